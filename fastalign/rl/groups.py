"""The completions of a prompt with their rewards, and what is told of those of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastalign.config import AlgorithmConfig
from fastalign.types import Rollout


@dataclass
class Group:
    """The completions of one prompt with their rewards.

    Attributes:
        rollouts: in the order of their samples.
        table: ``[G, F]`` rewards by function.
        rewards: ``[G]`` their weighted sum; nan where no function gave any.
        tokens: per completion ``[R]`` rewards of its tokens, nan where there is none; None without.
        greedy: reward of the greedy answer; None without one.
        seed: of the sampler's draws.
    """

    rollouts: list[Rollout]
    table: np.ndarray
    rewards: np.ndarray
    tokens: list[np.ndarray] | None = None
    greedy: float | None = None
    seed: int = 0

    @property
    def row(self) -> int:
        """The prompt's position in the dataset."""
        return self.rollouts[0].row


def combine(table: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """``[G]`` weighted sums over the last axis of what is not nan; nan where everything is."""
    total = np.nansum(table * np.asarray(weights), axis=-1)
    return np.where(np.isnan(table).all(axis=-1), np.nan, total)


def pay_tokens(
    table: np.ndarray,
    by_token: Sequence[np.ndarray],
    rollouts: Sequence[Rollout],
    weights: Sequence[float],
    settings: AlgorithmConfig,
    shaped: Callable[[float, Rollout], float],
) -> list[np.ndarray]:
    """``[R]`` rewards of the tokens of each completion where some are for tokens; nan where there is none.

    Those are scaled. What rewards whole completions is shaped and paid at the last sampled token; of one that was cut
    off not with truncation bootstrap.
    """
    found = []
    for row, tokens, one in zip(table, by_token, rollouts, strict=True):
        of_tokens = np.zeros(len(row), dtype=bool)
        of_tokens[: tokens.shape[1]] = ~np.isnan(tokens).all(0)
        rest = float(combine(np.where(of_tokens, np.nan, row), weights))
        paid = combine(tokens, weights[: tokens.shape[1]]) * settings.reward_scale
        extra = shaped(0.0 if np.isnan(rest) and of_tokens.any() else rest, one)
        cut = settings.truncation == "bootstrap" and one.finish == "length"
        if not (np.isnan(extra) or cut) and (extra or not np.isnan(rest)):
            last = -1 if one.scored is None else np.flatnonzero(one.scored)[-1]
            paid[last] = np.nan_to_num(paid[last]) + extra
        found.append(paid)
    return found


def differs(group: Group) -> bool:
    """Whether the completions of a prompt have different rewards, so that there is something to learn."""
    return differ(group.rewards)


def differ(rewards: np.ndarray) -> bool:
    """Whether there are several rewards that are not all equal."""
    known = rewards[~np.isnan(rewards)]
    return len(known) > 1 and bool(known.max() > known.min())


def reward_metrics(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """Rewards under TRL's names: over all completions, each function's, and how they spread among those that are
    compared: the completions of a prompt, or where prompts have one each those of the step.
    """
    if not groups:
        return {}
    table = np.concatenate([group.table for group in groups])
    rewards = np.concatenate([group.rewards for group in groups])
    compared = [group.rewards for group in groups] if len(rewards) > len(groups) else [rewards]
    found = {
        "reward": mean(rewards),
        "reward_std": mean(np.array([deviation(some) for some in compared])),
        "frac_reward_zero_std": float(np.mean([not differ(some) for some in compared])),
    }
    for i, name in enumerate(names):
        found |= {f"rewards/{name}/mean": mean(table[:, i]), f"rewards/{name}/std": deviation(table[:, i])}
    greedy = [group.greedy for group in groups if group.greedy is not None]
    if greedy:
        found |= {"greedy_score": float(np.mean(greedy)), "baseline_gap": found["reward"] - float(np.mean(greedy))}
    return found


def length_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Lengths of completions under TRL's names."""
    every = [one for group in groups for one in group.rollouts]
    found: dict[str, float] = {}
    for word, some in (("", every), ("terminated_", [one for one in every if one.finish != "length"])):
        lengths = np.array([len(one.tokens) for one in some] or [0])
        ends = {"mean": float(lengths.mean()), "min": float(lengths.min()), "max": float(lengths.max())}
        found |= {f"completions/{name}_{word}length": value for name, value in ends.items()}
    cut = sum(one.finish == "length" for one in every)
    return {**found, "completions/clipped_ratio": cut / max(len(every), 1)}


def mean(values: np.ndarray) -> float:
    """Of what is not nan; nan of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def deviation(values: np.ndarray) -> float:
    """Of what is not nan, with Bessel's correction."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0


def sample_lines(
    groups: Sequence[Group],
    names: Sequence[str],
    step: int,
    decode: Callable[[np.ndarray], str],
    advantages: Mapping[tuple[int, int], float],
) -> list[dict[str, Any]]:
    """The lines of samples.jsonl of a step: one for every completion.

    Args:
        groups: of the step.
        names: of the reward functions.
        step: its number.
        decode: makes text of tokens.
        advantages: mean advantage by (row, sample), of those that were trained on.
    """
    lines = []
    for group in groups:
        prompt = decode(group.rollouts[0].prompt)
        for one, table, reward in zip(group.rollouts, group.table.tolist(), group.rewards.tolist(), strict=True):
            lines.append(
                {
                    "step": step,
                    "prompt_index": one.row,
                    "sample_index": one.sample,
                    "weight_version": one.version,
                    "prompt": prompt,
                    "completion": decode(one.tokens),
                    "finish_reason": one.finish,
                    "rewards": dict(zip(names, table, strict=True)),
                    "reward": reward,
                    "advantage": advantages.get((one.row, one.sample)),
                    "num_tokens": len(one.tokens),
                    "seed": group.seed,
                    "logp": float(one.sampler_logps.sum()),
                    "token_ids": one.tokens.tolist(),
                }
            )
    return lines
