"""Whitening of advantages or rewards with statistics of all ranks.

    out = (x - mean) / (std + eps)      or      (x - mean) / sqrt(variance + eps)

Count, mean and centred second moment are fp64 over the entries that the mask keeps, merged in rank order, so that every
rank has the same bits and the result does not depend on how entries are spread over ranks beyond fp64 rounding.
"""

from __future__ import annotations

from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.checks import FLOATS, check_device, stats_dtype

EPS_IN = ("std", "variance")


def reference(
    x: Tensor, mask: Tensor | None = None, *, eps: float = 1e-5, eps_in: str = "std", unbiased: bool = False
) -> Tensor:
    """The specification for one process: the selected entries in fp64, and PyTorch's own variance."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    kept = x.detach()[keep].double()
    variance = kept.var(correction=int(unbiased)) if kept.numel() > 1 else kept.new_zeros(())
    scale = variance.sqrt() + eps if eps_in == "std" else (variance + eps).sqrt()
    out = x.new_zeros(x.shape, dtype=stats_dtype(x))
    return out.masked_scatter(keep, ((kept - kept.mean()) / scale).to(out.dtype))


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-5,
    eps_in: str = "std",
    unbiased: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Shift and scale to mean 0 and deviation 1 over all kept entries of all ranks; detached.

    The defaults are the convention of PPO here, ``(x - mean) / (std + 1e-5)`` with the population's std;
    ``unbiased=True, eps=1e-8, eps_in="variance"`` is that of REINFORCE++ and verl.

    Args:
        x: ``[N]`` (any shape is understood), any float dtype.
        mask: of the shape of ``x``; entries where it is False or 0 are not read (they may hold NaN) and become 0.
        eps: added to what divides.
        eps_in: "std": ``std + eps``; "variance": ``sqrt(variance + eps)``.
        unbiased: divide the second moment by count - 1 instead of count.
        process_group: the ranks whose entries count, for example ``torch.distributed.group.WORLD``; None: this process
            alone. Every rank of the group must call, one without entries included.

    Returns:
        The shape of ``x``, fp32 (fp64 for fp64 input). One kept entry becomes 0.

    Raises:
        ValueError: a mask of another shape or device, an integer ``x``, an unknown ``eps_in``.

    >>> whiten(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
    tensor([-1.0000,  1.0000,  0.0000])
    """
    _check(x, mask, eps_in)
    count, mean, moment = moments(x, mask, process_group=process_group).unbind()
    variance = moment / (count - int(unbiased)).clamp(min=1)
    scale = variance.sqrt() + eps if eps_in == "std" else (variance + eps).sqrt()
    out = ((x.detach().double() - mean) / scale).to(stats_dtype(x))
    return out if mask is None else torch.where(mask.bool(), out, 0.0)


def moments(x: Tensor, mask: Tensor | None = None, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """``[3]`` fp64: count, mean and centred second moment ``sum (x - mean)^2`` of the kept entries of all ranks."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    values = torch.where(keep, x.detach().double(), 0.0)
    count = keep.sum(dtype=torch.float64)
    mean = values.sum() / count.clamp(min=1)
    local = torch.stack([count, mean, torch.where(keep, values - mean, 0.0).square().sum()])
    if process_group is None:
        return local
    parts = local.new_empty(dist.get_world_size(process_group) * 3)
    dist.all_gather_into_tensor(parts, local, group=process_group)
    return reduce(merge, parts.view(-1, 3).unbind())


def merge(a: Tensor, b: Tensor) -> Tensor:
    """`moments` of two disjoint sets from the moments of each (Chan, Golub and LeVeque 1979, equation 2.1)."""
    count, shift = a[0] + b[0], b[1] - a[1]
    share = b[0] / count.clamp(min=1)
    return torch.stack([count, a[1] + shift * share, a[2] + b[2] + shift.square() * a[0] * share])


def _check(x: Tensor, mask: Tensor | None, eps_in: str) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if eps_in not in EPS_IN:
        raise ValueError(f"eps_in must be one of {', '.join(EPS_IN)}, got {eps_in!r}")
    if mask is None:
        return
    if mask.shape != x.shape:
        raise ValueError(f"mask must have the shape of x, {list(x.shape)}, got {list(mask.shape)}")
    check_device("mask", mask, "x", x)
