"""``fastalign bench ops``: every op beside its rivals, with the error against float64 beside each time.

``python -m pytest bench/ops.py`` runs the same cases: pytest-benchmark's own table holds fastalign's times, the table
at the end everyone's.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import cases, common, measure
from bench.field import OURS, ROOF, Setting

if TYPE_CHECKING:
    import pytest

Row = dict[str, Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    common.add_device(parser)
    new("--only", metavar="PATTERN", help="cases whose name holds this; * is a wildcard, commas separate several")
    new("--rounds", type=common.positive, help="samples of every candidate (default 15 on a CPU, 100 on a GPU)")
    new("--seconds", type=float, default=20.0, help="begin no further round after so many per case, once there were 5")
    new(
        "--threads",
        type=common.positive,
        help="CPU threads: one is timed in CPU time, several in wall time (default: torch's)",
    )
    new("--no-compile", dest="compile", action="store_false", help="leave torch.compile out, which is slow to start")
    common.add_records(parser)
    new("--enforce", action="store_true", help="exit with 1 where a target ratio is missed")
    new("--profile", action="store_true", help="print where the time of fastalign's last run of each case goes")
    new("--list", action="store_true", help="print the names of the cases")


def main(options: argparse.Namespace) -> int:
    """Run the cases one after the other, each recorded as soon as it is measured; the exit code."""
    common.check_device(options.device)
    builders = cases.cases(Setting(options.device, options.compile))
    names = cases.matching(list(builders), options.only)
    if options.list:
        print("\n".join(names))
        return 0
    torch.set_num_threads(options.threads or torch.get_num_threads())
    where, rows, verdicts = common.environment(options.device), [], Verdicts()
    for index, name in enumerate(names):
        print(f"{index + 1} of {len(names)}: {name}", flush=True)
        found = run_case(name, builders[name], options, verdicts)
        rows += found
        if options.record and found:
            record(found, options.device, where, options.results)
    print_summary(rows, where)
    for line in [f"target missed: {fault}" for fault in verdicts.missed] + [f"FAILED: {x}" for x in verdicts.failed]:
        print(line)
    return int(bool(verdicts.failed or (options.enforce and verdicts.missed)))


@dataclass
class Verdicts:
    """What went wrong: cases in which fastalign failed or erred, and targets that were missed."""

    failed: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


def run_case(
    name: str, build: Callable[[], measure.Case], options: argparse.Namespace, verdicts: Verdicts
) -> list[Row]:
    """Measure a case and print it; its records, none when fastalign itself raises."""
    try:
        case = build()
        figures = measure.run(case, rounds_of(options.rounds, options.device), options.seconds)
    except Exception as error:  # told at once and again at the end; the other cases are still measured
        traceback.print_exc()
        verdicts.failed.append(f"{name}: {type(error).__name__}: {error}")
        return []
    rows = measure.rows(case, figures)
    print_case(rows)
    if figures[OURS].failure:
        verdicts.failed.append(f"{name}: {figures[OURS].failure}")
    missed = measure.missed_targets(case, figures)
    verdicts.missed += [f"{name}: {who}: {fault}" for who, fault in missed.items()]
    if options.profile:
        print_profile(measure.profiled(case), case.device)
    return rows


def rounds_of(rounds: int | None, device: str) -> int:
    """How many rounds, when not said otherwise."""
    return rounds or (100 if device == "cuda" else 15)


def record(rows: list[Row], device: str, where: Row, results: Path | None = None) -> Path:
    """Append rows to ``ops-cpu.json`` or ``ops-cuda.json``."""
    return common.record(f"ops-{device}", ({"bench": "ops", **row} for row in rows), where, results)


# --- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = ("who", "median ms", "p20", "p80", "/ eager", "/ fastalign", "of roof", "target", "max error", "first ms")


def title(row: Row) -> str:
    """A case in one line."""
    return f"{row['case']}, {row['shape']}, {row['dtype']}"


def cells(row: Row) -> tuple[str, ...]:
    """A candidate's figures as text."""
    ratio, target, roof = row["over_fastalign"], row["target"], row["of_roof"]
    kept = "" if target is None or ratio is None else f">= {target:.3g} {'kept' if ratio >= target else 'MISSED'}"
    error = f"{max(row['errors'].values()):.1e}" if row["errors"] else "roof"
    times = (f"{row[key]:.3g}" if row[key] < 1 else f"{row[key]:.2f}" for key in ("p50_ms", "p20_ms", "p80_ms"))
    ratios = (f"{row['over_baseline']:.2f}", "-" if ratio is None else f"{ratio:.2f}")
    return (row["who"], *times, *ratios, f"{roof:.0%}" if roof else "", kept, error, f"{row['first_ms']:.0f}")


def machine(where: Row) -> str:
    """The environment in one line."""
    gpu = ", ".join(f"{name} {value}" for name, value in where.get("gpu", {}).items())
    threads = f"{where['threads']} thread(s)"
    versions = f"torch {where['versions']['torch']}, commit {where['commit']}, {where['time']}"
    return ", ".join(part for part in (where["device"], gpu, threads, versions) if part)


def print_case(rows: list[Row]) -> None:
    """One line per candidate; ``/ fastalign`` above 1 means that fastalign is faster. Those without a number follow."""
    common.print_table(title(rows[0]), COLUMNS, [cells(row) for row in rows if not row.get("failure")])
    for row in rows:
        if row.get("failure"):
            print(f"no number: {row['who']}: {row['failure']}")


def print_summary(rows: list[Row], where: Row) -> None:
    """fastalign beside the best of the others in each case."""
    caption = f"{machine(where)}; load {where['load']:.1f}; interleaved, random order, fresh inputs"
    columns = ("case", "fastalign ms", "best peer", "its ms", "ratio", "max error")
    lines = [line for group in by_case(rows) if (line := summary(group))]
    common.print_table("fastalign beside the best peer of each case", columns, lines, caption)


def by_case(rows: list[Row]) -> list[list[Row]]:
    """The rows of each case, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(title(row), []).append(row)
    return list(found.values())


def summary(rows: list[Row]) -> tuple[str, ...] | None:
    """A case's line of the summary, None where someone has no number."""
    ours, best = our_row(rows), best_peer(rows)
    if ours is None or best is None:
        return None
    error = f"{max(ours['errors'].values()):.1e}"
    ratio = best["p50_ms"] / ours["p50_ms"]
    return title(ours), f"{ours['p50_ms']:.2f}", best["who"], f"{best['p50_ms']:.2f}", f"{ratio:.2f}", error


def our_row(rows: list[Row]) -> Row | None:
    """fastalign's own row, if it has a number."""
    return next((row for row in rows if row["who"] == OURS and not row.get("failure")), None)


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest row that has a number and is neither ours nor a roof."""
    rivals = [row for row in rows if not row.get("failure") and not row["who"].startswith((OURS, ROOF))]
    return min(rivals, key=lambda row: row["p50_ms"], default=None)


def print_profile(profiler: torch.profiler.profile, device: str, limit: int = 15) -> None:
    """The operations that took longest themselves."""
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=limit, max_name_column_width=60))


# --- under pytest ----------------------------------------------------------------------------------------------------

COLLECTED: list[Row] = []
"""What a pytest session has measured."""


def test_op(benchmark, name: str, request: pytest.FixtureRequest) -> None:
    """Time one case; wrong numbers from fastalign fail, a rival's wrong numbers are left out of the table."""
    option = request.config.getoption
    case = cases.cases(Setting(option("--device"), option("--compile")))[name]()
    rounds = rounds_of(option("--rounds"), option("--device"))
    contest = measure.Contest(case, rounds)
    contest.warm_up()

    def rivals() -> None:
        contest.until(OURS)

    benchmark.group = f"{case.name} {case.shape} {case.dtype}"
    benchmark.pedantic(lambda: contest.sample(OURS), setup=rivals, rounds=rounds)
    rivals()  # those whose turn comes after ours in the last round
    figures = contest.figures()
    COLLECTED.extend(measure.rows(case, figures))
    assert figures[OURS].failure is None, figures[OURS].failure
    missed = measure.missed_targets(case, figures)
    assert not (option("--enforce") and missed), missed
