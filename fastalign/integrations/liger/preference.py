"""Liger's losses of preference pairs: DPO and its variants, CPO, SimPO, ORPO.

The batch holds the chosen sequences, then the rejected ones; labels are shifted by the caller. Every class returns

    loss, (chosen_logps [P], rejected_logps [P], chosen_logits_mean, rejected_logits_mean, nll_loss, ...)

where the means are over all positions and the vocabulary, as Liger's, and more follows as each class says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.integrations._fields import Scaling, mean_logits
from fastalign.integrations.liger.rows import neighbours, reference_logps, refuse, scored_rows
from fastalign.losses import preference
from fastalign.losses.pairs import pair_logps, per_token
from fastalign.losses.preference_free import orpo_metrics, sft
from fastalign.losses.traits import canonical, keywords
from fastalign.ops import linear_loss
from fastalign.types import Columns, PairLogps, TokenStats

Results = tuple[Tensor, tuple[Tensor, ...]]
Objective = Callable[[PairLogps], Tensor]


class _PairLoss(nn.Module):
    """What the losses of pairs share.

    Attributes:
        objective: from pairs to ``[P]`` losses.
        average_log_prob: the objective reads means over tokens in place of sums.
        alpha: weight of the chosen sequences' mean negative log-likelihood, when ``compute_nll_loss``.
    """

    def __init__(
        self,
        objective: Objective,
        ignore_index: int,
        beta: float,
        alpha: float,
        compute_nll_loss: bool,
        average_log_prob: bool,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.average_log_prob = average_log_prob

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Results:
        """``[V, D]``, ``[2P, S, D]``, ``[2P, S]``, ``[V]``."""
        return self.compute(lin_weight, _input, target, bias)

    def compute(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ref: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
        nll_target: Tensor | None = None,
    ) -> Results:
        """The loss, and what Liger returns beside it."""
        order = neighbours(len(target), target.device)
        rows = scored_rows(target, target != self.ignore_index, order)
        ref_logps = None if ref is None else reference_logps(rows, *ref)
        pairs, chosen = len(target) // 2, target[: len(target) // 2]
        mean_length = (chosen != self.ignore_index).sum().clamp(min=1) / pairs
        alongside = self.compute_nll_loss and nll_target is None

        def pair_of(logps: Tensor, cu_seqlens: Tensor, ref: Tensor | None) -> tuple[PairLogps, PairLogps]:
            columns = Columns(mean_lengths=mean_length.expand(len(cu_seqlens) - 1))
            pair = pair_logps(logps, cu_seqlens, ref, columns=columns)
            return pair, means(pair) if self.average_log_prob else pair

        def loss_fn(stats: TokenStats) -> Tensor:
            assert stats.cu_seqlens is not None
            sums, read = pair_of(stats.logps, stats.cu_seqlens, None if ref_logps is None else ref_logps[stats.rows])
            losses = self.objective(read)
            return (losses + self.alpha * sft(sums) if alongside else losses).sum() / pairs

        options = {"cu_seqlens": rows.cu_seqlens, "align": "pair", "bias": bias, "num_scored": len(rows.labels)}
        loss, stats = linear_loss(rows.of(_input), lin_weight, rows.labels, loss_fn, **options)
        sums, read = pair_of(stats.logps, rows.cu_seqlens, ref_logps)
        nll = sft(sums).mean() if alongside else loss.new_zeros(())
        if self.compute_nll_loss and nll_target is not None:
            nll = self._nll(lin_weight, _input[:pairs], nll_target[:pairs], bias)
            loss = loss + self.alpha * nll
        with torch.no_grad():
            z = mean_logits(_input.flatten(0, 1), lin_weight, bias, Scaling()).view(2, -1).mean(1)
        return loss, (read.chosen, read.rejected, *z, nll.detach(), *self.rest(read))

    def _nll(self, weight: Tensor, chosen: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        """The mean negative log-likelihood of other labels than the objective's."""
        rows = scored_rows(target, target != self.ignore_index)
        count = max(1, len(rows.labels))
        return linear_loss(rows.of(chosen), weight, rows.labels, lambda s: -s.logps.sum() / count, bias=bias)[0]

    def rest(self, pair: PairLogps) -> tuple[Tensor, ...]:
        """What follows the common results: rewards of chosen and rejected, ``beta`` times their log-ratios."""
        return self.beta * (pair.chosen - pair.ref_chosen), self.beta * (pair.rejected - pair.ref_rejected)


def means(pair: PairLogps) -> PairLogps:
    """The pair with means over tokens in place of sums."""
    chosen, rejected = per_token(pair, pair.chosen, pair.rejected)
    ref_chosen, ref_rejected = per_token(pair, pair.ref_chosen, pair.ref_rejected)
    return replace(pair, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)


class LigerFusedLinearDPOLoss(_PairLoss):
    """DPO and its variants; the losses are those of ``fastalign.losses.preference``.

    Args:
        loss_type: ``sigmoid hinge exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down``, and, beside Liger,
            any other name of ``fastalign.losses.preference`` that reads a pair's sums: ``ipo`` (length-normalised, as
            TRL's), ``cdpo``, ``dpop`` ... with their own defaults. ``discopop`` is not served.
        label_smoothing: of ``robust``, ``exo_pair`` and ``cdpo``; ``sigmoid`` ignores it, as Liger and TRL do.
        alpha, compute_nll_loss: add ``alpha`` times the chosen sequences' mean negative log-likelihood.
        average_log_prob: read means over tokens.

    Returns of a call: the common results, chosen_rewards ``[P]``, rejected_rewards ``[P]``.

    Raises:
        ValueError: an unknown loss, a smoothing out of its range, an odd batch, a missing reference.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        loss = _bound(loss_type, beta=beta, label_smoothing=label_smoothing)
        super().__init__(loss, ignore_index, beta, alpha, compute_nll_loss, average_log_prob)
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Results:
        """``[V, D]``, ``[2P, S, D]``, ``[2P, S]``, ``[V]``; the reference likewise."""
        ref = (ref_input, ref_weight, ref_bias) if self.use_ref_model else None
        return self.compute(lin_weight, _input, target, bias, ref)


def _bound(loss_type: str, **options: Any) -> Objective:
    """A pair loss by Liger's, TRL's or our name, with those of the options that it has."""
    alone = {n: x for n, x in preference.LOSSES.items() if not (x.tails or x.distributions)}
    losses = {n: x for n, x in alone.items() if {*x.columns} <= {"mean_lengths"}}
    served = canonical(losses)
    if loss_type not in served:
        refuse("loss_type", loss_type, f"choose one of {', '.join(sorted(served))}")
    loss = losses[served[loss_type]]
    bound = partial(loss, **{key: value for key, value in options.items() if key in keywords(loss)})
    one = torch.ones(1)
    bound(PairLogps(one, one, one, one, one, one))  # settings out of their range are refused now, not in training
    return bound


class LigerFusedLinearCPOLoss(_PairLoss):
    """CPO: ``-ln s(beta (L_w - L_x))``, labels smoothed, plus ``alpha`` times the chosen mean negative log-likelihood.

    Returns of a call: the common results, chosen_rewards ``[P]``, rejected_rewards ``[P]``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ):
        loss = _bound("cdpo", beta=beta, label_smoothing=label_smoothing)  # against a uniform reference
        super().__init__(loss, ignore_index, beta, alpha, compute_nll_loss, average_log_prob)


class LigerFusedLinearSimPOLoss(_PairLoss):
    """SimPO: ``-ln s(beta (L_w / n_w - L_x / n_x) - gamma)``, labels smoothed; ``gamma`` itself, not its share of beta.

    Returns of a call: the common results with mean log-probs, chosen_rewards ``[P]``, rejected_rewards ``[P]``.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ):
        smoothed = _bound("cdpo", beta=beta, label_smoothing=label_smoothing)

        def loss(pair: PairLogps) -> Tensor:  # the target of the margin, moved into the chosen side
            return smoothed(replace(pair, chosen=pair.chosen - gamma / beta))

        super().__init__(loss, ignore_index, beta, alpha, compute_nll_loss, average_log_prob=True)


class LigerFusedLinearORPOLoss(_PairLoss):
    """ORPO: ``-beta ln s(log odds ratio)`` of mean log-probs, plus the chosen mean negative log-likelihood.

    Mean log-probs are clamped to -1e-4 and ``ln(1 - e^x)`` is computed in its stable form; Liger's gradient grows
    without bound as a mean log-prob nears 0.

    Returns of a call: the common results with mean log-probs, chosen_rewards ``[P]``, rejected_rewards ``[P]``,
    log_odds_ratio and log_odds_chosen, means over pairs.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        def odds(pair: PairLogps) -> Tensor:
            return preference.orpo(_single(pair), beta=beta, nll_weight=0.0)

        super().__init__(odds, ignore_index, beta, 1.0, compute_nll_loss, average_log_prob=True)

    def rest(self, pair: PairLogps) -> tuple[Tensor, ...]:
        """Rewards, then the odds."""
        odds = orpo_metrics(_single(pair), max_mean_logp=-1e-4)
        return *super().rest(pair), odds["log_odds_ratio"].mean(), odds["log_odds_chosen"].mean()

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> Results:
        """``[V, D]``, ``[2P, S, D]``, ``[2P, S]``, ``[V]``, and other labels ``[2P, S]`` for the imitation term."""
        return self.compute(lin_weight, _input, target, bias, nll_target=nll_target)


def _single(pair: PairLogps) -> PairLogps:
    """The pair with completions of one token, whose sum is their mean."""
    return replace(
        pair,
        chosen_lengths=torch.ones_like(pair.chosen_lengths),
        rejected_lengths=torch.ones_like(pair.rejected_lengths),
    )
