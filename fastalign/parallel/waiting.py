"""Sharing the cores with other busy processes: threads that wait for one another sleep instead of spinning.

OpenMP's threads spin at the end of every parallel region, which is fastest while each of them has a core. Beside one
busy process on two cores it costs two thirds of the speed: a thread that spins burns the time of the one it waits for.
To sleep at once costs a fifth of the speed where there is no neighbour. So the kernel is asked, twice a second, how
long our threads stood in line for a core.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fastalign.ops.backends import cpp

log = logging.getLogger(__name__)

TASKS = Path("/proc/self/task")
PERIOD = 0.5
"""Seconds between two looks."""
CROWDED = 0.1
"""Seconds in line per second, over all threads, from which on the cores count as shared."""
CALM_LOOKS = 4
"""So many looks below that in a row, and the cores count as ours again."""


@contextmanager
def sharing_cores() -> Iterator[None]:
    """Let waiting threads sleep for as long as other processes want the cores, inside this context.

    Nothing is done where ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` say how to wait, where there is one thread, or where
    the kernel does not tell (``/proc/self/task/*/schedstat``). No result depends on it.
    """
    if not adjustable():
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(done,), name="fastalign-cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def adjustable() -> bool:
    """Whether this process may and can change how its threads wait."""
    decided = os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT")
    if decided or torch.get_num_threads() == 1 or cpp.unavailable() or not queued():
        return False
    from fastalign import _C

    return hasattr(_C, "ShortWaits")


def queued() -> float:
    """Seconds that the living threads of this process have been ready to run without a core."""
    total = 0
    for task in TASKS.iterdir() if TASKS.exists() else ():
        with suppress(OSError):  # a thread that has just ended
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9


def watch(done: threading.Event) -> None:
    """Keep the waits short while the cores are shared."""
    from fastalign import _C

    short, calm, told = None, 0, False
    before, then = queued(), time.monotonic()
    while not done.wait(PERIOD):
        now, clock = queued(), time.monotonic()
        crowded = now - before > CROWDED * (clock - then)
        before, then = now, clock
        calm = 0 if crowded else calm + 1
        if crowded and short is None:
            short = _C.ShortWaits(torch.get_num_threads())
            if not told:
                log.info("other processes use this machine's cores: the run is slower than it would be alone")
                told = True
        elif calm >= CALM_LOOKS:
            short = None
