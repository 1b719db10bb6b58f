"""``fastalign bench rollout``: tokens per CPU-second of the native sampler, of transformers, and of the products alone.

On a GPU they are tokens per second.
All sample the same number of tokens behind the same prompts from one model in this process, in random order, round by
round. The products are those of the model's matrices with the rows of one step, as often as there are steps, and no
more: once by the faster one of PyTorch's libraries, once by our own, which the sampler calls where they are faster.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bench import common
from fastalign.config import SamplerConfig
from fastalign.models.native import use_native_layers
from fastalign.models.policy import Policy
from fastalign.ops.backends.cpp import product
from fastalign.rl.exact import compare_many, probe
from fastalign.rl.sampler import NativeSampler, Stops
from fastalign.types import Prompt

SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048}
"""A Llama of 8.6M parameters."""
LARGE = {"hidden_size": 896, "intermediate_size": 2688, "num_hidden_layers": 24, "num_attention_heads": 14}
LARGE |= {"num_key_value_heads": 7, "vocab_size": 151936}
MODELS = {"9m": {}, "0.5b": LARGE}
"""What replaces numbers of that Llama."""
SMALL = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 1024}
LENGTHS = (40, 220)
"""Tokens of prompts, as the dialogues of hh-rlhf have."""
GOALS = {"float32": 3.5, "bfloat16": 5.0}
"""Times as fast as transformers."""
PRODUCTS = "PyTorch's products alone"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    common.add_device(parser)
    new("--model", choices=list(MODELS), default="9m", help="parameters of the Llama that samples (default 9m)")
    new("--dtype", choices=list(GOALS), default="float32", help="of the weights (default float32)")
    new("--prompts", type=common.positive, default=8, help="prompts (default 8)")
    new("--answers", type=common.positive, default=8, help="answers to each (default 8)")
    new("--tokens", type=common.positive, default=128, help="of each answer (default 128)")
    new("--rounds", type=common.positive, default=5, help="of which the median counts (default 5)")
    new("--threads", type=common.positive, default=1, help="CPU threads (default 1)")
    new("--exact", type=common.positive, metavar="N", help="only compare N sampled log-probs with those of training")
    common.add_records(parser)


def main(options: argparse.Namespace) -> int:
    """Measure and print; the exit code."""
    common.check_device(options.device)
    torch.set_num_threads(options.threads)
    if options.exact:
        return exact(options)
    seconds = measure(sides(options), options.rounds, options.device)
    total = options.prompts * options.answers * options.tokens
    rates = {name: sorted(total / s for s in each) for name, each in seconds.items()}
    rivals = [common.quantiles(rates[name])[1] for name in ("transformers generate", PRODUCTS)]
    rows = [row(name, rate, rivals) for name, rate in rates.items()]
    asked = f"{options.prompts} x {options.answers} answers of {options.tokens} tokens"
    title = f"{asked}, {options.model}-parameter Llama, {options.dtype}, {options.device}"
    goal = (
        f"goal: fastalign at least {GOALS[options.dtype]} times as fast as transformers, and 60 % of PyTorch's products"
    )
    unit = "tokens per CPU-second" if options.device == "cpu" else "tokens per second"
    columns = ["", unit, "20 % to 80 %", "against transformers", "of PyTorch's products"]
    common.print_table(title, columns, rows, goal if options.device == "cpu" else None)
    if options.record:
        facts = {
            "task": "rollout",
            **{name: getattr(options, name) for name in ("model", "dtype", "prompts", "answers", "tokens")},
        }
        name_of_rate = unit.replace(" ", "_").replace("CPU-", "cpu_")
        found = [{**facts, "side": name, name_of_rate: common.quantiles(rate)} for name, rate in rates.items()]
        print("recorded in", common.record("rollout", found, common.environment(options.device), options.results))
    return 0


def exact(options: argparse.Namespace) -> int:
    """Compare many log-probs bit for bit, on a model of 0.8M parameters; the exit code is 1 where any differs."""
    model = make_model(getattr(torch, options.dtype), **SMALL)
    policy = Policy(model)
    use_native_layers(model)
    begin = time.process_time()
    count, apart = compare_many(policy, options.exact, prompts=options.prompts, answers=options.answers)
    found = "all equal bit for bit" if apart == 0 else f"differ by up to {apart:.2g}"
    seconds = time.process_time() - begin
    print(f"{count:,} log-probs of sampling and of training, {options.dtype}: {found} ({seconds:.0f} CPU-seconds)")
    return int(apart > 0)


def row(name: str, rates: list[float], rivals: list[float]) -> tuple[str, ...]:
    """A line of the table, beside the rates of transformers and of the products."""
    low, middle, high = common.quantiles(rates)
    theirs, products = rivals
    return name, f"{middle:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{middle / theirs:.2f}x", f"{middle / products:.0%}"


def measure(runs: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """CPU seconds, on a GPU seconds, of each side in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(list(runs), len(runs)):
            spent = seconds_of(runs[name], device)
            seconds[name] += [spent] if number else []
    return seconds


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """CPU time of a call; on a GPU the time until all is done."""
    common.synchronize(device)
    clock = time.process_time if device == "cpu" else time.perf_counter
    begin = clock()
    run()
    common.synchronize(device)
    return clock() - begin


def sides(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    dtype, sizes = getattr(torch, options.dtype), MODELS[options.model]
    ours, theirs = (make_model(dtype, **sizes).to(options.device) for _ in range(2))
    draw = np.random.default_rng(0)
    lengths = draw.integers(*LENGTHS, size=options.prompts)
    prompts = [Prompt(draw.integers(ours.config.vocab_size, size=length), i) for i, length in enumerate(lengths)]
    policy = Policy(ours)
    use_native_layers(ours)
    sampler = NativeSampler(policy, SamplerConfig(max_new_tokens=options.tokens), Stops())
    if differs := probe(sampler):
        print(f"not exact here: {differs}")
    own = options.device == "cpu" and product.preferred()
    return {
        "fastalign": lambda: list(sampler.generate(prompts, options.answers, 0)),
        "transformers generate": lambda: generate(theirs, prompts, options),
        PRODUCTS: products(theirs, options, faster_of_pytorch),
        **({"our products alone": products(theirs, options, our_product)} if own else {}),
    }


def make_model(dtype: torch.dtype, **sizes: int) -> PreTrainedModel:
    """The Llama, with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SIZES, **sizes})).to(dtype)


def generate(model: Any, prompts: list[Prompt], options: argparse.Namespace) -> Any:
    """By transformers, in one batch with padding on the left."""
    rows = [prompt.ids for prompt in prompts for _ in range(options.answers)]
    longest = max(map(len, rows))
    ids = torch.tensor(np.stack([np.pad(x, (longest - len(x), 0)) for x in rows]))
    mask = torch.tensor(np.stack([np.arange(longest) >= longest - len(x) for x in rows])).long()
    ids, mask = ids.to(options.device), mask.to(options.device)
    length = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens}
    made = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0, **length)
    assert made.shape[1] == longest + options.tokens
    return made


Multiply = Callable[[Tensor], Any]
"""A product of some rows with a weight."""


def products(
    model: nn.Module, options: argparse.Namespace, make: Callable[[Tensor, Tensor], Multiply]
) -> Callable[[], Any]:
    """The matrix products of all decode steps; ``make`` chooses and prepares that of a weight."""
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    rows, (dtype, *_) = options.prompts * options.answers, {x.dtype for x in weights}
    inputs = {
        width: torch.randn(rows, width, dtype=dtype, device=options.device) for width in {x.shape[1] for x in weights}
    }
    multiply = [(make(inputs[x.shape[1]], x), inputs[x.shape[1]]) for x in weights]

    def run() -> None:
        for _ in range(options.tokens):
            for f, x in multiply:
                f(x)

    return run


def faster_of_pytorch(x: Tensor, weight: Tensor) -> Multiply:
    """By MKL or oneDNN, whichever takes less time for these rows."""
    found: list[Multiply] = [lambda x: nn.functional.linear(x, weight)]
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        found.append(lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    return min(found, key=lambda f: min(seconds_of(lambda: f(x), x.device.type) for _ in range(10)))


def our_product(x: Tensor, weight: Tensor) -> Multiply:
    """By the native kernel, the weight packed."""
    packed = product.Packed(weight)
    return lambda x: packed(x, weight.dtype)
