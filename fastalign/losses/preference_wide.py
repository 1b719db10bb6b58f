"""Pair losses that read more than the six sums of their pair: parts of the completions, other pairs, the vocabulary.

``a`` and ``b`` are the log-ratios of chosen and rejected to the reference, ``s`` the logistic function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.pairs import check_smoothing, given, log_ratios, of_step, smoothed
from fastalign.types import PairLogps


def ld_dpo(pair: PairLogps, *, beta: float = 0.1, ld_alpha: float = 0.5) -> Tensor:
    """LD-DPO: DPO that discounts what only the longer answer has.

    ``l = -ln s(beta (a' - b'))``, where tokens beyond the length of the pair's shorter completion weigh ``ld_alpha``.
    Source: Liu et al. 2024 (arXiv:2409.06411).

    Args:
        pair: sequence log-probs of P pairs with their tails.
        beta: weight of the KL penalty; larger stays closer to the reference.
        ld_alpha: weight of the tail, between 0 (cut off) and 1 (DPO).

    Returns:
        ``[P]`` losses.
    """
    tails = given("ld_dpo", "tails", pair.chosen_tails, pair.rejected_tails)
    ref_tails = given("ld_dpo", "tails", pair.ref_chosen_tails, pair.ref_rejected_tails)
    chosen, rejected = (
        ratio - (1 - ld_alpha) * (tail - ref)
        for ratio, tail, ref in zip(log_ratios(pair), tails, ref_tails, strict=True)
    )
    return -logsigmoid(beta * (chosen - rejected))


def aot(pair: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT on pairs: the policy's margins should dominate the reference's as a distribution, rank by rank.

    ``l = -(1 - e) ln s(u) - e ln s(-u)`` with ``u = beta (m - r)``, ``m = chosen - rejected`` and ``r`` the
    reference's margin of the same rank. Batch-coupled: ranks are over all pairs of the step.
    Source: Melnyk et al. 2024 (arXiv:2406.05882).

    Args:
        pair: sequence log-probs of P pairs with the column `rank_margins`, unless these are all pairs of the step.
        beta: scale of the margins.
        label_smoothing: share of flipped labels ``e``, at least 0 and below 1.

    Returns:
        ``[P]`` losses.
    """
    check_smoothing("aot", label_smoothing, 0, 1)
    target = of_step(pair, "rank_margins", "aot", rank_margins)[0::2]
    return smoothed(beta * (pair.chosen - pair.rejected - target), label_smoothing)


def aot_unpaired(pair: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT unpaired: the log-ratios of chosen answers should dominate those of rejected ones, rank by rank.

    ``l = -(1 - e) ln s(u) - e ln s(-u)`` with ``u = beta (a - b')`` and ``b'`` the rejected log-ratio of the rank of
    ``a``; the gradient reaches both. Batch-coupled: ranks are over all pairs of the step.
    Source: Melnyk et al. 2024 (arXiv:2406.05882).

    Args:
        pair: sequence log-probs of P pairs with the column `rank_ratios`, unless these are all pairs of the step.
        beta: scale of the log-ratios.
        label_smoothing: share of flipped labels ``e``, at least 0 and below 1.

    Returns:
        ``[P]`` losses, each the value of its chosen side's rank.
    """
    check_smoothing("aot_unpaired", label_smoothing, 0, 1)
    (chosen, rejected), same_rank = log_ratios(pair), of_step(pair, "rank_ratios", "aot_unpaired", rank_ratios)
    losses = smoothed(beta * (chosen - same_rank[0::2]), label_smoothing)
    other = smoothed(beta * (same_rank[1::2] - rejected), label_smoothing)
    return losses + (other - other.detach())  # its value is counted at the chosen side


def rank_margins(step: PairLogps) -> Tensor:
    """``[2P]`` the column of that name, of all pairs of a step: for both sides the reference's margin of their rank."""
    margins = partners(step.chosen - step.rejected, step.ref_chosen - step.ref_rejected)
    return margins.repeat_interleave(2)


def rank_ratios(step: PairLogps) -> Tensor:
    """``[2P]`` the column of that name, of all pairs of a step: for each side that of its rank on the other."""
    chosen, rejected = log_ratios(step)
    return torch.stack([partners(chosen, rejected), partners(rejected, chosen)], dim=1).flatten()


def partners(values: Tensor, others: Tensor) -> Tensor:
    """For each value the one among ``others`` of the same rank; detached, ties in order."""
    ranks = values.detach().argsort(stable=True).argsort()
    return others.detach().sort().values[ranks]


def tdpo1(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """TDPO1: DPO with the difference of sequential forward KLs inside.

    ``l = -ln s(beta (a - b - (D_x - D_w)))``, ``D`` the KL(reference || policy) summed over a completion's tokens.
    Source: Zeng et al. 2024 (arXiv:2404.11999).

    Args:
        pair: sequence log-probs of P pairs with their KLs.
        beta: weight of the KL penalty; larger stays closer to the reference.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    chosen_kl, rejected_kl = given("tdpo1", "full-vocabulary KLs", pair.chosen_kls, pair.rejected_kls)
    return -logsigmoid(beta * (chosen - rejected - (rejected_kl - chosen_kl)))


def tdpo2(pair: PairLogps, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """TDPO2: TDPO1 with a weight, and without a push on the chosen side's KL.

    ``l = -ln s(beta (a - b - alpha (D_x - sg(D_w))))``, ``sg`` stopping the gradient.
    Source: Zeng et al. 2024 (arXiv:2404.11999).

    Args:
        pair: sequence log-probs of P pairs with their KLs.
        beta: weight of the KL penalty; larger stays closer to the reference.
        alpha: weight of the KL difference.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    chosen_kl, rejected_kl = given("tdpo2", "full-vocabulary KLs", pair.chosen_kls, pair.rejected_kls)
    return -logsigmoid(beta * (chosen - rejected - alpha * (rejected_kl - chosen_kl.detach())))


def tdpo_metrics(pair: PairLogps, *, beta: float, **options: Any) -> dict[str, Tensor]:
    """The sequential KLs, and rewards that count them, as the official code tells them."""
    chosen_kl, rejected_kl = given("tdpo", "full-vocabulary KLs", pair.chosen_kls, pair.rejected_kls)
    chosen, rejected = log_ratios(pair)
    kls = {"kl/chosen": chosen_kl, "kl/rejected": rejected_kl, "kl/margin": chosen_kl - rejected_kl}
    return {"rewards/chosen": beta * (chosen + chosen_kl), "rewards/rejected": beta * (rejected + rejected_kl), **kls}
