"""The native CUDA kernels of ``token_logps`` behind tensors: checks, memory, the caller's device and stream.

Nothing here waits for the device, and nothing is allocated beside the outputs but what blocks that share rows leave for
each other, where rows are few: a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastalign.ops import _cpp
from fastalign.ops._rows import Coefficients

DEVICE = "cuda"


def unavailable() -> str | None:
    """Why the kernels cannot be used, or None when they can."""
    if why := _cpp.unavailable():
        return why
    from fastalign import _C

    if not _C.has_cuda:
        return (
            "fastalign._C was built without CUDA (no nvcc of 11.8 or newer when fastalign was installed, or it failed: "
            "FASTALIGN_CUDA=1 pip install -v . says why)"
        )
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no CUDA device"
    return None


@contextmanager
def on_stream(x: Tensor) -> Iterator[tuple[Any, int]]:
    """The kernels, and the handle of the current stream of the device that holds ``x``, which is in use meanwhile."""
    from fastalign import _C

    with torch.cuda.device(x.device):
        _C.cuda.use_device(x.device.index)
        yield _C.cuda, torch.cuda.current_stream().cuda_stream


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
) -> _cpp.Statistics:
    """As ``_cpp.forward``, on CUDA tensors."""
    _cpp._check(logits, labels, "cuda", DEVICE)
    outputs = _cpp._outputs(logits, entropy, total, top1)
    op, _alive = _cpp._describe(logits, labels, temperature, softcap, logit_scale, outputs._asdict())
    with on_stream(logits) as (kernels, stream):
        blocks = kernels.blocks_per_row(*logits.shape)
        scratch = torch.empty(kernels.scratch(op) if blocks > 1 else 0, dtype=torch.uint8, device=logits.device)
        kernels.token_logps_forward(op, blocks, scratch.data_ptr(), stream)
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
    """As ``_cpp.backward``, on CUDA tensors; ``out`` may be the logits."""
    _cpp._check(logits, labels, "cuda", DEVICE)
    _cpp._check_out(out, logits)
    inputs = _cpp._vectors({"max": max, "logsum": logsum, **coefficients._asdict()}, logits)
    op, _alive = _cpp._describe(logits, labels, temperature, softcap, logit_scale, inputs, grad=_cpp._matrix(out))
    with on_stream(logits) as (kernels, stream):
        kernels.token_logps_backward(op, kernels.blocks_per_row(*logits.shape), stream)
