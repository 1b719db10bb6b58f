"""``fastalign bench soak``: a run whose ranks are killed again and again ends with the numbers of one that was not.

Two ranks train under ``torchrun --max-restarts``. At random steps one of them, drawn anew each time, is sent SIGKILL;
every second time while a checkpoint is being written. torchrun starts the ranks again, and ``run.resume: auto`` goes on
from the newest whole checkpoint. In the end metrics, completions and weights are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench import common
from fastalign.engine.output.metrics import read_metrics
from fastalign.words import as_yaml

CLOCK = ("t_", "timing_s/", "step_time", "perf/", "wall_time", "peak_memory", "mfu")
"""Fields of a step that tell of time or memory; those per second beside."""
POLL = 0.001
"""Seconds between two looks at a run: a small checkpoint is written in some ten milliseconds."""
REWARD = (
    "def likes(completion_ids, **columns):\n    return [sum(ids) % 7 / 7 + len(ids) / 10 for ids in completion_ids]\n"
)
MODEL = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    new("--steps", type=common.positive, default=200, help="steps of a run (default 200)")
    new("--kills", type=common.positive, default=10, help="ranks that are killed in each run (default 10)")
    new("--ranks", type=common.positive, default=2, help="ranks (default 2)")
    new("--only", choices=["dpo", "grpo"], action="append", help="run these methods only")
    new("--seed", type=int, default=None, help="of the moments; default: other ones every time")
    new("--sync", action="store_true", help="write checkpoints while the run waits, not beside it")
    common.add_records(parser)


@dataclass
class Kill:
    """A rank that was killed: which, after which step, and whether a checkpoint was being written."""

    rank: int
    step: int
    saving: bool


@dataclass
class Run:
    """A run under torchrun, and what became of it."""

    directory: Path
    process: subprocess.Popen[str]
    kills: list[Kill] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step in its metrics; 0 while there is none."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        try:
            return json.loads(lines[-1])["step"] if lines else 0
        except ValueError:  # a line that is being written
            return json.loads(lines[-2])["step"] if len(lines) > 1 else 0

    def ranks(self) -> dict[int, psutil.Process]:
        """Its processes that train, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            try:
                found[int(child.environ()["RANK"])] = child
            except (KeyError, psutil.Error):  # it has just ended
                continue
        return found


def settings(method: str, folder: Path, name: str, steps: int, beside: bool) -> dict[str, Any]:
    """A small run on letters, with a checkpoint every tenth step."""
    (folder / "likes.py").write_text(REWARD)
    run = {"output_dir": str(folder / name), "steps": steps, "save_every": 10, "async_save": beside, "resume": "auto"}
    found = {
        "model": {"config": MODEL, "tokenizer": "builtin:letters"},
        "data": {"path": "builtin:sort_letters", "max_length": 24, "limit": 400},
        "batch": {"size": 8, "tokens": 200},
        "optim": {"lr": 3e-4},
        "run": {**run, "show_example": False, "log_every": 50},
    }
    if method == "dpo":
        return found
    sampled = {"algorithm": {"kl_coef": 0.05, "num_iterations": 2}, "sampler": {"max_new_tokens": 8}}
    return {**found, **sampled, "rewards": [{"function": f"{folder / 'likes.py'}:likes"}]}


def start(method: str, config: dict[str, Any], folder: Path, ranks: int, restarts: int) -> Run:
    """Launch a run."""
    directory = Path(config["run"]["output_dir"])
    file = folder / f"{directory.name}.yaml"
    file.write_text(as_yaml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "--max-restarts", str(restarts), "-m", "fastalign", method, "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (folder / f"{directory.name}.log").open("w")
    return Run(directory, subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True))


def disturb(run: Run, steps: int, kills: int, draw: random.Random) -> None:
    """Kill ranks of a run at random steps, every second time while a checkpoint is written."""
    known: set[int] = set()
    for number, target in enumerate(sorted(draw.sample(range(2, steps - 12), kills))):
        saving = number % 2 == 1
        while run.process.poll() is None and not (run.step >= target and has_moved(run, known)):
            time.sleep(0.05)
        while saving and run.process.poll() is None and not list(run.directory.glob("checkpoints/step-*.tmp")):
            time.sleep(POLL)
        if run.process.poll() is not None:
            return
        time.sleep(0 if saving else draw.uniform(0, 0.05))
        rank, process = draw.choice([*run.ranks().items()])
        known |= {one.pid for one in run.ranks().values()}
        run.kills.append(Kill(rank, run.step, saving))
        process.send_signal(signal.SIGKILL)


def has_moved(run: Run, known: set[int]) -> bool:
    """Whether the ranks that run now are not those of a launch that was killed, and write metrics."""
    ranks = run.ranks().values()
    if not ranks or {one.pid for one in ranks} & known:
        return False
    return (run.directory / "metrics.jsonl").stat().st_mtime > max(one.create_time() for one in ranks)


def finish(run: Run) -> None:
    """Wait for a run, which must end well."""
    if run.process.wait():
        log = run.directory.with_suffix(".log")
        raise ValueError(f"{run.directory} ended with {run.process.returncode}: {log.read_text().splitlines()[-20:]}")


def left(directory: Path) -> tuple[list[dict[str, Any]], bytes, bytes]:
    """What a run leaves: its metrics without times, its completions and its weights."""
    lines = read_metrics(directory / "metrics.jsonl")
    clock = lambda name: name.startswith(CLOCK) or name.endswith("_per_second")  # noqa: E731
    numbers = [{name: x for name, x in line.items() if not clock(name)} for line in lines]
    samples = directory / "samples.jsonl"
    weights = (directory / "model" / "model.safetensors").read_bytes()
    return numbers, samples.read_bytes() if samples.exists() else b"", weights


def soak(method: str, options: argparse.Namespace, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A run that is left alone and one that is not; what differs."""
    seconds, ends = [], []
    for name, kills in ((f"{method}-whole", 0), (f"{method}-killed", options.kills)):
        began = time.perf_counter()
        config = settings(method, folder, name, options.steps, not options.sync)
        run = start(method, config, folder, options.ranks, restarts=2 * kills)
        disturb(run, options.steps, kills, draw) if kills else None
        finish(run)
        seconds.append(time.perf_counter() - began)
        ends.append((run, left(run.directory)))
        print(f"{name}: {seconds[-1]:.0f} s, {len(run.kills)} kills", flush=True)
    (_, whole), (run, killed) = ends
    same = dict(zip(("metrics", "samples", "model"), (a == b for a, b in zip(whole, killed, strict=True)), strict=True))
    return {
        "method": method,
        "steps": len(killed[0]),
        "seconds": seconds,
        "kills": [vars(k) for k in run.kills],
        **same,
    }


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for every method."""
    lines = []
    for row in rows:
        when = ", ".join(
            f"{kill['step']}{'*' if kill['saving'] else ''} (rank {kill['rank']})" for kill in row["kills"]
        )
        equal = ["equal" if row[name] else "NOT EQUAL" for name in ("metrics", "samples", "model")]
        lines.append([row["method"], str(row["steps"]), when, *equal, *(f"{x:.0f}" for x in row["seconds"])])
    head = ["method", "steps", "killed after step (* in a save)", "metrics", "samples", "model", "s whole", "s killed"]
    common.print_table("soak", head, lines)


def main(options: argparse.Namespace) -> int:
    """Run the command; 1 when anything differs or a kill did not come about."""
    draw, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for method in options.only or ("dpo", "grpo"):
            rows.append(soak(method, options, Path(folder), draw))
    show(rows)
    if options.record:
        common.record("soak", [{"bench": "soak", **row} for row in rows], common.environment(), options.results)
    fine = all(row[name] for row in rows for name in ("metrics", "samples", "model"))
    return 0 if fine and all(len(row["kills"]) == options.kills for row in rows) else 1
