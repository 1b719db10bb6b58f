"""Packed attention in one call of flash-attn."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from fastalign.ops.attention import Layout, gathered, needs_half_on_cuda


def unavailable(device: str, dtype: torch.dtype, softcap: bool) -> str | None:
    """Why it cannot serve tensors of this device and dtype; None when it can."""
    if reason := needs_half_on_cuda(device, dtype):
        return reason
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    # before 2.1 its causal masks were aligned top-left, which is silently wrong for a response after its prefix
    found, needed = version("flash-attn"), (2, 6) if softcap else (2, 1)
    release = tuple(int(part) for part in found.split(".")[:2])
    return None if release >= needed else f"flash-attn >= {needed[0]}.{needed[1]} is needed, {found} is installed"


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    """All calls at once, each over its keys gathered."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    options = {} if softcap is None else {"softcap": softcap}
    k, v, offsets = gathered(k, v, plan)
    return flash_attn_varlen_func(q, k, v, *offsets, softmax_scale=scale, causal=True, deterministic=True, **options)
