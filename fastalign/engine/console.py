"""Sinks of the metrics besides the file: a progress bar or plain lines, and trackers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

Sink = Callable[[dict[str, Any]], None]

SHOWN = (
    *("loss", "eval_loss", "accuracy", "eval_accuracy", "rank_accuracy", "rewards/accuracies", "rewards/margins"),
    *("mean_token_accuracy", "grad_norm"),
)
"""Metrics on the console, those that a run has."""


@contextmanager
def open_sinks(
    trackers: Sequence[str], directory: Path, config: dict[str, Any], total: int, done: int, log_every: int
) -> Iterator[list[Sink]]:
    """The console and the trackers of a run, closed at its end.

    Args:
        trackers: names in ``TRACKERS``.
        directory: of the run.
        config: resolved settings, for trackers that keep them.
        total, done: optimizer steps of the run, and those already behind it.
        log_every: steps between plain lines.
    """
    with ExitStack() as stack:
        console = progress(total, done) if sys.stdout.isatty() else plain(total, log_every)
        opened = [console, *(TRACKERS[name](directory, config) for name in trackers)]
        yield [stack.enter_context(sink) for sink in opened]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before any work."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r} in run.trackers: expected one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.trackers asks for {name}, which is not installed: pip install {name}")


def summary(record: dict[str, Any]) -> str:
    """The few numbers of a step that a person watches."""
    shown = [f"{name} {record[name]:.4g}" for name in SHOWN if record.get(name) is not None]
    return "  ".join([*shown, f"lr {record['lr']:.2e}", f"{record['tokens_per_second']:.0f} tok/s"])


@contextmanager
def plain(total: int, log_every: int) -> Iterator[Sink]:
    """Lines for logs and pipes."""
    started: list[tuple[float, int]] = []

    def sink(record: dict[str, Any]) -> None:
        step = record["step"]
        started.append((time.monotonic(), step)) if not started else None
        if step % log_every == 0 or step == total or "eval_loss" in record:
            print(f"step {step}/{total}  {summary(record)}  eta {eta(started[0], step, total)}", flush=True)

    yield sink


def eta(start: tuple[float, int], step: int, total: int) -> str:
    """Time left at the pace since ``start`` (time, step), as h:mm:ss."""
    since, first = start
    if step == first:
        return "?"
    left = int((time.monotonic() - since) / (step - first) * (total - step))
    return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


@contextmanager
def progress(total: int, done: int) -> Iterator[Sink]:
    """A live bar with the time left, on a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, TextColumn("{task.description}")) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda record: bar.update(task, completed=record["step"], description=summary(record))


@contextmanager
def tensorboard(directory: Path, config: dict[str, Any]) -> Iterator[Sink]:
    """Scalars under ``tensorboard/`` of the run directory."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory / "tensorboard")) as writer:

        def sink(record: dict[str, Any]) -> None:
            for name, value in numbers(record).items():
                writer.add_scalar(name, value, record["step"])

        yield sink


def hosted(module: str) -> Callable[[Path, dict[str, Any]], Any]:
    """A tracker with the interface ``init(project, name, config)``, ``log(values, step)``, ``finish()``."""

    @contextmanager
    def opened(directory: Path, config: dict[str, Any]) -> Iterator[Sink]:
        tracker = importlib.import_module(module)
        tracker.init(project="fastalign", name=directory.name, config=config)
        try:
            yield lambda record: tracker.log(numbers(record), step=record["step"])
        finally:
            tracker.finish()

    return opened


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numeric fields of a record, its step apart."""
    return {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "tensorboard": tensorboard,
    "wandb": hosted("wandb"),
    "trackio": hosted("trackio"),
}
