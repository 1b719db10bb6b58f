"""Pair losses that read more than the six sums of their pair: parts of the completions, other pairs, the vocabulary.

``a`` and ``b`` are the log-ratios of chosen and rejected to the reference, ``s`` the logistic function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.pairs import check_smoothing, given, log_ratios, smoothed
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
        pair: sequence log-probs of P pairs, and those of the whole step unless these are all.
        beta: scale of the margins.
        label_smoothing: share of flipped labels ``e``, at least 0 and below 1.

    Returns:
        ``[P]`` losses.
    """
    check_smoothing("aot", label_smoothing, 0, 1)
    step = pair if pair.step is None else pair.step
    target = partners(step.chosen - step.rejected, step.ref_chosen - step.ref_rejected, pair.places)
    return smoothed(beta * (pair.chosen - pair.rejected - target), label_smoothing)


def aot_unpaired(pair: PairLogps, *, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """AOT unpaired: the log-ratios of chosen answers should dominate those of rejected ones, rank by rank.

    ``l = -(1 - e) ln s(u) - e ln s(-u)`` with ``u = beta (a - b')`` and ``b'`` the rejected log-ratio of the rank of
    ``a``; the gradient reaches both. Batch-coupled: ranks are over all pairs of the step.
    Source: Melnyk et al. 2024 (arXiv:2406.05882).

    Args:
        pair: sequence log-probs of P pairs, and those of the whole step unless these are all.
        beta: scale of the log-ratios.
        label_smoothing: share of flipped labels ``e``, at least 0 and below 1.

    Returns:
        ``[P]`` losses, each the value of its chosen side's rank.
    """
    check_smoothing("aot_unpaired", label_smoothing, 0, 1)
    (chosen, rejected), step = log_ratios(pair), log_ratios(pair if pair.step is None else pair.step)
    losses = smoothed(beta * (chosen - partners(step[0], step[1], pair.places)), label_smoothing)
    other = smoothed(beta * (partners(step[1], step[0], pair.places) - rejected), label_smoothing)
    return losses + (other - other.detach())  # its value is counted at the chosen side


def partners(values: Tensor, others: Tensor, places: Tensor | None) -> Tensor:
    """For each value, at ``places`` only, the one among ``others`` of the same rank; detached, ties in order."""
    ranks = values.detach().argsort(stable=True).argsort()
    matched = others.detach().sort().values[ranks]
    return matched if places is None else matched[places]


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
