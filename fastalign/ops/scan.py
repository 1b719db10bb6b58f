"""Scans over packed tokens: discounted suffix sums and generalised advantage estimation, segment by segment.

    segment_scan:  y_t = x_t + decay_t * y_{t+1}                                       y beyond the segment's end is 0
    gae:           delta_t = r_t + gamma v_{t+1} - v_t,    A_t = delta_t + gamma lam A_{t+1},    R_t = A_t + v_t

A segment's bits do not depend on its place in the batch, and no value crosses from one segment into another.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastalign.ops import dispatch
from fastalign.ops.checks import FLOATS, check_device, checked_offsets, stats_dtype

# --- reference -------------------------------------------------------------------------------------------------------


def reference(x: Tensor, cu_seqlens: Tensor, decay: float | Tensor) -> Tensor:
    """The specification: the recurrence token by token, differentiable, in fp32 or (fp64 x) fp64."""
    decays = decay if isinstance(decay, Tensor) else torch.full_like(x, decay, dtype=stats_dtype(x))
    values, y = list(x.to(stats_dtype(x, decays))), []
    for start, stop in pairwise(cu_seqlens.tolist()):
        segment = values[stop - 1 : stop] if stop > start else []
        for t in range(stop - 2, start - 1, -1):
            segment.append(values[t] + decays[t] * segment[-1])
        y += segment[::-1]
    return torch.stack(y) if y else x.to(stats_dtype(x, decays))


def gae_reference(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float, last_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The specification of `gae`: temporal differences segment by segment, then `reference`."""
    rewards, values = (x.to(stats_dtype(rewards, values)) for x in (rewards, values))
    last_values = values.new_zeros(len(cu_seqlens) - 1) if last_values is None else last_values.to(values.dtype)
    following = []
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        following.append(torch.cat([values[start:stop], last_values[i : i + 1]])[1:] if stop > start else values[:0])
    deltas = rewards + gamma * torch.cat([*following, values[:0]]) - values
    advantages = reference(deltas, cu_seqlens, gamma * lam)
    return advantages, advantages + values


# --- custom ops ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fastalign::segment_scan", mutates_args=())
def _op(
    x: Tensor, cu_seqlens: Tensor, decays: Tensor | None, decay: float, reverse: bool, backend: str | None
) -> Tensor:
    _check_order(cu_seqlens, len(x))
    kernels = dispatch.kernels("segment_scan", backend, x.device)
    return kernels.scan(x.contiguous(), cu_seqlens, decay if decays is None else decays, reverse=reverse)


@_op.register_fake
def _(x, cu_seqlens, decays, decay, reverse, backend):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, cu_seqlens, decays, *ctx.options = inputs
    ctx.save_for_backward(cu_seqlens, decays)


def _backward(ctx, grad):
    """The map is linear: its adjoint is the scan in the other direction, as often as one differentiates."""
    decay, reverse, backend = ctx.options
    return _op(grad.contiguous(), *ctx.saved_tensors, decay, not reverse, backend), *(None,) * 5


_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("fastalign::gae", mutates_args=())
def _gae_op(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    last_values: Tensor | None,
    gamma: float,
    lam: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check_order(cu_seqlens, len(rewards))
    kernels = dispatch.kernels("gae", backend, rewards.device)
    last_values = None if last_values is None else last_values.contiguous()
    return kernels.advantages(rewards.contiguous(), values.contiguous(), cu_seqlens, last_values, gamma, lam)


@_gae_op.register_fake
def _(rewards, *_):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def _check_order(cu_seqlens: Tensor, num_tokens: int) -> None:
    """On the CPU the offsets rise from 0 to N; elsewhere asking would cost a sync."""
    if cu_seqlens.device.type != "cpu":
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or (cu_seqlens.diff() < 0).any():
        checked_offsets("cu_seqlens", cu_seqlens, num_tokens, "tokens")


# --- public ----------------------------------------------------------------------------------------------------------


def segment_scan(x: Tensor, cu_seqlens: Tensor, decay: float | Tensor = 1.0, *, backend: str | None = None) -> Tensor:
    """Discounted sums over the rest of each segment: ``y_t = x_t + decay_t * y_{t+1}``, 0 beyond the segment's end.

    Decay 1 gives suffix sums: returns, process rewards. Differentiable in ``x``, any number of times.

    Args:
        x: ``[N]`` fp32, bf16, fp16 or fp64.
        cu_seqlens: ``[B+1]`` int32 or int64 offsets of the segments, from 0 to N; segments may be empty. On CUDA their
            order is not checked, which would cost a sync: wrong offsets give wrong numbers and touch nothing else.
        decay: a number or ``[N]``, meant for [0, 1]; gets no gradient. The value at a segment's last token is not used.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        ``[N]`` fp32 (fp64 if any input is fp64); the gradient has the dtype of ``x``.

    Raises:
        ValueError: wrong rank, shape, dtype or device; offsets on the CPU that do not rise from 0 to N.

    >>> segment_scan(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3]), 0.5)
    tensor([2., 2., 4.])
    """
    _check_vector("x", x, None, "[N]")
    _check_offsets(cu_seqlens, "x", x)
    rows = _checked_decays(decay, x) if isinstance(decay, Tensor) else None
    dtype = stats_dtype(x, rows)
    number = float(decay) if rows is None else 1.0
    return _op(x.to(dtype), cu_seqlens, None if rows is None else rows.to(dtype), number, True, backend)


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    *,
    last_values: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over packed responses (Schulman et al. 2016, equations 11 to 16).

    ``delta_t = r_t + gamma v_{t+1} - v_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + v_t``. With gamma = lam = 1
    the returns are the suffix sums of the rewards. Both results are detached.

    Args:
        rewards: ``[N]`` token rewards, any float dtype.
        values: ``[N]`` the critic's value before each token.
        cu_seqlens: ``[B+1]`` offsets of the responses, as for `segment_scan`.
        gamma: discount per token.
        lam: 1 trusts the rewards, 0 the critic.
        last_values: ``[B]`` value of the state after each response's last token, to bootstrap from where a response
            was cut short; 0 for one that ended. None: 0 for all.
        backend: "torch", "cpp", "triton" or None for the best one here.

    Returns:
        advantages, returns: ``[N]`` fp32 (fp64 if any input is fp64), not normalised.

    Raises:
        ValueError: wrong rank, shape, dtype or device; offsets on the CPU that do not rise from 0 to N.

    >>> gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25]), torch.tensor([0, 2]), 1.0, 1.0)
    (tensor([0.5000, 0.7500]), tensor([1., 1.]))
    """
    _check_vector("rewards", rewards, None, "[N]")
    _check_vector("values", values, rewards.shape[0], "[N] like the rewards", rewards)
    _check_offsets(cu_seqlens, "rewards", rewards)
    if last_values is not None:
        _check_vector("last_values", last_values, cu_seqlens.shape[0] - 1, "[B], one per segment", rewards)
    dtype = stats_dtype(rewards, values, last_values)
    last = None if last_values is None else last_values.detach().to(dtype)
    inputs = (rewards.detach().to(dtype), values.detach().to(dtype))
    return _gae_op(*inputs, cu_seqlens, last, float(gamma), float(lam), backend)


def _check_vector(name: str, x: Tensor, length: int | None, shape: str, rows: Tensor | None = None) -> None:
    """``x`` is a floating vector of the length given, on the device of ``rows``."""
    if x.dim() != 1 or x.dtype not in FLOATS or (length is not None and x.shape[0] != length):
        expected = shape if length is None else f"{shape} ({length})"
        raise ValueError(f"{name} must be a floating {expected}, got {x.dtype} of shape {list(x.shape)}")
    if rows is not None:
        check_device(name, x, "the rewards", rows)


def _check_offsets(cu_seqlens: Tensor, name: str, x: Tensor) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or not cu_seqlens.shape[0]:
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [B+1], got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    check_device("cu_seqlens", cu_seqlens, name, x)


def _checked_decays(decay: Tensor, x: Tensor) -> Tensor:
    if decay.shape != x.shape or not decay.is_floating_point():
        raise ValueError(
            f"decay must be a number or a floating [N] with N = {x.shape[0]}, "
            f"got {decay.dtype} of shape {list(decay.shape)}"
        )
    if decay.requires_grad:
        raise ValueError("decay gets no gradient; pass decay.detach()")
    check_device("decay", decay, "x", x)
    return decay.contiguous()
