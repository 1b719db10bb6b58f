"""``fastalign bench ops``: every op beside its rivals, with the error against float64 beside each time."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import cases, common, measure, tables
from bench.field import Setting


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    device_argument(parser)
    new("--only", metavar="PATTERN", help="cases whose name holds this; * is a wildcard, commas separate several")
    new("--rounds", type=positive, help="samples of every candidate (default 15 on a CPU, 100 on a GPU)")
    new("--seconds", type=float, default=20.0, help="begin no further round after so many per case, once there were 5")
    new(
        "--threads",
        type=positive,
        help="CPU threads: one is timed in CPU time, several in wall time (default: torch's)",
    )
    new("--no-compile", dest="compile", action="store_false", help="leave torch.compile out, which is slow to start")
    new("--record", action="store_true", help="append the figures to the results")
    new("--results", type=Path, default=common.RESULTS, help="where results are kept (default bench/results)")
    new("--enforce", action="store_true", help="exit with 1 where a target ratio is missed")
    new("--profile", action="store_true", help="print where the time of fastalign's last run of each case goes")
    new("--list", action="store_true", help="print the names of the cases")


def device_argument(parser: argparse.ArgumentParser) -> None:
    """``--device``, the GPU if there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=found, help=f"where to measure (default {found})")


def positive(text: str) -> int:
    """A count."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def whole(text: str) -> int:
    """A count that may be none."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting asked for.

    Raises:
        ValueError: a GPU is asked for where there is none.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out to measure on the CPU")
    return Setting(options.device, getattr(options, "compile", False))


def rounds_of(rounds: int | None, device: str) -> int:
    """How many rounds, when not said otherwise."""
    return rounds or (100 if device == "cuda" else 15)


def main(options: argparse.Namespace) -> int:
    """Run the cases one after the other, each recorded as soon as it is measured; the exit code."""
    setting = setting_of(options)
    builders = cases.cases(setting)
    names = cases.matching(list(builders), options.only)
    if options.list:
        print("\n".join(names))
        return 0
    torch.set_num_threads(options.threads or torch.get_num_threads())
    where, rows, verdicts = common.environment(setting.device), [], Verdicts()
    for index, name in enumerate(names):
        print(f"{index + 1} of {len(names)}: {name}", flush=True)
        found = run_case(name, builders[name], options, verdicts)
        rows += found
        if options.record and found:
            tables.record_ops(found, setting.device, where, options.results)
    tables.print_summary(rows, where)
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
) -> list[dict[str, Any]]:
    """Measure a case and print it; its records, none when fastalign itself raises."""
    try:
        case = build()
        figures = measure.run(case, rounds_of(options.rounds, options.device), options.seconds)
    except Exception as error:  # told at once and again at the end; the other cases are still measured
        traceback.print_exc()
        verdicts.failed.append(f"{name}: {type(error).__name__}: {error}")
        return []
    rows = measure.rows(case, figures)
    tables.print_case(rows)
    if figures[measure.OURS].failure:
        verdicts.failed.append(f"{name}: {figures[measure.OURS].failure}")
    missed = measure.missed_targets(case, figures)
    verdicts.missed += [f"{name}: {who}: {fault}" for who, fault in missed.items()]
    if options.profile:
        tables.print_profile(measure.profiled(case), case.device)
    return rows
