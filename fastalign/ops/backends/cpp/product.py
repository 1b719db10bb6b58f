"""The native product of bf16 matrices into an fp32 sum behind tensors; torch has none on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.backends import cpp


def serves(acc: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `add_product` takes these: bf16 into fp32 on a processor with AVX512-BF16, layouts that need no copy."""
    narrow = a.dtype == b.dtype == torch.bfloat16 and acc.dtype == torch.float32 and acc.device.type == "cpu"
    return narrow and acc.stride(-1) == 1 and 1 in a.stride() and 1 in b.stride() and _available()


def _available() -> bool:
    if cpp.unavailable():
        return False
    from fastalign import _C

    return _C.has_bf16_product()


def add_product(acc: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``acc = a @ b`` (first) or ``acc += a @ b``, summed in fp32; the bits do not depend on the number of threads.

    Args:
        acc: ``[m, n]`` fp32 with neighbouring columns.
        a: ``[m, k]`` bf16 with neighbouring rows or columns.
        b: ``[k, n]`` bf16 with neighbouring rows or columns.
        first: ``acc`` holds nothing yet.
    """
    from fastalign import _C

    if first and not a.shape[1]:
        acc.zero_()
    _C.add_product(
        out=acc.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr(),
        m=acc.shape[0],
        n=acc.shape[1],
        k=a.shape[1],
        out_stride=acc.stride(0),
        a_row_stride=a.stride(0),
        a_col_stride=a.stride(1),
        b_row_stride=b.stride(0),
        b_col_stride=b.stride(1),
        accumulate=not first,
        threads=torch.get_num_threads(),
    )
