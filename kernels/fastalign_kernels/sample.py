"""Draws of tokens from rows of logits by inverse CDF, in index order.

A first kernel adds up exp(z - max z) by blocks of 512 neighbouring columns, a few blocks to a program; a second, one
program to a row, finds the block and then the column in which the running sum passes the target. Sums of blocks and of
columns are integers in units of about V / 2^62: exact, so that neither the number of programs nor their order matters.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import launch
from fastalign_kernels.rows import SIZES, _exp, _factors, _scaled, arguments

BLOCK = 512
"""Columns that are added in fp32."""
BLOCKS = 8
"""Blocks of one program."""
PICK_THREADS = 256
"""Threads that pick: with two columns each, fp64 too stays in registers; sums of integers do not depend on them."""

VECTORS = ["row_temperature_ptr", "top_ptr", "sums_ptr"]


@triton.jit
def _exponential(x, inside, top, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """``exp(z - z_top)`` of the columns that exist; 0 for the others, and in place of NaN."""
    z, _ = _scaled(x, inner, outer, HAS_SOFTCAP)
    highest, _ = _scaled(top, inner, outer, HAS_SOFTCAP)
    e = _exp(z - highest)
    return tl.where(inside & (e == e), e, 0.0)


@triton.jit
def _fixed(x, unit):
    return (x.to(tl.float64) * unit + 0.5).to(tl.int64)


@triton.jit(do_not_specialize=[*SIZES, "num_blocks"], do_not_specialize_on_alignment=VECTORS)
def sums_kernel(
    logits_ptr,
    row_temperature_ptr,
    top_ptr,
    sums_ptr,
    vocab_size,
    row_stride,
    num_blocks,
    temperature: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    unit: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr,
    VOCAB_ALIGN: tl.constexpr,
):
    """Sums of exponentials of some blocks of one row."""
    dtype: tl.constexpr = top_ptr.dtype.element_ty
    vocab_size = vocab_size // VOCAB_ALIGN * VOCAB_ALIGN
    row_stride = row_stride // STRIDE_ALIGN * STRIDE_ALIGN
    row = tl.program_id(0).to(tl.int64)
    inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < vocab_size
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=0.0)
    e = _exponential(x, inside, tl.load(top_ptr + row), inner, outer, HAS_SOFTCAP)
    tl.store(sums_ptr + row * num_blocks + block, _fixed(tl.sum(e, 1), unit), mask=block < num_blocks)


@triton.jit(
    do_not_specialize=[*SIZES, "num_blocks"],
    do_not_specialize_on_alignment=[*VECTORS, "noise_ptr", "tokens_ptr"],
)
def pick_kernel(
    logits_ptr,
    row_temperature_ptr,
    top_ptr,
    sums_ptr,
    noise_ptr,
    tokens_ptr,
    vocab_size,
    row_stride,
    num_blocks,
    temperature: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    unit: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token of one row."""
    dtype: tl.constexpr = top_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    row_sums_ptr = sums_ptr + row * num_blocks
    total = tl.zeros((), tl.int64)
    for start in range(0, num_blocks, BLOCK):
        total += tl.sum(tl.load(row_sums_ptr + start + lane, mask=start + lane < num_blocks, other=0), 0)
    target = tl.minimum((tl.load(noise_ptr + row) * total.to(tl.float64)).to(tl.int64), total - 1)
    seen = tl.zeros((), tl.int64)
    before = tl.zeros((), tl.int64)
    block = tl.zeros((), tl.int32)
    for start in range(0, num_blocks, BLOCK):
        there = start + lane < num_blocks
        sums = tl.load(row_sums_ptr + start + lane, mask=there, other=0)
        running = seen + tl.cumsum(sums, 0)
        passed = there & (running <= target)
        block += tl.sum(passed.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(passed, running, 0), 0))
        seen += tl.sum(sums, 0)
    block = tl.minimum(block, num_blocks - 1)
    column = block * BLOCK + lane
    inside = column < vocab_size
    inner, outer = _factors(row, row_temperature_ptr, temperature, softcap, logit_scale, HAS_SOFTCAP, dtype)
    x = tl.load(logits_ptr + row * row_stride + column, mask=inside, other=0.0)
    q = _fixed(_exponential(x, inside, tl.load(top_ptr + row), inner, outer, HAS_SOFTCAP), unit)
    place = tl.sum((tl.cumsum(q, 0) <= target - before).to(tl.int32), 0)
    last = tl.max(tl.where(q > 0, lane, 0), 0)  # columns, rounded one by one, may add up to less than their block
    tl.store(tokens_ptr + row, tl.minimum(block * BLOCK + tl.minimum(place, last), vocab_size - 1).to(tl.int64))


def draw(
    logits: Tensor,
    noise: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    cut: Any,
) -> tuple[Tensor, Tensor]:
    """The token of each row and the mass that is kept: all of it.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64; copied when its columns are not adjacent.
        noise: ``[N]`` float64 in [0, 1).
        temperature: a positive number or ``[N]``.
        softcap: the bound of ``softcap * tanh(x / softcap)``, or None.
        logit_scale: positive factor of the logits.
        cut: the truncation, which must not be active: that is PyTorch's part.

    Returns:
        ``[N]`` int64 and ``[N]`` float64, ones.
    """
    assert not cut.active
    logits = launch.unit_columns(logits)
    num_rows, vocab_size = logits.shape
    tokens, kept = torch.empty(num_rows, dtype=torch.int64, device=logits.device), torch.ones_like(noise)
    if not num_rows:
        return tokens, kept
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_blocks = -(-vocab_size // BLOCK)
    shared = arguments(logits, [logits.stride(0)], temperature, softcap, logit_scale)
    aligned = {name: shared.pop(name) for name in ("STRIDE_ALIGN", "VOCAB_ALIGN")}
    shared = {name: value for name, value in shared.items() if name not in ("ROWS", "LOG_COLS")} | {
        "logits_ptr": logits,
        "top_ptr": logits.amax(-1).to(dtype),
        "sums_ptr": torch.empty(num_rows, num_blocks, dtype=torch.int64, device=logits.device),
        "row_stride": logits.stride(0),
        "num_blocks": num_blocks,
        "unit": 2.0 ** (62 - math.ceil(math.log2(max(vocab_size, BLOCK)))),
        "BLOCK": BLOCK,
    }
    more = {"noise_ptr": noise.contiguous(), "tokens_ptr": tokens}
    with launch.device(logits):
        sums_kernel[(num_rows, -(-num_blocks // BLOCKS))](**shared, BLOCKS=BLOCKS, **aligned, **launch.options(logits))
        pick_kernel[(num_rows,)](**shared, **more, **launch.options(logits, PICK_THREADS))
    return tokens, kept
