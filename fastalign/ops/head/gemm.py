"""The products of a head: hidden states to logits, and the logits' gradient back to hidden states and weights.

GEMMs are written with ``out=`` or in place: no fresh ``[n, V]`` tensor, and autocast does not touch them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalign.ops.backends.cpp import product
from fastalign.ops.backends.torch import onednn
from fastalign.ops.head.head import Head
from fastalign.ops.head.plan import UPCAST_ROWS

INVARIANT_ROWS = 32
"""Rows per GEMM when a row's bits must not depend on its batch: every product then has the same shape."""


def parts(head: Head) -> list[tuple[Tensor, slice]]:
    """Weight and adapter, each with the columns of hidden that it multiplies; the logits are the sum of products."""
    width = head.weight.shape[1]
    base = (head.weight, slice(0, width))
    return [base] if head.up is None else [base, (head.up, slice(width, None))]


def project(head: Head, hidden: Tensor, buffer: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Logits ``hidden @ weight[first:last].T + bias`` in ``buffer``.

    Half precision rounds between the products. The adapter's part, small, goes first, unless there is a bias: that
    joins the weight's product before any rounding, as in a linear layer; the two may be large and cancel.
    """
    columns = len(head.weight[first:last])
    out = buffer[: hidden.shape[0] * columns].view(hidden.shape[0], columns)
    plus = None if head.bias is None else head.bias[first:last]
    joined = plus is not None and out.dtype.itemsize < 4
    for weight, part in parts(head) if joined else reversed(parts(head)):
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
    if (plus is None or plus is out) and onednn.multiplies(a, b, out):
        onednn.multiply(a, b, out, add=plus is out)
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


def add_product(acc: Tensor, a: Tensor, b: Tensor, *, first: bool, alpha: Tensor | None = None) -> None:
    """``acc = a @ b`` (first) or ``acc += a @ b`` with sums and result in the accumulator's precision.

    ``alpha``, a number on the device, is a factor of the product: what an fp16 ``a`` was divided by.
    """
    if alpha is not None:
        _add_scaled(acc, a, b, alpha, first=first)
        return
    if onednn.multiplies(a, b, acc):
        onednn.multiply(a, b, acc, add=not first)
        return
    if a.dtype == acc.dtype:
        acc.addmm_(a, b, beta=0 if first else 1)
        return
    if product.serves(acc, a, b):
        product.add_product(acc, a, b, first=first)
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


def add_back(
    head: Head, dz: Tensor, total: Tensor, alpha: Tensor | None, first: int = 0, last: int | None = None
) -> None:
    """``total [n, D + r] += alpha * dz @ [weight, up][first:last]`` in the precision of ``total``."""
    if head.options.batch_invariant and alpha is None:
        total.add_(multiply_back(head, dz, torch.empty(total.shape, dtype=dz.dtype, device=dz.device), first, last))
        return
    for weight, columns in parts(head):
        if not head.options.batch_invariant:
            add_product(total[:, columns], dz, weight[first:last], first=False, alpha=alpha)
            continue
        for rows, part in _padded(dz):
            tile = total.new_empty(INVARIANT_ROWS, weight.shape[1])
            add_product(tile, part, weight[first:last], first=True, alpha=alpha)
            total[rows, columns] += tile[: rows.stop - rows.start]
