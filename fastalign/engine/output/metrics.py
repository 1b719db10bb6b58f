"""What a run says of itself: one JSON line per step, a console, and trackers that are asked for.

Sums stay on the device until they are written; only then is anything read back. That is every step on CPU, and every
``log_every`` steps on CUDA.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from fastalign.disk import WriteError, writing
from fastalign.engine.errors import RunError
from fastalign.engine.methods import Objective
from fastalign.engine.output.alarms import Alarms
from fastalign.engine.readings import EXTREMES
from fastalign.engine.timing import Stopwatch
from fastalign.parallel.mesh import World

SCHEMA = 1
"""Version of the fields of metrics.jsonl."""
WORK = ("tokens", "tokens_computed", "tokens_response", "examples", "sequences")
"""Counts of a step that are also given per second."""


@dataclass(frozen=True)
class StepResult:
    """A finished step whose numbers may still be on the device.

    Attributes:
        record: what the host knows: step, epoch, lr, counts of work.
        sums: ``[m, 2]`` fp64 (sum, count) of the objective's metrics, over all ranks.
        grad_norm: ``[]`` before clipping.
        losses: this rank's summed loss of each micro-batch, and the examples in it, to name a culprit.
        watch: the step's times.
        extremes: ``[e]`` of `readings.EXTREMES`; empty for methods without.
    """

    record: dict[str, Any]
    sums: Tensor
    grad_norm: Tensor
    losses: Sequence[tuple[Tensor | None, tuple[int, ...]]]
    watch: Stopwatch
    extremes: Tensor | None = None


@dataclass
class MetricsLog:
    """metrics.jsonl, console and trackers; only the main rank writes, every rank checks that the numbers are finite.

    Attributes:
        path: metrics.jsonl; lines are appended.
        objective: names the metrics.
        sinks: functions of a record beside the file: console and trackers.
        peak_flops: what all devices together can do in a second, where that is known.
        vitals: loss and gradient norm of the last step that was read back, equal on all ranks.
    """

    path: Path
    objective: Objective
    world: World
    sinks: Sequence[Callable[[dict], None]]
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        self.failure: WriteError | None = None
        self.vitals: tuple[float, float] = (0.0, 0.0)
        self.pending: list[StepResult] = []
        self.alarms = Alarms(self.world.is_main)
        self.file: TextIO | None = self.path.open("a", encoding="utf-8") if self.world.is_main else None

    def add(self, result: StepResult) -> None:
        """Keep a step until the next flush."""
        self.pending.append(result)

    def flush(self) -> None:
        """Read the kept steps back and write their lines."""
        pending, self.pending = self.pending, []
        for result in pending:
            record = self.finished(result)
            self.write(record)
            self.alarms.check(record)

    def read(self, result: StepResult) -> dict[str, Any]:
        """The record of a step, for `write`, after the kept steps were flushed; raises as that does."""
        self.flush()
        record = self.finished(result)
        self.alarms.check(record)
        return record

    def finished(self, result: StepResult) -> dict[str, Any]:
        """The record of a step whose loss and gradient are finite; RunError for any other."""
        record = self.complete(result)
        if not record["tokens_response"]:  # of completions that are all rewarded alike
            record["loss"] = 0.0
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            raise RunError(self.diagnosis(result, record))
        self.vitals = record["loss"], record["grad_norm"]
        return record

    def complete(self, result: StepResult) -> dict[str, Any]:
        """The record of a step, with metrics, times and speeds."""
        times = result.watch.seconds()
        known = {"schema": SCHEMA, "step": result.record["step"], "epoch": result.record["epoch"]}
        learned = {**means(self.objective, result.sums), "grad_norm": result.grad_norm.item()}
        if result.extremes is not None:
            most = result.extremes.tolist()
            learned |= {name: sign * x for (name, sign), x in zip(EXTREMES.items(), most, strict=False)}
        speeds = {f"{name}_per_second": result.record[name] / times["t_step"] for name in WORK}
        speeds["mfu"] = result.record["flops_model"] / (times["t_step"] * self.peak_flops) if self.peak_flops else None
        speeds |= sampling_times(times, speeds["tokens_per_second"]) if self.objective.on_policy else {}
        return {**known, **learned, **result.record, **speeds, **times, "wall_time": time.time()}

    def diagnosis(self, result: StepResult, record: dict[str, Any]) -> str:
        """One line on a step that is not finite: its numbers and the examples behind them, from all ranks."""
        bad = [ids for loss, ids in result.losses if loss is not None and not loss.isfinite().all()]
        guilty = [i for part in self.world.gather_objects([i for ids in bad for i in ids]) for i in part]
        everyone = [i for part in self.world.gather_objects([i for _, ids in result.losses for i in ids]) for i in part]
        where = f"in the micro-batch of examples {sorted(guilty)}" if guilty else f"on examples {sorted(everyone)}"
        return (
            f"step {record['step']}: loss is {record['loss']} and grad_norm is {record['grad_norm']} {where}; "
            "the step was not applied and checkpoints are intact; "
            "look at these examples, or start again with a lower optim.lr"
        )

    def write(self, record: dict[str, Any]) -> None:
        """Append one line and call the sinks; a line that cannot be written is the ``failure`` that `check` raises."""
        if self.file is None or self.failure is not None:
            return
        with self.noted():
            self.file.write(json.dumps(tidy(record), allow_nan=False) + "\n")
            self.file.flush()
        for sink in self.sinks:
            sink(record)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Keep what a write raises until all ranks can hear of it: one that stops alone leaves the others waiting."""
        try:
            with writing("metrics", self.path, then="go on with run.resume=true"):
                yield
        except WriteError as error:
            self.failure = error

    def sync(self) -> None:
        """Put all lines on the disk: before a checkpoint that follows them. Raises a `WriteError` if one is missing."""
        self.flush()
        if self.file is not None:
            with self.noted():
                os.fsync(self.file.fileno())
        self.check()

    def check(self) -> None:
        """Raise what kept a line from being written."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            with suppress(OSError):  # what could not be written has been reported
                self.file.close()


def sampling_times(times: dict[str, float], speed: float) -> dict[str, float]:
    """Times and speed of an on-policy step under the names that TRL and verl have for them."""
    update = times["t_forward"] + times["t_backward"] + times["t_optimizer"]
    parts = {"generate": times["t_generate"], "score": times["t_reward"], "reference": times["t_reference"]}
    named = {f"timing_s/{name}": seconds for name, seconds in {**parts, "update": update}.items()}
    return {**named, "step_time": times["t_step"], "perf/tokens_per_second": speed}


def means(objective: Objective, sums: Tensor) -> dict[str, float]:
    """Metrics from their ``[m, 2]`` (sum, count), ``loss`` first; nan where nothing was counted."""
    pairs = {name: (s, n) for name, (s, n) in zip(objective.metric_names, sums.tolist(), strict=True)}
    values = {name: s / n if n else math.nan for name, (s, n) in pairs.items()}
    values |= dict(objective.method.family.derive(pairs))
    known = {name: value for name, value in values.items() if value is not None}
    return {"loss": known.pop("loss"), **known}


def tidy(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan: a number that is not finite becomes null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; see `read_lines`."""
    return [record for _, record in read_lines(path) if record is not None]


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a metrics.jsonl with its record, one at a time; a last line that was cut short comes with None."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            record = None
            try:
                record = json.loads(line.decode("utf-8", "replace"))
            except json.JSONDecodeError as error:
                if next(lines, None) is not None:
                    raise ValueError(f"{path}: line {number} is not JSON ({error}); remove it") from error
            else:
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError(f"{path}: line {number} is not the object of a step; remove it")
            yield line, record


@dataclass(frozen=True)
class Kept:
    """What `truncate_metrics` has left: the step of the last line, 0 without any; and what it has not."""

    last: int
    dropped: int
    was_cut: bool


def truncate_metrics(path: Path, step: int) -> Kept:
    """Cut the lines after ``step`` off, so that a resumed run writes no step twice."""
    last = size = dropped = 0
    was_cut, line = False, b"\n"
    for text, record in read_lines(path):
        was_cut = record is None
        if record is not None and record["step"] <= step and not dropped:
            last, size, line = record["step"], size + len(text), text
        else:
            dropped += not was_cut
    with writing("metrics", path, then="start again"), path.open("ab") as file:
        file.truncate(size)
        file.write(b"" if line.endswith(b"\n") else b"\n")
    return Kept(last, dropped, was_cut)
