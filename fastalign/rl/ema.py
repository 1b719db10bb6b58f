"""A reference that follows the policy slowly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(reference: Iterable[Tensor], policy: Iterable[Tensor], *, eta: float = 0.001) -> None:
    """Move each reference tensor towards the policy's, in place: ``ref <- ref + eta (policy - ref)``.

    Args:
        reference: fp32 or fp64 copies of the weights.
        policy: the weights, in the same order.
        eta: share of the way.

    Raises:
        ValueError: a reference tensor of less than fp32, where such a step is below half a unit in the last place and
            would be lost.
    """
    for ref, weight in zip(reference, policy, strict=True):
        if ref.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"an average in {ref.dtype} does not move: keep the reference's weights in float32")
        ref.lerp_(weight.to(ref.dtype), eta)
