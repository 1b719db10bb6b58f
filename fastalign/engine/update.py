"""One optimizer step: micro-batches in, gradients and metric sums out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.engine.forward import Models, run_critic, run_head
from fastalign.engine.methods import Objective
from fastalign.engine.timing import Stopwatch
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import synchronise_gradients
from fastalign.types import PackedBatch


@dataclass(frozen=True)
class Work:
    """What a step computes, over all ranks; known before it starts.

    Attributes:
        imitated: scored tokens of the first sequence of each example, such as the chosen ones of pairs.
        examples, sequences, tokens: as the data has them, a shared prompt counted once per sequence.
        scored: rows of the head.
        nonempty: sequences with a scored token.
        computed, attended: tokens that the backbone computes, and pairs of a query and a key.
        idle: tokens of ranks without work, which belong to no sequence.
        micro_batches: per rank.
        memory: peak bytes of the rank that has used most so far.
        asked: the most that signals or the clock ask of a rank; see `interrupt.ORDER`.
    """

    imitated: int
    examples: int
    sequences: int
    tokens: int
    scored: int
    nonempty: int
    computed: int
    attended: int
    idle: int
    micro_batches: int
    memory: int
    asked: int = 0


def measure_work(batches: Sequence[PackedBatch], world: World, memory: int, asked: int = 0) -> Work:
    """Count a step over all ranks and micro-batches, in one exchange on the host, which carries requests as well."""
    mine = [
        [
            int(b.cu_seqlens.diff()[b.cu_groups[:-1].long()].sum()),
            b.num_examples,
            b.num_sequences,
            b.logical_tokens,
            b.num_scored,
            int((b.cu_seqlens.diff() > 0).sum()),
            *((b.num_tokens, b.num_attended, 0) if b.num_examples else (0, 0, b.num_tokens)),
        ]
        for b in batches
    ]
    everyone = world.data.gather([*map(sum, zip(*mine, strict=True)), memory, asked])
    counts = (int(x) for x in everyone[:, :-2].sum(0))
    memory, asked = (int(x) for x in everyone[:, -2:].amax(0))
    return Work(*counts, micro_batches=len(batches), memory=memory, asked=asked)


def accumulate_gradients(
    models: Models,
    batches: Sequence[PackedBatch],
    objective: Objective,
    world: World,
    watch: Stopwatch,
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch from `prepare`; gradients of the whole step are left in the parameters.

    Returns:
        per micro-batch, this rank's ``[2]`` fp64 (sum, count) of each metric.
    """
    sums = []
    for i, batch in enumerate(batches):
        synchronise_gradients(models.policy, i == len(batches) - 1)
        with watch("forward"), models.precision(world.device):
            loss, metrics = run_head(models, batch, objective)
        with watch("backward"):
            loss.backward()
        sums.append({**metrics, **train_critic(models, batch, objective, world, watch, i == len(batches) - 1)})
    return sums


def train_critic(
    models: Models, batch: PackedBatch, objective: Objective, world: World, watch: Stopwatch, last: bool
) -> dict[str, Tensor]:
    """Gradients of a critic that is a model of its own, and its metrics."""
    if models.critic is None:
        return {}
    synchronise_gradients(models.critic, last)
    with watch("forward"), models.precision(world.device):
        loss, metrics = run_critic(models.critic, batch, objective)
    with watch("backward"):
        loss.backward()
    return metrics if batch.num_scored else {}


def add_extremes(sums: Sequence[dict[str, Tensor]], names: Sequence[str], device: torch.device) -> Tensor:
    """``[len(names)]`` fp64, the largest of each number over micro-batches; -inf where there is none."""
    total = torch.full((len(names),), -math.inf, dtype=torch.float64, device=device)
    for metrics in sums:
        if all(name in metrics for name in names):
            total = torch.maximum(total, torch.stack([metrics[name].double() for name in names]))
    return total


def add_sums(sums: Sequence[dict[str, Tensor]], names: Sequence[str], device: torch.device) -> Tensor:
    """``[len(names), 2]`` fp64 totals over micro-batches; one without a scored row adds nothing."""
    total = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for metrics in sums:
        if metrics:
            total += torch.stack([metrics[name] for name in names])
    return total
