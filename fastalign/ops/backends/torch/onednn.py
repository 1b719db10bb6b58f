"""fp32 matrix products by oneDNN where PyTorch's own choice, MKL, is slow: on processors that are not Intel's.

There MKL keeps to its AVX2 kernels. Measured on two cores of an AMD EPYC with AVX-512, 1700 x 256 x 768: 222 GFLOP/s by
MKL, 480 by oneDNN.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastalign.ops.final import applied, final

LEAST_WORK = 1 << 22
"""Multiply-adds from which a product is worth a fresh result that is copied."""
TILE = 2048
"""Rows or columns of a result at a time."""
TERMS = 1024
"""Products that oneDNN adds up one after the other: all of a long sum would err twice as much as MKL."""


@lru_cache(maxsize=1)
def preferred() -> bool:
    """Whether oneDNN is the faster choice here: a fact of the processor, so that bits do not depend on timing."""
    cpuinfo = Path("/proc/cpuinfo")
    known = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return known and cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def enabled() -> bool:
    """Whether PyTorch may use oneDNN now; ``torch.backends.mkldnn.flags`` switches it for some calls."""
    return bool(torch.backends.mkldnn.enabled)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these: plain fp32 CPU tensors that autocast leaves alone, with oneDNN switched on."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    usual = type(x) is Tensor and type(weight) in (Tensor, torch.nn.Parameter) and x.numel() > 0
    return plain and usual and preferred() and enabled() and not torch.is_autocast_enabled("cpu")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a [m, k] @ b [k, n]`` in fp32, of any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, attr="none", scalars=[], algorithm="")


def multiplies(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether `multiply` takes ``a [m, k]`` and ``b [k, n]``."""
    return serves(a, b) and type(out) is Tensor and out.dtype == a.dtype


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """``out = a @ b``, or with ``add`` ``out += a @ b``, a tile after the other: oneDNN makes fresh results only."""
    wide = out.shape[1] > out.shape[0]
    for start in range(0, max(out.shape), TILE):
        part = slice(start, start + TILE)
        tile, rows, columns = (out[:, part], a, b[:, part]) if wide else (out[part], a[part], b)
        for first in range(0, a.shape[1], TERMS):
            terms = slice(first, first + TERMS)
            fresh = product(rows[:, terms], columns[terms])
            tile.add_(fresh) if add or first else tile.copy_(fresh)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., K] @ weight [N, K].T + bias``."""
    return applied(_Linear, x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr="none", scalars=[], algorithm="")

    @staticmethod
    @final("a linear layer by oneDNN")
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        grad, rows = grads[0].flatten(0, -2), x.flatten(0, -2)
        needs, multiplied = ctx.needs_input_grad, product if enabled() else torch.mm
        grad_x = multiplied(grad, weight).view(x.shape) if needs[0] else None
        grad_weight = multiplied(grad.t(), rows) if needs[1] else None
        return grad_x, grad_weight, grad.sum(0) if needs[2] else None
