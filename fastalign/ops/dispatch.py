"""Which backend serves an op here, and why.

A backend is absent (not installed, not built, no device) and passed over with a reason, or present and used; a present
but broken one raises when it is imported. Its kernels are found by name: ``backends/<backend>/<file>.py``, Triton's in
``fastalign_kernels/<file>.py``.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from fastalign.ops.backends import cpp, cuda

log = logging.getLogger("fastalign")

OPS = {
    **{"token_logps": "token_logps", "linear_logps": "token_logps", "linear_loss": "token_logps"},
    **{"policy_loss": "policy_loss", "preference_loss": "token_logps"},
    **{"segment_scan": "scan", "gae": "scan"},
    **{"divergence": "divergence", "linear_divergence": "divergence"},
    "forest_decode": "forest_decode",
    **{"sample": "sample", "linear_sample": "sample"},
}
"""op -> the file of its kernels; the linear ops are GEMMs around the sweep of ``token_logps`` or ``divergence``."""

BACKENDS = ("torch", "cpp", "triton", "cuda")
PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}
"""Best first. The CUDA C++ kernels serve those who ask for them until a measurement puts them before Triton's."""
ATTENTION = ("sdpa", "cpp", "varlen", "flash")
"""Of ``packed_attention``, the best last."""


def available(op: str) -> tuple[str, ...]:
    """Names of the backends of ``op`` that are usable here, for example ``("torch", "cpp")``."""
    return tuple(backend for backend in backends(op) if missing(backend) is None)


def reasons(op: str) -> dict[str, str]:
    """What ``fastalign info`` prints: each backend of ``op`` with "usable" and its level, or why it is not."""
    usable = {backend: f"usable ({level(backend)})" for backend in available(op)}
    return {backend: usable.get(backend) or str(missing(backend)) for backend in backends(op)}


def missing(backend: str) -> str | None:
    """Why ``backend`` cannot be used here, or None when it can."""
    if backend == "cpp":
        return cpp.unavailable()
    if backend == "cuda":
        return cuda.unavailable()
    if backend == "triton":
        for name in ("triton", "fastalign_kernels"):
            if not found(name):
                return f"{name} is not installed"
        if not torch.cuda.is_available() and not interpreted():
            return "no CUDA device, and TRITON_INTERPRET is not set"
    return None


@cache
def choose(op: str, backend: str | None, device: str, float64: bool = False) -> str:
    """The backend that serves ``op`` on tensors of ``device`` ("cpu", "cuda"): the one asked for, else the best.

    fp64, which is for checks of gradients, has no C++ kernels over logits: torch's serve there.

    Raises:
        ValueError: the backend asked for is unknown, not usable here, or does not serve this device.
    """
    usable = tuple(name for name in available(op) if serves(name, device))
    if backend is not None and backend not in usable:
        why = missing(backend) if backend in backends(op) else "no such backend"
        raise ValueError(
            f"{op}: backend {backend!r} is not available for {device} tensors"
            f" ({why or 'it serves another device'}); available: {', '.join(usable)}"
        )
    chosen = backend or next(name for name in PREFERENCE.get(device, ("torch",)) if name in usable)
    if chosen == "cpp" and float64 and OPS[op] != "scan":
        return "torch"
    asked = ", as asked" if backend else passed_over(chosen, device)
    log.info("%s: %s (%s tensor, %s%s)", op, chosen, device, level(chosen), asked)
    return chosen


@cache
def kernels(op: str, backend: str | None, device: torch.device, *dtypes: torch.dtype) -> ModuleType:
    """The module with the kernels ``forward`` and ``backward`` of ``op`` for logits of these dtypes."""
    return importlib.import_module(place(choose(op, backend, device.type, torch.float64 in dtypes), OPS[op]))


@cache
def choose_attention(backend: str | None, device: str, dtype: torch.dtype, softcap: bool = False) -> str:
    """The backend of ``packed_attention`` for such tensors; the best one is logged with the reasons against better.

    Raises:
        ValueError: the backend asked for is unknown or cannot serve them.
    """
    if backend is not None and backend not in ATTENTION:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(ATTENTION)}")
    against = {name: without_attention(name, device, dtype, softcap) for name in reversed(ATTENTION)}
    if backend is not None:
        if against[backend]:
            raise ValueError(f"attention backend {backend!r} cannot serve this call: {against[backend]}")
        return backend
    chosen = next(name for name, reason in against.items() if reason is None)
    better = [f"{name}: {against[name]}" for name in against if ATTENTION.index(name) > ATTENTION.index(chosen)]
    log.info("attention: %s%s", chosen, f" ({'; '.join(better)})" if better else "")
    return chosen


def without_attention(backend: str, device: str, dtype: torch.dtype, softcap: bool = False) -> str | None:
    """Why a backend of ``packed_attention`` cannot serve such tensors; None when it can."""
    return attention(backend).unavailable(device, dtype, softcap) if backend in ATTENTION else "no such backend"


@cache
def attention(backend: str) -> ModuleType:
    """The module with ``attend`` and ``unavailable`` of a backend of ``packed_attention``."""
    return importlib.import_module(place(backend, "attention"))


def backends(op: str) -> tuple[str, ...]:
    """Names of the backends that have kernels of ``op``, usable here or not."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    return tuple(name for name in BACKENDS if has(name, OPS[op]))


def has(backend: str, file: str) -> bool:
    """Whether a backend has such a file of kernels; of Triton, which need not be installed, it is taken as given."""
    absent = backend == "triton" and not found("fastalign_kernels")
    return absent or found(place(backend, file))


def place(backend: str, file: str) -> str:
    """The dotted name of a file of kernels."""
    return f"fastalign_kernels.{file}" if backend == "triton" else f"fastalign.ops.backends.{backend}.{file}"


@cache
def found(module: str) -> bool:
    """Whether a module is there; it is not imported."""
    return find_spec(module) is not None


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def serves(backend: str, device: str) -> bool:
    """Whether a usable backend takes tensors of ``device``."""
    if backend == "triton":
        return device == "cuda" or (device == "cpu" and interpreted())
    return backend == "torch" or device == ("cuda" if backend == "cuda" else "cpu")


def passed_over(chosen: str, device: str) -> str:
    """The reason against the best backend that is better than the chosen one."""
    for name in PREFERENCE.get(device, ()):
        if name == chosen:
            return ""
        if why := missing(name):
            return f"; not {name}: {why}"
    return ""


def level(backend: str) -> str:
    """The instruction set or mode a usable backend runs in."""
    if backend == "cpp":
        return cpp.cpu_level()
    if backend == "triton":
        return "interpreter" if not torch.cuda.is_available() else "sm_{}{}".format(*torch.cuda.get_device_capability())
    return f"torch {torch.__version__}"
