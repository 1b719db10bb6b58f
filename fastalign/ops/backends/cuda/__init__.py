"""What calls the native CUDA kernels: whether they were built, on which device and stream they run.

Nothing here waits for the device. Beside the outputs only a small scratch is allocated, where few rows are shared by
several blocks. So a launch can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import cpp

DEVICE = "cuda"


def unavailable() -> str | None:
    """Why the kernels cannot be used, or None when they can."""
    if why := cpp.unavailable():
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
    """The kernels and the current stream's handle; inside the block the device of ``x`` is the current one."""
    from fastalign import _C

    with torch.cuda.device(x.device):
        _C.cuda.use_device(x.device.index)
        yield _C.cuda, torch.cuda.current_stream().cuda_stream
