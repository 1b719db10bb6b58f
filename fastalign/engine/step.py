"""One optimizer step: micro-batches in, gradients and metric sums out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.engine.methods import Align, LossFn, Objective
from fastalign.engine.metrics import Stopwatch
from fastalign.engine.reference import reference_logps
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import synchronise_gradients
from fastalign.types import PackedBatch, TokenStats


@dataclass(frozen=True)
class Models:
    """The policy, the frozen reference if the loss needs one, and whether they compute under bf16 autocast."""

    policy: Policy
    reference: Policy | None
    autocast: bool

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The context in which both run forward."""
        return torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()


@dataclass(frozen=True)
class Work:
    """What a step computes, over all ranks; known before it starts.

    Attributes:
        units: what the loss is a mean over: scored tokens or pairs.
        examples, tokens, computed: examples, logical tokens, tokens that the backbone computes.
        micro_batches: per rank.
        memory: peak bytes of the rank that has used most so far.
    """

    units: int
    examples: int
    tokens: int
    computed: int
    micro_batches: int
    memory: int


def measure_work(batches: Sequence[PackedBatch], objective: Objective, world: World, memory: int) -> Work:
    """Count a step over all ranks and micro-batches, in one exchange on the host."""
    mine = [
        [objective.method.count(b), len(b.example_ids), b.logical_tokens, b.num_tokens if b.example_ids else 0]
        for b in batches
    ]
    everyone = world.gather([*map(sum, zip(*mine, strict=True)), memory])
    units, examples, tokens, computed, _ = (int(x) for x in everyone.sum(0))
    return Work(units, examples, tokens, computed, len(batches), int(everyone[:, -1].max()))


def accumulate_gradients(
    models: Models, batches: Sequence[PackedBatch], objective: Objective, work: Work, world: World, watch: Stopwatch
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch; gradients of the global mean are left in the parameters.

    Each micro-batch adds ``world.size * (sum of its losses) / (units of the whole step)``; the factor undoes the
    average that gradient reduction takes over ranks.

    Returns:
        per micro-batch, this rank's ``[2]`` fp64 (sum, count) of each metric.
    """
    scale = world.size / max(work.units, 1)
    sums = []
    for i, batch in enumerate(batches):
        synchronise_gradients(models.policy, i == len(batches) - 1)
        with watch("data"):
            batch = batch.to(world.device)
        ref_logps = score_reference(models, batch, objective, world.device, watch)
        with watch("forward"), models.precision(world.device):
            loss, stats = run_head(models.policy, batch, objective.loss_fn(ref_logps, scale), objective.method.align)
        with watch("backward"):
            loss.backward()
        sums.append(stats.metrics)
    return sums


def score_reference(
    models: Models, batch: PackedBatch, objective: Objective, device: torch.device, watch: Stopwatch
) -> Tensor | None:
    """``[N]`` reference log-probs: those that came with the batch, or computed now; None for reference-free losses."""
    if models.reference is None or batch.ref_logps is not None:
        return batch.ref_logps
    with watch("reference"), models.precision(device):
        return reference_logps(models.reference, batch, objective.method.align)


def run_head(policy: Policy, batch: PackedBatch, loss_fn: LossFn, align: Align) -> tuple[Tensor, TokenStats]:
    """The policy's forward up to the loss: hidden states go through the fused head, logits never exist at once."""

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, TokenStats]:
        offsets = None if align == "token" else batch.cu_seqlens
        cut = {"cu_seqlens": offsets, "align": align, "entropy": True}
        return linear_loss(hidden, weight, labels, loss_fn, **cut, **options)

    return policy(batch, head)


def add_sums(sums: Sequence[dict[str, Tensor]], names: Sequence[str], device: torch.device) -> Tensor:
    """``[len(names), 2]`` fp64 totals over micro-batches; one without a scored row adds nothing."""
    total = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for metrics in sums:
        if metrics:
            total += torch.stack([metrics[name] for name in names])
    return total
