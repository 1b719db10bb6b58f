"""Ops: the reference definitions, their backends and the choice among them."""

from fastalign.ops.linear_logps import linear_logps
from fastalign.ops.linear_loss import linear_loss
from fastalign.ops.token_logps import entropy_from_logits, selective_log_softmax, token_logps

__all__ = ["entropy_from_logits", "linear_logps", "linear_loss", "selective_log_softmax", "token_logps"]
