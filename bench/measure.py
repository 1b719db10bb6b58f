"""Interleaved timing with a correctness gate.

Each round draws new inputs and runs every candidate once, in a random order, on its own fresh copy of them. The outputs
of the last round are compared with a float64 oracle: the tensors that are checked are tensors that were timed. A
candidate whose error is over the budget, or that raises, gets no number.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.common import quantiles, relative_error, synchronize
from bench.field import OURS, ROOF, Field, Inputs, Outputs, Run

LEAST_ROUNDS = 5
"""Rounds that a case gets whatever its budget of seconds."""


@dataclass(frozen=True)
class Case:
    """One workload, and everyone who can do it.

    Attributes:
        name, shape, dtype: what is measured, for the table.
        make: draws inputs from a generator, on its device; those that need gradients say so.
        truth: the outputs in float64.
        field: the candidates, and those that cannot run here with the reason.
        baseline: the candidate whose own error, doubled, is the error budget of the others.
        targets: the least ratio ``candidate time / our time`` wanted.
        roof: the candidate that bounds the task from below.
        least: the part of the roof's work that the task cannot avoid.
        calls: how many calls, each on inputs of its own, make one sample: for what is too short to be timed alone.
    """

    name: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.Generator], Inputs]
    truth: Callable[[Inputs], Outputs]
    field: Field
    baseline: str = "eager"
    targets: dict[str, float] = dataclasses.field(default_factory=dict)
    roof: str | None = None
    least: float = 1.0
    calls: int = 1

    @property
    def candidates(self) -> dict[str, Run]:
        return self.field.runs

    @property
    def device(self) -> str:
        return self.field.setting.device


@dataclass(frozen=True)
class Figure:
    """A candidate's result: its samples in seconds and its error, or the reason why there is none.

    Attributes:
        first: seconds of its first call, compilation and autotuning included.
        plans: how fastalign cut the call, where a plan was made.
    """

    samples: tuple[float, ...]
    errors: dict[str, float]
    failure: str | None = None
    first: float | None = None
    plans: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """The largest relative error over the outputs; None for a roof."""
        return max(self.errors.values()) if self.errors else None

    @property
    def median(self) -> float:
        return quantiles(self.samples)[1]


def _copy(inputs: Inputs) -> Inputs:
    return {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in inputs.items()}


class Contest:
    """The interleaved run of one case.

    `until` advances the shuffled sequence of candidates up to a given one, so that pytest-benchmark can time that one
    itself while its rivals run in between; `sample` times it.

    Args:
        rounds: how many rounds to run.
        seconds: after so many no further round begins, once there were `LEAST_ROUNDS`.
    """

    def __init__(self, case: Case, rounds: int, seconds: float = float("inf"), seed: int = 0) -> None:
        self.case, self.rounds, self.seconds = case, rounds, seconds
        self.round = 0
        self.samples: dict[str, list[float]] = {name: [] for name in case.candidates}
        self.errors: dict[str, dict[str, float]] = {}
        self.failures: dict[str, str] = {}
        self.first: dict[str, float] = {}
        self.plans: dict[str, tuple[str, ...]] = {}
        self.inputs: Inputs = {}
        self._truth: Outputs | None = None
        self._generator = torch.Generator(case.device).manual_seed(seed)
        self._order = random.Random(seed)
        self._time = timer(case.device)
        self._turns = self._sequence()
        self._fresh: list[Inputs] = []
        self._deadline = 0.0

    def _sequence(self) -> Iterator[str]:
        """Candidates in their order of turns; a last round, known beforehand, has an oracle."""
        while self._truth is None:
            self.round += 1
            self.inputs = self.case.make(self._generator)
            late = time.monotonic() > self._deadline and self.round >= LEAST_ROUNDS
            if self.round >= self.rounds or late:
                self._truth = self.case.truth(self.inputs)
            yield from self._order.sample(list(self.case.candidates), len(self.case.candidates))

    def warm_up(self) -> None:
        """Run every candidate once, its first call; a rival that raises is out, we are not excused."""
        if "torch._dynamo" in sys.modules:  # graphs of other sizes would make these dynamic
            torch.compiler.reset()
        self.inputs = self.case.make(self._generator)
        for name, run in self.case.candidates.items():
            fresh = _copy(self.inputs)
            synchronize(self.case.device)
            start = time.perf_counter()
            with recorded_plans() as plans:
                self._guarded(name, lambda run=run, fresh=fresh: (run(fresh), synchronize(self.case.device)))
            self.first[name] = time.perf_counter() - start
            self.plans[name] = tuple(dict.fromkeys(map(str, plans)))
        self._deadline = time.monotonic() + self.seconds

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        """``call()``; what a rival raises is its failure."""
        try:
            return call()
        except Exception as error:
            if name.startswith(OURS):
                raise
            self.failures[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            return None

    def sample(self, name: str) -> None:
        """Time one run of ``name`` on the inputs that `prepare` copied; in the last round check it."""
        fresh, self._fresh = self._fresh, []
        timed = self._guarded(name, lambda: self._time(self.case.candidates[name], fresh))
        if timed is None:
            return
        outputs, seconds = timed
        self.samples[name].append(seconds / self.case.calls)
        if self._truth is not None:
            self.errors[name] = {key: relative_error(y, self._truth[key]) for key, y in outputs.items()}

    def prepare(self, name: str) -> None:
        """Copy the round's inputs for ``name``, outside the timed region."""
        self._fresh = [_copy(self.inputs) for _ in range(self.case.calls)]

    def until(self, target: str) -> bool:
        """Run the candidates whose turn comes before ``target``'s, and prepare its inputs; False after the last."""
        for name in self._turns:
            if name in self.failures:
                continue
            self.prepare(name)
            if name == target:
                return True
            self.sample(name)
        return False

    def figures(self) -> dict[str, Figure]:
        """Every candidate's figure, the absent ones included."""
        field, found = self.case.field, {}
        budget = _budget(self.errors[self.case.baseline], self.case.dtype)
        for name in [*field.runs, *field.skipped]:
            failure = self.failures.get(name) or field.skipped.get(name)
            if failure is None:
                errors = self.errors[name]
                found[name] = Figure(
                    tuple(self.samples[name]), errors, _verdict(errors, budget), self.first[name], self.plans[name]
                )
            else:
                found[name] = Figure((), {}, failure)
        return found


def _verdict(errors: dict[str, float], budget: dict[str, float]) -> str | None:
    wrong = {key: error for key, error in errors.items() if not error <= budget.get(key, budget["*"])}
    return (
        "; ".join(f"{key}: error {e:.1e} over {budget.get(key, budget['*']):.1e}" for key, e in wrong.items()) or None
    )


def _budget(baseline: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Twice the baseline's own error, and never less than a few roundings; "*" for outputs that it does not have.

    A 16-bit result is rounded once or twice, an fp32 one at every step.
    """
    least = max(4 * torch.finfo(dtype).eps, 32 * torch.finfo(torch.float32).eps)
    finite = {key: value for key, value in baseline.items() if math.isfinite(value)}
    return {"*": least} | {key: max(2 * value, least) for key, value in finite.items()}


@contextmanager
def recorded_plans() -> Iterator[list[Any]]:
    """A list of what the linear ops plan meanwhile, as their log says it."""
    plans: list[Any] = []
    log, listener = logging.getLogger("fastalign.plan"), logging.Handler()
    listener.emit = lambda record: plans.extend(record.args or ())
    before, log.propagate = log.level, False
    log.setLevel(logging.DEBUG)
    log.addHandler(listener)
    try:
        yield plans
    finally:
        log.removeHandler(listener)
        log.setLevel(before)
        log.propagate = True


def run(case: Case, rounds: int, seconds: float = float("inf"), seed: int = 0) -> dict[str, Figure]:
    """Time ``case`` over ``rounds`` rounds, or as many as fit into ``seconds``."""
    contest = Contest(case, rounds, seconds, seed)
    contest.warm_up()
    while contest.until(OURS):
        contest.sample(OURS)
    return contest.figures()


# --- clocks ----------------------------------------------------------------------------------------------------------

Timer = Callable[[Run, "list[Inputs]"], "tuple[Outputs, float]"]
"""Calls a candidate on each of the inputs: the last outputs, and the seconds of all calls."""

HEAD_START = 1_000_000
"""Cycles that a GPU spins before the timed region, half a millisecond, in which the host queues the first kernels."""
FLUSHES = 4
"""The flushed buffer in units of the level-two cache."""


def clock() -> float:
    """CPU time of the process on one thread, which other processes hardly disturb; wall time on several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def cpu_timer() -> Timer:
    """Times a run by `clock`."""

    def run(candidate: Run, inputs: list[Inputs]) -> tuple[Outputs, float]:
        start = clock()
        outputs = [candidate(x) for x in inputs]
        return outputs[-1], clock() - start

    return run


def cuda_timer() -> Timer:
    """Times a run by device events.

    The cache is overwritten and all streams are synchronised first. Then the device spins for `HEAD_START` cycles, so
    that a run is not charged for the host's way to its first kernel; a run that waits for the device pays for that.
    """
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(FLUSHES * cache, dtype=torch.uint8, device="cuda")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(candidate: Run, inputs: list[Inputs]) -> tuple[Outputs, float]:
        flush.zero_()
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        start.record()
        outputs = [candidate(x) for x in inputs]
        stop.record()
        torch.cuda.synchronize()
        return outputs[-1], start.elapsed_time(stop) / 1e3

    return run


def timer(device: str) -> Timer:
    """The device's."""
    return cuda_timer() if device == "cuda" else cpu_timer()


# --- records ---------------------------------------------------------------------------------------------------------


def rows(case: Case, figures: dict[str, Figure]) -> list[dict[str, Any]]:
    """The figures as flat records: milliseconds, ratios to us and to the baseline, errors."""
    what = {"case": case.name, "shape": case.shape, "dtype": str(case.dtype).split(".")[-1]}
    return [{**what, "who": name, **_row(case, name, figures)} for name in figures]


def _row(case: Case, name: str, figures: dict[str, Figure]) -> dict[str, Any]:
    figure, ours = figures[name], figures[OURS]
    if figure.failure:
        return {"failure": figure.failure}
    low, middle, high = (1e3 * value for value in quantiles(figure.samples))
    roof = figures.get(case.roof or "")
    over = figure.median / ours.median if not ours.failure else None
    return {
        **{"p20_ms": low, "p50_ms": middle, "p80_ms": high, "rounds": len(figure.samples)},
        "first_ms": 1e3 * (figure.first or 0.0),
        "over_baseline": figure.median / figures[case.baseline].median,
        "over_fastalign": over,
        "of_roof": case.least * roof.median / figure.median if roof and not name.startswith(ROOF) else None,
        "errors": figure.errors,
        "target": case.targets.get(name),
        "plans": list(figure.plans),
    }


def missed_targets(case: Case, figures: dict[str, Figure]) -> dict[str, str]:
    """The rivals that we do not beat by the wanted ratio; those without a number decide nothing."""
    if figures[OURS].failure:
        return {}
    timed = {name: figures[name] for name in case.targets if name in figures and not figures[name].failure}
    ratios = {name: figure.median / figures[OURS].median for name, figure in timed.items()}
    return {name: f"{r:.2f}x, wanted {case.targets[name]:.2f}x" for name, r in ratios.items() if r < case.targets[name]}


def profiled(case: Case) -> torch.profiler.profile:
    """A profile of one run of ours, after one that warms up."""
    inputs = case.make(torch.Generator(case.device).manual_seed(0))
    case.candidates[OURS](_copy(inputs))
    fresh = _copy(inputs)
    synchronize(case.device)
    with torch.profiler.profile() as profiler:
        case.candidates[OURS](fresh)
        synchronize(case.device)
    return profiler
