"""Losses of ranked candidates: several completions of one prompt with scores, one loss per prompt."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastalign.losses.pairs import token_counts
from fastalign.losses.reduce import lengths, segment_ids, segment_sum, sum_and_count
from fastalign.losses.traits import Family, Loss
from fastalign.types import RankedLogps


def rrhf(
    batch: RankedLogps, *, rank_weight: float = 1.0, length_penalty: float = 1.0, sft: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """RRHF: the policy's own log-probs should rank the candidates as their scores do; the best is imitated.

    ``l = rank_weight sum_{R_i < R_j} max(0, P_i - P_j) - L_best`` with ``P = L / n^length_penalty``; equal scores form
    no pair, the first of several best counts.
    Source: Yuan et al. 2023 (arXiv:2304.05302), with the candidates' true lengths.

    Args:
        batch: sequence log-probs of the candidates of G prompts.
        rank_weight: weight of the ranking term.
        length_penalty: exponent of the length.
        sft: the imitation term is the best's log-prob, or its mean over tokens.

    Returns:
        ``[G]`` losses; 0 for a prompt without candidates.
    """
    return rank_weight * rank_loss(batch, length_penalty) + imitation_loss(batch, sft)


def rank_loss(batch: RankedLogps, length_penalty: float) -> Tensor:
    """``sum_{R_i < R_j} max(0, P_i - P_j)`` of each prompt, ``[G]``."""
    scores = candidate_scores(batch, length_penalty)
    violations = torch.where(ordered_pairs(batch), (scores[:, None] - scores[None, :]).relu(), 0.0)
    return segment_sum(violations.sum(1), batch.cu_groups)


def candidate_scores(batch: RankedLogps, length_penalty: float) -> Tensor:
    """``P_i``, ``[B]``: what the trained model scores candidates by."""
    return batch.logps / token_counts(batch.lengths).to(batch.logps.dtype) ** length_penalty


def prompts(batch: RankedLogps) -> Tensor:
    """``[B]`` int64, the prompt of each candidate."""
    return segment_ids(batch.cu_groups, len(batch.logps))


def ordered_pairs(batch: RankedLogps) -> Tensor:
    """``[B, B]`` bool: i and j answer the same prompt and i is the worse."""
    group, rewards = prompts(batch), batch.rewards
    return (group[:, None] == group[None, :]) & (rewards[:, None] < rewards[None, :])


def best(batch: RankedLogps, values: Tensor) -> Tensor:
    """``[B]`` bool: the first candidate of its prompt that has the largest of ``values``."""
    same = prompts(batch)[:, None] == prompts(batch)[None, :]
    earlier = torch.ones_like(same).tril(-1)
    beaten = same & ((values[None, :] > values[:, None]) | ((values[None, :] == values[:, None]) & earlier))
    return ~beaten.any(1)


def imitation_loss(batch: RankedLogps, sft: str) -> Tensor:
    """Negative log-prob of each prompt's best candidate, summed or averaged over tokens, ``[G]``."""
    if sft not in ("sum", "mean"):
        raise ValueError(f"rrhf: sft must be sum or mean, got {sft!r}")
    nll = -batch.logps if sft == "sum" else -batch.logps / token_counts(batch.lengths)
    return segment_sum(torch.where(best(batch, batch.rewards), nll, 0.0), batch.cu_groups)


def metrics(
    batch: RankedLogps, losses: Tensor, *, length_penalty: float = 1.0, sft: str = "sum", **others: Any
) -> dict[str, Tensor]:
    """``[2]`` (sum, count): ``loss`` and its parts over prompts, ``rank_accuracy`` over pairs, ``best_is_top1``."""
    scores, pairs = candidate_scores(batch, length_penalty), ordered_pairs(batch)
    right = pairs & (scores[:, None] < scores[None, :])
    agree = best(batch, batch.rewards) & best(batch, scores)
    return {
        "loss": sum_and_count(losses),
        "rank_loss": sum_and_count(rank_loss(batch, length_penalty)),
        "sft_loss": sum_and_count(imitation_loss(batch, sft)),
        "rank_accuracy": torch.stack([right.sum(), pairs.sum()]).double(),
        "best_is_top1": torch.stack([agree.sum(), (lengths(batch.cu_groups) > 0).sum()]).double(),
    }


LOSSES = {"rrhf": Loss(rrhf, reference=False, nonnegative=("rank_weight",))}
FAMILY = Family(
    "Ranked completions",
    "Rows of `prompt`, `completions` and `scores`, any number of candidates per prompt. No reference.",
    "`rank_accuracy` and `best_is_top1` rise, `rank_loss` falls to 0, `sft_loss` falls.",
    LOSSES,
)
