"""``fastalign bench ablation``: what each part of a DPO step on a CPU is worth, one change per line.

Every line trains a model of its own from the same weights on the same pairs in the same order. The lines take turns in
random order at every step of one process, so that they are compared on the same pairs and under the same load. What a
step adds to memory is measured once, in an untimed step.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench import common, memory, workload
from bench.ablation_lines import Trainee, lines, read_examples, trainee, with_reference
from bench.ablation_lines import train as train_step
from bench.workload import Workload
from fastalign.data.examples import TokenExample
from fastalign.types import Columns


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    new(
        "--model",
        choices=list(workload.SIZES),
        default="9m",
        help="parameters of the Llama that is trained (default 9m)",
    )
    new("--steps", type=common.positive, default=9, help="optimizer steps of each line, the two untimed ones included")
    new("--examples", type=common.positive, default=8, help="pairs per step (default 8)")
    new("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast in every line")
    new("--threads", type=common.positive, default=2, help="CPU threads (default 2)")
    common.add_records(parser)


@dataclass
class Log:
    """What a line's steps took: wall and CPU seconds of the timed ones, all losses, memory."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    held_mib: float = 0.0
    added_mib: float = 0.0


def measure(work: Workload) -> dict[str, Log]:
    """Train all lines step by step."""
    torch.set_num_threads(work.threads)
    trainees = [trainee(line, work) for line in lines()]
    known = with_reference(read_examples(work), trainees[-1])
    logs = {one.line.name: Log() for one in trainees}
    for step in range(work.steps):
        examples = known[step * work.examples : (step + 1) * work.examples]
        for one in random.Random(step).sample(trainees, len(trainees)):
            run_step(one, examples, logs[one.line.name], step - work.warmup)
    return logs


def run_step(one: Trainee, examples: Sequence[TokenExample], log: Log, timed: int) -> None:
    """One step of a line; the last untimed one, -1, is that whose memory is measured."""
    if not one.line.known:
        examples = [replace(example, columns=Columns()) for example in examples]
    before = memory.start("cpu")[0] if timed == -1 else 0
    wall, cpu = time.perf_counter(), time.process_time()
    log.losses.append(train_step(one, examples))
    if timed >= 0:
        log.wall.append(time.perf_counter() - wall)
        log.cpu.append(time.process_time() - cpu)
    elif timed == -1:
        log.added_mib = (memory.peaks("cpu")[0] - before) / common.MIB
        log.held_mib = one.held_bytes / common.MIB


def figures(logs: dict[str, Log]) -> list[dict[str, Any]]:
    """A row per line: factors are of total times, distances the largest over all steps."""
    rows, first = [], next(iter(logs.values()))
    before = first
    for name, log in logs.items():
        low, middle, high = common.quantiles(log.wall)
        rows.append(
            {
                "line": name,
                "step_seconds_p20": low,
                "step_seconds_p50": middle,
                "step_seconds_p80": high,
                "over_line_before": sum(before.wall) / sum(log.wall),
                "over_first": sum(first.wall) / sum(log.wall),
                "cpu_over_line_before": sum(before.cpu) / sum(log.cpu),
                "cpu_seconds_per_step": sum(log.cpu) / len(log.cpu),
                "peak_mib": log.held_mib + log.added_mib,
                "held_mib": log.held_mib,
                "max_distance": max(abs(a - b) for a, b in zip(log.losses, first.losses, strict=True)),
                "losses": log.losses,
            }
        )
        before = log
    return rows


def print_figures(rows: Sequence[dict[str, Any]], facts: dict[str, Any], work: Workload) -> None:
    """The table; the losses' largest distance stands beside the speed."""
    cells = []
    for row in rows:
        steps = "/".join(f"{row[f'step_seconds_p{p}']:.2f}" for p in (20, 50, 80))
        factors = (
            f"{row['over_line_before']:.2f}x",
            f"{row['over_first']:.2f}x",
            f"{row['cpu_over_line_before']:.2f}x",
        )
        peak, loss = (f"{row['peak_mib']:.0f}", f"{row['held_mib']:.0f}"), f"{row['losses'][-1]:.5f}"
        cells.append((row["line"], steps, *factors, *peak, loss, f"{row['max_distance']:.1e}"))
    columns = ("", "s/step p20/50/80", "to line before", "to first", "CPU before", "peak MiB", "of it held")
    model = f"{facts['parameters'] / 1e6:.1f}M-parameter Llama"
    timed = f"{work.steps - work.warmup} timed steps after {work.warmup}"
    common.print_table(
        f"DPO on {facts['data']}, {model}, {work.dtype}, {work.examples} pairs a step, {work.threads} threads",
        (*columns, "last loss", "max distance"),
        cells,
        caption=f"{timed}; held: weights, moments, reference; distance of the losses from the first line's",
    )
    print(f"largest distance of any loss from the first line's: {max(row['max_distance'] for row in rows):.2e}")


def main(options: argparse.Namespace) -> int:
    """Measure on hh-rlhf where it is; the exit code."""
    if options.steps <= Workload.warmup:
        raise ValueError(f"--steps: the first {Workload.warmup} are not timed, expected more, got {options.steps}")
    if common.shared_data("hh-rlhf") is None:
        print("skipped: hh-rlhf is not here (put its files under ../shared/data, or set FASTALIGN_SHARED)")
        return 0
    wanted = {name: getattr(options, name) for name in ("steps", "examples", "dtype", "threads")}
    with tempfile.TemporaryDirectory(prefix="fastalign-bench-") as directory:
        work = Workload(directory, **workload.SIZES[options.model], **wanted)
        facts = workload.prepare(work)
        rows = figures(measure(work))
    print_figures(rows, facts, work)
    if options.record:
        what = {"bench": "ablation", "dtype": work.dtype, "steps": work.steps, "examples": work.examples, **facts}
        where = {**common.environment("cpu"), "threads": work.threads}
        print("recorded in", common.record("ablation", ({**what, **row} for row in rows), where, options.results))
    return 0
