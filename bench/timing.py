"""Clocks: one run of a candidate, timed by its device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.field import Inputs, Outputs, Run

Timer = Callable[[Run, Inputs], "tuple[Outputs, float]"]

HEAD_START = 1_000_000
"""Cycles that a GPU spins before the timed region, half a millisecond, in which the host queues the first kernels."""
FLUSHES = 4
"""The flushed buffer in units of the level-two cache."""


def clock() -> float:
    """CPU time of the process on one thread, which other processes hardly disturb; wall time on several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def cpu_timer() -> Timer:
    """Times a run by `clock`."""

    def run(candidate: Run, inputs: Inputs) -> tuple[Outputs, float]:
        start = clock()
        outputs = candidate(inputs)
        return outputs, clock() - start

    return run


def cuda_timer() -> Timer:
    """Times a run by device events.

    The cache is overwritten and all streams are synchronised first. Then the device spins for `HEAD_START` cycles, so
    that a run is not charged for the host's way to its first kernel; a run that waits for the device pays for that.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(FLUSHES * cache, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(candidate: Run, inputs: Inputs) -> tuple[Outputs, float]:
        flush.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        start.record()
        outputs = candidate(inputs)
        stop.record()
        torch.cuda.synchronize()
        return outputs, start.elapsed_time(stop) / 1e3

    return run


def timer(device: str) -> Timer:
    """The device's."""
    return cuda_timer() if device == "cuda" else cpu_timer()


def synchronize(device: str) -> None:
    """Wait for everything that was queued."""
    if device == "cuda":
        torch.cuda.synchronize()
