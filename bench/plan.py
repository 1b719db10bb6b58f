"""``fastalign bench plan``: what `fastalign plan` predicts of memory, beside what training takes.

Every case trains a small Llama in processes of its own, on letters of fixed lengths. What counts is the growth of the
resident set from before the models are loaded to its peak in the steps after the first; of several ranks that of the
largest.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import common
from bench.common import MIB
from fastalign.arguments import parse_config
from fastalign.commands import PlanConfig
from fastalign.engine.plan.search import plan
from fastalign.engine.plan.setting import make_setting

SHAPE = {
    **{"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536},
    **{"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False},
}
"""33 million parameters."""
PROMPT, ANSWER, STEPS = 128, 128, 2
WORDS = ("predicted", "measured")
BOUND = 0.10
"""How far off a prediction may be."""
LIMIT = 900
"""Seconds for one case."""


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        method: the command.
        ranks: processes.
        flags: beside those that all have.
    """

    method: str = "dpo"
    ranks: int = 1
    flags: dict[str, Any] = field(default_factory=dict)


FROZEN = {"reference.cache": "off"}
CASES = {
    "dp 1": Case(flags=FROZEN),
    "dp 2": Case(flags=FROZEN, ranks=2),
    "tp 2": Case(flags={**FROZEN, "parallel.tp": 2}, ranks=2),
    "checkpointing": Case(flags={**FROZEN, "model.gradient_checkpointing": True}),
    "lora": Case(flags={**FROZEN, "model.lora": {"r": 16}}),
    "cached reference": Case(flags={"reference.cache": "{folder}/kept"}),
    "bf16 by autocast": Case("sft", flags={"model.autocast": True}),
    "bf16 with masters": Case("sft", flags={"model.dtype": "bfloat16"}),
    "one micro-batch": Case("sft", flags={"batch.size": 16}),
    "steps within backward": Case("sft", flags={"batch.size": 16, "optim.in_backward": True, "optim.clip_norm": 0}),
    "moments in 8 bits": Case("sft", flags={"optim.name": "adamw_8bit"}),
    "dp 2, bf16 by autocast": Case("sft", ranks=2, flags={"model.autocast": True}),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(CASES), help="measure these cases only")
    common.add_records(parser)
    help = f"exit with 1 where a prediction is off by over {BOUND:.0%}"
    parser.add_argument("--enforce", action="store_true", help=help)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> int:
    """Measure the cases, print and record them; the exit code."""
    if options.child:
        child(options.child)
        return 0
    where, rows = common.environment(), []
    for name in options.only or CASES:
        row = {"bench": "plan", "case": name, **measured(CASES[name])}
        rows.append(row)
        print(f"{name}: predicted {row['predicted_mib']:.0f} MiB, measured {row['measured_mib']:.0f}", flush=True)
        if options.record:
            common.record("plan", [row], where, options.results)
    lines = [(row["case"], *(f"{row[f'{word}_mib']:.0f}" for word in WORDS), f"{row['off']:+.1%}") for row in rows]
    columns = ("", *(f"{word} MiB" for word in WORDS), "off")
    common.print_table("peak memory of a rank beyond the interpreter and its libraries", columns, lines)
    return int(options.enforce and any(abs(row["off"]) > BOUND for row in rows))


def measured(case: Case) -> dict[str, Any]:
    """What was predicted of a case, and what it took."""
    with tempfile.TemporaryDirectory() as folder:
        words = flags_of(case, Path(folder))
        asked = PlanConfig(gpus=case.ranks, device="cpu", prompt=PROMPT, answer=ANSWER)
        found = plan(make_setting(parse_config(case.method, words), asked))
        taken = max(spawn(case, words, Path(folder)))
        off = found.memory.peak / taken - 1
        kinds = {name: size / MIB for name, size in found.memory.kinds.items() if size}
        figures = {"predicted_mib": found.memory.peak / MIB, "measured_mib": taken / MIB, "off": off}
        return {**figures, "ranks": case.ranks, "phase": found.memory.phase, "kinds_mib": kinds}


def flags_of(case: Case, folder: Path) -> list[str]:
    """The words of the run's command."""
    draw = random.Random(0)
    rows = [row(draw, case.method) for _ in range(160)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    flags = {
        "model.config": SHAPE,
        "model.tokenizer": "builtin:letters",
        "data.path": str(folder / "rows.jsonl"),
        "data.cache_dir": str(folder / "cache"),
        "data.max_length": PROMPT + ANSWER,
        "batch.size": 32,
        "batch.tokens": 4096,
        "run.steps": STEPS,
        "run.show_example": False,
        "run.output_dir": str(folder / "run"),
        **case.flags,
    }
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flags.items()}
    return [word for key, text in written.items() for word in (f"--{key}", text.replace("{folder}", str(folder)))]


def row(draw: random.Random, method: str) -> dict[str, str]:
    """Letters; the tokenizer makes a token of each, and ends the answer with one more."""

    def letters(number: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(number))

    answers = ("chosen", "rejected") if method == "dpo" else ("completion",)
    return {"prompt": letters(PROMPT), **{name: letters(ANSWER - 1) for name in answers}}


def spawn(case: Case, words: list[str], folder: Path) -> list[int]:
    """The bytes that each rank took at most."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    launch = [sys.executable, "-W", "ignore", *(torchrun if case.ranks > 1 else [])]
    command = [*launch, "-m", "bench", "plan", "--child", str(folder), case.method, *words]
    # Freed blocks of a MiB and more go back to the system: a peak above what is resident is then a peak of the run.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise ValueError(f"a case failed: {done.stderr.strip()[-600:]}")
    return [int((folder / f"taken-{rank}").read_text()) for rank in range(case.ranks)]


def child(words: list[str]) -> None:
    """Train as one rank, and leave a file with the bytes that it took."""
    folder, method, *flags = words
    from fastalign.engine import train as engine

    before, load = [0], engine.load_models

    def noted(*args: Any, **kwargs: Any) -> Any:
        ctypes.CDLL(None).malloc_trim(0)
        before[0] = common.status_bytes("VmRSS")
        return load(*args, **kwargs)

    def on_step(step: int) -> None:
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident
        if step == STEPS:
            rank = os.environ.get("RANK", "0")
            Path(folder, f"taken-{rank}").write_text(str(common.status_bytes("VmHWM") - before[0]))

    engine.load_models = noted
    engine.train(parse_config(method, flags), on_step=on_step)
