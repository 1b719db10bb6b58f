"""Where every rank is, told to the others every few seconds: a wait in vain then names who is missing, and where.

The loop notes the step and its part in two attributes and pays nothing else for it. A thread reads them, looks which
collective the main thread is in, and writes that to the store through which the ranks have found each other.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

PERIOD = 1.0
"""Seconds between two notes of a rank."""
SILENT = 3
"""Periods after which a rank that writes no more counts as silent."""
GRACE = 30.0
"""Seconds beyond ``parallel.timeout_minutes`` after which a rank that has not moved ends its process."""
MOST = 8
"""Places of ranks that an error names."""
OPEN_ENDED = ("generate", "reward")
"""Parts of a step that last as long as the code of a user does: a rank that is in them and waits for none is let be."""
COLLECTIVES, OURS = "distributed_c10d.py", str(Path(__file__).parents[1]) + os.sep
"""Files whose frames tell what a thread does."""


@dataclass
class Now:
    """What this process does.

    Attributes:
        step: of the run; 0 before the first.
        part: of the step, or of the run.
    """

    step: int = 0
    part: str = "start-up"


NOW = Now()
"""Of this process, whose loop sets it."""


@contextmanager
def doing(part: str) -> Iterator[None]:
    """Note that the block is a part of a step or of the run; an error leaves the note as it is."""
    before, NOW.part = NOW.part, part
    yield
    NOW.part = before


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        step, part: see `Now`.
        call: what its main thread waits or works in.
        number: of the collectives that it has entered.
    """

    step: int
    part: str
    call: str
    number: int

    @property
    def waits(self) -> bool:
        """Whether it may be waiting for another rank."""
        return self.part not in OPEN_ENDED or not self.call.startswith("in no")

    def __str__(self) -> str:
        return f"{f'step {self.step}' if self.step else 'before step 1'}, {self.part}, {self.call}"


def here(error: BaseException | None = None) -> Place:
    """Where this process is now, or where an error came from."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if error is not None:
        frame = [frame for frame, _ in walk_tb(error.__traceback__)][-1]
    return Place(NOW.step, NOW.part, call_of(frame), collectives())


def collectives() -> int:
    """How many collectives this process has entered in the group of all ranks."""
    group: Any = dist.group.WORLD
    return group._get_sequence_number_for_group() if group is not None else 0


def call_of(frame: FrameType | None) -> str:
    """The collective that a thread is in, and the line of ours that called it; without one the line it is at."""
    collective, innermost = "", frame
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        if frame.f_code.co_filename.endswith(COLLECTIVES):
            collective = frame.f_code.co_name
        frame = frame.f_back
    at = frame or innermost
    line = f"{Path(at.f_code.co_filename).name}:{at.f_lineno} {at.f_code.co_name}" if at else "at its end"
    return f"in {collective} of {line}" if collective else f"in no collective ({line})"


class Watch:
    """Tells the other ranks where this one is, and ends a process that waits longer than any wait may last.

    Args:
        rank, size: of the process, and of all.
        minutes: `parallel.timeout_minutes`.
    """

    def __init__(self, rank: int, size: int, minutes: float) -> None:
        self.rank, self.size, self.minutes = rank, size, minutes
        own: Any = _get_default_store()  # the collectives may be waiting in theirs
        self.store = PrefixStore("places", own.clone())
        self.store.set_timeout(timedelta(seconds=PERIOD))
        self.period = min(PERIOD, 10 * minutes)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, name="whereabouts", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Note the place again and again."""
        last, since = here(), time.monotonic()
        while True:
            with suppress(RuntimeError):  # the store is gone, with the process that kept it
                self.store.set(str(self.rank), json.dumps([asdict(last), time.monotonic() - since, time.time()]))
            if self.done.wait(self.period):
                return
            if (place := here()) != last:
                last, since = place, time.monotonic()
            elif place.waits and time.monotonic() - since > 60 * self.minutes + GRACE * (1 + (self.rank > 0)):
                self.end()

    def end(self) -> None:
        """End the process, which may be in a call that never returns; rank 0 is the first to."""
        sys.stderr.write(f"fastalign: error: {waited(self.rank, self.minutes, self.places())}\n")
        sys.stderr.flush()
        os._exit(1)

    def close(self) -> None:
        """Stop."""
        self.done.set()
        self.thread.join(PERIOD)

    def places(self, error: BaseException | None = None) -> str:
        """Where all ranks are, this one at an error; those at one place together. Empty where the store is gone."""
        told = []
        with suppress(RuntimeError):
            others = (rank for rank in range(self.size) if rank != self.rank)
            told = [(str(here(error)), self.rank), *((self.place_of(rank), rank) for rank in others)]
        alike = [(text, [rank for _, rank in some]) for text, some in groupby(sorted(told), key=lambda pair: pair[0])]
        alike.sort(key=lambda pair: pair[1])
        lines = [f"{ranks_as_text(ranks)}: {text}" for text, ranks in alike[:MOST]]
        return "; ".join(lines + ["..."] * (len(alike) > MOST))

    def place_of(self, rank: int) -> str:
        """Where a rank was when it last said so, and how long ago that is where it says no more."""
        if not self.store.check([str(rank)]):
            return "has said nothing yet"
        place, since, then = json.loads(self.store.get(str(rank)))
        silent = time.time() - then
        text, some = str(Place(**place)), SILENT * self.period
        text += f" for {since:.0f} s" if since > some else ""
        return f"{text}, not heard of for {silent:.0f} s" if silent > some else text


def waited(rank: int, minutes: float, places: str) -> str:
    """One line on a wait that is given up."""
    return (
        f"rank {rank} has waited {minutes:g} minutes (parallel.timeout_minutes) for another rank: "
        f"{places or 'look at what that one said last'}; if it is only slow, raise parallel.timeout_minutes"
    )


def ranks_as_text(ranks: list[int]) -> str:
    """Ranks in words.

    Example:
        >>> ranks_as_text([3]), ranks_as_text([0, 1, 2, 5])
        ('rank 3', 'ranks 0-2, 5')
    """
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])]
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(words)}"
