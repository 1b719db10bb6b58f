"""The update phase of GRPO on rollouts that are given: groups of answers of unequal lengths to one prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.turns import StepLog
from bench.workload import Workload
from fastalign.config import ModelConfig, OptimConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.engine.optim import make_optimizer
from fastalign.engine.settings import bound_kernels
from fastalign.losses import policy as losses
from fastalign.models.costs import forward_cost
from fastalign.models.load import load_policy
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.parallel.clip import clip_gradients
from fastalign.types import PackedBatch, TokenStats

GROUP = 8
"""Answers to one prompt."""


def prepare(work: Workload) -> None:
    """Write one group per pair: its prompt, with the answers of eight pairs; advantages and old log-probs beside."""
    pairs = [json.loads(line) for line in work.data.read_text().splitlines()]
    tokenizer, draw, groups = AutoTokenizer.from_pretrained(work.model), random.Random(work.seed), []
    for i, pair in enumerate(pairs):
        answers = [pairs[(i + k) % len(pairs)]["chosen"] for k in range(GROUP)]
        prompt = tokenizer(pair["prompt"]).input_ids
        room = work.max_length - len(prompt)
        ids = [[*tokenizer(answer).input_ids, tokenizer.eos_token_id][:room] for answer in answers]
        rewards = np.array([draw.gauss(0, 1) for _ in range(GROUP)])
        advantages = ((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)).tolist()
        groups.append({"prompt_ids": prompt, "completion_ids": ids, "advantages": advantages})
    policy = load_policy(ModelConfig(path=str(work.model)))
    for group in groups:
        old = scored(policy, build_batch([example(group)], share_prefix=True))
        lengths = [len(ids) for ids in group["completion_ids"]]
        group["old_logps"] = [part.tolist() for part in old.split(lengths)]
    path(work).write_text("".join(json.dumps(group) + "\n" for group in groups))


def path(work: Workload) -> Any:
    """Where the groups lie, in the order of the steps."""
    return work.path / "groups.jsonl"


def read(work: Workload) -> list[dict[str, Any]]:
    """The groups."""
    return [json.loads(line) for line in path(work).read_text().splitlines()]


def example(group: dict[str, Any]) -> TokenExample:
    """A group as the packer takes it: the completions' tokens are scored."""
    prompt = group["prompt_ids"]
    rows = [
        (np.array(prompt + ids), np.arange(len(prompt) + len(ids)) >= len(prompt)) for ids in group["completion_ids"]
    ]
    return TokenExample(tuple(rows), 0)


@torch.no_grad()
def scored(policy: Policy, batch: PackedBatch) -> Tensor:
    """``[N]`` log-probs."""

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return linear_loss(hidden, weight, labels, lambda stats: stats.logps.sum(), **options)[1].logps

    return policy(batch, head)


def fastalign_update(work: Workload, log: StepLog) -> Callable[[], Any]:
    """Packed groups with a shared prompt, the policy loss inside the head; ``examples`` groups per optimizer step."""
    bound_kernels()
    groups = read(work)
    policy = load_policy(ModelConfig(path=str(work.model))).to(work.device).train()
    optimizer = make_optimizer(policy, OptimConfig(lr=work.lr, schedule="constant"))

    def train() -> None:
        log.tick()
        for start in range(0, work.steps * work.examples, work.examples):
            step(policy, optimizer, groups[start : start + work.examples], work, log)
            log.tick()

    return train


def step(policy: Policy, optimizer: Any, groups: list[dict[str, Any]], work: Workload, log: StepLog) -> None:
    """One update: every token of every answer once, all in one micro-batch."""
    batch = build_batch([example(group) for group in groups], share_prefix=True).to(work.device)
    loss_fn = surrogate(groups, batch.num_scored, work.device)

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return linear_loss(hidden, weight, labels, loss_fn, entropy=True, num_scored=batch.num_scored, **options)[0]

    with torch.autocast(work.device, torch.bfloat16, enabled=work.dtype == "bfloat16"):
        loss = policy(batch, head)
    loss.backward()
    clip_gradients(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    log.losses.append(loss.item())
    log.tokens.append(batch.num_tokens)
    log.scored.append(batch.num_scored)
    log.flops.append(6 * forward_cost(policy).of(batch.num_tokens, batch.num_attended, batch.num_scored))


def surrogate(groups: list[dict[str, Any]], count: int, device: str) -> Callable[[TokenStats], Any]:
    """The clipped surrogate, its mean over the step's tokens, and the metrics that TRL logs too."""
    old = torch.tensor([x for group in groups for part in group["old_logps"] for x in part], device=device)
    weights = [a for g in groups for a, ids in zip(g["advantages"], g["completion_ids"], strict=True) for _ in ids]
    advantages = torch.tensor(weights, device=device)

    def loss_fn(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        known = stats.logps, old[stats.rows], advantages[stats.rows]
        loss = losses.ppo(*known).sum() / count
        assert stats.entropy is not None
        with torch.no_grad():
            metrics = losses.metrics(*known, clip_low=0.2, clip_high=0.2)
        return loss, {**metrics, "entropy": stats.entropy.detach().sum()}

    return loss_fn
