"""From what the head made of a batch to each family's losses and metrics: the functions that a head differentiates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastalign.engine.methods import Objective
from fastalign.losses import policy, preference, ranking, reward, supervised, unpaired
from fastalign.losses.pairs import pair_logps
from fastalign.losses.reduce import lengths, segment_sum, sum_and_count, weighted
from fastalign.ops.checks import stats_dtype
from fastalign.types import Columns, LabelledLogps, PackedBatch, PairLogps, RankedLogps, TokenStats

Metrics = dict[str, Tensor]
LossFn = Callable[[Any], tuple[Tensor, Metrics]]
"""From what the head made to a share of the loss, and ``[2]`` (sum, count) per metric."""


def share_of(objective: Objective, columns: Columns, losses: Tensor, first: Any = slice(None)) -> Tensor:
    """A share of the step's loss: weighted by token, or by example as its ``first`` sequence says."""
    name = "weights" if objective.reduction == "token-mean" else "example_weights"
    return weighted(losses, columns.read(name, objective.names[0])[first])


def supervised_loss(objective: Objective, batch: PackedBatch, stats: TokenStats) -> tuple[Tensor, Metrics]:
    """Token losses."""
    losses = objective.losses(stats.logps)
    return share_of(objective, batch.columns.at(stats), losses), supervised.metrics(stats, losses)


def preference_loss(objective: Objective, batch: PackedBatch, stats: TokenStats) -> tuple[Tensor, Metrics]:
    """Pair losses."""
    assert stats.cu_seqlens is not None
    columns = batch.columns.at(stats)
    reference = columns.read("ref_logps", objective.names[0]) if objective.needs_reference else None
    pair = pair_logps(stats.logps, stats.cu_seqlens, reference, tails=objective.has("tails"), columns=columns)
    if stats.divergence is not None:
        kls = segment_sum(stats.divergence, stats.cu_seqlens)
        pair = replace(pair, chosen_kls=kls[0::2], rejected_kls=kls[1::2])
    losses = objective.losses(pair)
    metrics = preference.metrics(pair, losses, list(objective.members.values()), objective.options)
    loss = share_of(objective, columns, losses, slice(0, None, 2))
    return loss, {**metrics, **pair_metrics(pair), **supervised.token_metrics(stats)}


def pair_metrics(pair: PairLogps) -> Metrics:
    """What the policy says of the pairs without a reference: does it prefer the chosen, at what cost per token."""
    return {
        "logps/accuracies": sum_and_count(pair.chosen > pair.rejected),
        "nll/chosen": torch.stack([-sum_and_count(pair.chosen)[0], sum_and_count(pair.chosen_lengths)[0]]),
    }


def unpaired_loss(objective: Objective, batch: PackedBatch, stats: TokenStats) -> tuple[Tensor, Metrics]:
    """Losses of labelled completions."""
    (name, *others), (loss, *_) = objective.names, objective.members.values()
    if others:
        raise ValueError(f"kto takes one loss, each has a baseline of its own; got {', '.join(objective.names)}")
    assert stats.cu_seqlens is not None
    columns, logps = batch.columns.at(stats), segment_sum(stats.logps, stats.cu_seqlens)
    ref_logps = segment_sum(columns.read("ref_logps", name).to(logps.dtype), stats.cu_seqlens)
    desirable, baseline = columns.read("scores", name) > 0, columns.read("baseline", name)
    labelled = LabelledLogps(logps, ref_logps, desirable, baseline)
    losses = objective.losses(labelled)
    metrics = unpaired.metrics(labelled, losses, beta=objective.options.get("beta", 1.0), loss=loss)
    return share_of(objective, columns, losses), {**metrics, **supervised.token_metrics(stats)}


def ranking_loss(objective: Objective, batch: PackedBatch, stats: TokenStats) -> tuple[Tensor, Metrics]:
    """Losses of ranked candidates, one per prompt."""
    assert stats.cu_seqlens is not None and stats.sequences is not None
    columns = batch.columns.at(stats)
    ranked = RankedLogps(
        logps=segment_sum(stats.logps, stats.cu_seqlens),
        lengths=lengths(stats.cu_seqlens),
        rewards=columns.read("scores", objective.names[0]),
        cu_groups=groups_of(stats.sequences, batch.cu_groups),
    )
    losses = objective.losses(ranked)
    metrics = ranking.metrics(ranked, losses, **objective.options)
    loss = share_of(objective, columns, losses, ranked.cu_groups[:-1])
    return loss, {**metrics, **supervised.token_metrics(stats)}


def groups_of(sequences: Tensor, cu_groups: Tensor) -> Tensor:
    """``[g+1]`` offsets of the groups among the consecutive sequences of whole groups."""
    offsets = cu_groups.to(sequences.device, sequences.dtype)
    if sequences.numel() == 0:
        return offsets[:1]
    inside = (offsets >= sequences[0]) & (offsets <= sequences[-1] + 1)
    return offsets[inside] - sequences[0]


def reward_loss(objective: Objective, batch: PackedBatch, outputs: Tensor) -> tuple[Tensor, Metrics]:
    """Losses of a scalar head's outputs, one per pair, prompt or step."""
    loss, *others = objective.members.values()
    if others:
        raise ValueError(f"reward takes one loss, each reads other data; got {', '.join(objective.names)}")
    cu_groups = batch.cu_groups.to(outputs.device, torch.int64)
    arguments, metrics = (loss.read or reward.read_pairs)(outputs, batch.columns, cu_groups)
    losses = objective.losses(*arguments)
    first = slice(None) if loss.per_token else cu_groups[:-1]
    return share_of(objective, batch.columns, losses, first), metrics(losses)


def distillation_loss(objective: Objective, batch: PackedBatch, stats: TokenStats) -> tuple[Tensor, Metrics]:
    """Divergences from a teacher, which the head computed as the loss asked."""
    losses = stats.divergence
    assert losses is not None
    metrics = {"loss": sum_and_count(losses), "nll": sum_and_count(-stats.logps)}
    return share_of(objective, batch.columns.at(stats), losses), {**metrics, **supervised.token_metrics(stats)}


def policy_loss(objective: Objective, batch: PackedBatch, stats: TokenStats) -> tuple[Tensor, Metrics]:
    """Losses of policy gradients, with the KL from the reference and the entropy bonus where these are part of it."""
    assert objective.on_policy is not None and stats.entropy is not None
    settings, columns, (name, *_) = objective.on_policy.settings, batch.columns.at(stats), objective.names
    old, advantages = columns.old_logps, columns.read("advantages", name)
    old = stats.logps.detach() if old is None else old  # one update of fresh completions: the ratio is 1
    known = (stats.logps, old, advantages)
    losses = objective.losses(*known, *([stats.cu_seqlens] if objective.has("sequences") else []))
    losses = losses * correction(objective, columns, old)
    metrics = {"loss/policy_avg": sum_and_count(losses), **ratio_metrics(objective, *known, stats.cu_seqlens)}
    if columns.ref_logps is not None:
        adds = objective.on_policy.adds_kl
        costs = policy.KL_ESTIMATORS[(adds and settings.kl_estimator) or "k3"](stats.logps, columns.ref_logps)
        losses = losses + (settings.kl_coef or 0.0) * costs if adds else losses
        metrics["kl"] = sum_and_count(costs)
    if settings.entropy_coef:
        losses = losses + policy.entropy_bonus(stats.entropy, entropy_coef=settings.entropy_coef)
    if columns.sampler_logps is not None:
        metrics[DIFFERENCE] = sum_and_count((stats.logps - columns.sampler_logps).abs())
    weights = columns.read("weights", name)
    loss = weighted(losses, weights)
    metrics["policy/entropy_avg"] = metrics["entropy"] = sum_and_count(stats.entropy)
    return loss, {"loss": torch.stack([loss.detach().double(), weights.sum(dtype=torch.float64)]), **metrics}


DIFFERENCE = "sampling/sampling_logp_difference/mean"
"""How far training is from what the sampler computed, on the first update of a step."""


def ratio_metrics(objective: Objective, logps: Tensor, old: Tensor, advantages: Tensor, offsets: Any) -> Metrics:
    """What the ratios are, and how many of those that the loss clips are beyond its bounds."""
    of_sequence = policy.SEQUENCE_RATIOS.get(objective.names[0])
    clipped = of_sequence(logps, old, offsets) if of_sequence else None
    return policy.metrics(logps, old, advantages, **clips(objective), clipped=clipped)


def clips(objective: Objective) -> dict[str, float]:
    """The clip of the losses that have one, as distances from 1."""
    options = objective.options
    if options.get("ratio_max") is not None:
        return {"clip_low": 1 - (options["ratio_min"] or 0.0), "clip_high": options["ratio_max"] - 1}
    return {name: options[name] for name in ("clip_low", "clip_high") if name in options}


def correction(objective: Objective, columns: Columns, old: Tensor) -> Tensor | float:
    """Weights for a sampler that computes other numbers than training does; 1 without."""
    assert objective.on_policy is not None
    how, cap = objective.on_policy.settings.correction, objective.on_policy.settings.correction_cap
    if how == "none" or columns.sampler_logps is None:
        return 1.0
    if how == "truncate":
        return policy.sampler_correction(old, columns.sampler_logps, cap=cap)
    ratio = (old - columns.sampler_logps).exp()
    return ((ratio <= cap) & (ratio >= 1 / cap)).to(ratio.dtype)


def extremes(objective: Objective, batch: PackedBatch, stats: TokenStats) -> Metrics:
    """``[]`` the largest of some numbers of a batch, of those that are smallest the negative; see `EXTREMES`."""
    columns = batch.columns
    old = stats.logps if columns.old_logps is None else columns.old_logps
    ratio = policy.token_ratio(stats.logps, old)
    known = stats.logps, old, columns.read("advantages", objective.names[0])
    found = ratio_metrics(objective, *known, batch.cu_seqlens.to(old.device))
    low, high = (found[f"clip_ratio/{side}_mean"] for side in ("low", "high"))
    sampler = stats.logps if columns.sampler_logps is None else columns.sampler_logps
    difference = (stats.logps - sampler).abs().max()
    return dict(
        zip(EXTREMES, (difference, -low[0] / low[1], high[0] / high[1], ratio.max(), -ratio.min()), strict=True)
    )


EXTREMES = {
    "sampling/sampling_logp_difference/max": 1,
    "clip_ratio/low_min": -1,
    "clip_ratio/high_max": 1,
    "val/ratio_max": 1,
    "val/ratio_min": -1,
}
"""Metrics that are the largest, or with -1 the smallest, over the micro-batches of all ranks."""


def critic_loss(objective: Objective, batch: PackedBatch, values: Tensor) -> tuple[Tensor, Metrics]:
    """The share of a critic's loss, a mean over scored tokens, and its metrics."""
    assert objective.on_policy is not None
    columns, clip = batch.columns, objective.on_policy.settings.value_clip
    values = values.to(stats_dtype(values))
    known = values, columns.read("values", "the critic"), columns.read("returns", "the critic")
    loss = weighted(policy.value_loss(*known, value_clip=clip), columns.read("value_weights", "the critic"))
    return loss, policy.value_metrics(*known, value_clip=clip)
