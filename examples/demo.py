"""From nothing to an aligned language model in minutes on two cores: the program behind ``make demo``.

1. A byte-level BPE tokenizer and a small Llama learn English from the docstrings of Python's own standard library.
2. DPO teaches the model which of two docstrings belongs to a signature: the worse one is another object's, or the
   true one with its sentences out of order, or the true one broken off.
3. Both models are judged on modules that neither has seen.
4. A smaller Llama learns to sort the letters of words, until GRPO takes over: it samples answers, and is rewarded for
   the right ones.

    python examples/demo.py                        # the run directories lie under runs/demo
    python examples/demo.py --sft.optim.lr 1e-3    # settings of a run (sft, dpo, letters, grpo), as on the command line
"""

from __future__ import annotations

import os

# Threads that spin while they wait make a demo beside any other busy program three times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.table import Table

from fastalign.arguments import parse_config
from fastalign.data.sources import load_rows
from fastalign.engine.evaluate import evaluate_model
from fastalign.engine.output.metrics import read_metrics

EXAMPLES = Path(__file__).resolve().parent
FILES = {
    "sft": ("sft", "demo-sft.yaml"),
    "dpo": ("dpo", "demo-dpo.yaml"),
    "letters": ("sft", "sort_letters/sft.yaml"),
    "grpo": ("grpo", "sort_letters/grpo.yaml"),
}
"""The runs by name: what each is trained with, and its settings."""
GRPO_STEPS = "100"
"""Of the 120 that the example takes: most of what is learned is learned by then."""
KINDS = {"other": "another object's docstring", "shuffled": "sentences out of order", "truncated": "broken off"}
MIB = 2**20


@dataclass(frozen=True)
class Run:
    """A finished training run: its directory, its wall time and what it logged."""

    directory: Path
    seconds: float
    records: list[dict[str, Any]]


def train(name: str, directory: Path, settings: Sequence[str]) -> Run:
    """Run ``fastalign METHOD --config FILE``, see `FILES`, into a fresh directory."""
    shutil.rmtree(directory, ignore_errors=True)
    method, file = FILES[name]
    command = ["fastalign", method, "--config", str(EXAMPLES / file), "--run.output_dir", str(directory), *settings]
    print("\n$", " ".join(command), flush=True)
    start = time.monotonic()
    status = subprocess.run([sys.executable, "-m", *command]).returncode
    if status:
        raise SystemExit(status)
    return Run(directory, time.monotonic() - start, read_metrics(directory / "metrics.jsonl"))


def write_held_out(directory: Path) -> Counter[str]:
    """Write the pairs of the held-out modules to ``all.jsonl`` and one file per kind; returns how many there are."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = load_rows("builtin:docstrings", "test")
    rows.to_json(directory / "all.jsonl")
    for kind in KINDS:
        rows.filter(lambda row, kind=kind: row["kind"] == kind).to_json(directory / f"{kind}.jsonl")
    return Counter(all=len(rows), **Counter(rows["kind"]))


def judge(model: Path, reference: Path, pairs: Path) -> dict[str, float]:
    """Metrics of ``model`` on preference pairs, margins measured from ``reference``."""
    models = ["--model.path", str(model / "model"), "--reference.path", str(reference / "model")]
    return evaluate_model(
        parse_config("dpo", ["--config", str(EXAMPLES / "demo-dpo.yaml"), *models, "--data.path", str(pairs)])
    )


def show_alignment(console: Console, counts: Counter[str], scores: dict[str, tuple[dict, dict]]) -> None:
    """Before and after DPO, all held-out pairs and each kind of rejected docstring apart."""
    table = Table(title="Held-out modules: SFT -> DPO", title_justify="left", caption_justify="left")
    table.caption = (
        "accuracy and margin: of the implicit reward, beta x log-ratio to the SFT model, whose own are a tie; "
        "by log-prob alone: the chosen text is the likelier one; a text broken off wins that by being short"
    )
    for name in ("rejected is", "pairs", "preference accuracy", "margin", "by log-prob alone", "perplexity of chosen"):
        table.add_column(name, justify="left" if name == "rejected is" else "right")
    for kind, (before, after) in scores.items():
        table.add_row(
            KINDS.get(kind, "all"),
            str(counts[kind]),
            f"tie -> {after['rewards/accuracies']:.1%}",
            f"{before['rewards/margins']:.2f} -> {after['rewards/margins']:.2f}",
            f"{before['logps/accuracies']:.1%} -> {after['logps/accuracies']:.1%}",
            f"{before['perplexity/chosen']:.1f} -> {after['perplexity/chosen']:.1f}",
            end_section=kind == "all",
        )
    console.print(table)


def show_runs(console: Console, runs: dict[str, Run]) -> None:
    """What each run cost, and where its report lies."""
    table = Table(title="Runs", title_justify="left", caption_justify="left")
    table.caption = "grpo: the share of right answers among those that it sampled, which its loss does not tell"
    for name in ("", "steps", "wall time", "tokens/s", "peak memory", "loss or reward, first -> last 20", "report"):
        table.add_column(name, justify="left" if name in ("", "report") else "right", overflow="fold")
    for method, run in runs.items():
        speed = sum(r["tokens"] for r in run.records) / sum(r["t_step"] for r in run.records)
        memory = f"{max(r['peak_memory_rank_max'] for r in run.records) / MIB:.0f} MiB"
        report = str(run.directory / "report.html")
        steps = str(len(run.records))
        table.add_row(method, steps, f"{run.seconds:.0f} s", f"{speed:.0f}", memory, learned(run.records), report)
    console.print(table)


def learned(records: Sequence[dict[str, Any]]) -> str:
    """How the loss began and ended, or of sampled completions the reward; means, since a single step is noise."""
    name, first = ("reward", 20) if "reward" in records[0] else ("loss", 1)
    begin, end = (statistics.mean(r[name] for r in some) for some in (records[:first], records[-20:]))
    return f"{begin:.3f} -> {end:.3f}"


def split_settings(arguments: Sequence[str]) -> dict[str, list[str]]:
    """``--sft.optim.lr 1e-3`` is the setting ``--optim.lr 1e-3`` of the sft run."""
    settings: dict[str, list[str]] = {name: [] for name in FILES}
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        method, _, key = name.removeprefix("--").partition(".")
        if method not in settings or not key:
            raise SystemExit(f"expected --sft.SECTION.KEY VALUE, or one of {', '.join(FILES)} in its place, got {name}")
        settings[method] += [f"--{key}", value]
    return settings


def main(arguments: Sequence[str], output: Path = Path("runs/demo")) -> dict[str, tuple[dict, dict]]:
    """Train, align, judge, print; returns the scores before and after DPO."""
    began = time.monotonic()
    settings = split_settings(arguments)
    sft = train("sft", output / "sft", settings["sft"])
    dpo = train("dpo", output / "dpo", ["--model.path", str(sft.directory / "model"), *settings["dpo"]])
    letters = train("letters", output / "letters", settings["letters"])
    start = ["--model.path", str(letters.directory / "model"), "--run.steps", GRPO_STEPS]
    grpo = train("grpo", output / "grpo", [*start, *settings["grpo"]])

    print("\nJudging both models on held-out modules ...", flush=True)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    counts = write_held_out(output / "held-out")
    files = {kind: output / "held-out" / f"{kind}.jsonl" for kind in ("all", *KINDS)}
    judged = {kind: [judge(run.directory, sft.directory, file) for run in (sft, dpo)] for kind, file in files.items()}
    scores = {kind: (before, after) for kind, (before, after) in judged.items()}

    console = Console()
    console = console if console.is_terminal else Console(width=140)
    show_alignment(console, counts, scores)
    show_runs(console, {"sft": sft, "dpo": dpo, "letters": letters, "grpo": grpo})
    console.print(f"{time.monotonic() - began:.0f} s in all. The aligned model: {dpo.directory / 'model'}")
    return scores


if __name__ == "__main__":
    main(sys.argv[1:])
