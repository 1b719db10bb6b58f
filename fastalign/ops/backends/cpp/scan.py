"""The native scans over packed tokens behind tensors: addresses of contiguous CPU vectors, checked before."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(x: Tensor, cu_seqlens: Tensor, decay: float | Tensor, *, reverse: bool) -> Tensor:
    """As ``fastalign.ops.scan.scan``: each segment is one loop, carried in fp64, segments are shared among threads."""
    from fastalign import _C

    out, decays = torch.empty_like(x), decay.contiguous() if isinstance(decay, Tensor) else None
    offsets = cu_seqlens.to(torch.int64).contiguous()
    _C.segment_scan(
        x=x.data_ptr(),
        decays=0 if decays is None else decays.data_ptr(),
        decay=1.0 if isinstance(decay, Tensor) else decay,
        out=out.data_ptr(),
        float64=x.dtype == torch.float64,
        offsets=offsets.data_ptr(),
        segments=len(offsets) - 1,
        reverse=reverse,
        threads=torch.get_num_threads(),
    )
    return out


def advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, last_values: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """As ``fastalign.ops.scan.advantages``, in one pass over rewards and values."""
    from fastalign import _C

    result, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    offsets = cu_seqlens.to(torch.int64).contiguous()
    _C.gae(
        rewards=rewards.data_ptr(),
        values=values.data_ptr(),
        last_values=0 if last_values is None else last_values.data_ptr(),
        gamma=gamma,
        lam=lam,
        advantages=result.data_ptr(),
        returns=returns.data_ptr(),
        float64=rewards.dtype == torch.float64,
        offsets=offsets.data_ptr(),
        segments=len(offsets) - 1,
        threads=torch.get_num_threads(),
    )
    return result, returns
