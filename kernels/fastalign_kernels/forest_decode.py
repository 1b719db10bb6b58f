"""Decoding against a forest: one new token per row, a program for each row and key head.

A program walks its row's chain of blocks with a running maximum and sum. The new token's key and value are written and
taken from registers: no program waits for what another has written.
"""
# A kernel's body is Triton's language, not Python's:
# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import launch
from fastalign_kernels.rows import _exp, _tanh

QUERIES = 1024
"""Bytes of queries that a program keeps: what its registers hold beside a block."""

# Neither other rows, heads or lengths nor a slice compile a kernel again.
STRIDES = ["q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "width", "key_heads"]
AXES = ((0, "row"), (1, "head"))
POINTERS = ["q_ptr", "k_ptr", "v_ptr", "chains_ptr", "lengths_ptr"]


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=POINTERS)
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    chains_ptr,
    lengths_ptr,
    out_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    width,
    key_heads,
    scale: tl.float64,
    softcap: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """HEADS of the GROUP query heads of one key head in one row, over its whole sequence."""
    row = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, COLS)
    wanted = (head < GROUP)[:, None] & (col < SIZE)[None, :]
    head = key_head * GROUP + head
    q = tl.load(q_ptr + row * q_row + head[:, None] * q_head + col[None, :], mask=wanted, other=0.0).to(DTYPE)
    q = q * tl.full((), scale, DTYPE)
    new_k = tl.load(k_ptr + row * k_row + key_head * k_head + col, mask=col < SIZE, other=0.0)
    new_v = tl.load(v_ptr + row * v_row + key_head * v_head + col, mask=col < SIZE, other=0.0)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    place = tl.arange(0, BLOCK)
    base = tl.full((), 0, tl.int64)
    top = tl.full((HEADS,), float("-inf"), DTYPE)
    total = tl.zeros((HEADS,), DTYPE)
    result = tl.zeros((HEADS, COLS), DTYPE)
    for first in range(0, length, BLOCK):
        block = tl.load(chains_ptr + row * width + first // BLOCK).to(tl.int64)
        base = (block * key_heads + key_head) * (SIZE * BLOCK)
        known = first + place < length - 1
        fresh = first + place == length - 1
        at = base + col[:, None] * BLOCK + place[None, :]
        k = tl.load(keys_ptr + at, mask=(col < SIZE)[:, None] & known[None, :], other=0.0).to(DTYPE)
        k = tl.where(fresh[None, :], new_k.to(DTYPE)[:, None], k)
        scores = tl.sum(q[:, :, None] * k[None, :, :], 1)
        if HAS_SOFTCAP:
            cap = tl.full((), softcap, DTYPE)
            scores = cap * _tanh(scores / cap)
        scores = tl.where((known | fresh)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        decay = _exp(top - new_top)
        weights = _exp(scores - new_top[:, None])
        top = new_top
        total = total * decay + tl.sum(weights, 1)
        at = base + place[:, None] * SIZE + col[None, :]
        v = tl.load(values_ptr + at, mask=known[:, None] & (col < SIZE)[None, :], other=0.0).to(DTYPE)
        v = tl.where(fresh[:, None], new_v.to(DTYPE)[None, :], v)
        result = result * decay[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
    at = out_ptr + (row * key_heads * GROUP + head[:, None]) * SIZE + col[None, :]
    tl.store(at, result / total[:, None], mask=wanted)
    if tl.program_id(2) == 0:
        last = (length - 1) % BLOCK
        tl.store(keys_ptr + base + col * BLOCK + last, new_k, mask=col < SIZE)
        tl.store(values_ptr + base + last * SIZE + col, new_v, mask=col < SIZE)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Any,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Write the new keys and values, then attend.

    Args:
        q: ``[B, H, d]``; ``k`` and ``v`` are ``[B, K, d]``.
        keys: ``[blocks, K, d, BLOCK]`` arena of the layer.
        values: ``[blocks, K, BLOCK, d]``.
        step: the rows, as ``chains`` ``[B, W]`` of their blocks and ``lengths`` ``[B]``.
        scale: factor of the scores.
        softcap: None or the cap.
        dtype: of the result.

    Returns:
        ``[B, H, d]``, computed in fp32, or in fp64 if any input is fp64.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (num_rows, num_heads, size), key_heads = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    group, cols = num_heads // key_heads, triton.next_power_of_2(size)
    wide = torch.float64 if torch.float64 in (q.dtype, keys.dtype) else torch.float32
    heads = min(triton.next_power_of_2(group), max(1, QUERIES // (wide.itemsize * cols)))
    strides = {f"{name}_{kind}": x.stride(i) for name, x in (("q", q), ("k", k), ("v", v)) for i, kind in AXES}
    constants = {"GROUP": group, "HEADS": heads, "SIZE": size, "COLS": cols, "BLOCK": keys.shape[-1]}
    constants |= {"HAS_SOFTCAP": softcap is not None, "DTYPE": tl.float64 if wide == torch.float64 else tl.float32}
    with launch.device(q):
        decode_kernel[(num_rows, key_heads, triton.cdiv(group, heads))](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            keys_ptr=keys,
            values_ptr=values,
            chains_ptr=step.chains,
            lengths_ptr=step.lengths,
            out_ptr=out,
            width=step.chains.shape[1],
            key_heads=key_heads,
            scale=float(scale),
            softcap=1.0 if softcap is None else float(softcap),
            **strides,
            **constants,
            **launch.options(q),
        )
    return out
