"""What every launcher of this package shares: threads per program, rounding, and the device to launch on."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

THREADS = 128
"""Threads per program: fixed, because the order of a reduction depends on it."""


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads per warp: 32, or 64 on most AMD devices."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def options(tensor: Tensor, threads: int = THREADS) -> dict[str, Any]:
    """Launch options for kernels on ``tensor``: ``threads`` threads, and no contraction of ``a * b + c``.

    Without contraction an expression has the same bits wherever it is compiled, so that the target's logit minus the
    row's maximum is exactly zero when the target is the maximum.
    """
    return {"num_warps": threads // warp_size(tensor.device), "enable_fp_fusion": False}


def device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The context in which a launch goes to the device that holds ``tensor``, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def alignment(itemsize: int, *sizes: int) -> int:
    """The largest power of two that divides every size, in elements, up to 16 bytes: the width of one load."""
    width = 16 // itemsize
    while any(size % width for size in sizes):
        width //= 2
    return width


def unit_columns(x: Tensor) -> Tensor:
    """``x`` ``[N, V]``, or a copy when its columns are not adjacent in memory."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
