"""Best-of-n sampling: no training; the yardstick of every method that pays with KL."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl_bound(n: int) -> float:
    """KL of best-of-n from the policy it samples, at most: ``ln n - (n - 1) / n`` nats.

    Source: Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3; a bound by Beirami et al. 2024 (arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: Tensor, draws: int) -> Tensor:
    """Expected best of ``draws`` answers drawn with replacement from n scored ones.

    ``sum_k r_(k) ((k / n)^draws - ((k - 1) / n)^draws)`` with scores ``r_(k)`` in rising order.

    Args:
        scores: ``[M, n]``.
        draws: how many are drawn.

    Returns:
        ``[M]``.
    """
    n = scores.shape[1]
    shares = (torch.arange(n + 1, dtype=torch.float64, device=scores.device) / n).pow(draws).diff()
    return scores.sort(1).values @ shares.to(scores.dtype)
