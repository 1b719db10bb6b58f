"""Runs side by side: what they measured at their end, and the settings in which they differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastalign.engine.output.metrics import read_metrics
from fastalign.engine.output.rundir import read_settings
from fastalign.words import flatten

LAST = 0.1
"""Share of a run's steps whose mean stands for its end: single steps are of single batches."""
SHOWN = ("loss", "eval_", "reward", "rewards/", "kl", "entropy", "mean_token_accuracy", "critic/", "completions/mean")
SHOWN += ("t_step", "tokens_computed_per_second", "peak_memory")
"""Beginnings of the names that are shown unless others are asked for."""


def compare(runs: Sequence[Path], metrics: Sequence[str] = (), console: Console | None = None) -> None:
    """Print two tables: the last values of the runs' metrics, and the settings that are not the same in all.

    Args:
        runs: their directories.
        metrics: names of those to show; none: the usual ones that a run has.
        console: where to; standard output by default.

    Raises:
        ValueError: a directory is no run, or no run has the metric.
    """
    records = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    for run, lines in records.items():
        if not lines:
            raise ValueError(f"{run} holds no metrics.jsonl with steps: expected the output_dir of a run")
    ends = {run: last_values(lines) for run, lines in records.items()}
    names = [*dict.fromkeys(name for end in ends.values() for name in end)]
    if missing := [name for name in metrics if name not in names]:
        raise ValueError(f"no run has the metric {missing[0]!r}: they have {', '.join(names)}")
    chosen = metrics or [name for name in names if name.startswith(SHOWN)]
    console = console or Console()
    rows = [["steps", *(str(lines[-1]["step"]) for lines in records.values())]]
    rows += [[name, *(shown(end.get(name)) for end in ends.values())] for name in chosen]
    console.print(table(f"means of the last {LAST:.0%} of the steps; evaluations: the last one", runs, rows))
    if differing := different([dict(flatten(read_settings(run))) for run in runs]):
        console.print(table("settings that differ", runs, differing))


def last_values(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the last steps, or its last value where it is measured now and then."""
    tail, values = lines[-max(1, round(LAST * len(lines))) :], dict[str, float]()
    for name in dict.fromkeys(name for line in lines for name in line):
        if name.startswith("eval_") or not any(name in line for line in tail):
            values[name] = next((line[name] for line in reversed(lines) if name in line), math.nan)
        else:
            found = [line[name] for line in tail if isinstance(line.get(name), int | float)]
            values[name] = sum(found) / len(found) if found else math.nan
    return {name: x for name, x in values.items() if isinstance(x, int | float) and not math.isnan(x)}


def different(settings: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The settings that are not the same in all runs, a row each."""
    keys = dict.fromkeys(key for each in settings for key in each if key != "run.output_dir")
    rows = [(key, [str(each.get(key, "-")) for each in settings]) for key in keys]
    return [[key, *values] for key, values in rows if len({*values}) > 1]


def shown(value: float | None) -> str:
    """Four digits."""
    return "" if value is None else f"{value:.4g}"


def table(title: str, runs: Iterable[Path], rows: Iterable[Sequence[str]]) -> Table:
    """A table with a column for each run."""
    made = Table("", *map(str, runs), title=title, title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows:
        made.add_row(*row)
    return made
