"""Losses on preference pairs: pure functions of the sequence log-probs of P pairs, one loss per pair.

Notation of the docstrings: ``a = chosen - ref_chosen`` and ``b = rejected - ref_rejected`` are log-ratios summed over
the completion, ``n_w`` and ``n_x`` the completions' lengths in tokens, ``s`` the logistic function.

Here are the losses of the margin ``a - b``; ``preference_sides`` holds those that look at each side by itself,
``preference_free`` those without a reference, ``preference_wide`` those that read more than their pair's sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.pairs import check_smoothing, log_ratios, pair_logps, per_token, smoothed
from fastalign.losses.preference_free import cpo, imitation_metrics, orpo, orpo_metrics, sft, simpo, slic
from fastalign.losses.preference_sides import apo_down, apo_zero, bco_pair, nca, sppo
from fastalign.losses.preference_wide import aot, aot_unpaired, ld_dpo, tdpo1, tdpo2, tdpo_metrics
from fastalign.losses.reduce import sum_and_count
from fastalign.losses.supervised import perplexity_of
from fastalign.losses.traits import Family, Loss
from fastalign.types import PairLogps

__all__ = ["FAMILY", "LOSSES", "log_ratios", "metrics", "pair_logps"]


def dpo(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """DPO: classify preferences through the implicit reward ``beta ln(policy / reference)``.

    ``l = -ln s(beta (a - b))``; ln 2 when the policy is the reference.
    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return -logsigmoid(beta * (chosen - rejected))


def cdpo(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO: labels are wrong with a known probability, so the best margin is finite.

    ``l = -(1 - e) ln s(u) - e ln s(-u)`` with ``u = beta (a - b)``; least at ``u = logit(1 - e)``.
    Source: Mitchell 2023, "A note on DPO with noisy preferences", eq. 3.

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.
        label_smoothing: share of flipped labels ``e``, at least 0 and below 1.

    Returns:
        ``[P]`` losses.
    """
    check_smoothing("cdpo", label_smoothing, 0, 1)
    chosen, rejected = log_ratios(pair)
    return smoothed(beta * (chosen - rejected), label_smoothing)


def robust(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO: an unbiased estimate of the DPO loss of the clean labels, from noisy ones.

    ``l = (-(1 - e) ln s(u) + e ln s(-u)) / (1 - 2 e)`` with ``u = beta (a - b)``; unbounded below for large ``u``.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409).

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.
        label_smoothing: share of flipped labels ``e``, at least 0 and below 1/2.

    Returns:
        ``[P]`` losses.
    """
    check_smoothing("robust", label_smoothing, 0, 0.5)
    chosen, rejected = log_ratios(pair)
    margin, flipped = beta * (chosen - rejected), label_smoothing
    return (-(1 - flipped) * logsigmoid(margin) + flipped * logsigmoid(-margin)) / (1 - 2 * flipped)


def ipo(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """IPO: regress the margin of per-token log-ratios onto a finite target.

    ``l = (a / n_w - b / n_x - 1 / (2 beta))^2``, log-ratios averaged over tokens as the authors advise.
    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17.

    Args:
        pair: sequence log-probs of P pairs.
        beta: tau of the paper; the target margin is ``1 / (2 beta)``.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = per_token(pair, *log_ratios(pair))
    return (chosen - rejected - 1 / (2 * beta)).square()


def ipo_sum(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """IPO on sums: regress the margin of log-ratios, summed over tokens, onto a finite target.

    ``l = (a - b - 1 / (2 beta))^2``, as the paper prints it.
    Source: Azar et al. 2023 (arXiv:2310.12036), eq. 17.

    Args:
        pair: sequence log-probs of P pairs.
        beta: tau of the paper; the target margin is ``1 / (2 beta)``.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Hinge: a pair is left alone once its reward margin reaches 1.

    ``l = max(0, 1 - beta (a - b))``.
    Source: Liu et al. 2023, RSO (arXiv:2309.06657); Zhao et al. 2023, SLiC-HF, relative to a reference.

    Args:
        pair: sequence log-probs of P pairs.
        beta: reward per nat; the margin wanted is ``1 / beta`` nats.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return (1 - beta * (chosen - rejected)).relu()


def dpop(pair: PairLogps, *, beta: float = 0.3, lam: float = 50.0) -> Tensor:
    """DPO-Positive: DPO that pays for letting the chosen answer fall below the reference.

    ``l = -ln s(beta (a - b - lam max(0, -a)))``; the penalty sits inside ``beta`` and ``s``.
    Source: Pal et al. 2024, Smaug (arXiv:2402.13228).

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.
        lam: weight of the penalty; while ``a < 0`` the chosen side's gradient is ``1 + lam`` times the rejected side's.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return -logsigmoid(beta * (chosen - rejected - lam * (-chosen).relu()))


def dpop_metrics(pair: PairLogps, **options: Any) -> dict[str, Tensor]:
    """How many chosen answers lie below the reference, and by how many nats."""
    shortfall = (-log_ratios(pair)[0]).relu()
    return {"dpop/penalty_active": shortfall > 0, "dpop/penalty_mean": shortfall}


def r_dpo(pair: PairLogps, *, beta: float = 0.1, alpha: float = 0.01) -> Tensor:
    """R-DPO: DPO whose reward is charged for length.

    ``l = -ln s(beta (a - b) + alpha (n_w - n_x))``: a longer chosen answer gets a smaller gradient.
    Source: Park et al. 2024 (arXiv:2403.19159).

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.
        alpha: reward that a token costs; to be tuned, between 0.01 and 1.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    longer = (pair.chosen_lengths - pair.rejected_lengths).to(chosen.dtype)
    return -logsigmoid(beta * (chosen - rejected) + alpha * longer)


def ln_dpo(pair: PairLogps, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: DPO on log-ratios per token.

    ``l = -ln s(beta (a / n_w - b / n_x))``.
    Source: Lambert et al. 2024, Tulu 3 (arXiv:2411.15124); TRL's ``sigmoid_norm``.

    Args:
        pair: sequence log-probs of P pairs.
        beta: reward per nat of the mean log-ratio.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = per_token(pair, *log_ratios(pair))
    return -logsigmoid(beta * (chosen - rejected))


def exo(pair: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO: the reverse KL of the policy's preference from the smoothed label.

    ``l = q (ln q - ln(1 - e)) + (1 - q)(ln(1 - q) - ln e)`` with ``q = s(beta (a - b))``. The gradient is bounded, and
    vanishes at ``logit(1 - e)`` and for hopeless pairs.
    Source: Ji et al. 2024 (arXiv:2402.00856), eq. 16.

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.
        label_smoothing: probability ``e`` of the other label, above 0 and below 1.

    Returns:
        ``[P]`` losses.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"exo: label_smoothing must be in (0, 1), got {label_smoothing}")
    chosen, rejected = log_ratios(pair)
    margin, flipped = beta * (chosen - rejected), label_smoothing
    right = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-flipped))
    return right + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(flipped))


def metrics(pair: PairLogps, losses: Tensor, members: Sequence[Loss], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """``[2]`` (sum, count) over pairs: ``loss``, ``rewards/*`` and ``logps/*`` under TRL's names, and the losses' own.

    The implicit reward is ``beta`` (1 for losses without) times the log-ratio, per token where ``length_normalised``.
    Of a loss's own metrics, ``rewards/chosen`` and ``rewards/rejected`` replace the common ones.

    Args:
        pair: sequence log-probs of P pairs.
        losses: ``[P]``.
        members: the losses; the first one's reward is told.
        options: their keyword arguments.
    """
    chosen, rejected = log_ratios(pair)
    if members[0].length_normalised:
        chosen, rejected = per_token(pair, chosen, rejected)
    beta = options.get("beta", 1.0)
    rewards = {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected}
    own = {key: value for one in members if one.metrics for key, value in one.metrics(pair, **options).items()}
    rewards |= {key: own.pop(key) for key in rewards if key in own}
    values = {
        "loss": losses,
        **rewards,
        "rewards/margins": rewards["rewards/chosen"] - rewards["rewards/rejected"],
        "rewards/accuracies": rewards["rewards/chosen"] > rewards["rewards/rejected"],
        "logps/chosen": pair.chosen,
        "logps/rejected": pair.rejected,
        **own,
    }
    return {key: sum_and_count(value) for key, value in values.items()}


LOSSES = {
    "dpo": Loss(dpo, aliases=("sigmoid",)),
    "cdpo": Loss(cdpo),
    "robust": Loss(robust),
    "ipo": Loss(ipo),
    "ipo_sum": Loss(ipo_sum),
    "hinge": Loss(hinge),
    "slic": Loss(slic, reference=False, nonnegative=("lam",)),
    "dpop": Loss(dpop, nonnegative=("lam",), metrics=dpop_metrics),
    "r_dpo": Loss(r_dpo),
    "ln_dpo": Loss(ln_dpo, aliases=("sigmoid_norm",)),
    "ld_dpo": Loss(ld_dpo, tails=True),
    "exo": Loss(exo, aliases=("exo_pair",)),
    "nca": Loss(nca, aliases=("nca_pair",)),
    "bco_pair": Loss(bco_pair),
    "sppo": Loss(sppo, aliases=("sppo_hard",)),
    "aot": Loss(aot, columns=("rank_margins",)),
    "aot_unpaired": Loss(aot_unpaired, columns=("rank_ratios",)),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "simpo": Loss(simpo, reference=False, length_normalised=True),
    "cpo": Loss(cpo, reference=False, columns=("mean_lengths",), nonnegative=("cpo_alpha",), metrics=imitation_metrics),
    "orpo": Loss(
        orpo,
        reference=False,
        length_normalised=True,
        columns=("mean_lengths",),
        nonnegative=("nll_weight",),
        metrics=orpo_metrics,
    ),
    "tdpo1": Loss(tdpo1, distributions=True, metrics=tdpo_metrics),
    "tdpo2": Loss(tdpo2, distributions=True, metrics=tdpo_metrics),
    "sft": Loss(sft, reference=False, columns=("mean_lengths",), metrics=imitation_metrics),
}
FAMILY = Family(
    "Preference pairs",
    "Rows of `chosen` and `rejected`, with or without `prompt`. `L_w`, `L_x` are the log-probs of the chosen and "
    "the rejected completion summed over their tokens, `n_w`, `n_x` their counts, `a` and `b` the log-ratios "
    "to the reference, `s` the logistic function. The reference is the policy as it starts, or `reference.path`. "
    "Several losses make a weighted sum: `--loss.name dpo,sft --loss.loss_weights [1,0.2]`. TRL's names "
    "(`sigmoid`, `exo_pair`, `nca_pair`, `sppo_hard`, `sigmoid_norm`) are understood.",
    "`rewards/accuracies` and `rewards/margins` rise; `logps/chosen` may fall a little, a steady fall asks for "
    "`dpop`, an imitation term or a larger `beta`; `logps/accuracies` judges without the reference.",
    LOSSES,
    derive=lambda sums: {"perplexity/chosen": perplexity_of(sums, "nll/chosen")},
)
