"""The native products of fp32 and bf16 matrices behind tensors, with sums in fp32, where they are the faster choice.

They are on processors with AVX-512 and its bf16 that are not Intel's: there MKL keeps to its AVX2 kernels, and oneDNN
makes fresh results only, copies what is transposed and is slow where rows are few. Measured on a core of an AMD EPYC
with a busy neighbour, GFLOP/s of oneDNN and of these: 64 x 256 x 768 in fp32 70 and 104, in bf16 130 and 202; 1273 rows
96 and 108, 191 and 221; 1273 rows of 8192 words in fp32 60 and 103.

Bits of a number depend neither on threads nor on the rows and columns around it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.final import applied, final

LEAST_WORK = 1 << 21
"""Multiply-adds from which a product is worth the call, where its bits may depend on its size."""


@lru_cache(maxsize=1)
def preferred() -> bool:
    """Whether they are the faster choice here: a fact of the processor, so that bits do not depend on timing."""
    cpuinfo = Path("/proc/cpuinfo")
    return available() and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def available() -> bool:
    """Whether they run here."""
    if cpp.unavailable():
        return False
    from fastalign import _C

    return _C.has_product()


def serves(acc: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> bool:
    """Whether `add_product` takes these: operands of one dtype into fp32 or, where nothing is added, into their own."""
    plain = all(type(x) in PLAIN and x.device.type == "cpu" and 1 in x.stride() for x in (acc, a, b))
    known = a.dtype == b.dtype and a.dtype in SERVED
    fits = acc.dtype == torch.float32 or (first and acc.dtype == a.dtype)
    return plain and known and fits and acc.stride(-1) == 1 and available()


PLAIN = (Tensor, torch.nn.Parameter)


SERVED = (torch.float32, torch.bfloat16)


def multiplies(*operands: Tensor) -> bool:
    """Whether `product` and `linear` take these, and are the faster choice: plain CPU tensors that are not empty."""
    plain = all(type(x) in PLAIN and x.device.type == "cpu" and x.dtype in SERVED and x.numel() for x in operands)
    return plain and preferred()


def add_product(acc: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``acc = a @ b`` (first) or ``acc += a @ b``, summed in fp32.

    Args:
        acc: ``[m, n]`` fp32 with neighbouring columns; bf16 if it is the first.
        a: ``[m, k]`` fp32 or bf16 with neighbouring rows or columns.
        b: ``[k, n]`` likewise.
        first: ``acc`` holds nothing yet.
    """
    from fastalign import _C

    if first and not a.shape[1]:
        acc.zero_()
    _C.product(
        out=(acc.data_ptr(), cpp.DTYPES[acc.dtype], acc.stride(0)),
        a=_matrix(a),
        b=_matrix(b),
        dtype=cpp.DTYPES[a.dtype],
        shape=(*acc.shape, a.shape[1]),
        accumulate=not first,
        threads=torch.get_num_threads(),
    )


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a [m, k] @ b [k, n]``, in the dtype of a or another one of both."""
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype or a.dtype)
    add_product(out, a, b, first=True)
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x [..., K] @ weight [N, K].T + bias``, multiplied in ``dtype``; gradients are in those of x and weight."""
    return applied(_Linear, x, weight, bias, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, dtype):
        ctx.dtypes = x.dtype, weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        rows = x.flatten(0, -2)
        out = product(rows, weight.t(), dtype if bias is None else torch.float32)
        out = out if bias is None else out.add_(bias).to(dtype)  # rounded once
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @final("a native linear layer")
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        grad, rows = grads[0].flatten(0, -2), x.flatten(0, -2)
        needs, (x_dtype, weight_dtype) = ctx.needs_input_grad, ctx.dtypes
        grad_x = product(grad, weight, x_dtype).view(x.shape) if needs[0] else None
        grad_weight = product(grad.t(), rows, weight_dtype) if needs[1] else None
        return grad_x, grad_weight, grad.sum(0) if needs[2] else None, None


class Packed:
    """A weight ``[N, K]`` in the order in which products read it, for as long as it does not change.

    A product of few rows takes a third less time then.
    """

    def __init__(self, weight: Tensor) -> None:
        from fastalign import _C

        self.shape, self.dtype = tuple(weight.shape), weight.dtype
        kind, threads = cpp.DTYPES[self.dtype], torch.get_num_threads()
        size = _C.packed_bytes(*self.shape, kind)
        memory = torch.empty(size + 64, dtype=torch.uint8)
        self._data = memory[-memory.data_ptr() % 64 :]
        weight = weight.detach().contiguous()
        shape = (0, *self.shape)
        _C.pack_product(b=_matrix(weight.t()), dtype=kind, shape=shape, out=self._data.data_ptr(), threads=threads)
        self._multiply = _C.product
        self._given = {"b": (0, 0, 0), "dtype": kind, "packed": self.address, "accumulate": False}

    @property
    def address(self) -> int:
        """Where it lies."""
        return self._data.data_ptr()

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``x [m, K] @ weight.T``, the bits of `product`."""
        rows, columns = x.shape[0], self.shape[0]
        out = torch.empty(rows, columns, dtype=dtype)
        to, shape = (out.data_ptr(), cpp.DTYPES[dtype], columns), (rows, *self.shape)
        self._multiply(out=to, a=_matrix(x), shape=shape, threads=torch.get_num_threads(), **self._given)
        return out


def _matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)
