"""One optimizer step: micro-batches in, gradients and metric sums out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastalign.engine.forward import Models, run_head
from fastalign.engine.methods import Objective
from fastalign.engine.prepare import Carried, look_ahead, score_reference
from fastalign.engine.timing import Stopwatch
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import synchronise_gradients
from fastalign.types import PackedBatch


@dataclass(frozen=True)
class Work:
    """What a step computes, over all ranks; known before it starts.

    Attributes:
        units: what the loss is a mean over: scored tokens or examples.
        imitated: tokens that an imitation term is a mean over.
        examples, sequences, tokens: as the data has them, a shared prompt counted once per sequence.
        scored: rows of the head.
        computed, attended: tokens that the backbone computes, and pairs of a query and a key.
        idle: tokens of ranks without work, which belong to no sequence.
        micro_batches: per rank.
        memory: peak bytes of the rank that has used most so far.
        asked: the most that signals or the clock ask of a rank; see `interrupt.ORDER`.
    """

    units: int
    imitated: int
    examples: int
    sequences: int
    tokens: int
    scored: int
    computed: int
    attended: int
    idle: int
    micro_batches: int
    memory: int
    asked: int = 0


def measure_work(
    batches: Sequence[PackedBatch], objective: Objective, world: World, memory: int, asked: int = 0
) -> Work:
    """Count a step over all ranks and micro-batches, in one exchange on the host, which carries requests as well."""
    mine = [
        [
            objective.count(b),
            objective.imitated(b),
            b.num_examples,
            b.num_sequences,
            b.logical_tokens,
            b.num_scored,
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
    work: Work,
    world: World,
    watch: Stopwatch,
    carried: Carried,
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch; gradients of the global mean are left in the parameters.

    Each micro-batch adds ``world.data.size * (sum of its losses) / (units of the whole step)``; the factor undoes the
    average that gradient reduction takes over ranks.

    Returns:
        per micro-batch, this rank's ``[2]`` fp64 (sum, count) of each metric.
    """
    scale, per_unit = world.data.size / max(work.units, 1), max(work.imitated, 1) / max(work.units, 1)
    sums = []
    for i, (batch, facts) in enumerate(look_ahead(models, batches, objective, per_unit, world, watch, carried)):
        synchronise_gradients(models.policy, i == len(batches) - 1)
        with watch("data"):
            batch = batch.to(world.device)
        batch = replace(batch, ref_logps=score_reference(models, batch, objective, world.device, watch))
        with watch("forward"), models.precision(world.device):
            loss, metrics = run_head(models, batch, objective, scale, facts)
        with watch("backward"):
            loss.backward()
        sums.append(metrics)
    return sums


def add_sums(sums: Sequence[dict[str, Tensor]], names: Sequence[str], device: torch.device) -> Tensor:
    """``[len(names), 2]`` fp64 totals over micro-batches; one without a scored row adds nothing."""
    total = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for metrics in sums:
        if metrics:
            total += torch.stack([metrics[name] for name in names])
    return total
