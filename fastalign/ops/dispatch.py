"""Which backend serves an op here, and why.

A backend is absent (not installed, not built, no device) and passed over with a reason, or present and used; a present
but broken one raises when it is imported.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

from fastalign.ops import _cpp, _cuda, _onednn

log = logging.getLogger("fastalign")

_SWEEP = {
    **{"torch": "fastalign.ops._torch_token_logps", "cpp": "fastalign.ops._cpp"},
    **{"triton": "fastalign_kernels.token_logps", "cuda": "fastalign.ops._cuda"},
}

_SCAN = {"torch": "fastalign.ops.scan", "cpp": "fastalign.ops._cpp_scan", "triton": "fastalign_kernels.scan"}

_POLICY = {
    **{"torch": "fastalign.ops._torch_policy", "cpp": "fastalign.ops._cpp_policy"},
    **{"triton": "fastalign_kernels.policy_loss", "cuda": "fastalign.ops._cuda_policy"},
}

_DIVERGENCE = {
    **{"torch": "fastalign.ops._torch_divergence", "cpp": "fastalign.ops._cpp_divergence"},
    "triton": "fastalign_kernels.divergence",
}

MODULES: dict[str, dict[str, str]] = {
    **{"token_logps": _SWEEP, "linear_logps": _SWEEP, "linear_loss": _SWEEP},
    **{"policy_loss": _POLICY, "preference_loss": _SWEEP},
    **{"segment_scan": _SCAN, "gae": _SCAN},
    **{"divergence": _DIVERGENCE, "linear_divergence": _DIVERGENCE},
}
"""op -> backend -> the module that holds its kernels; the linear ops are GEMMs around the sweep of ``token_logps``."""

_PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}
"""Best first. The CUDA C++ kernels serve those who ask for them until a measurement puts them before Triton's."""


def available(op: str) -> tuple[str, ...]:
    """Names of the backends of ``op`` that are usable here, for example ``("torch", "cpp")``."""
    return tuple(backend for backend in _modules(op) if missing(backend) is None)


def reasons(op: str) -> dict[str, str]:
    """What ``fastalign info`` prints: each backend of ``op`` with "usable" and its level, or why it is not."""
    usable = {backend: f"usable ({_level(backend)}{_switched_off(op, backend)})" for backend in available(op)}
    return {backend: usable.get(backend) or str(missing(backend)) for backend in _modules(op)}


def missing(backend: str) -> str | None:
    """Why ``backend`` cannot be used here, or None when it can."""
    if backend == "cpp":
        return _cpp.unavailable()
    if backend == "cuda":
        return _cuda.unavailable()
    if backend == "triton":
        for module in ("triton", "fastalign_kernels"):
            if _absent(module):
                return f"{module} is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "no CUDA device, and TRITON_INTERPRET is not set"
    return None


@cache
def choose(op: str, backend: str | None, device: str) -> str:
    """The backend that serves ``op`` on tensors of ``device`` ("cpu", "cuda"): the one asked for, else the best.

    Raises:
        ValueError: the backend asked for is unknown, not usable here, or does not serve this device.
    """
    usable = tuple(name for name in available(op) if _serves(name, device))
    if backend is not None and backend not in usable:
        why = missing(backend) if backend in _modules(op) else "no such backend"
        raise ValueError(
            f"{op}: backend {backend!r} is not available for {device} tensors"
            f" ({why or 'it serves another device'}); available: {', '.join(usable)}"
        )
    chosen = backend or next(name for name in _PREFERENCE.get(device, ("torch",)) if name in usable)
    asked = _switched_off(op, chosen if device == "cpu" else "")
    asked += ", as asked" if backend else _passed_over(chosen, device)
    log.info("%s: %s (%s tensor, %s%s)", op, chosen, device, _level(chosen), asked)
    return chosen


def kernels(op: str, backend: str | None, device: torch.device) -> ModuleType:
    """The module with the kernels ``forward`` and ``backward`` of ``op``."""
    return importlib.import_module(_modules(op)[choose(op, backend, device.type)])


def _modules(op: str) -> dict[str, str]:
    if op not in MODULES:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(MODULES)}")
    return MODULES[op]


@cache
def _absent(module: str) -> bool:
    return find_spec(module) is None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _serves(backend: str, device: str) -> bool:
    if backend == "triton":
        return device == "cuda" or (device == "cpu" and _interpreted())
    return backend == "torch" or device == ("cuda" if backend == "cuda" else "cpu")


def _passed_over(chosen: str, device: str) -> str:
    for name in _PREFERENCE.get(device, ()):
        if name == chosen:
            return ""
        if why := missing(name):
            return f"; not {name}: {why}"
    return ""


def _switched_off(op: str, backend: str) -> str:
    """What is said of a linear op on a CPU whose fp32 products would be oneDNN's; asked again at every call."""
    concerned = op.startswith("linear") and backend in ("torch", "cpp") and _onednn.preferred()
    off = concerned and not _onednn.enabled()
    return ", fp32 products not by oneDNN: torch.backends.mkldnn.enabled is False" if off else ""


def _level(backend: str) -> str:
    """The instruction set or mode a usable backend runs in."""
    if backend == "cpp":
        return _cpp.cpu_level()
    if backend == "triton":
        return "interpreter" if not torch.cuda.is_available() else "sm_{}{}".format(*torch.cuda.get_device_capability())
    return f"torch {torch.__version__}"
