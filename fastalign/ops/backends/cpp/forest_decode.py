"""The native decoding against a forest behind tensors: a prompt's blocks are read once for all rows that share them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.forest_decode import Step


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Step,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """As ``fastalign.ops.backends.torch.forest_decode.decode``, in fp32 inside."""
    from fastalign import _C

    out = torch.empty(q.shape, dtype=dtype)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    _C.forest_decode(
        q=_heads(q),
        k=_heads(k),
        v=_heads(v),
        out=_heads(out),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        dtype=cpp.DTYPES[keys.dtype],
        shape=(q.shape[1], k.shape[1], q.shape[2]),
        scale=scale,
        softcap=softcap or 0.0,
        **described(step),
    )
    return out


def described(step: Step) -> dict[str, int]:
    """A step as the bindings take it, with the number of threads."""
    return {
        "chains": step.chains.data_ptr(),
        "width": step.chains.shape[1],
        "lengths": step.lengths.data_ptr(),
        "order": step.order.data_ptr(),
        "groups": step.groups.data_ptr(),
        "num_groups": len(step.groups),
        "threads": torch.get_num_threads(),
    }


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), cpp.DTYPES[x.dtype], x.stride(0), x.stride(1)
