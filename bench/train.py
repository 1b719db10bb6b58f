"""``fastalign bench train``: whole training steps beside a peer.

Every side trains the same model on the same rows in the same order, in a process of its own, and all take turns step by
step (`bench.turns`). The first steps are not timed. Beside the speed stand the losses of every side: a faster step
that learns something else is no result. Beside our own stands the share of the machine's speed at bare matrix
products, measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import common, peers, report, sides, turns
from bench.workload import SIZES, TASKS, Workload

SIDES = {
    "fastalign": "fastalign",
    "again": "fastalign, once more",
    "trl": "TRL as installed",
    "trl-fair": "TRL, rows selected as on a GPU",
}
DISTURBED = 0.1
"""The share of a side's time in line for a core from which on it is told."""
PEERS = {"trl": ["trl", "trl-fair"], "self": ["again"], "none": []}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    common.add_device(parser)
    new("--peer", choices=list(PEERS), default="trl", help="measured beside fastalign; self: another fastalign")
    new("--task", choices=list(TASKS), default="dpo", help="what is trained")
    new("--model", choices=list(SIZES), default="9m", help="parameters of the Llama that is trained (default 9m)")
    new("--steps", type=common.positive, default=12, help="optimizer steps, the untimed ones included")
    new("--examples", type=common.positive, help="pairs, sequences, completions or groups a step (default: the task's)")
    new("--precomputed", action="store_true", help="reference log-probs are known before the first step, on both sides")
    new("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast on both sides")
    new("--threads", type=common.positive, default=2, help="CPU threads of each side")
    new("--neighbours", type=common.whole, default=0, help="busy processes that run beside every side (default 0)")
    new("--repeats", type=common.positive, default=1, help="runs of each side, in random order")
    new("--only", choices=list(SIDES), action="append", help="measure these sides only")
    new("--profile", action="store_true", help="print where the time of fastalign's steps goes")
    common.add_records(parser)
    new("--side", choices=[*SIDES, sides.ROOF], help=argparse.SUPPRESS)
    new("--workload", help=argparse.SUPPRESS)
    new("--turns", type=int, help=argparse.SUPPRESS)


def run_sides(names: Sequence[str], work: Workload, profile: bool = False) -> dict[str, dict[str, Any]]:
    """Train the sides by turns, and return what each reports."""
    start = [partial(start_side, name, work, profile and name == "fastalign") for name in names]
    with busy(work.neighbours):
        turns.take_turns(start, work.steps, in_a_row=work.neighbours > 0)
    if profile:
        print((work.path / "fastalign.log").read_text())
    return {name: json.loads((work.path / f"{name}.json").read_text()) for name in names}


def start_side(name: str, work: Workload, profile: bool = False) -> turns.Side:
    """A side in a process of its own."""
    command = [sys.executable, "-m", "bench", "train", "--side", name, "--workload", str(work.save())]
    environment = {"OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if work.device == "cpu" else {}
    return turns.Side(
        name, [*command, *["--profile"] * profile], work.path / f"{name}.log", environment, not work.neighbours
    )


def measure_roof(work: Workload) -> dict[str, float]:
    """GFLOP/s of bare matrix products, with nothing beside it."""
    start_side(sides.ROOF, work).end()
    return json.loads((work.path / f"{sides.ROOF}.json").read_text())


@contextlib.contextmanager
def busy(number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """So many processes that want a core of their own all the time."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield hogs
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def summarise(runs: Sequence[dict[str, Any]], work: Workload) -> dict[str, Any]:
    """One side's figures over its runs: examples per second over all timed steps, memory, losses, operations.

    A step's own seconds are those without the time in which threads stood in line for a core, as far as it held up the
    step: they are no fewer than what was computed takes on all threads.
    """

    def timed(name: str) -> list[float]:
        return [value for run in runs for value in run.get(name, [])[work.warmup :]]

    seconds, flops, tokens = timed("wall"), timed("flops"), timed("tokens")
    low, middle, high = common.quantiles(seconds)
    return {
        "examples_per_second": work.examples * len(seconds) / sum(seconds),
        "tokens_computed_per_second": sum(tokens) / sum(seconds) if tokens else None,
        "gflops": sum(flops) * passes(work) / sum(seconds) / 1e9 if flops else None,
        "cpu_seconds_per_step": sum(timed("cpu")) / len(seconds),
        "step_seconds_p20": low,
        "step_seconds_p50": middle,
        "step_seconds_p80": high,
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "ready_mib": statistics.median(run["ready_mib"] for run in runs),
        "losses": runs[0]["losses"],
        "step_seconds": seconds,
        **({"sampling_seconds": timed("sampling"), "rewards": runs[0]["rewards"]} if TASKS[work.task].samples else {}),
        "own_seconds": [
            min(wall, max(wall - queued, cpu / work.threads))
            for wall, queued, cpu in zip(seconds, timed("queued"), timed("cpu"), strict=True)
        ],
    }


def times_as_fast(ours: dict[str, Any], theirs: dict[str, Any], work: Workload) -> float:
    """The median over the steps of their own seconds over ours; of all seconds where neighbours are asked about."""
    seconds = "step_seconds" if work.neighbours else "own_seconds"
    return statistics.median(a / b for a, b in zip(theirs[seconds], ours[seconds], strict=True))


def in_line(row: dict[str, Any]) -> float:
    """The share of a side's seconds in which it stood in line for a core."""
    return 1 - sum(row["own_seconds"]) / sum(row["step_seconds"])


def passes(work: Workload) -> float:
    """Operations of a step in units of the policy's forward and backward: a reference adds a forward, a third of them.

    The passes of kto on mismatched completions are not counted: its share of the roof is understated.
    """
    return 4 / 3 if TASKS[work.task].reference and not work.precomputed else 1.0


def speed_table(figures: dict[str, dict[str, Any]], facts: dict[str, Any], work: Workload) -> None:
    """Examples per second, the ratio to each peer, memory."""
    ours = figures.get("fastalign")
    rows = []
    for side, row in figures.items():
        ratios = ("-", "-", "-")
        if ours and row is not ours:
            wall = times_as_fast(ours, row, work)
            cpu = row["cpu_seconds_per_step"] / ours["cpu_seconds_per_step"]
            ratios = (f"{wall:.2f}x", f"{cpu:.2f}x", f"{ours['peak_mib'] / row['peak_mib']:.2f}")
        steps = "/".join(f"{row[f'step_seconds_p{p}']:.2f}" for p in (20, 50, 80))
        memory = (f"{row['peak_mib']:.0f}", f"{row['peak_mib'] - row['ready_mib']:.0f}")
        speed, cpu = f"{row['examples_per_second']:.2f}", f"{row['cpu_seconds_per_step']:.2f}"
        rows.append((SIDES[side], speed, ratios[0], steps, f"{in_line(row):.0%}", cpu, ratios[1], *memory, ratios[2]))
    model = f"{facts['parameters'] / 1e6:.1f}M-parameter Llama"
    where = f"{work.threads} threads" if work.device == "cpu" else work.device
    beside = f", beside {work.neighbours} busy processes" if work.neighbours else ""
    unit, known = TASKS[work.task].unit, "precomputed" if work.precomputed else "online"
    reference = f"{known} reference; " if TASKS[work.task].reference else ""
    timed = f"{work.steps - work.warmup} timed steps after {work.warmup}"
    own = "" if work.neighbours else ", without the time in line for a core"
    common.print_table(
        f"{work.task} on {facts['data']}, {model}, {work.dtype}, {work.examples} {unit} a step, {where}{beside}",
        (
            "",
            f"{unit.split()[0]}/s",
            "we are",
            "s/step p20/50/80",
            "in line",
            "CPU s",
            "CPU we",
            "peak MiB",
            "over start",
            "of theirs",
        ),
        rows,
        caption=f"{timed}; {reference}no gradient checkpointing; we are: median of the steps' ratios{own}",
    )


def print_disturbed(figures: dict[str, dict[str, Any]]) -> None:
    """A line on every side that other processes kept from the cores for long."""
    for side, row in figures.items():
        if (share := in_line(row)) > DISTURBED:
            print(f"{SIDES[side]} stood in line for a core {share:.0%} of the time: other processes use this machine")


def roof_table(ours: dict[str, Any], roof: dict[str, float]) -> None:
    """Our operations per second beside those of bare products; attention's are among ours."""
    rows = [(name, f"{rate:.0f}", f"{ours['gflops'] / rate:.0%}") for name, rate in roof.items()]
    tokens = f"{ours['tokens_computed_per_second']:.0f} computed tokens/s"
    title = f"fastalign: {ours['gflops']:.0f} GFLOP/s of products, {tokens}"
    common.print_table(title, ("bare products of the model's shapes by", "GFLOP/s", "we reach"), rows)


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
    common.print_table("Same rows, same order, same optimizer", columns, rows)


def parts_table(figures: dict[str, dict[str, Any]]) -> None:
    """Sampling and the rest of a step apart, and the rewards of what was sampled."""
    parts = {
        side: (
            row["sampling_seconds"],
            [a - b for a, b in zip(row["step_seconds"], row["sampling_seconds"], strict=True)],
        )
        for side, row in figures.items()
    }
    rows = []
    for side, each in parts.items():
        cells = [SIDES[side]]
        for ours, seconds in zip(parts.get("fastalign", each), each, strict=True):
            ratio = statistics.median(a / b for a, b in zip(seconds, ours, strict=True))
            cells += [f"{statistics.median(seconds):.2f}", "-" if side == "fastalign" else f"{ratio:.2f}x"]
        rows.append((*cells, f"{statistics.mean(figures[side]['rewards']):.3f}"))
    columns = ("median seconds of", "sampling", "we are", "rewards and update", "we are", "mean reward")
    common.print_table("The parts of a step, answers of one length on every side", columns, rows)


def chosen_sides(options: argparse.Namespace) -> list[str]:
    """The sides to run; an absent peer is left out with its reason."""
    one = options.device != "cpu" or not TASKS[options.task].scores_rows  # then both of TRL's are the same
    every = [name for name in SIDES if name != "trl-fair" or not one]
    names = options.only or ["fastalign", *(name for name in PEERS[options.peer] if name in every)]
    reason = peers.missing("trl") if TASKS[options.task].trainer else f"TRL has no trainer for {options.task}"
    if reason and any(name.startswith("trl") for name in names):
        print(f"skipped: {reason}")
        names = [name for name in names if not name.startswith("trl")]
    return names


def measure(options: argparse.Namespace, work: Workload) -> dict[str, dict[str, Any]]:
    """Run all sides ``repeats`` times; the figures of each."""
    names = chosen_sides(options)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        print(f"run {repeat + 1} of {options.repeats}: {', '.join(SIDES[name] for name in names)} ...", flush=True)
        for name, run in run_sides(names, work, options.profile).items():
            runs[name].append(run)
    return {name: summarise(runs[name], work) for name in names}


def plot(figures: dict[str, dict[str, Any]], what: dict[str, Any], where: dict[str, Any], results: Path) -> None:
    """Losses over each other and speeds, as a file beside the results; a line why not where there is none."""
    if not report.can_plot():
        print("no plot: matplotlib is not installed (pip install fastalign[report])")
        return
    rows = [{**what, "side": side, **row} for side, row in figures.items()]
    figure = report.training_plot(rows, report.short_machine(where))
    results.mkdir(parents=True, exist_ok=True)
    known = "-precomputed" if what["precomputed"] else ""
    path = results / f"train-{what['task']}-{what['dtype']}{known}.png"
    figure.savefig(path, dpi=130)
    print("plotted in", path)


def make_work(options: argparse.Namespace, directory: str, work: Workload | None) -> Workload:
    """The workload that the options describe."""
    same = ("task", "steps", "dtype", "threads", "device", "precomputed", "neighbours")
    wanted = {name: getattr(options, name) for name in same}
    wanted["examples"] = options.examples or TASKS[options.task].examples
    return replace(work or Workload(directory, **SIZES[options.model]), directory=directory, **wanted)


def check(options: argparse.Namespace) -> None:
    """Refuses what cannot be measured."""
    if options.steps <= Workload.warmup:
        raise ValueError(f"--steps: the first {Workload.warmup} are not timed, expected more, got {options.steps}")
    if options.precomputed and not TASKS[options.task].reference:
        having = ", ".join(name for name, task in TASKS.items() if task.reference)
        raise ValueError(f"--precomputed: {options.task} has no reference; expected one of {having}")


def main(options: argparse.Namespace, work: Workload | None = None) -> int:
    """Prepare the data once, run the sides, print the tables, record; the exit code."""
    if options.side:
        sides.run(options.side, Workload.load(options.workload), options.profile, options.turns)
        return 0
    common.check_device(options.device)
    check(options)
    with tempfile.TemporaryDirectory(prefix="fastalign-bench-") as directory:
        work = make_work(options, directory, work)
        facts = sides.prepare(work)
        figures = measure(options, work)
        roof = measure_roof(work) if "fastalign" in figures and not TASKS[work.task].samples else {}
    speed_table(figures, facts, work)
    print_disturbed(figures)
    if roof and figures["fastalign"]["gflops"]:
        roof_table(figures["fastalign"], roof)
    (parts_table if TASKS[work.task].samples else loss_table)(figures)
    what = {"bench": "train", "task": work.task, "dtype": work.dtype, "steps": work.steps, **facts}
    what |= {"examples": work.examples, "unit": TASKS[work.task].unit, "precomputed": work.precomputed, "roof": roof}
    what |= {"neighbours": work.neighbours} if work.neighbours else {}
    where = {**common.environment(options.device), "threads": work.threads}
    if not work.neighbours:
        plot(figures, what, where, options.results)
    if options.record:
        rows = [{**what, "side": side, **row} for side, row in figures.items()]
        print("recorded in", common.record(f"train-{work.task}", rows, where, options.results))
    return 0
