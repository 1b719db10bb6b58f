"""Interleaved timing with a correctness gate.

Each round draws new inputs and runs every candidate once, in a random order, on its own fresh copy of them. The outputs
of the last round are compared with a float64 oracle: the tensors that are checked are tensors that were timed. A
candidate whose error is over the budget, or that raises, gets no number.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.common import quantiles, relative_error

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
OURS = "fastalign"


@dataclass(frozen=True)
class Case:
    """One workload, and everyone who can do it.

    Attributes:
        name, shape, dtype: what is measured, for the table.
        make: draws inputs from a generator; those that need gradients say so.
        truth: the outputs in float64.
        candidates: timed functions from inputs to outputs; a roof, which computes something simpler, returns none.
        baseline: the candidate whose own error, doubled, is the error budget of the others.
        skipped: candidates that cannot run here, with the reason.
        targets: the least ratio ``candidate time / our time`` wanted.
    """

    name: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.Generator], Inputs]
    truth: Callable[[Inputs], Outputs]
    candidates: dict[str, Callable[[Inputs], Outputs]]
    baseline: str = "eager"
    skipped: dict[str, str] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A candidate's result: its samples in seconds and its error, or the reason why there is none."""

    samples: tuple[float, ...]
    errors: dict[str, float]
    failure: str | None = None

    @property
    def error(self) -> float | None:
        """The largest relative error over the outputs; None for a roof."""
        return max(self.errors.values()) if self.errors else None

    @property
    def median(self) -> float:
        return quantiles(self.samples)[1]


def clock() -> float:
    """CPU time of the process on one thread, which other processes hardly disturb; wall time on several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _copy(inputs: Inputs) -> Inputs:
    return {name: value.detach().clone().requires_grad_(value.requires_grad) for name, value in inputs.items()}


class Contest:
    """The interleaved run of one case.

    `until` advances the endless shuffled sequence of candidates up to a given one, so that pytest-benchmark can time
    that one itself while its rivals run in between.
    """

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        self.samples: dict[str, list[float]] = {name: [] for name in case.candidates}
        self.outputs: dict[str, Outputs] = {}
        self.failures: dict[str, str] = {}
        self.inputs: Inputs = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._order = random.Random(seed)
        self._turns = self._sequence()
        self._fresh: Inputs = {}

    def _draw(self) -> None:
        self.inputs = self.case.make(self._generator)
        self.outputs = {}

    def _sequence(self) -> Iterator[str]:
        while True:
            self._draw()
            yield from self._order.sample(list(self.case.candidates), len(self.case.candidates))

    def warm_up(self) -> None:
        """Run every candidate once, untimed; a rival that raises is out, we are not excused."""
        self._draw()
        for name, run in list(self.case.candidates.items()):
            try:
                run(_copy(self.inputs))
            except Exception as error:
                if name.startswith(OURS):
                    raise
                self.failures[name] = f"{type(error).__name__}: {error}"

    def sample(self, name: str) -> None:
        """Time one run of ``name`` on the inputs that `prepare` copied."""
        fresh, self._fresh = self._fresh, {}
        start = clock()
        outputs = self.case.candidates[name](fresh)
        self.samples[name].append(clock() - start)
        self.outputs[name] = outputs

    def prepare(self, name: str) -> None:
        """Copy the round's inputs for ``name``, outside the timed region."""
        self.outputs.pop(name, None)
        self._fresh = _copy(self.inputs)

    def until(self, target: str) -> None:
        """Run the candidates whose turn comes before ``target``'s, and prepare its inputs."""
        for name in self._turns:
            if name in self.failures:
                continue
            self.prepare(name)
            if name == target:
                return
            self.sample(name)

    def finish_round(self) -> None:
        """Run those that have not yet had their turn in the last round."""
        for name in self.case.candidates:
            if name not in self.outputs and name not in self.failures:
                self.prepare(name)
                self.sample(name)

    def figures(self) -> dict[str, Figure]:
        """Check the last round against float64 and return every candidate's figure, the skipped ones included."""
        truth = self.case.truth(self.inputs)
        errors = {name: _errors(outputs, truth) for name, outputs in self.outputs.items()}
        budget = _budget(errors[self.case.baseline], self.case.dtype)
        figures = {name: Figure((), {}, reason) for name, reason in {**self.failures, **self.case.skipped}.items()}
        for name, found in errors.items():
            wrong = [
                f"{key}: error {value:.1e} over {budget[key]:.1e}"
                for key, value in found.items()
                if value > budget[key]
            ]
            figures[name] = Figure(tuple(self.samples[name]), found, "; ".join(wrong) or None)
        return {name: figures[name] for name in [*self.case.candidates, *self.case.skipped]}


def _errors(outputs: Outputs, truth: Outputs) -> dict[str, float]:
    return {key: relative_error(value, truth[key]) for key, value in outputs.items()}


def _budget(baseline: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """Twice the baseline's own error, and never less than four roundings of the result's dtype."""
    return {key: max(2 * value, 4 * torch.finfo(dtype).eps) for key, value in baseline.items()}


def run(case: Case, rounds: int, seed: int = 0) -> dict[str, Figure]:
    """Time ``case`` over ``rounds`` rounds without pytest."""
    contest = Contest(case, seed)
    contest.warm_up()
    for _ in range(rounds):
        contest.until(OURS)
        contest.sample(OURS)
    contest.finish_round()
    return contest.figures()


def rows(case: Case, figures: dict[str, Figure]) -> list[dict[str, Any]]:
    """The figures as flat records: milliseconds, ratios to us and to the baseline, errors."""
    ours, baseline = figures[OURS], figures[case.baseline]
    result = []
    for name, figure in figures.items():
        row: dict[str, Any] = {
            "case": case.name,
            "shape": case.shape,
            "dtype": str(case.dtype).split(".")[-1],
            "who": name,
        }
        if figure.failure:
            result.append({**row, "failure": figure.failure})
            continue
        low, middle, high = (1e3 * value for value in quantiles(figure.samples))
        row |= {"p20_ms": low, "p50_ms": middle, "p80_ms": high, "rounds": len(figure.samples)}
        row |= {"over_baseline": figure.median / baseline.median, "errors": figure.errors}
        row |= {
            "over_fastalign": None if ours.failure else figure.median / ours.median,
            "target": case.targets.get(name),
        }
        result.append(row)
    return result
