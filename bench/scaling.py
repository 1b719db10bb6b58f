"""``fastalign bench scaling``: the modelled table of docs/scaling.md, from `fastalign plan --fit` for 8 to 1024 GPUs.

Nothing is measured: bytes and operations are counted from the models' sizes, seconds come from a device's data sheet
and the shares of it that are assumed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastalign.arguments import parse_config
from fastalign.commands import PlanConfig
from fastalign.engine.plan.devices import DEVICES, in_units
from fastalign.engine.plan.search import Plan, fitted, plan, rungs
from fastalign.engine.plan.setting import Setting, make_setting

LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "num_key_value_heads": 8}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODELS = {
    "8B": {**LLAMA, **dict(zip(SIZES, (4096, 14336, 32, 32), strict=True))},
    "70B": {**LLAMA, **dict(zip(SIZES, (8192, 28672, 80, 64), strict=True))},
}
"""Sizes of Llama 3."""
PAIRS = {"data.max_length": 2048}
ANSWERS = {"data.max_length": 2048, "sampler.max_new_tokens": 1024, "algorithm.preset": "strong"}
SERVED = {**ANSWERS, "sampler.backend": "vllm", "sampler.url": "http://localhost:8000/v1"}
CASES = {
    "DPO, 8B": ("dpo", "8B", PAIRS),
    "DPO, 70B": ("dpo", "70B", PAIRS),
    "PPO, 8B": ("ppo", "8B", ANSWERS),
    "PPO, 70B": ("ppo", "70B", ANSWERS),
    "PPO, 70B, sampled by a server": ("ppo", "70B", SERVED),
}
"""DPO on pairs of 1024 tokens after prompts of 1024; PPO with a critic of its own, on answers of 1024."""
PER_GPU = 8
"""Pairs or prompts of a step for each GPU."""
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
HEAD = (
    *("GPUs", "mesh", "recomputed", "batch.tokens", "peak of a rank", "received by a rank"),
    *("s a step", "tokens/s", "tokens/s/GPU"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="how many (default: 8 to 1024)")
    parser.add_argument("--only", choices=list(CASES), help="print this table only")
    parser.add_argument("--device", choices=list(DEVICES), default="h100", help="which (default: h100)")


def main(options: argparse.Namespace) -> int:
    """Print the tables; the exit code."""
    for title in [options.only] if options.only else CASES:
        print(f"\n### {title} (modelled)\n")
        for row in (HEAD, ["---"] * len(HEAD), *rows(title, options)):
            print(f"| {' | '.join(row)} |", flush=True)
    return 0


def rows(title: str, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """A row for each number of GPUs."""
    first = None
    for gpus in options.gpus:
        asked = PlanConfig(gpus=gpus, device=options.device)
        one = setting(title, asked) if first is None else replace(first, asked=asked)
        first = first or one
        config = one.config
        one = replace(one, config=replace(config, batch=replace(config.batch, size=PER_GPU * gpus)))
        best = fitted(one)
        yield (str(gpus), *(cells(best) if best is not None else missing(one)))


def setting(title: str, asked: PlanConfig) -> Setting:
    """The run of a row."""
    method, model, own = CASES[title]
    flags: dict[str, Any] = {"model.config": json.dumps(MODELS[model]), **own}
    return make_setting(parse_config(method, [word for k, v in flags.items() for word in (f"--{k}", str(v))]), asked)


def cells(found: Plan) -> tuple[str, ...]:
    """What was found for it."""
    config, layout, rate = found.setting.config, found.setting.layout, found.speed.tokens / found.speed.step
    mesh = f"{layout.replicate} x {layout.shard} x {layout.tp}"
    again = {True: "layers", "mlp": "MLPs"}.get(config.model.gradient_checkpointing, "nothing")
    sizes = in_units(found.memory.peak), in_units(sum(found.speed.sent.values()))
    per = rate / found.setting.asked.gpus
    return mesh, again, f"{config.batch.tokens:,}", *sizes, f"{found.speed.step:.1f}", f"{rate:,.0f}", f"{per:,.0f}"


def missing(one: Setting) -> tuple[str, ...]:
    """By how much the smallest of what was tried is too large."""
    same = [rung.peak for rung in rungs(one) if not rung.words.startswith(("--gpus", "model.lora"))]
    least = min(same, default=plan(one).memory.peak)
    return ("none fits", "", "", f"{in_units(least)} at least", "", "", "", "")
