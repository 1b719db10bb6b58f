"""The native CPU kernels behind tensors: checks, memory, addresses.

``fastalign._C`` knows nothing about torch: it is given addresses, sizes, strides and the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.ops._rows import Coefficients

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
CPU = torch.device("cpu")
ABI = 2
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


def forward(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    total: bool = False,
    top1: bool = False,
) -> Statistics:
    """Log-probs of the labels and the row statistics that the backward needs, in one read of the logits.

    ``z = softcap(logit_scale * logits) / temperature``, ``max = max_v z_v``, ``logsum = ln sum_v exp(z_v - max)``,
    ``logps = (z_y - max) - logsum``, ``entropy = logsum - sum_v p_v (z_v - max)`` in nats,
    ``total = sum_v (z_v - max)``, ``top1 = 1`` where the label is the first column whose z is max, else 0.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64 on the CPU, of any strides.
        labels: ``[N]`` int32 or int64; -100: row not scored (never read, all outputs 0); -1: the label is elsewhere
            (logps 0); any other label outside ``[0, V)`` gives NaN.
        temperature: a float or ``[N]``.
        softcap: ``cap * tanh(x / cap)`` when given.
        logit_scale: factor on the logits before the softcap.
        entropy, total, top1: whether to compute them.

    Returns:
        ``(logps, entropy or None, max, logsum, total or None, top1 or None)``: ``[N]`` fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    _check(logits, labels)
    outputs = _outputs(logits, entropy, total, top1)
    op, _alive = _describe(logits, labels, temperature, softcap, logit_scale, outputs._asdict())
    op.forward(torch.get_num_threads())
    return outputs


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    max: Tensor,
    logsum: Tensor,
    coefficients: Coefficients,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> None:
    """Write the gradient of the logits into ``out``, which may be the logits themselves.

    ``dz_v = g (1[v=y] - p_v) + p_v (alpha + beta ln p_v) + delta`` and
    ``d logits = dz * logit_scale / temperature * (1 - tanh^2)``, the last factor under a softcap. Rows that are not
    scored, or whose coefficients are zero, are zeros without their logits being read.

    Args:
        out: ``[N, V]`` of the dtype of the logits, of any strides.
        logits, labels, temperature, softcap, logit_scale: as in ``forward``.
        max, logsum: ``[N]`` from ``forward``.
        coefficients: ``[N]`` each; None is 0 everywhere and costs nothing.

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    _check(logits, labels)
    _check_out(out, logits)
    inputs = _vectors({"max": max, "logsum": logsum, **coefficients._asdict()}, logits)
    op, _alive = _describe(logits, labels, temperature, softcap, logit_scale, inputs, grad=_matrix(out))
    op.backward(torch.get_num_threads())


def _check(logits: Tensor, labels: Tensor, backend: str = "cpp", device: str = "cpu") -> None:
    """Shapes, dtypes and devices are right."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not logits.shape[1]:
        raise ValueError(
            f"expected logits [N, V] and labels [N], got {tuple(logits.shape)} and {tuple(labels.shape)}: "
            "flatten the leading dimensions"
        )
    if logits.dtype not in DTYPES or labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"expected fp32, bf16, fp16 or fp64 logits and int32 or int64 labels, got {logits.dtype} and {labels.dtype}"
        )
    if logits.device.type != device or labels.device != logits.device:
        raise ValueError(
            f"the {backend} backend computes on {device} tensors of one device, "
            f"got logits on {logits.device}, labels on {labels.device}"
        )


def _check_out(out: Tensor, logits: Tensor) -> None:
    if out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
        raise ValueError(
            f"out must be {logits.dtype} {tuple(logits.shape)} on {logits.device} like the logits, "
            f"not {out.dtype} {tuple(out.shape)} on {out.device}"
        )


def _stats_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class Statistics(NamedTuple):
    """What ``forward`` returns, each ``[N]``."""

    logps: Tensor
    entropy: Tensor | None
    max: Tensor
    logsum: Tensor
    total: Tensor | None
    top1: Tensor | None


def _outputs(logits: Tensor, entropy: bool, total: bool, top1: bool) -> Statistics:
    """Fresh memory for the statistics, beside the logits."""

    def fresh() -> Tensor:
        return torch.empty(len(logits), dtype=_stats_dtype(logits), device=logits.device)

    others = (fresh() if wanted else None for wanted in (total, top1))
    return Statistics(fresh(), fresh() if entropy else None, fresh(), fresh(), *others)


def _vectors(given: Mapping[str, Tensor | None], logits: Tensor) -> dict[str, Tensor]:
    """What is given, as contiguous ``[N]`` of the statistics' dtype beside the logits."""
    dtype, rows = _stats_dtype(logits), len(logits)
    return {name: _vector(name, x, rows, dtype, logits.device) for name, x in given.items() if x is not None}


def _vector(name: str, x: Tensor, rows: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """``x`` as a contiguous ``[N]`` of ``dtype``."""
    if x.shape != (rows,) or x.device != device:
        raise ValueError(f"{name} must be [{rows}] on {device}, got {tuple(x.shape)} on {x.device}")
    return x.detach().to(dtype).contiguous()


def _matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _describe(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    vectors: Mapping[str, Tensor | None],
    **matrices: tuple[int, int, int],
) -> tuple[Any, list[Tensor]]:
    """The addresses, and the copies that must stay alive until the kernel has returned."""
    from fastalign import _C

    rows, vocabulary = logits.shape
    alive = [labels.contiguous()]
    if isinstance(temperature, Tensor):
        alive.append(_vector("temperature", temperature.expand(rows), rows, torch.float64, logits.device))
        settings = {"temperatures": alive[1].data_ptr()}
    else:
        settings = {"temperature": float(temperature)}
    op = _C.TokenLogps(
        logits=_matrix(logits),
        dtype=DTYPES[logits.dtype],
        rows=rows,
        vocabulary=vocabulary,
        labels=alive[0].data_ptr(),
        labels_are_int64=labels.dtype == torch.int64,
        softcap=softcap or 0.0,
        logit_scale=logit_scale,
        **settings,
        **{name: x.data_ptr() for name, x in vectors.items() if x is not None},
        **matrices,
    )
    return op, alive
