"""Times of the parts of a step, and the memory that a process has used at most."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastalign.parallel.whereabouts import doing

PARTS = ("data", "generate", "reward", "reference", "forward", "backward", "optimizer")
"""The parts of a step that are timed; ``t_other`` is the rest."""


class Stopwatch:
    """Times the named parts of one step: by the clock on CPU, by events on CUDA, which are read only when asked for."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []
        self.start = self.end = self.mark()
        self.moved: dict[str, float] = {}

    def mark(self) -> Any:
        """A point in time."""
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time a block as one of ``PARTS``."""
        start = self.mark()
        with doing(part):
            yield
        self.spans.append((part, start, self.mark()))

    def book(self, part: str, seconds: float) -> None:
        """Move time from ``data``, in which a source was asked for a step, to what the source did in it."""
        self.moved[part] = self.moved.get(part, 0.0) + seconds

    def stop(self) -> None:
        """End the step."""
        self.end = self.mark()

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another."""
        return start.elapsed_time(end) / 1000 if self.on_cuda else end - start

    def seconds(self) -> dict[str, float]:
        """``t_step`` and its parts; waits for the device."""
        if self.on_cuda:
            self.end.synchronize()
        times = {f"t_{part}": sum(self.between(a, b) for name, a, b in self.spans if name == part) for part in PARTS}
        for part, seconds in self.moved.items():
            times[f"t_{part}"] += seconds
            times["t_data"] -= seconds
        step = self.between(self.start, self.end)
        return {"t_step": step, **times, "t_other": max(step - sum(times.values()), 0.0)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the peak resident set of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
