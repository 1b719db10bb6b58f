"""Pair losses that judge each side by itself: how likely the chosen is, and how unlikely the rejected.

``a`` and ``b`` are the log-ratios of chosen and rejected to the reference, ``s`` the logistic function.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.pairs import log_ratios
from fastalign.types import PairLogps


def nca(pair: PairLogps, *, beta: float = 0.01) -> Tensor:
    """NCA: noise contrastive alignment, which keeps the chosen answer's likelihood from falling.

    ``l = -ln s(beta a) - ln s(-beta a) / 2 - ln s(-beta b) / 2``.
    Source: Chen et al. 2024 (arXiv:2402.05369), for two answers.

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = (beta * x for x in log_ratios(pair))
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pair: PairLogps, *, beta: float = 0.01) -> Tensor:
    """BCO on pairs: chosen and rejected are two examples of a binary classifier; no reward shift.

    ``l = -ln s(beta a) - ln s(-beta b)``.
    Source: Jung et al. 2024 (arXiv:2404.04656), without its shift, as in TRL.

    Args:
        pair: sequence log-probs of P pairs.
        beta: reward per nat.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = (beta * x for x in log_ratios(pair))
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo(pair: PairLogps, *, beta: float = 0.001) -> Tensor:
    """SPPO with hard labels: regress each log-ratio onto its share of a zero-sum game's value.

    ``l = (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2``: chosen wins with probability 1, rejected with 0.
    Source: Wu et al. 2024 (arXiv:2405.00675), eq. 4.7.

    Args:
        pair: sequence log-probs of P pairs.
        beta: inverse of the step size eta of the paper.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-zero: raise the chosen and lower the rejected; for chosen answers better than the model's own.

    ``l = 1 - s(beta a) + s(beta b)``.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7.

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-down: lower both, the rejected faster; for chosen answers worse than the model's own.

    ``l = s(beta a) + 1 - s(beta (a - b))``.
    Source: D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 8.

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()
