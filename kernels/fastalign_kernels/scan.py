"""Scans over packed tokens: discounted suffix sums, their adjoint, and generalised advantage estimation.

One program walks one segment in blocks of ``BLOCK`` steps. Steps are counted from where the recurrence begins, which is
the segment's end for a reverse scan, and so is a step's place in its block: a segment has the same bits wherever it
lies in the batch. A block is an associative scan over the maps ``y -> b + a y``; one number is carried to the next.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import launch

BLOCK = 512
"""Steps per block: fixed, because the order of the sums depends on it."""

# Neither another number of tokens nor a slice compiles a kernel again.
SCAN_VECTORS = ["x_ptr", "cu_seqlens_ptr", "decays_ptr", "out_ptr"]
GAE_VECTORS = ["rewards_ptr", "values_ptr", "cu_seqlens_ptr", "last_values_ptr", "advantages_ptr", "returns_ptr"]


@triton.jit
def _compose(a1, b1, a2, b2):
    """The map ``y -> b1 + a1 y`` followed by ``y -> b2 + a2 y``."""
    return a1 * a2, b2 + a2 * b1


@triton.jit
def _scan_block(a, b, carry, lane, BLOCK: tl.constexpr):
    """Every step's value from the carried one, and what to carry on."""
    a, b = tl.associative_scan((a, b), 0, _compose)
    y = b + a * carry
    return y, tl.sum(tl.where(lane == BLOCK - 1, y, 0.0), 0)


@triton.jit
def _segment(cu_seqlens_ptr, num_tokens):
    """The program's segment: where it starts and its length, kept inside the tensors whatever the offsets say."""
    index = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(cu_seqlens_ptr + index).to(tl.int64), 0)
    stop = tl.minimum(tl.load(cu_seqlens_ptr + index + 1).to(tl.int64), num_tokens)
    return index, start, stop - start


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=SCAN_VECTORS)
def scan_kernel(
    x_ptr,
    cu_seqlens_ptr,
    decays_ptr,
    out_ptr,
    num_tokens,
    decay: tl.float64,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``y_t = x_t + decay_t y_{t+1}``, or ``y_t = x_t + decay_{t-1} y_{t-1}`` when not REVERSE, in one segment."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    _, start, length = _segment(cu_seqlens_ptr, num_tokens)
    lane = tl.arange(0, BLOCK)
    carry = tl.full((), 0.0, dtype)
    for first in range(0, length, BLOCK):
        step = first + lane
        inside = step < length
        linked = inside & (step > 0)
        if REVERSE:
            position = start + length - 1 - step
            link = position
        else:
            position = start + step
            link = position - 1
        if decays_ptr is not None:
            a = tl.load(decays_ptr + link, mask=linked, other=0.0)
        else:
            a = tl.where(linked, tl.full((), decay, dtype), 0.0)
        x = tl.load(x_ptr + position, mask=inside, other=0.0)
        y, carry = _scan_block(a, x, carry, lane, BLOCK)
        tl.store(out_ptr + position, y, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=GAE_VECTORS)
def gae_kernel(
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    last_values_ptr,
    advantages_ptr,
    returns_ptr,
    num_tokens,
    gamma: tl.float64,
    lam: tl.float64,
    BLOCK: tl.constexpr,
):
    """Advantages and returns of one segment, in one read of its rewards and values."""
    dtype: tl.constexpr = advantages_ptr.dtype.element_ty
    index, start, length = _segment(cu_seqlens_ptr, num_tokens)
    lane = tl.arange(0, BLOCK)
    discount = tl.full((), gamma, dtype)
    trace = tl.full((), gamma * lam, dtype)
    last = tl.full((), 0.0, dtype)
    if last_values_ptr is not None:
        last = tl.load(last_values_ptr + index)
    carry = tl.full((), 0.0, dtype)
    for first in range(0, length, BLOCK):
        step = first + lane
        inside = step < length
        linked = inside & (step > 0)
        position = start + length - 1 - step
        reward = tl.load(rewards_ptr + position, mask=inside, other=0.0)
        value = tl.load(values_ptr + position, mask=inside, other=0.0)
        following = tl.where(linked, tl.load(values_ptr + position + 1, mask=linked, other=0.0), last)
        delta = reward + discount * following - value
        advantage, carry = _scan_block(tl.where(linked, trace, 0.0), delta, carry, lane, BLOCK)
        tl.store(advantages_ptr + position, advantage, mask=inside)
        tl.store(returns_ptr + position, advantage + value, mask=inside)


def scan(x: Tensor, cu_seqlens: Tensor, decay: float | Tensor, *, reverse: bool) -> Tensor:
    """Discounted sums over the rest of each segment, or their adjoint.

    Args:
        x: ``[N]`` fp32 or fp64, contiguous.
        cu_seqlens: ``[B+1]`` int32 or int64 offsets, from 0 to N.
        decay: a number, or ``[N]`` of the dtype of x.
        reverse: True for ``y_t = x_t + decay_t y_{t+1}``, False for its adjoint ``y_t = x_t + decay_{t-1} y_{t-1}``.
            The decay of a segment's last token is not read.

    Returns:
        ``[N]`` of the dtype of x; NaN where the offsets leave a token out.
    """
    out = _unwritten(x)
    num_segments = cu_seqlens.shape[0] - 1
    if x.numel() and num_segments:
        with launch.device(x):
            scan_kernel[(num_segments,)](
                x_ptr=x,
                cu_seqlens_ptr=cu_seqlens.contiguous(),
                decays_ptr=decay.contiguous() if isinstance(decay, Tensor) else None,
                out_ptr=out,
                num_tokens=x.shape[0],
                decay=1.0 if isinstance(decay, Tensor) else float(decay),
                **_options(x, REVERSE=reverse),
            )
    return out


def advantages(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, last_values: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages ``A_t = r_t + gamma v_{t+1} - v_t + gamma lam A_{t+1}`` and returns ``A_t + v_t``.

    Args:
        rewards, values: ``[N]``, both fp32 or both fp64, contiguous.
        cu_seqlens: ``[B+1]`` int32 or int64 offsets, from 0 to N.
        last_values: ``[B]`` of the same dtype, the value after each segment's last token, or None for 0.
        gamma, lam: discount and trace decay.

    Returns:
        advantages, returns: ``[N]`` of the dtype of the rewards; NaN where the offsets leave a token out.
    """
    result, returns = _unwritten(rewards), _unwritten(rewards)
    num_segments = cu_seqlens.shape[0] - 1
    if rewards.numel() and num_segments:
        with launch.device(rewards):
            gae_kernel[(num_segments,)](
                rewards_ptr=rewards,
                values_ptr=values,
                cu_seqlens_ptr=cu_seqlens.contiguous(),
                last_values_ptr=last_values,
                advantages_ptr=result,
                returns_ptr=returns,
                num_tokens=rewards.shape[0],
                gamma=float(gamma),
                lam=float(lam),
                **_options(rewards),
            )
    return result, returns


def _options(x: Tensor, **constants: bool) -> dict[str, Any]:
    """What a launch is compiled for."""
    return {"BLOCK": BLOCK, **constants, **launch.options(x)}


def _unwritten(x: Tensor) -> Tensor:
    """Memory for a result: NaN, which shows the tokens that wrong offsets leave out."""
    return torch.full_like(x, float("nan"))
