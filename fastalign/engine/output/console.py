"""Sinks of the metrics besides the file: the console, and trackers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastalign.disk import write_whole
from fastalign.engine.output.progress import Pace, training_bar

log = logging.getLogger(__name__)

Sink = Callable[[dict[str, Any]], None]

TRACKED = "trackers.json"
"""What each tracker knows the run of a directory by."""
SHOWN = (
    *("loss", "accuracy", "rank_accuracy", "rewards/accuracies", "margin", "rewards/margins", "mean_token_accuracy"),
    "grad_norm",
)
"""Metrics on the console, those that a run has; ``eval_`` ones alike."""
SHOWN_ON_POLICY = (
    *("reward", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio", "kl", "entropy"),
    *("critic/vf_explained_var", "grad_norm"),
)
"""Those of methods that sample: their loss is near 0 whatever they learn. Of several rewards also each one's mean."""


@contextmanager
def open_sinks(
    trackers: Sequence[str], directory: Path, config: dict[str, Any], total: int, done: int, log_every: int
) -> Iterator[list[Sink]]:
    """The console and the trackers of a run, closed at its end; of ``total`` steps ``done`` are behind it already."""
    with ExitStack() as stack:
        opened = [console(total, done, log_every), *(TRACKERS[name](directory, config, done) for name in trackers)]
        yield [stack.enter_context(sink) for sink in opened]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before any work."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r} in run.trackers: expected one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"run.trackers asks for {name}, which is not installed: pip install {name}")


@contextmanager
def console(total: int, done: int, log_every: int) -> Iterator[Sink]:
    """Lines every ``log_every`` steps and after evaluations; on a terminal also a bar below them, moved by every step.

    A line shows plain means over the steps since the last one (not weighted by their tokens), the current learning
    rate, and the tokens of those steps over their time. An evaluation has a line of its own.
    """
    since: list[dict[str, Any]] = []
    pace = Pace(total)
    with training_bar(total, done) as bar:

        def sink(record: dict[str, Any]) -> None:
            step = record["step"]
            left = pace.left(step)
            since.append(record)
            bar.move(step, left, words(record))
            if step % log_every == 0 or step == total:
                bar.write("  ".join([f"step {step}/{total}", *words(means(since)), f"eta {left}"]))
                since.clear()
            if any(name.startswith("eval_") for name in record):
                bar.write("  ".join([f"step {step}/{total}", *metrics(record, "eval_")]))

        yield sink


def means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a line says of several steps; a step in which a metric counted nothing plays no part in its mean."""
    known = {name: [r[name] for r in records if is_number(r.get(name))] for name in shown(records[-1])}
    tokens, seconds = (sum(r.get(name, 0) for r in records) for name in ("tokens", "t_step"))
    speed = tokens / seconds if seconds else records[-1]["tokens_per_second"]
    return {
        **{name: sum(values) / len(values) for name, values in known.items() if values},
        **{"lr": records[-1]["lr"], "tokens_per_second": speed},
    }


def words(record: dict[str, Any]) -> list[str]:
    """The few numbers of a step that a person watches."""
    return [*metrics(record), f"lr {record['lr']:.2e}", f"{record['tokens_per_second']:.0f} tok/s"]


def metrics(record: dict[str, Any], prefix: str = "") -> list[str]:
    """Names and values of the metrics that are shown."""
    names = [f"{prefix}{name}" for name in shown(record)]
    return [f"{name} {record[name]:.4g}" for name in names if is_number(record.get(name))]


def shown(record: dict[str, Any]) -> Sequence[str]:
    """The metrics of a step, or of an evaluation, that are on the console."""
    if "reward" not in record:
        return SHOWN
    parts = [name for name in record if re.fullmatch("rewards/.*/mean", name)]
    return ["reward", *(parts if len(parts) > 1 else []), *SHOWN_ON_POLICY[1:]]


def is_number(value: Any) -> bool:
    """Whether something was counted: neither absent nor nan."""
    return value is not None and value == value


@contextmanager
def tensorboard(directory: Path, config: dict[str, Any], done: int) -> Iterator[Sink]:
    """Scalars under ``tensorboard/`` of the run directory; those of steps that come again are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1) as writer:

        def sink(record: dict[str, Any]) -> None:
            for name, value in numbers(record).items():
                writer.add_scalar(name, value, record["step"])

        yield sink


def hosted(module: str, key: str) -> Callable[[Path, dict[str, Any], int], Any]:
    """A tracker with the interface ``init(project, name, config)``, ``log(values, step)``, ``finish()``.

    A resumed run goes on in the tracker's run, which ``key``, an argument and an attribute of what ``init`` returns,
    finds again: ``trackers.json`` of the run directory keeps it.
    """

    @contextmanager
    def opened(directory: Path, config: dict[str, Any], done: int) -> Iterator[Sink]:
        tracker, known = importlib.import_module(module), read_tracked(directory)
        again = {key: known[module], "resume": "allow"} if done and module in known else {}
        made = tracker.init(**{"project": "fastalign", "name": directory.name, "config": config, **again})
        try:
            text = json.dumps({**known, module: getattr(made, key)}, indent=1) + "\n"
            write_whole(directory / TRACKED, text, "the trackers' runs")
            yield lambda record: tracker.log(numbers(record), step=record["step"])
        finally:
            tracker.finish()

    return opened


def read_tracked(directory: Path) -> dict[str, str]:
    """What each tracker knows the run by; nothing, with a warning, when the file cannot be read."""
    file = directory / TRACKED
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s cannot be read (%s): the trackers begin a new run", file, error)
        return {}


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numeric fields of a record, its step apart."""
    return {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Any]] = {
    "tensorboard": tensorboard,
    "wandb": hosted("wandb", "id"),
    "trackio": hosted("trackio", "name"),
}
