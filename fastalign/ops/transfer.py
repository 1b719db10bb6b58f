"""Integers from the host to the device, without a sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """``[n]`` int64. In a CUDA graph kernels write them: the host memory of a copy may be freed before the replay."""
    source = torch.as_tensor(values, dtype=torch.int64)
    if source.device == device or device.type != "cuda":
        return source.to(device)
    if not torch.cuda.is_current_stream_capturing():
        return source.pin_memory().to(device, non_blocking=True)
    out = torch.empty(len(source), dtype=torch.int64, device=device)
    for place, value in zip(out.unbind(), source.tolist(), strict=True):
        place.fill_(value)
    return out
