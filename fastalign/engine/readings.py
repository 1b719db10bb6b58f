"""From what the head made of a batch to each family's losses and metrics: the functions that a head differentiates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastalign.engine.methods import Objective, StepFacts
from fastalign.losses import preference, ranking, reward, supervised, unpaired
from fastalign.losses.pairs import pair_logps
from fastalign.losses.reduce import lengths, segment_sum, sum_and_count
from fastalign.types import LabelledLogps, PackedBatch, PairLogps, RankedLogps, TokenStats

Metrics = dict[str, Tensor]
LossFn = Callable[[Any], tuple[Tensor, Metrics]]
"""From what the head made to a share of the loss, and ``[2]`` (sum, count) per metric."""


def supervised_loss(objective: Objective, batch: PackedBatch, scale: float, facts: StepFacts) -> LossFn:
    """Token losses: ``scale * sum_t l_t``."""

    def loss_fn(stats: TokenStats) -> tuple[Tensor, Metrics]:
        losses = objective.losses(stats.logps)
        return losses.sum() * scale, supervised.metrics(stats, losses)

    return loss_fn


def preference_loss(objective: Objective, batch: PackedBatch, scale: float, facts: StepFacts) -> LossFn:
    """Pair losses: ``scale * sum_p l_p``; the reference's log-probs are looked up by row."""
    check_beta(objective)
    tails, members = objective.has("tails"), list(objective.members.values())
    known = {"tails": tails, "mean_chosen_length": facts.imitated_per_unit}

    def loss_fn(stats: TokenStats) -> tuple[Tensor, Metrics]:
        assert stats.cu_seqlens is not None and stats.sequences is not None
        reference = None if batch.ref_logps is None else batch.ref_logps[stats.rows]
        pair = pair_logps(stats.logps, stats.cu_seqlens, reference, **known)
        if facts.pairs is not None:
            pair = replace(pair, step=facts.pairs, places=facts.first_pair + stats.sequences[0::2] // 2)
        if stats.divergence is not None:
            kls = segment_sum(stats.divergence, stats.cu_seqlens)
            pair = replace(pair, chosen_kls=kls[0::2], rejected_kls=kls[1::2])
        losses = objective.losses(pair)
        metrics = preference.metrics(pair, losses, members, objective.options)
        return losses.sum() * scale, {**metrics, **pair_metrics(pair), **supervised.token_metrics(stats)}

    return loss_fn


def pair_metrics(pair: PairLogps) -> Metrics:
    """What the policy says of the pairs without a reference: does it prefer the chosen, at what cost per token."""
    return {
        "logps/accuracies": sum_and_count(pair.chosen > pair.rejected),
        "nll/chosen": torch.stack([-sum_and_count(pair.chosen)[0], sum_and_count(pair.chosen_lengths)[0]]),
    }


def unpaired_loss(objective: Objective, batch: PackedBatch, scale: float, facts: StepFacts) -> LossFn:
    """Losses of labelled completions: ``scale * sum_i l_i``, measured from the step's baseline."""
    check_beta(objective)
    loss, *others = objective.members.values()
    if others:
        raise ValueError(f"kto takes one loss, each has a baseline of its own; got {', '.join(objective.names)}")
    beta = objective.options.get("beta", 1.0)
    baseline = facts.baseline or unpaired.make_baseline(device=batch.scores.device)

    def loss_fn(stats: TokenStats) -> tuple[Tensor, Metrics]:
        assert stats.cu_seqlens is not None
        logps = segment_sum(stats.logps, stats.cu_seqlens)
        reference = torch.zeros_like(stats.logps) if batch.ref_logps is None else batch.ref_logps[stats.rows]
        ref_logps = segment_sum(reference.to(logps.dtype), stats.cu_seqlens)
        labelled = LabelledLogps(logps, ref_logps, batch.scores[stats.sequences] > 0)
        losses = objective.losses(labelled, baseline)
        metrics = unpaired.metrics(labelled, losses, baseline, beta=beta, loss=loss)
        return losses.sum() * scale, {**metrics, **supervised.token_metrics(stats)}

    return loss_fn


def ranking_loss(objective: Objective, batch: PackedBatch, scale: float, facts: StepFacts) -> LossFn:
    """Losses of ranked candidates: ``scale * sum_g l_g`` over prompts."""

    def loss_fn(stats: TokenStats) -> tuple[Tensor, Metrics]:
        assert stats.cu_seqlens is not None and stats.sequences is not None
        ranked = RankedLogps(
            logps=segment_sum(stats.logps, stats.cu_seqlens),
            lengths=lengths(stats.cu_seqlens),
            rewards=batch.scores[stats.sequences],
            cu_groups=groups_of(stats.sequences, batch.cu_groups),
        )
        losses = objective.losses(ranked)
        return losses.sum() * scale, {
            **ranking.metrics(ranked, losses, **objective.options),
            **supervised.token_metrics(stats),
        }

    return loss_fn


def groups_of(sequences: Tensor, cu_groups: Tensor) -> Tensor:
    """``[g+1]`` offsets of the groups among the consecutive sequences of whole groups."""
    offsets = cu_groups.to(sequences.device, sequences.dtype)
    if sequences.numel() == 0:
        return offsets[:1]
    inside = (offsets >= sequences[0]) & (offsets <= sequences[-1] + 1)
    return offsets[inside] - sequences[0]


def reward_loss(objective: Objective, batch: PackedBatch, scale: float, facts: StepFacts) -> LossFn:
    """Losses of a scalar head's outputs: ``scale`` times their sum over pairs, prompts or steps."""
    loss, *others = objective.members.values()
    if others:
        raise ValueError(f"reward takes one loss, each reads other data; got {', '.join(objective.names)}")
    read = loss.read or reward.read_pairs

    def loss_fn(outputs: Tensor) -> tuple[Tensor, Metrics]:
        arguments, metrics = read(outputs, batch.scores.to(outputs.dtype), batch.cu_groups.to(outputs.device))
        losses = objective.losses(*arguments)
        return losses.sum() * scale, metrics(losses)

    return loss_fn


def distillation_loss(objective: Objective, batch: PackedBatch, scale: float, facts: StepFacts) -> LossFn:
    """Divergences from a teacher, which the head computed as the loss asked: ``scale * sum_t l_t``."""

    def loss_fn(stats: TokenStats) -> tuple[Tensor, Metrics]:
        assert stats.divergence is not None
        metrics = {"loss": sum_and_count(stats.divergence), "nll": sum_and_count(-stats.logps)}
        return stats.divergence.sum() * scale, {**metrics, **supervised.token_metrics(stats)}

    return loss_fn


def check_beta(objective: Objective) -> None:
    """Refuse a temperature of the reward that turns the preference round."""
    if not objective.options.get("beta", 1) > 0:
        raise ValueError(f"loss.beta must be above 0, got {objective.options['beta']}")
