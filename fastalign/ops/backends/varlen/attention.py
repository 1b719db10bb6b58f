"""Packed attention in one call of ``torch.nn.attention.varlen``."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.attention import Layout, expand_heads, gathered, needs_half_on_cuda


def unavailable(device: str, dtype: torch.dtype, softcap: bool) -> str | None:
    """Why it cannot serve tensors of this device and dtype; None when it can."""
    if reason := needs_half_on_cuda(device, dtype):
        return reason
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn (it came with 2.10)"
    return "varlen_attn has no softcap" if softcap else None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Layout, scale: float, softcap: float | None) -> Tensor:
    """All calls at once, each over its keys gathered."""
    from torch.nn.attention.varlen import varlen_attn

    accepted = inspect.signature(varlen_attn).parameters  # grew from 2.10 to 2.13
    if "scale" not in accepted:
        q, scale = q * (scale * q.shape[-1] ** 0.5), q.shape[-1] ** -0.5
    if "enable_gqa" not in accepted:
        k, v = expand_heads(q, k), expand_heads(q, v)
    options: dict[str, Any] = {
        "window_size": (-1, 0),  # causal
        "scale": scale,
        "enable_gqa": k.shape[1] != q.shape[1],
        "num_splits": 1,  # a row's result does not depend on the other rows of the batch
    }
    options = {name: value for name, value in options.items() if name in accepted}
    if "window_size" not in accepted:
        options["is_causal"] = True
    k, v, offsets = gathered(k, v, plan)
    out = varlen_attn(q, k, v, *offsets, **options)
    assert isinstance(out, Tensor)  # a pair only when the log-sum-exp is asked for
    return out
