"""Which sampled answers are trained on: the best of each prompt, the best of all, best against worst."""

from __future__ import annotations

import torch
from torch import Tensor


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
