"""Pair losses without a reference model.

``L_w`` and ``L_x`` are the log-probs of chosen and rejected summed over the completion, ``n_w`` and ``n_x`` their
lengths, ``s`` the logistic function. An imitation term is a mean over the chosen tokens of the whole step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.pairs import of_step, per_token
from fastalign.types import PairLogps


def sft(pair: PairLogps) -> Tensor:
    """SFT on the chosen answers: the imitation term, to be added to another loss.

    ``l = -L_w / mean n_w``: its mean over pairs is the mean over chosen tokens.
    Source: the RPO term of Pang et al. 2024 (arXiv:2404.19733), averaged over tokens as in TRL.

    Args:
        pair: sequence log-probs of P pairs.

    Returns:
        ``[P]`` losses.
    """
    return -pair.chosen / of_step(pair, "mean_lengths", "the imitation term", mean_lengths)[0::2]


def mean_lengths(step: PairLogps) -> Tensor:
    """``[2P]`` the column of that name, of all pairs of a step."""
    mean = step.chosen_lengths.sum().clamp(min=1).to(step.chosen.dtype) / max(len(step.chosen_lengths), 1)
    return mean.expand(2 * len(step.chosen_lengths))


def slic(pair: PairLogps, *, margin: float = 1.0, lam: float = 0.1) -> Tensor:
    """SLiC: a hinge on the log-probs themselves, with an imitation term.

    ``l = max(0, margin - L_w + L_x) - lam L_w``.
    Source: Zhao et al. 2023, SLiC-HF (arXiv:2305.10425), with the chosen answer as its target.

    Args:
        pair: sequence log-probs of P pairs; the reference is not read.
        margin: nats by which the chosen should win.
        lam: weight of the imitation term, a sum over tokens.

    Returns:
        ``[P]`` losses.
    """
    return (margin - pair.chosen + pair.rejected).relu() - lam * pair.chosen


def simpo(pair: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> Tensor:
    """SimPO: length-normalised log-probs with a target margin.

    ``l = -ln s(beta (L_w / n_w - L_x / n_x) - gamma)`` with ``gamma = gamma_beta_ratio * beta``.
    Source: Meng et al. 2024 (arXiv:2405.14734), eq. 6.

    Args:
        pair: sequence log-probs of P pairs; the reference is not read.
        beta: scale of the reward.
        gamma_beta_ratio: target margin as a share of ``beta``.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = per_token(pair, pair.chosen, pair.rejected)
    return -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))


def cpo(pair: PairLogps, *, beta: float = 0.1, cpo_alpha: float = 1.0) -> Tensor:
    """CPO: DPO under a uniform reference, with an imitation term.

    ``l = -ln s(beta (L_w - L_x)) - cpo_alpha L_w / mean n_w``.
    Source: Xu et al. 2024 (arXiv:2401.08417), eq. 3 plus the imitation term.

    Args:
        pair: sequence log-probs of P pairs; the reference is not read.
        beta: scale of the reward.
        cpo_alpha: weight of the imitation term, a mean over chosen tokens.

    Returns:
        ``[P]`` losses.
    """
    return -logsigmoid(beta * (pair.chosen - pair.rejected)) + cpo_alpha * sft(pair)


def orpo(pair: PairLogps, *, beta: float = 0.1, nll_weight: float = 1.0, max_mean_logp: float = -1e-4) -> Tensor:
    """ORPO: imitate the chosen answer and raise its odds against the rejected one, in a single stage.

    ``l = -nll_weight L_w / mean n_w - beta ln s(o)`` with the log odds ratio
    ``o = x_w - x_x - (ln(1 - e^x_w) - ln(1 - e^x_x))`` of the mean log-probs ``x = L / n``.
    Source: Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7; the first term is over the response alone.

    Args:
        pair: sequence log-probs of P pairs; the reference is not read.
        beta: lambda of the paper, weight of the odds ratio.
        nll_weight: weight of the imitation term, a mean over chosen tokens.
        max_mean_logp: ``x`` is clamped to it, because the gradient grows like ``1 / (1 - e^x)``.

    Returns:
        ``[P]`` losses.
    """
    return nll_weight * sft(pair) - beta * logsigmoid(log_odds_ratio(pair, max_mean_logp))


def log_odds_ratio(pair: PairLogps, max_mean_logp: float) -> Tensor:
    """``o`` of `orpo`, ``[P]``."""
    chosen, rejected = (x.clamp(max=max_mean_logp) for x in per_token(pair, pair.chosen, pair.rejected))
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def log1mexp(x: Tensor) -> Tensor:
    """``ln(1 - e^x)`` for ``x < 0``, precise at both ends; each branch is kept from where it breaks (Maechler 2012)."""
    near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))
    return torch.where(x > -math.log(2), (-near.expm1()).log(), (-far.exp()).log1p())


def orpo_metrics(pair: PairLogps, *, max_mean_logp: float, **options: Any) -> dict[str, Tensor]:
    """The odds ratio as TRL tells it, and the imitation term."""
    odds = log_odds_ratio(pair, max_mean_logp)
    return {"log_odds_ratio": logsigmoid(odds), "log_odds_chosen": odds, **imitation_metrics(pair)}


def imitation_metrics(pair: PairLogps, **options: Any) -> dict[str, Tensor]:
    """The imitation term."""
    return {"nll_loss": sft(pair)}
