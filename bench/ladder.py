"""``fastalign bench ladder``: what every rung of the memory ladder saves, and what it costs.

Each is a process of its own that trains a Llama of 9M parameters for some steps of 4096 tokens. Memory is the peak of
the resident set in a step, over what the process had before the model was made; time is CPU time, the median of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import numpy as np
import torch

from bench import common
from bench.common import MIB
from bench.memory import peaks, start
from bench.sharing import MODELS
from fastalign.config import ModelConfig, OptimConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.engine.optim import Trained, make_optimizer, stepping, take_step
from fastalign.models.load import load_policy
from fastalign.ops import linear_loss

HALF = {"dtype": "bfloat16"}
TWICE, EIGHT = {"master_weights": "compensated"}, {"name": "adamw_8bit"}
WITHIN = {"in_backward": True, "clip_norm": 0.0}
RUNGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({}, {}),
    "model.gradient_checkpointing mlp": ({"gradient_checkpointing": "mlp"}, {}),
    "model.gradient_checkpointing true": ({"gradient_checkpointing": True}, {}),
    "optim.name adamw_8bit": ({}, EIGHT),
    "optim.in_backward true": ({}, WITHIN),
    "model.dtype bfloat16": (HALF, {}),
    "... and optim.name adamw_8bit": (HALF, EIGHT),
    "... and optim.master_weights compensated": (HALF, TWICE),
    "... and optim.master_weights false": (HALF, {"master_weights": False}),
    "compensated and adamw_8bit": (HALF, {**TWICE, **EIGHT}),
    "compensated and gradient_checkpointing true": ({**HALF, "gradient_checkpointing": True}, TWICE),
    "all of these": ({**HALF, "gradient_checkpointing": True}, {**TWICE, **EIGHT, **WITHIN}),
}
"""Settings of the sections model and optim."""
VOCABULARY = 8192


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    new("--model", choices=list(MODELS), default="9m", help="parameters of the Llama (default 9m)")
    new("--tokens", type=common.positive, default=4096, help="of a step, in sequences of 256 (default 4096)")
    new("--steps", type=common.positive, default=3, help="timed steps of each rung (default 3)")
    new("--child", metavar="RUNG", help=argparse.SUPPRESS)
    common.add_records(parser)


def main(options: argparse.Namespace) -> int:
    """Measure the rungs, print and record them; the exit code."""
    if options.child:
        print(json.dumps(measure(options.child, options)))
        return 0
    rows = [spawn(rung, options) for rung in RUNGS]
    if options.record:
        common.record("ladder-cpu", rows, common.environment("cpu"), options.results)
    lines = [(row["rung"], f"{row['peak_mib']:.0f}", f"{row['cpu_s']:.2f}") for row in rows]
    common.print_table(
        f"{options.model}, {options.tokens} tokens", ("setting", "peak MiB", "CPU seconds a step"), lines
    )
    return 0


def spawn(rung: str, options: argparse.Namespace) -> dict[str, Any]:
    """A rung in a process of its own."""
    given = ["--model", options.model, "--tokens", str(options.tokens), "--steps", str(options.steps)]
    command = [sys.executable, "-W", "ignore", "-m", "bench", "ladder", *given, "--child", rung]
    # Freed blocks of a MiB and more go back to the system: what is resident is then what is used.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(rung: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak and time of a rung."""
    before, _ = start("cpu")
    (model, optim), size = RUNGS[rung], MODELS[options.model]
    shape = {"vocab_size": VOCABULARY, "num_key_value_heads": size["num_attention_heads"] // 2}
    policy = load_policy(ModelConfig(config={"model_type": "llama", **shape, **size}, **model)).train()
    asked = OptimConfig(**optim)
    trained, fine = Trained(policy, make_optimizer(policy, asked, tell=False)), torch.tensor(True)
    draw, scored = np.random.default_rng(0), np.arange(256) > 0
    rows = [draw.integers(VOCABULARY, size=256) for _ in range(options.tokens // 256)]
    batch = build_batch([TokenExample(((ids, scored),), i) for i, ids in enumerate(rows)], False)

    def step() -> float:
        begun = time.process_time()
        loss = policy(
            batch, lambda *tensors, **known: linear_loss(*tensors, lambda stats: -stats.logps.mean(), **known)[0]
        )
        with stepping(trained, 1e-5, fine) if asked.in_backward else nullcontext():
            loss.backward()
        if not asked.in_backward:
            take_step(trained, 1e-5, asked.clip_norm, fine)
        return time.process_time() - begun

    step()  # makes the moments
    start("cpu")
    times = [step() for _ in range(options.steps)]
    return {"rung": rung, "peak_mib": (peaks("cpu")[0] - before) / MIB, "cpu_s": median(times)}
