"""Whole training steps beside a peer: ``python bench/train.py --peer trl``.

Every side trains the same model on the same pairs in the same order, in a process of its own. The first steps are not
timed. Beside the speed stand the losses of every side: a faster step that learns something else is no result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import common, peers, sides, workload
from bench.workload import Workload

SIDES = {"fastalign": "fastalign", "trl": "TRL as installed", "trl-fair": "TRL, rows selected as on a GPU"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl", "none"], default="trl", help="whom to measure beside fastalign")
    parser.add_argument("--task", choices=["dpo"], default="dpo", help="what is trained")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps, the untimed ones included")
    parser.add_argument("--pairs", type=int, default=8, help="preference pairs per step")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast on both sides"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side, in random order")
    parser.add_argument("--only", choices=list(SIDES), action="append", help="measure these sides only")
    parser.add_argument("--profile", action="store_true", help="print where the time of fastalign's steps goes")
    parser.add_argument("--record", action="store_true", help="append the figures to bench/results/train-dpo.json")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--workload", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_side(side: str, work: Workload, profile: bool) -> dict[str, Any]:
    """Train one side in a process of its own and return its log."""
    command = [sys.executable, __file__, "--side", side, "--workload", str(work.save())]
    threads = {"OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    log = work.path / f"{side}.log"
    with log.open("w") as file:
        run = subprocess.run(command + ["--profile"] * profile, env={**os.environ, **threads}, stdout=file, stderr=file)
    if run.returncode:
        raise SystemExit(f"{SIDES[side]} failed:\n{log.read_text()[-3000:]}")
    if profile:
        print(log.read_text())
    return json.loads((work.path / f"{side}.json").read_text())


def summarise(runs: Sequence[dict[str, Any]], work: Workload) -> dict[str, Any]:
    """One side's figures over its runs: pairs per second over all timed steps, spread over steps, memory, losses."""
    seconds = [b - a for run in runs for a, b in list(zip(run["wall"], run["wall"][1:], strict=False))[work.warmup :]]
    cpu = [run["cpu"][-1] - run["cpu"][work.warmup] for run in runs]
    low, middle, high = common.quantiles(seconds)
    return {
        "pairs_per_second": work.pairs * len(seconds) / sum(seconds),
        "cpu_seconds_per_step": statistics.median(cpu) / (work.steps - work.warmup),
        "step_seconds_p20": low,
        "step_seconds_p50": middle,
        "step_seconds_p80": high,
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "ready_mib": statistics.median(run["ready_mib"] for run in runs),
        "losses": runs[0]["losses"],
    }


def speed_table(figures: dict[str, dict[str, Any]], facts: dict[str, Any], work: Workload) -> None:
    """Pairs per second, the ratio to each peer, memory."""
    ours = figures.get("fastalign")
    rows = []
    for side, row in figures.items():
        ratios = ("-", "-")
        if ours and row is not ours:
            wall = ours["pairs_per_second"] / row["pairs_per_second"]
            ratios = (f"{wall:.2f}x", f"{row['cpu_seconds_per_step'] / ours['cpu_seconds_per_step']:.2f}x")
        steps = "/".join(f"{row[f'step_seconds_p{p}']:.2f}" for p in (20, 50, 80))
        memory = (f"{row['peak_mib']:.0f}", f"{row['peak_mib'] - row['ready_mib']:.0f}")
        speed, cpu = f"{row['pairs_per_second']:.2f}", f"{row['cpu_seconds_per_step']:.2f}"
        rows.append((SIDES[side], speed, ratios[0], steps, cpu, ratios[1], *memory))
    model = f"{facts['parameters'] / 1e6:.1f}M-parameter Llama"
    timed = f"{work.steps - work.warmup} timed steps after {work.warmup}"
    common.print_table(
        f"DPO, {model}, {work.dtype}, {work.pairs} pairs a step, {work.threads} threads",
        ("", "pairs/s", "we are", "s/step p20/50/80", "CPU s/step", "CPU we are", "peak MiB", "over start"),
        rows,
        caption=f"{timed}; online reference; no gradient checkpointing",
    )


def loss_table(figures: dict[str, dict[str, Any]]) -> None:
    """The losses of every side at the same steps, and their largest distance from the first side's."""
    first = next(iter(figures.values()))["losses"]
    rows = []
    for side, row in figures.items():
        apart = max(abs(a - b) for a, b in zip(row["losses"], first, strict=False))
        rows.append(
            (SIDES[side], *(f"{loss:.5f}" for loss in row["losses"][:6]), f"{row['losses'][-1]:.5f}", f"{apart:.1e}")
        )
    steps = min(6, len(first))
    columns = ("loss at step", *map(str, range(1, steps + 1)), f"last ({len(first)})", "max distance")
    common.print_table("Same pairs, same order, same optimizer", columns, rows)


def chosen_sides(options: argparse.Namespace) -> list[str]:
    """The sides to run; an absent peer is left out with its reason."""
    names = options.only or (["fastalign"] if options.peer == "none" else list(SIDES))
    reason = peers.missing("trl")
    if reason and any(name.startswith("trl") for name in names):
        print(f"skipped: {reason}")
        names = [name for name in names if not name.startswith("trl")]
    return names


def measure(options: argparse.Namespace, work: Workload) -> dict[str, dict[str, Any]]:
    """Run every side ``repeats`` times in random order."""
    names = chosen_sides(options)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        for name in random.Random(repeat).sample(names, len(names)):
            print(f"run {repeat + 1} of {options.repeats}: {SIDES[name]} ...", flush=True)
            runs[name].append(run_side(name, work, options.profile and name == "fastalign"))
    return {name: summarise(runs[name], work) for name in names}


def main(arguments: Sequence[str] | None = None, work: Workload | None = None) -> dict[str, dict[str, Any]]:
    """Prepare the data once, run the sides, print the tables; returns the figures."""
    options = parse(arguments)
    if options.side:
        sides.run(options.side, Workload.load(options.workload), options.profile)
        return {}
    with tempfile.TemporaryDirectory(prefix="fastalign-bench-") as directory:
        wanted = {name: getattr(options, name) for name in ("steps", "pairs", "dtype", "threads")}
        work = replace(work or Workload(directory), directory=directory, **wanted)
        facts = workload.prepare(work)
        figures = measure(options, work)
    speed_table(figures, facts, work)
    loss_table(figures)
    if options.record:
        rows = [{"bench": "train", "task": options.task, "side": side, "dtype": work.dtype, "pairs": work.pairs,
                 "steps": work.steps, **facts, **row} for side, row in figures.items()]  # fmt: skip
        print("recorded in", common.record("train-dpo", rows))
    return figures


if __name__ == "__main__":
    main()
