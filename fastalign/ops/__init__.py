"""Ops: the reference definitions, their backends and the choice among them."""

from fastalign.ops.attention import packed_attention
from fastalign.ops.divergence import divergence
from fastalign.ops.forest_decode import forest_decode
from fastalign.ops.linear_divergence import linear_divergence
from fastalign.ops.linear_logps import linear_logps
from fastalign.ops.linear_loss import linear_loss
from fastalign.ops.linear_sample import linear_sample
from fastalign.ops.policy_loss import policy_loss
from fastalign.ops.preference_loss import preference_loss
from fastalign.ops.sample import sample, sample_keys, uniforms
from fastalign.ops.scan import gae, segment_scan
from fastalign.ops.token_logps import entropy_from_logits, selective_log_softmax, token_logps
from fastalign.ops.whiten import whiten

__all__ = [
    "divergence",
    "entropy_from_logits",
    "forest_decode",
    "gae",
    "linear_divergence",
    "linear_logps",
    "linear_loss",
    "linear_sample",
    "packed_attention",
    "policy_loss",
    "preference_loss",
    "sample",
    "sample_keys",
    "segment_scan",
    "selective_log_softmax",
    "token_logps",
    "uniforms",
    "whiten",
]
