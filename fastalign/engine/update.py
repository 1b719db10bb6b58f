"""The updates of a step: micro-batches in; gradients, metric sums and new weights out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastalign.engine.forward import Models, run_critic, run_head
from fastalign.engine.methods import Objective, passes_of
from fastalign.engine.optim import learning_rate, stepping, take_step
from fastalign.engine.readings import EXTREMES
from fastalign.engine.timing import Stopwatch
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import synchronise_gradients
from fastalign.types import PackedBatch

if TYPE_CHECKING:
    from fastalign.engine.train import Job


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
        vitals: ``[ranks, n]`` what each rank has told beside.
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
    vitals: Tensor | None = None


def measure_work(
    batches: Sequence[PackedBatch], world: World, memory: int, asked: int = 0, vitals: Sequence[float] = ()
) -> Work:
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
    counts = [*map(sum, zip(*mine, strict=True))]
    everyone = world.everyone.gather([*counts, memory, asked, *vitals])
    added, most, told = everyone.split([len(counts), 2, len(vitals)], 1)
    memory, asked = (int(x) for x in most.amax(0))
    numbers = (int(x) for x in added[:: world.size // world.data.size].sum(0))  # one of each tensor group
    return Work(*numbers, micro_batches=len(batches), memory=memory, asked=asked, vitals=told)


def accumulate_gradients(
    models: Models,
    batches: Sequence[PackedBatch],
    objective: Objective,
    world: World,
    watch: Stopwatch,
    reduces: bool = False,
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch from `prepare`; gradients of the whole step are left in the parameters.

    With ``reduces`` those of a sharded model are reduced after each.

    Returns:
        per micro-batch, this rank's ``[2]`` fp64 (sum, count) of each metric.
    """
    sums = []
    for i, batch in enumerate(batches):
        last = reduces or i == len(batches) - 1
        synchronise_gradients(models.policy, last)
        with watch("forward"), models.precision(world.device):
            loss, metrics = run_head(models, batch, objective)
        with watch("backward"):
            loss.backward()
        sums.append({**metrics, **train_critic(models, batch, objective, world, watch, last)})
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


@dataclass(frozen=True)
class Update:
    """An optimizer update.

    Attributes:
        sums: of metrics, over all ranks.
        grad_norm: of the policy.
        losses: of this rank's micro-batches, with their examples.
        extremes: of metrics, over all ranks.
        skipped: the weights are as before, since the policy had moved too far already.
    """

    sums: Tensor
    grad_norm: Tensor
    losses: list[tuple[Tensor | None, tuple[int, ...]]]
    extremes: Tensor
    skipped: bool = False


def update(job: Job, batches: list[PackedBatch], step: int, lr: float, watch: Stopwatch) -> Update:
    """One update of all that trains, from the gradients of some of a step's micro-batches."""
    if job.config.optim.in_backward:
        return update_in_backward(job, batches, lr, watch)
    reduces = job.config.parallel.shard_gradients
    metrics = accumulate_gradients(job.models, batches, job.objective, job.world, watch, reduces)
    with watch("optimizer"):
        found, finite = verdict(job, batches, metrics)
        warm, critic_lr = warmup_of(job, step, lr)
        known = {"policy": (lr, finite & warm), "critic": (critic_lr, finite)}
        clip = job.config.optim.clip_norm
        norms = {role: take_step(one, known[role][0], clip, known[role][1]) for role, one in job.trained.items()}
    return replace(found, grad_norm=norms["policy"])


def update_in_backward(job: Job, batches: list[PackedBatch], lr: float, watch: Stopwatch) -> Update:
    """Likewise, weight by weight while backward goes on; whether the loss is finite is known before."""
    (batch,), policy, world = batches, job.models.policy, job.world
    synchronise_gradients(policy, True)
    with watch("forward"), job.models.precision(world.device):
        loss, metrics = run_head(job.models, batch, job.objective)
        found, finite = verdict(job, batches, [metrics])
    with watch("backward"), stepping(job.trained["policy"], lr, finite) as squares:
        loss.backward()
    with watch("optimizer"):
        return replace(found, grad_norm=squares.norm())


def verdict(job: Job, batches: list[PackedBatch], metrics: list[dict[str, Tensor]]) -> tuple[Update, Tensor]:
    """What an update tells, all but its norm, and ``[]`` bool, whether it may be made: the same on all ranks."""
    world, names = job.world, job.objective.metric_names
    sums = world.data.sum(add_sums(metrics, names, world.device))
    most = sums.new_empty(0)
    if job.objective.policy_gradient:
        most = world.data.max(add_extremes(metrics, list(EXTREMES), world.device))
    skipped, loss = moved_too_far(job.objective, sums), sums[names.index("loss")]
    finite = loss.isfinite().all() & (loss[1] > 0) & (not skipped)  # nothing scored teaches nothing
    losses = [one["loss"][0] if one else None for one in metrics]
    named = list(zip(losses, (batch.example_ids for batch in batches), strict=True))
    return Update(sums, sums.new_zeros(()), named, most, skipped), finite


def warmup_of(job: Job, step: int, lr: float) -> tuple[bool, float]:
    """Whether the policy trains in this step, and the learning rate of a separate critic."""
    plan = job.objective.policy_gradient
    if plan is None:
        return True, lr
    peak = plan.settings.critic_lr
    if peak is not None:
        lr = learning_rate(step, job.total, replace(job.config.optim, lr=peak))
    return step > plan.settings.critic_warmup, lr


def moved_too_far(objective: Objective, sums: Tensor) -> bool:
    """Whether an update is to be skipped: the same on all ranks, from sums over all of them."""
    plan = objective.policy_gradient
    if plan is None or (plan.settings.target_kl is None and plan.settings.max_ratio is None):
        return False
    limits = {"policy/approxkl_avg": plan.settings.target_kl, "val/ratio": plan.settings.max_ratio}
    found = {name: sums[objective.metric_names.index(name)].tolist() for name in limits}
    return any(limit is not None and found[name][0] > limit * max(found[name][1], 1) for name, limit in limits.items())


def make_updates(job: Job, parts: list[list[PackedBatch]], step: int, lr: float, watch: Stopwatch) -> list[Update]:
    """All updates of a step, pass after pass; they end where one was skipped."""
    updates: list[Update] = []
    for _ in range(passes_of(job.objective)):
        for part in parts:
            updates.append(update(job, part, step, lr, watch))
            if updates[-1].skipped:
                return updates
    return updates


def total(objective: Objective, updates: list[Update]) -> Tensor:
    """Sums of metrics over the updates of a step; how far the sampler is from training only its first can tell."""
    if len(updates) == 1:
        return updates[0].sums  # without a copy from the host
    sums = torch.stack([one.sums for one in updates])
    first = torch.tensor([name.startswith("sampling/") for name in objective.metric_names], device=sums.device)
    return torch.where(first[:, None], sums[0], sums.sum(0))


def extremes_of(updates: list[Update]) -> Tensor:
    """Likewise of the extremes, of which the first is the sampler's."""
    every = torch.stack([one.extremes for one in updates])
    found = every.amax(0) if every.shape[1] else every[0]
    return torch.cat([every[0, :1], found[1:]])
