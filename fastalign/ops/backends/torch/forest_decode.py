"""Decoding against a forest in PyTorch, for any device and dtype: every backend has ``decode`` as here."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.forest_decode import BLOCK, Step


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
    """Write the new keys and values, then attend; each row gathers its whole sequence.

    Args:
        q: ``[B, H, d]``; ``k`` and ``v`` are ``[B, K, d]``.
        keys: ``[blocks, K, d, BLOCK]`` arena of the layer.
        values: ``[blocks, K, BLOCK, d]``.
        step: the rows.
        scale: factor of the scores.
        softcap: None or the cap.
        dtype: of the result.

    Returns:
        ``[B, H, d]``.
    """
    (num_rows, num_heads, size), heads = q.shape, k.shape[1]
    chains, place = step.chains.long(), step.lengths - 1
    block = chains.gather(1, (place // BLOCK)[:, None])[:, 0]
    keys[block, :, :, place % BLOCK] = k.to(keys.dtype)
    values[block, :, place % BLOCK] = v.to(values.dtype)
    wide = torch.float64 if torch.float64 in (q.dtype, keys.dtype) else torch.float32
    seen = torch.arange(chains.shape[1] * BLOCK, device=q.device) < step.lengths[:, None]
    with torch.autocast(q.device.type, enabled=False):
        all_k = keys[chains].to(wide).permute(0, 2, 3, 1, 4).flatten(3)
        all_v = values[chains].to(wide).transpose(1, 2).flatten(2, 3).masked_fill(~seen[:, None, :, None], 0)
        scores = q.to(wide).reshape(num_rows, heads, -1, size) @ all_k * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        return (weights @ all_v).to(dtype).view(num_rows, num_heads, size)
