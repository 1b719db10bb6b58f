"""Matrix products into memory that is there, by the library that is best at them.

GEMMs are written with ``out=`` or in place: no fresh ``[n, V]`` tensor, and autocast does not touch them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.ops.backends.cpp import product
from fastalign.ops.head.plan import UPCAST_ROWS

INVARIANT_ROWS = 32
"""Rows per GEMM when a row's bits must not depend on its batch: every product then has the same shape."""
LARGE_WEIGHT = 1 << 15
"""Elements of a weight from which the native products are worth their call."""
FEW_ROWS = 12
"""In fp32 on a CPU fewer rows are padded to so many, as then a row's bits are those that it has among more: measured,
MKL's products have them from 12 rows on, on 1 and 2 threads."""


def multiply(a: Tensor, b: Tensor, out: Tensor, plus: Tensor | None, batch_invariant: bool) -> Tensor:
    """``out = a @ b + plus``, where ``plus`` is a row, ``out`` itself or None; ``out`` may be wider than a and b.

    Batch-invariant: in products of one shape, whatever the number of rows.
    """
    large = b.numel() >= LARGE_WEIGHT  # whatever the rows: few go where many would
    first = plus is None
    if large and (first or plus is out) and product.preferred() and product.serves(out, a, b, first=first):
        product.add_product(out, a, b, first=first)
        return out
    few = 0 < a.shape[0] < FEW_ROWS and out.dtype == torch.float32 and out.device.type == "cpu"
    if batch_invariant or few:
        size = INVARIANT_ROWS if batch_invariant else FEW_ROWS
        for rows, part in padded(a, size):
            tile = out.new_empty(size, b.shape[1])
            tile[: rows.stop - rows.start] = out[rows]
            multiply(part, b, tile, tile if plus is out else plus, False)
            out[rows] = tile[: rows.stop - rows.start]
        return out
    if out.dtype != a.dtype:
        return _multiply_wide(a, b, out, plus)
    return torch.mm(a, b, out=out) if plus is None else torch.addmm(plus, a, b, out=out)


def _multiply_wide(a: Tensor, b: Tensor, out: Tensor, plus: Tensor | None) -> Tensor:
    """`multiply` of half precision into fp32: the sums are never rounded. On a CPU some columns at a time."""
    if out.device.type != "cpu":
        if plus is None:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        return torch.addmm(plus.to(out.dtype), a, b, out_dtype=out.dtype, out=out)
    if plus is not None and plus is not out:
        out.copy_(plus)
    for start in range(0, out.shape[1], UPCAST_ROWS):
        part = slice(start, start + UPCAST_ROWS)
        add_product(out[:, part], a, b[:, part], first=plus is None)
    return out


def padded(a: Tensor, size: int = INVARIANT_ROWS) -> Iterator[tuple[slice, Tensor]]:
    """Slices of ``size`` rows, each with its rows followed by zeros."""
    for start in range(0, a.shape[0], size):
        rows = slice(start, min(a.shape[0], start + size))
        part = a.new_zeros(size, a.shape[1])
        part[: rows.stop - start] = a[rows]
        yield rows, part


def add_product(acc: Tensor, a: Tensor, b: Tensor, *, first: bool, alpha: Tensor | None = None) -> None:
    """``acc = a @ b`` (first) or ``acc += a @ b`` with sums and result in the accumulator's precision.

    ``alpha``, a number on the device, is a factor of the product: what an fp16 ``a`` was divided by.
    """
    if alpha is not None:
        _add_scaled(acc, a, b, alpha, first=first)
        return
    faster = a.dtype != acc.dtype or (a.numel() * b.shape[1] >= product.LEAST_WORK and product.preferred())
    if faster and product.serves(acc, a, b):
        product.add_product(acc, a, b, first=first)
        return
    if a.dtype == acc.dtype:
        torch.mm(a, b, out=acc) if first else acc.addmm_(a, b)
        return
    wide = b.to(acc.dtype) if acc.device.type == "cpu" else b
    for start in range(0, acc.shape[0], UPCAST_ROWS):
        part, rows = acc[start : start + UPCAST_ROWS], a[start : start + UPCAST_ROWS]
        if acc.device.type == "cpu":
            part.addmm_(rows.to(acc.dtype), wide, beta=0 if first else 1)
        elif first:
            torch.mm(rows, b, out_dtype=acc.dtype, out=part)
        else:
            part.add_(torch.mm(rows, b, out_dtype=acc.dtype))


def _add_scaled(acc: Tensor, a: Tensor, b: Tensor, alpha: Tensor, *, first: bool) -> None:
    """``add_product`` of fp16 with a factor: the host knows it on a CPU alone, where operands are widened in blocks."""
    for start in range(0, acc.shape[0], UPCAST_ROWS):
        part, rows = acc[start : start + UPCAST_ROWS], a[start : start + UPCAST_ROWS]
        if acc.device.type != "cpu":
            product = torch.mm(rows, b, out_dtype=acc.dtype).mul_(alpha)
            part.copy_(product) if first else part.add_(product)
            continue
        if first:
            part.zero_()
        for begin in range(0, a.shape[1], UPCAST_ROWS):
            terms = slice(begin, begin + UPCAST_ROWS)
            part.addmm_(rows[:, terms].to(acc.dtype), b[terms].to(acc.dtype), alpha=alpha.item())
