"""``fastalign bench learn``: does every on-policy algorithm learn, and is a collapse told?

A small Llama learns to sort the letters of words until it gets half of them right; from there each algorithm goes on as
its file in ``examples/sort_letters`` says, seed by seed. Before and after stands the share of 400 held-out words that
a sampled answer gets right, and the greedy one; beside it the time of the run, and what its alarms said. It takes an
hour: ``--record`` keeps every run as it ends, and with ``--resume`` those that are kept are not made again.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench import common
from fastalign.config import ModelConfig, SamplerConfig
from fastalign.data.builtin import letter_tokenizer, sort_letters
from fastalign.engine.output.metrics import read_metrics
from fastalign.models.load import load_policy
from fastalign.rl.sampler import NativeSampler, stops_of
from fastalign.types import Prompt

EXAMPLES = common.ROOT / "examples" / "sort_letters"
DRAWS = 4
"""Sampled answers to each held-out word: the share of right ones has a standard error of about 0.02."""
GOAL, LIMIT = 0.75, 180
"""Share of right sampled answers, and CPU-seconds in which a run is to reach it."""


@dataclass(frozen=True)
class Case:
    """A run that starts from the SFT model.

    Attributes:
        method: the command.
        file: its settings.
        flags: that differ.
        collapses: it is meant to go wrong, and to say so.
    """

    method: str
    file: str
    flags: tuple[str, ...] = ()
    collapses: bool = False


TOO_LARGE = ("--optim.warmup", "0", "--optim.schedule", "constant")
SEED = (
    *("--algorithm.preset", "seed", "--algorithm.kl_coef", "1"),
    *("--algorithm.num_iterations", "4", "--algorithm.num_minibatches", "1", "--algorithm.normalize_values", "false"),
)
"""The first papers' PPO: four unclipped uses of each batch."""
CASES = {
    "grpo": Case("grpo", "grpo"),
    **{name: Case("grpo", "grpo", ("--algorithm.name", name)) for name in ("dr_grpo", "gspo", "cispo")},
    "ppo": Case("ppo", "ppo"),
    "remax": Case("remax", "remax"),
    "rloo": Case("rloo", "rloo"),
    "reinforce_pp": Case("reinforce-pp", "reinforce_pp"),
    "raft": Case("raft", "raft"),
    "online_dpo": Case("online-dpo", "online_dpo"),
    "collapse-lr": Case(
        "grpo", "grpo", (*TOO_LARGE, "--optim.lr", "1e-3", "--batch.size", "16", "--run.steps", "40"), collapses=True
    ),
    "collapse-seed": Case("ppo", "ppo", (*TOO_LARGE, *SEED, "--optim.lr", "2e-4", "--run.steps", "20"), collapses=True),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    new("--seeds", type=common.positive, default=3, help="seeds of each case (default 3)")
    new("--only", choices=list(CASES), action="append", help="run these cases only")
    new("--threads", type=common.positive, default=2, help="CPU threads of a run (default 2)")
    new("--resume", action="store_true", help="take over the runs that are recorded with the same settings")
    common.add_records(parser)


def judge(model: Path) -> dict[str, float]:
    """Shares of right answers to the held-out words: sampled, and greedy."""
    policy, tokenizer = load_policy(ModelConfig(path=str(model))), letter_tokenizer()
    sampler = NativeSampler(policy, SamplerConfig(max_new_tokens=12), stops_of(policy, tokenizer))
    rows = sort_letters("test").to_list()
    encoded = tokenizer([row["prompt"] for row in rows])["input_ids"]
    prompts = [Prompt(np.array(ids), i) for i, ids in enumerate(encoded)]

    def right(n: int, *, greedy: bool) -> float:
        found = list(sampler.generate(prompts, n, 0, greedy=greedy))
        texts = tokenizer.batch_decode([one.tokens.tolist() for one in found], skip_special_tokens=True)
        return float(np.mean([text == rows[one.row]["answer"] for text, one in zip(texts, found, strict=True)]))

    return {"sampled": right(DRAWS, greedy=False), "greedy": right(1, greedy=True)}


def train(method: str, file: str, directory: Path, flags: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a command to its end: CPU seconds, seconds of its steps, and its alarms."""
    command = [sys.executable, "-m", "fastalign", method, "--config", str(EXAMPLES / f"{file}.yaml")]
    command += ["--run.output_dir", str(directory), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ValueError(f"{method} ended with {done.returncode}: {done.stdout.strip().splitlines()[-1]}")
    after, records = resource.getrusage(resource.RUSAGE_CHILDREN), read_metrics(directory / "metrics.jsonl")
    return {
        "cpu_seconds": sum(getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime")),
        "seconds": sum(record["t_step"] for record in records),
        "steps": len(records),
        "alarms": re.findall(r"^.*\bstep \d+: [a-z].*$", done.stdout, re.M),
        "reward": [record.get("reward") for record in records],
        "entropy": [record.get("entropy") for record in records],
        "explained_variance": [record.get("critic/vf_explained_var") for record in records],
    }


def settings(case: Case) -> dict[str, Any]:
    """All that makes a run but its seed: its file and that of the model it starts from, and the flags."""
    files = {file: yaml.safe_load((EXAMPLES / f"{file}.yaml").read_text()) for file in ("sft", case.file)}
    return {"files": files, "flags": list(case.flags)}


def recorded(names: Sequence[str], seeds: int, results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The runs of these cases and seeds that were recorded with the settings of now, by case and seed."""
    rows = [row for row in common.read_records("learn", results) if row["case"] in names and row["seed"] < seeds]
    return {(row["case"], row["seed"]): row for row in rows if row.get("settings") == settings(CASES[row["case"]])}


def measure(
    names: Sequence[str], seeds: int, threads: int, directory: Path, known: Container[tuple[str, int]] = ()
) -> Iterator[dict[str, Any]]:
    """Every case that is not known from the SFT model of every seed, each as it ends."""
    for seed in range(seeds):
        missing = [name for name in names if (name, seed) not in known]
        if not missing:
            continue
        start = directory / f"sft-{seed}"
        train("sft", "sft", start, ["--run.seed", str(seed)], threads)
        before = judge(start / "model")
        for name in missing:
            row = {"case": name, "seed": seed, "before": before, **follow(name, seed, start, threads, directory)}
            print(f"{name}, seed {seed}: {before['sampled']:.3f} -> {row['after']['sampled']:.3f}", flush=True)
            yield row


def follow(name: str, seed: int, start: Path, threads: int, directory: Path) -> dict[str, Any]:
    """Run a case from an SFT model, and judge what comes of it."""
    case, out = CASES[name], directory / f"{name}-{seed}"
    flags = ["--model.path", str(start / "model"), "--run.seed", str(seed), *case.flags]
    run = train(case.method, case.file, out, flags, threads)
    return {"after": judge(out / "model"), **run, "settings": settings(case)}


def show(rows: Sequence[dict[str, Any]], threads: int) -> None:
    """A line for every case."""

    def shares(some: Sequence[dict[str, Any]], when: str, how: str) -> str:
        return " ".join(f"{row[when][how]:.3f}" for row in some)

    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        some = [row for row in rows if row["case"] == name]
        took = (
            f"{statistics.median(r['seconds'] for r in some):.0f}",
            f"{statistics.median(r['cpu_seconds'] for r in some):.0f}",
        )
        sampled, greedy = (
            f"{shares(some, 'before', how)} -> {shares(some, 'after', how)}" for how in ("sampled", "greedy")
        )
        told = sum(bool(row["alarms"]) for row in some)
        lines.append((name, str(some[0]["steps"]), *took, sampled, greedy, f"{told} of {len(some)}"))
    head = ("", "steps", "s", "CPU s", "sampled", "greedy", "alarms")
    caption = "right answers to 400 held-out words, a number for each seed; median times of the steps, of the process"
    common.print_table(f"Sorting letters from one SFT model, {threads} threads", head, lines, caption=caption)


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What did not go as it should, a line for each."""
    named = ((f"{row['case']}, seed {row['seed']}: ", row) for row in rows)
    return [name + text for name, row in named for text in faults(row)]


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a run: it learned little, slowly, with an alarm or harmed greedy answers; or no alarm came."""
    if CASES[row["case"]].collapses:
        return [] if row["alarms"] else ["collapsed without an alarm"]
    before, after, took = row["before"]["greedy"], row["after"], row["cpu_seconds"]
    known = {
        f"{after['sampled']:.3f} sampled, the goal is {GOAL}": after["sampled"] < GOAL,
        f"greedy answers fell from {before:.3f} to {after['greedy']:.3f}": after["greedy"] < before,
        f"{took:.0f} CPU-seconds, the goal is {LIMIT}": took > LIMIT,
        f"learned with an alarm: {', '.join(row['alarms'])}": bool(row["alarms"]),
    }
    return [text for text, wrong in known.items() if wrong]


def main(options: argparse.Namespace) -> int:
    """Run the cases, print the table, record; 1 when something did not go as it should."""
    where, names = {**common.environment(), "threads": options.threads}, options.only or list(CASES)
    found = recorded(names, options.seeds, options.results) if options.resume else {}
    with tempfile.TemporaryDirectory(prefix="fastalign-bench-") as directory:
        for row in measure(names, options.seeds, options.threads, Path(directory), found):
            found[row["case"], row["seed"]] = row
            if options.record:
                common.record("learn", [{"bench": "learn", **row}], where, options.results)
    rows = [found[key] for key in sorted(found, key=lambda key: (names.index(key[0]), key[1]))]
    show(rows, options.threads)
    for line in missed(rows):
        print(line)
    return int(bool(missed(rows)))
