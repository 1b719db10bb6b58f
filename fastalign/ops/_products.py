"""The products of a head: hidden states to logits, and the logits' gradient back to hidden states and weights.

GEMMs are written with ``out=`` or in place: no fresh ``[n, V]`` tensor, and autocast does not touch them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.ops import _cpp_product, _onednn
from fastalign.ops._head import Head
from fastalign.ops.plan import UPCAST_ROWS

INVARIANT_ROWS = 32
"""Rows per GEMM when a row's bits must not depend on its batch: every product then has the same shape."""


def parts(head: Head) -> list[tuple[Tensor, slice]]:
    """Weight and adapter, each with the columns of hidden that it multiplies; the logits are the sum of products."""
    width = head.weight.shape[1]
    base = (head.weight, slice(0, width))
    return [base] if head.up is None else [base, (head.up, slice(width, None))]


def project(head: Head, hidden: Tensor, buffer: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Logits ``hidden @ weight[first:last].T + bias`` in ``buffer``; the adapter's part, small, is rounded first."""
    columns = len(head.weight[first:last])
    out = buffer[: hidden.shape[0] * columns].view(hidden.shape[0], columns)
    plus = None if head.bias is None else head.bias[first:last]
    for weight, part in reversed(parts(head)):
        multiply(hidden[:, part], weight[first:last].t(), out, plus, head.options.batch_invariant)
        plus = out
    return out


def multiply(a: Tensor, b: Tensor, out: Tensor, plus: Tensor | None, batch_invariant: bool) -> Tensor:
    """``out = a @ b + plus``, where ``plus`` is a row, ``out`` itself or None.

    Batch-invariant: in products of one shape, whatever the number of rows.
    """
    if batch_invariant:
        for rows, part in _padded(a):
            tile = out.new_empty(INVARIANT_ROWS, b.shape[1])
            tile[: rows.stop - rows.start] = out[rows]
            multiply(part, b, tile, tile if plus is out else plus, False)
            out[rows] = tile[: rows.stop - rows.start]
        return out
    if (plus is None or plus is out) and _onednn.multiplies(a, b, out):
        _onednn.multiply(a, b, out, add=plus is out)
        return out
    return torch.mm(a, b, out=out) if plus is None else torch.addmm(plus, a, b, out=out)


def _padded(a: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each with its rows followed by zeros."""
    for start in range(0, a.shape[0], INVARIANT_ROWS):
        rows = slice(start, min(a.shape[0], start + INVARIANT_ROWS))
        part = a.new_zeros(INVARIANT_ROWS, a.shape[1])
        part[: rows.stop - start] = a[rows]
        yield rows, part


def multiply_back(head: Head, dz: Tensor, out: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """``out [n, D + r] = dz @ [weight, up][first:last]``."""
    for weight, part in parts(head):
        multiply(dz, weight[first:last], out[:, part], None, head.options.batch_invariant)
    return out


def add_product(acc: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``acc = a @ b`` (first) or ``acc += a @ b`` with sums and result in the accumulator's precision."""
    if _onednn.multiplies(a, b, acc):
        _onednn.multiply(a, b, acc, add=not first)
        return
    if a.dtype == acc.dtype:
        acc.addmm_(a, b, beta=0 if first else 1)
        return
    if _cpp_product.serves(acc, a, b):
        _cpp_product.add_product(acc, a, b, first=first)
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
