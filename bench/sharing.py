"""``fastalign bench sharing``: how much of what sharing a prompt saves in tokens becomes time.

Every case is one forward and backward of the same sequences, with the prompt computed once and once per response; the
two take turns in random order. Packing is timed, the optimizer, which does not depend on it, is not. Beside the
speed-up stand two bounds: the ratio of tokens, and that of multiply-adds. The second is lower, because the head reads
as many rows as before, and attention to the prompt is no less.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import common
from fastalign.config import ModelConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.losses import policy as losses
from fastalign.losses.pairs import pair_logps
from fastalign.losses.preference import dpo
from fastalign.models.costs import forward_cost
from fastalign.models.load import load_policy
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.types import PackedBatch, TokenStats


@dataclass(frozen=True)
class Case:
    """``groups`` groups of ``size`` responses to one prompt; pairs where the size is 2."""

    prompt: int
    response: int
    size: int
    groups: int

    @property
    def name(self) -> str:
        """Which case it is."""
        return f"{'pairs' if self.size == 2 else f'G={self.size}'}, {self.prompt}:{self.response}"


CASES = (
    Case(512, 128, 2, 2),
    Case(1024, 256, 2, 1),
    Case(512, 128, 8, 1),
    Case(256, 64, 8, 2),
    Case(128, 1024, 2, 1),
    Case(150, 1200, 2, 1),
)

MODELS = {
    "9m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4},
    "46m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8},
}
"""Llamas of about that many parameters, 8192 words; the head has 31 and 10 % of the multiply-adds of a scored token."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    new("--model", choices=list(MODELS), default="9m", help="parameters of the Llama (default 9m)")
    new("--only", metavar="TEXT", default="", help="cases whose name holds this, such as G=8 or 512:128")
    new("--rounds", type=common.positive, default=7, help="timed steps of each case, shared and unshared (default 7)")
    new("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    new("--threads", type=common.positive, default=2, help="CPU threads (default 2)")
    new("--profile", action="store_true", help="print where the time of the last step of each kind goes")
    common.add_records(parser)


def make_policy(model: str, longest: int) -> Policy:
    """A Llama with random weights; heads of 64, two to a key head."""
    size: dict[str, Any] = MODELS[model]
    shape = {"vocab_size": 8192, "num_key_value_heads": size["num_attention_heads"] // 2}
    config = {"model_type": "llama", "max_position_embeddings": longest, "tie_word_embeddings": False, **shape, **size}
    return load_policy(ModelConfig(config=config)).train()


def make_examples(case: Case, seed: int, vocabulary: int = 8192) -> list[TokenExample]:
    """Random tokens."""
    draw = np.random.default_rng(seed)
    scored = np.arange(case.prompt + case.response) >= case.prompt

    def group(index: int) -> TokenExample:
        prompt = draw.integers(vocabulary, size=case.prompt)
        answers = draw.integers(vocabulary, size=(case.size, case.response))
        return TokenExample(tuple((np.concatenate([prompt, answer]), scored) for answer in answers), index)

    return [group(index) for index in range(case.groups)]


def loss_fn_of(batch: PackedBatch, case: Case) -> tuple[Callable[[TokenStats], Tensor], dict[str, Any]]:
    """DPO of pairs with a known reference, the clipped surrogate of groups; and how the head may cut the batch."""
    if case.size == 2:
        known = torch.full((batch.num_scored,), -9.0)

        def preference(stats: TokenStats) -> Tensor:
            assert stats.cu_seqlens is not None
            return dpo(pair_logps(stats.logps, stats.cu_seqlens, known[stats.rows]), beta=0.1).sum() / case.groups

        return preference, {"cu_seqlens": batch.cu_seqlens, "align": "pair"}
    advantages = torch.linspace(-1, 1, batch.num_scored)

    def surrogate(stats: TokenStats) -> Tensor:
        old = stats.logps.detach()
        return losses.ppo(stats.logps, old, advantages[stats.rows]).sum() / batch.num_scored

    return surrogate, {}


def step(policy: Policy, examples: Sequence[TokenExample], case: Case, shared: bool, autocast: bool) -> float:
    """Packing, forward and backward; the loss."""
    batch = build_batch(examples, shared)
    loss_fn, cut = loss_fn_of(batch, case)

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return linear_loss(hidden, weight, labels, loss_fn, entropy=True, num_scored=len(labels), **cut, **options)[0]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = policy(batch, head)
    loss.backward()
    return loss.item()


def measure(policy: Policy, case: Case, rounds: int, autocast: bool) -> dict[bool, list[float]]:
    """Seconds of shared and unshared steps, round by round; the first round is not timed.

    Raises:
        ValueError: both compute different losses.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(rounds + 1):
        examples, found = make_examples(case, seed, policy.config.vocab_size), {}
        for shared in random.Random(seed).sample([True, False], 2):
            policy.zero_grad()
            start = time.perf_counter()
            found[shared] = step(policy, examples, case, shared, autocast)
            seconds[shared] += [time.perf_counter() - start] * (seed > 0)
        check(found, autocast)
    return seconds


def check(found: dict[bool, float], autocast: bool) -> None:
    """Sharing changes the order of sums and nothing else."""
    if abs(found[True] - found[False]) > (2e-2 if autocast else 1e-4) * max(1.0, abs(found[False])):
        raise ValueError(f"the loss with shared prompts is {found[True]}, without {found[False]}")


def figures(policy: Policy, case: Case, seconds: dict[bool, list[float]]) -> dict[str, Any]:
    """The realised ratio beside its bounds; the ratio is the median over rounds."""
    low, realised, high = common.quantiles([a / b for a, b in zip(seconds[False], seconds[True], strict=True)])
    batches = [build_batch(make_examples(case, 0, policy.config.vocab_size), shared) for shared in (False, True)]
    cost = forward_cost(policy)
    once, shared = (cost.of(b.num_tokens, b.num_attended, b.num_scored) for b in batches)
    tokens = batches[0].num_tokens / batches[1].num_tokens
    return {
        "case": case.name,
        "groups": case.groups,
        "unshared_seconds": common.quantiles(seconds[False])[1],
        "shared_seconds": common.quantiles(seconds[True])[1],
        "realised_p20": low,
        "realised": realised,
        "realised_p80": high,
        "token_ratio": tokens,
        "share_of_token_ratio": realised / tokens,
        "operations_ratio": once / shared,
        "share_of_operations_ratio": realised / (once / shared),
    }


def print_figures(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """A line per case."""
    cells = []
    for row in rows:
        times = (f"{row['unshared_seconds']:.3f}", f"{row['shared_seconds']:.3f}")
        realised = "/".join(f"{row[name]:.2f}" for name in ("realised_p20", "realised", "realised_p80"))
        tokens = (f"{row['token_ratio']:.2f}", f"{row['share_of_token_ratio']:.0%}")
        operations = (f"{row['operations_ratio']:.2f}", f"{row['share_of_operations_ratio']:.0%}")
        cells.append((row["case"], *times, realised, *tokens, *operations))
    common.print_table(
        f"Shared prompts, Llama {options.model}, {options.dtype}, {options.threads} threads, forward and backward",
        ("prompt:response", "unshared s", "shared s", "realised p20/50/80", "tokens", "of it", "operations", "of it"),
        cells,
        caption=f"{options.rounds} rounds; realised: unshared / shared time; of it: realised / the ratio beside",
    )


def profile(policy: Policy, case: Case, autocast: bool) -> None:
    """Where the time of both kinds of steps goes."""
    for shared in (False, True):
        policy.zero_grad()
        with torch.profiler.profile() as profiler:
            step(policy, make_examples(case, 0, policy.config.vocab_size), case, shared, autocast)
        print(case.name, "shared" if shared else "unshared")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=50))


def main(options: argparse.Namespace) -> int:
    """Measure the cases; the exit code."""
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        raise ValueError(f"--only: no case has {options.only!r} in its name; there are {[c.name for c in CASES]}")
    torch.set_num_threads(options.threads)
    policy = make_policy(options.model, max(c.prompt + c.response for c in CASES))
    autocast = options.dtype == "bfloat16"
    rows = [figures(policy, case, measure(policy, case, options.rounds, autocast)) for case in cases]
    print_figures(rows, options)
    for case in cases if options.profile else ():
        profile(policy, case, autocast)
    if options.record:
        what = {"bench": "sharing", "model": options.model, "dtype": options.dtype, "rounds": options.rounds}
        where = common.environment("cpu")
        print("recorded in", common.record("sharing", ({**what, **row} for row in rows), where, options.results))
    return 0
