"""The native CPU kernels, ``fastalign._C``, behind tensors: whether they are there, checks, memory, addresses.

The extension knows nothing about torch: it is given addresses, sizes, strides and the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.checks import stats_dtype

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
CPU = torch.device("cpu")
ABI = 5
"""The bindings that this package calls: ``kAbi`` in csrc/bindings.cpp, raised with every change to them."""


@cache
def unavailable() -> str | None:
    """Why the native kernels cannot be used, or None when they can.

    Raises:
        ImportError: the extension is there but cannot be loaded, or it was built from the sources of another version,
            whose functions take other arguments.
    """
    if find_spec("fastalign._C") is None:
        return "fastalign._C is not built (no C++ compiler when fastalign was installed)"
    from fastalign import _C

    if getattr(_C, "abi", None) != ABI:
        raise ImportError(
            f"the native extension {_C.__file__} was built for another version of fastalign: build it again with "
            "`pip install .` (beside the sources: `python setup.py build_ext --inplace`), or remove the file"
        )
    return None


def cpu_level() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``scalar``; ``FASTALIGN_CPU`` may force a lower one."""
    from fastalign import _C

    return _C.cpu_level()


def check(logits: Tensor, labels: Tensor, backend: str = "cpp", device: str = "cpu") -> None:
    """Shapes, dtypes and devices are right."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not logits.shape[1]:
        raise ValueError(
            f"expected logits [N, V] and labels [N], got {tuple(logits.shape)} and {tuple(labels.shape)}: "
            "flatten the leading dimensions"
        )
    wide = backend == "cuda"  # fp64 on a CPU is torch's
    served = logits.dtype in DTYPES and (wide or logits.dtype != torch.float64)
    if not served or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expected fp32, bf16{', fp16 or fp64' if wide else ' or fp16'} logits and int32 or int64 labels, "
            f"got {logits.dtype} and {labels.dtype}"
        )
    if logits.device.type != device or labels.device != logits.device:
        raise ValueError(
            f"the {backend} backend computes on {device} tensors of one device, "
            f"got logits on {logits.device}, labels on {labels.device}"
        )


def check_out(out: Tensor, logits: Tensor, *, narrower: bool = False) -> None:
    """``out`` is laid out for a gradient of the logits; ``narrower``: of fp32 logits also for one in bf16 or fp16."""
    served = out.dtype == logits.dtype or (narrower and logits.dtype == torch.float32 and out.dtype.itemsize == 2)
    if out.shape != logits.shape or not served or out.device != logits.device:
        raise ValueError(
            f"out must be {logits.dtype} {tuple(logits.shape)} on {logits.device} like the logits, "
            f"not {out.dtype} {tuple(out.shape)} on {out.device}"
        )


def vectors(given: Mapping[str, Tensor | None], logits: Tensor) -> dict[str, Tensor]:
    """What is given, as contiguous ``[N]`` of the statistics' dtype beside the logits."""
    rows, dtype, found = logits.shape[0], stats_dtype(logits), {}
    for name, x in given.items():
        if x is not None:
            found[name] = vector(name, x, rows, dtype, logits.device)
    return found


def vector(name: str, x: Tensor, rows: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """``x`` as a contiguous ``[N]`` of ``dtype``."""
    if x.shape != (rows,) or x.device != device:
        raise ValueError(f"{name} must be [{rows}] on {device}, got {tuple(x.shape)} on {x.device}")
    return x if x.dtype == dtype and x.is_contiguous() else x.detach().to(dtype).contiguous()


def matrix(x: Tensor) -> tuple[int, int, int]:
    """Address and strides."""
    return x.data_ptr(), x.stride(0), x.stride(1)


def describe(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    vectors: Mapping[str, Tensor | None],
    grad: Tensor | None = None,
) -> tuple[Any, list[Tensor]]:
    """The addresses, and the copies that must stay alive until the kernel has returned."""
    from fastalign import _C

    rows, vocabulary = logits.shape
    alive, per_row, dtype = [labels.contiguous()], 0, DTYPES[logits.dtype]
    if isinstance(temperature, Tensor):
        alive.append(vector("temperature", temperature.expand(rows), rows, torch.float64, logits.device))
        per_row, temperature = alive[1].data_ptr(), 1.0
    places: list[int] = []
    for name in VECTORS:
        x = vectors.get(name)
        places.append(0 if x is None else x.data_ptr())
    shape = matrix(logits), dtype, rows, vocabulary, alive[0].data_ptr(), labels.dtype == torch.int64
    scaling = per_row, temperature, softcap or 0.0, logit_scale
    gradient = () if grad is None else (matrix(grad), DTYPES[grad.dtype])
    return _C.TokenLogps(*shape, *scaling, *places, *gradient), alive  # 22 names would cost more than a small kernel


VECTORS = ("logps", "entropy", "max", "logsum", "total", "top1", "g", "alpha", "beta", "delta")
"""Statistics and coefficients ``[N]`` that a kernel reads or writes, in the order of its arguments."""
