"""Which sampled answers are trained on: all, the best of each prompt, the best of all, best against worst."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastalign.data.examples import TokenExample
from fastalign.rl.algorithms import OnPolicy
from fastalign.rl.groups import Group, differs
from fastalign.types import Columns, Rollout


def best_of_each(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """The best answer to each prompt.

    Source: Dong et al. 2023 (arXiv:2304.06767), algorithm 1.

    Args:
        rewards: ``[M, K]``; -inf for an answer that is discarded.

    Returns:
        ``[M]`` int64 positions, the first of several best, and ``[M]`` bool, False where all answers are discarded.
    """
    return rewards.argmax(1), rewards.amax(1) > -torch.inf


def top_fraction(rewards: Tensor, fraction: float) -> Tensor:
    """The best answers over all prompts.

    Args:
        rewards: ``[M, K]``; -inf for an answer that is discarded.
        fraction: share of all answers that is kept, rounded down.

    Returns:
        ``[n, 2]`` int64 (prompt, answer), best first, ties by position.
    """
    order = rewards.flatten().argsort(descending=True, stable=True)[: int(rewards.numel() * fraction)]
    order = order[rewards.flatten()[order] > -torch.inf]
    return torch.stack([order // rewards.shape[1], order % rewards.shape[1]], 1)


def best_and_worst(rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best answer to each prompt against its worst.

    Source: Guo et al. 2024, online DPO (arXiv:2402.04792); the first of several best or worst counts.

    Args:
        rewards: ``[M, K]`` of K answers to each of M prompts.

    Returns:
        chosen and rejected: ``[M]`` int64 positions among the answers; keep: ``[M]`` bool, False where all are equal.
    """
    chosen, rejected = rewards.argmax(1), rewards.argmin(1)
    return chosen, rejected, rewards.amax(1) > rewards.amin(1)


# --- from groups to examples -----------------------------------------------------------------------------------------


def select(plan: OnPolicy, groups: Sequence[Group]) -> list[TokenExample]:
    """What the algorithm trains on."""
    return SELECT[plan.algorithm.select](plan, groups)


def all_completions(plan: OnPolicy, groups: Sequence[Group]) -> list[TokenExample]:
    """Every completion that has a reward; a group in which too few have one is left out."""
    least = 1 if plan.settings.num_generations == 1 else 2
    kept = [(group, np.flatnonzero(~np.isnan(group.rewards))) for group in groups]
    return [group_example(plan, group, chosen.tolist()) for group, chosen in kept if len(chosen) >= least]


def best(plan: OnPolicy, groups: Sequence[Group]) -> list[TokenExample]:
    """The best completion of each prompt, or the best share of all."""
    scores = torch.tensor(np.stack([group.rewards for group in groups])).nan_to_num(-math.inf, neginf=-math.inf)
    if plan.settings.best_fraction is None:
        first, kept = best_of_each(scores)
        places = [(g, int(first[g])) for g in kept.nonzero().flatten().tolist()]
    else:
        places = sorted(map(tuple, top_fraction(scores, max(plan.settings.best_fraction, 1 / scores.numel())).tolist()))
    return [TokenExample((sequence(groups[g].rollouts[i]),), groups[g].row) for g, i in places]


def best_against_worst(plan: OnPolicy, groups: Sequence[Group]) -> list[TokenExample]:
    """The best completion against the worst, where their rewards differ."""
    pairs = []
    for group in filter(differs, groups):
        known = np.flatnonzero(~np.isnan(group.rewards))
        chosen, rejected, _ = best_and_worst(torch.tensor(group.rewards[known])[None])
        both = tuple(sequence(group.rollouts[known[int(i)]]) for i in (chosen, rejected))
        pairs.append(TokenExample(both, group.row))
    return pairs


SELECT: dict[str, Callable[[OnPolicy, Sequence[Group]], list[TokenExample]]] = {
    "all": all_completions,
    "best": best,
    "best_and_worst": best_against_worst,
}


def sequence(rollout: Rollout, scored: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and completion, of which the sampled tokens are scored."""
    own = np.ones(len(rollout.tokens), dtype=bool) if rollout.scored is None else rollout.scored
    mask = np.concatenate([np.zeros(len(rollout.prompt), dtype=bool), own & scored])
    return np.concatenate([rollout.prompt, rollout.tokens]), mask


def group_example(plan: OnPolicy, group: Group, chosen: Sequence[int]) -> TokenExample:
    """The chosen completions of a prompt with what their loss reads."""
    rollouts = [group.rollouts[i] for i in chosen]
    leave_out = plan.settings.truncation == "mask"
    sequences = tuple(sequence(one, scored=not (leave_out and one.finish == "length")) for one in rollouts)
    columns: dict[str, Any] = {
        "scores": group.rewards[list(chosen)],
        "truncated": [one.finish == "length" for one in rollouts],
        "sampler_logps": scored_part(rollouts, sequences, [one.sampler_logps for one in rollouts]),
    }
    if group.tokens is not None:
        columns["token_rewards"] = scored_part(rollouts, sequences, [group.tokens[i] for i in chosen])
    if group.greedy is not None:
        columns["greedy_scores"] = [group.greedy] * len(rollouts)
    return TokenExample(sequences, group.row, columns=Columns()).fill(**columns)


def scored_part(
    rollouts: Sequence[Rollout], sequences: Sequence[tuple[np.ndarray, np.ndarray]], values: Sequence[np.ndarray]
) -> np.ndarray:
    """Numbers of the tokens of completions, of those alone that are scored."""
    masks = [mask[len(one.prompt) :] for one, (_, mask) in zip(rollouts, sequences, strict=True)]
    return np.concatenate([value[mask] for value, mask in zip(values, masks, strict=True)])
