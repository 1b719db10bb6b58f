"""One optimizer step: micro-batches in, gradients and metric sums out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastalign.engine.methods import Align, LossFn, Objective, StepFacts
from fastalign.engine.metrics import Stopwatch
from fastalign.engine.reference import reference_logps
from fastalign.losses.pairs import pair_logps
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import synchronise_gradients
from fastalign.types import PackedBatch, PairLogps, TokenStats


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
        imitated: tokens that an imitation term is a mean over.
        examples, tokens, computed: examples, logical tokens, tokens that the backbone computes.
        micro_batches: per rank.
        memory: peak bytes of the rank that has used most so far.
    """

    units: int
    imitated: int
    examples: int
    tokens: int
    computed: int
    micro_batches: int
    memory: int


def measure_work(batches: Sequence[PackedBatch], objective: Objective, world: World, memory: int) -> Work:
    """Count a step over all ranks and micro-batches, in one exchange on the host."""
    mine = [
        [
            objective.method.count(b),
            objective.method.imitated(b),
            len(b.example_ids),
            b.logical_tokens,
            b.num_tokens if b.example_ids else 0,
        ]
        for b in batches
    ]
    everyone = world.gather([*map(sum, zip(*mine, strict=True)), memory])
    units, imitated, examples, tokens, computed, _ = (int(x) for x in everyone.sum(0))
    return Work(units, imitated, examples, tokens, computed, len(batches), int(everyone[:, -1].max()))


def accumulate_gradients(
    models: Models, batches: Sequence[PackedBatch], objective: Objective, work: Work, world: World, watch: Stopwatch
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch; gradients of the global mean are left in the parameters.

    Each micro-batch adds ``world.size * (sum of its losses) / (units of the whole step)``; the factor undoes the
    average that gradient reduction takes over ranks.

    Returns:
        per micro-batch, this rank's ``[2]`` fp64 (sum, count) of each metric.
    """
    scale, per_unit = world.size / max(work.units, 1), max(work.imitated, 1) / max(work.units, 1)
    sums = []
    for i, (batch, facts) in enumerate(look_ahead(models, batches, objective, per_unit, world, watch)):
        synchronise_gradients(models.policy, i == len(batches) - 1)
        with watch("data"):
            batch = batch.to(world.device)
        ref_logps = score_reference(models, batch, objective, world.device, watch)
        with watch("forward"), models.precision(world.device):
            loss, stats = run_head(
                models.policy, batch, objective.loss_fn(ref_logps, scale, facts), objective.method.align
            )
        with watch("backward"):
            loss.backward()
        sums.append(stats.metrics)
    return sums


def look_ahead(
    models: Models,
    batches: Sequence[PackedBatch],
    objective: Objective,
    imitated_per_unit: float | None,
    world: World,
    watch: Stopwatch,
) -> list[tuple[PackedBatch, StepFacts]]:
    """What each micro-batch's loss may know of the step; a step-coupled loss costs a forward pass of all of them.

    That pass cuts the head into the chunks of the training pass, so that both see the same bits, and keeps the
    reference's log-probs with the batches.
    """
    if not objective.is_step_coupled:
        return [(batch, StepFacts(imitated_per_unit)) for batch in batches]
    scored, mine = [], []
    for batch in batches:
        batch = batch.to(world.device)
        ref_logps = score_reference(models, batch, objective, world.device, watch)
        with watch("forward"), models.precision(world.device):
            logps = reference_logps(models.policy, batch, objective.method.align)
        scored.append(replace(batch, ref_logps=ref_logps))
        mine.append(pair_logps(logps, batch.cu_seqlens, ref_logps))
    pairs, first = gather_pairs(mine, world)
    places = accumulate((len(pair.chosen) for pair in mine), initial=first)
    return [(b, StepFacts(imitated_per_unit, pairs, place)) for b, place in zip(scored, places, strict=False)]


def gather_pairs(mine: Sequence[PairLogps], world: World) -> tuple[PairLogps, int]:
    """The pairs of all micro-batches and ranks, in the order of ranks, and the position of this rank's first."""
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths")
    table = torch.cat([torch.stack([getattr(pair, name).double() for name in names], 1) for pair in mine]).cpu()
    counts = world.gather([len(table)])[:, 0].long().tolist()
    padded = torch.nn.functional.pad(table, (0, 0, 0, max(counts) - len(table)))
    everyone = world.gather(padded.flatten().tolist()).view(world.size, -1, len(names))
    rows = torch.cat([rank[:count] for rank, count in zip(everyone, counts, strict=True)])
    columns = rows.to(mine[0].chosen.device, mine[0].chosen.dtype).unbind(1)
    return PairLogps(**dict(zip(names, columns, strict=True))), sum(counts[: world.rank])


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
        cut = {"cu_seqlens": offsets, "align": align, "entropy": True, "num_scored": batch.num_scored}
        return linear_loss(hidden, weight, labels, loss_fn, **cut, **options)

    return policy(batch, head)


def add_sums(sums: Sequence[dict[str, Tensor]], names: Sequence[str], device: torch.device) -> Tensor:
    """``[len(names), 2]`` fp64 totals over micro-batches; one without a scored row adds nothing."""
    total = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for metrics in sums:
        if metrics:
            total += torch.stack([metrics[name] for name in names])
    return total
