"""Preference pairs from sampled answers and their scores, for online and iterated DPO."""

from __future__ import annotations

from torch import Tensor


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
