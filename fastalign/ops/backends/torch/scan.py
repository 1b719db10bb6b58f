"""The scans over packed tokens in PyTorch: every backend has ``scan`` and ``advantages`` as here."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(x: Tensor, cu_seqlens: Tensor, decay: float | Tensor, *, reverse: bool) -> Tensor:
    """The recurrence by doubling: after step k a token holds its next ``2^k`` terms, so log2(longest) steps do.

    Args:
        x: ``[N]`` fp32 or fp64.
        cu_seqlens: ``[B+1]`` int32 or int64 offsets, from 0 to N.
        decay: a number, or ``[N]`` of the dtype of x.
        reverse: True for ``y_t = x_t + decay_t y_{t+1}``, False for its adjoint ``y_t = x_t + decay_{t-1} y_{t-1}``.
            The decay of a segment's last token is not read.

    Returns:
        ``[N]`` of the dtype of x.
    """
    if not reverse:
        mirrored = decay.roll(1).flip(0) if isinstance(decay, Tensor) else decay
        return scan(x.flip(0), len(x) - cu_seqlens.flip(0), mirrored, reverse=True).flip(0)
    _, remaining = _places(cu_seqlens, len(x))
    y, a, step = x.clone(), decay if isinstance(decay, Tensor) else torch.full_like(x, decay), 1
    while step < _longest(cu_seqlens, len(x)):
        reach = len(x) - step
        y[:reach] += torch.where(remaining[:reach] >= step, a[:reach] * y[step:], 0.0)
        a = a[:-step] * a[step:]  # the product of the next 2 * step decays; wrong across an end, but then not used
        step *= 2
    return y


def advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, last_values: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns.

    Args:
        rewards, values: ``[N]``, both fp32 or both fp64.
        cu_seqlens: ``[B+1]`` int32 or int64 offsets, from 0 to N.
        last_values: ``[B]`` of the same dtype, the value after each segment's last token, or None for 0.
        gamma, lam: discount and trace decay.

    Returns:
        advantages, returns: ``[N]`` of the dtype of the rewards.
    """
    if not len(values):
        return torch.empty_like(rewards), torch.empty_like(rewards)
    segment, remaining = _places(cu_seqlens, len(values))
    last = 0.0 if last_values is None else last_values[segment]
    deltas = rewards + gamma * torch.where(remaining == 0, last, values.roll(-1)) - values
    result = scan(deltas, cu_seqlens, gamma * lam, reverse=True)
    return result, result + values


def _places(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's segment, and how many tokens follow it there; nothing is read back from the device."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    ends = cu_seqlens[1:].contiguous()
    segment = torch.searchsorted(ends, tokens, right=True).clamp_(max=max(len(ends) - 1, 0))
    return segment, (ends[segment] if num_tokens else tokens) - 1 - tokens


def _longest(cu_seqlens: Tensor, num_tokens: int) -> int:
    """The longest segment where asking is free, else a bound."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" and len(cu_seqlens) > 1 else num_tokens
