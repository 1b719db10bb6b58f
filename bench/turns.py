"""The sides of ``fastalign bench train`` take turns: a step of one, a step of the other, and so on.

Each side is a process of its own. It stops before its first step and after every step until it is told to go on, so
that one side works at a time, and what disturbs the machine for longer than a step disturbs all sides. Where that is
allowed, the sides go before other processes in line for a core; how long they stood in line is measured, step by step.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from bench import common
from fastalign.parallel.waiting import queued

PAUSE = 0.01
"""Seconds between two turns: OpenMP's threads spin for milliseconds before they sleep."""


# --- in the side's process -------------------------------------------------------------------------------------------


@dataclass
class StepLog:
    """What a side reports of its steps.

    Attributes:
        wall, cpu: seconds of each step.
        queued: of each step, the seconds in which threads of the side were ready to run and had no core.
        losses: one per step.
        sampling, rewards: of each step that samples, the seconds of that, and the mean reward.
        tokens, scored, flops: what a step computed, where the side tells.
        ready_mib, peak_mib: peak memory before the first step, and until the end of the last.
        turns: the descriptor on which a turn is handed back, where there are turns.
        profiler: started after ``profile_after`` steps, when there is one.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    ready_mib: float = 0.0
    peak_mib: float = 0.0
    device: str = "cpu"
    turns: int | None = None
    profiler: torch.profiler.profile | None = None
    profile_after: int = 0
    began: tuple[float, float, float] | None = None

    def tick(self) -> None:
        """To be called before the first step and after each: ends a step, and waits for the turn to take the next."""
        common.synchronize(self.device)
        if self.began is not None:
            for spent, now, then in zip((self.wall, self.cpu, self.queued), clocks(), self.began, strict=True):
                spent.append(now - then)
        self.peak_mib = common.peak_mib(self.device)
        self.ready_mib = self.ready_mib or self.peak_mib
        if self.turns is not None:
            wait_for_turn(self.turns)
        if self.profiler is not None and len(self.wall) == self.profile_after:
            self.profiler.start()
        self.began = clocks()


def clocks() -> tuple[float, float, float]:
    """Seconds of the wall's clock, of this process on cores, and of its threads in line for one."""
    return time.perf_counter(), time.process_time(), queued()


def wait_for_turn(done: int) -> None:
    """Hand the turn back and wait for the next."""
    os.write(done, b".")
    if not sys.stdin.buffer.read(1):
        sys.exit("the benchmark that gives the turns is gone")


# --- in the benchmark's process --------------------------------------------------------------------------------------


class Side:
    """A side's process. Its output goes to ``log``.

    Args:
        name: for messages.
        command: its words; ``--turns DESCRIPTOR`` is added.
        environment: added to this process's.
        ahead: of other processes in line for the cores, where this one may ask for it.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: dict[str, str], ahead: bool = False
    ) -> None:
        self.name, self.log = name, log
        ours, theirs = os.pipe()
        self.done = os.fdopen(ours, "rb", buffering=0)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--turns", str(theirs)],
                cwd=common.ROOT, env={**os.environ, **environment}, pass_fds=[theirs],
                stdin=subprocess.PIPE, stdout=file, stderr=file, bufsize=0,
            )  # fmt: skip
        os.close(theirs)
        if ahead:
            go_ahead(self.process.pid)

    def wait(self) -> None:
        """Until it hands its turn back.

        Raises:
            SystemExit: it ended instead.
        """
        if not self.done.read(1):
            self.end()
            raise SystemExit(f"{self.name} ended before its last step:\n{self.log.read_text()[-3000:]}")

    def go(self) -> None:
        """Give it the turn."""
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `wait` says why
            self.process.stdin.write(b".")

    def end(self) -> None:
        """Wait for its end, and leave it.

        Raises:
            SystemExit: it failed.
        """
        code = self.process.wait()
        self.close()
        if code:
            raise SystemExit(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")

    def close(self) -> None:
        """Stop it if it runs."""
        self.process.kill()
        self.process.wait()
        self.done.close()


def go_ahead(pid: int) -> None:
    """Let a process that has just started, and its threads to come, have a core whenever they want one, where allowed.

    It takes root's rights or CAP_SYS_NICE. The kernel leaves a twentieth of the time to others. Niceness would not do:
    a thread that wakes waits for the slice of the one that runs, thousands of times a second.
    """
    with suppress(AttributeError, OSError):  # not Linux; not allowed
        os.sched_setscheduler(pid, os.SCHED_RR, os.sched_param(1))


def take_turns(start: Sequence[Callable[[], Side]], steps: int, in_a_row: bool = False) -> None:
    """Start the sides one after the other, then let each take a step, in random order, ``steps`` times.

    Args:
        in_a_row: each side takes all its steps before the next side's first.
    """
    with ExitStack() as stack:
        sides = []
        for new in start:
            sides.append(new())
            stack.callback(sides[-1].close)
            sides[-1].wait()
        shuffled = (random.Random(step).sample(sides, len(sides)) for step in range(steps))
        for side in chain.from_iterable([side] * steps for side in sides) if in_a_row else chain(*shuffled):
            side.go()
            side.wait()
        for side in sides:
            side.go()
            side.end()
