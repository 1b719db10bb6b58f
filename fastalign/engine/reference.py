"""Log-probs under the frozen reference: the same packed batch, attention and head as the policy's pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from fastalign.engine.heads import chunks
from fastalign.engine.method import Objective
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.types import PackedBatch, TokenStats


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, for reading only; taken before it is sharded or trained."""
    reference = copy.deepcopy(policy)
    return reference.requires_grad_(False).eval()


@torch.no_grad()
def reference_logps(reference: Policy, batch: PackedBatch, objective: Objective) -> Tensor:
    """``[N]`` fp32 log-probs of the batch's labels.

    The head is cut into the chunks of the policy's pass, so that equal weights give equal bits and the first margins
    are exactly 0.
    """

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> TokenStats:
        return linear_loss(hidden, weight, labels, sum_logps, **chunks(batch, objective), **options)[1]

    return reference(batch, head).logps


def sum_logps(stats: TokenStats) -> Tensor:
    """A loss that nobody reads: the reference pass is made for its statistics."""
    return stats.logps.sum()
