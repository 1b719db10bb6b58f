"""Losses on preference pairs: pure functions of the sequence log-probs of P pairs, one loss per pair.

Notation of the docstrings: ``a = chosen - ref_chosen`` and ``b = rejected - ref_rejected`` are log-ratios summed over
the completion, ``n_w`` and ``n_x`` the completions' lengths in tokens, ``s`` the logistic function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.reduce import lengths, segment_sum, sum_and_count
from fastalign.types import PairLogps


def dpo(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """DPO: classify preferences through the implicit reward ``beta ln(policy / reference)``.

    ``l = -ln s(beta (a - b))``; ln 2 when the policy is the reference. Rafailov et al. 2023, eq. 7.

    Args:
        pair: sequence log-probs of P pairs.
        beta: weight of the KL penalty; larger stays closer to the reference.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return -logsigmoid(beta * (chosen - rejected))


def ipo(pair: PairLogps, *, beta: float = 0.1) -> Tensor:
    """IPO: regress the margin of per-token log-ratios onto a finite target.

    ``l = (a / n_w - b / n_x - 1 / (2 beta))^2``. Azar et al. 2023, eq. 17, with log-ratios averaged over tokens as its
    authors advise.

    Args:
        pair: sequence log-probs of P pairs.
        beta: tau of the paper; the target margin is ``1 / (2 beta)``.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    margin = chosen / token_counts(pair.chosen_lengths) - rejected / token_counts(pair.rejected_lengths)
    return (margin - 1 / (2 * beta)).square()


def simpo(pair: PairLogps, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> Tensor:
    """SimPO: length-normalised log-probs with a target margin, and no reference.

    ``l = -ln s(beta (chosen / n_w - rejected / n_x) - gamma)`` with ``gamma = gamma_beta_ratio * beta``.
    Meng et al. 2024, eq. 6.

    Args:
        pair: sequence log-probs of P pairs; the reference is not read.
        beta: scale of the reward.
        gamma_beta_ratio: target margin as a share of ``beta``.

    Returns:
        ``[P]`` losses.
    """
    margin = pair.chosen / token_counts(pair.chosen_lengths) - pair.rejected / token_counts(pair.rejected_lengths)
    return -logsigmoid(beta * (margin - gamma_beta_ratio))


def log_ratios(pair: PairLogps) -> tuple[Tensor, Tensor]:
    """``(a, b)``: the log-ratios to the reference of chosen and rejected, ``[P]`` each."""
    return pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected


def token_counts(sequence_lengths: Tensor) -> Tensor:
    """Lengths as divisors: an empty completion counts as one token, so that its mean is 0."""
    return sequence_lengths.clamp(min=1)


def pair_logps(logps: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None = None) -> PairLogps:
    """Sum token log-probs into pairs; sequence 2p is chosen, 2p + 1 rejected.

    Args:
        logps: ``[n]`` policy log-probs of the scored tokens of 2P sequences.
        cu_seqlens: ``[2P+1]`` offsets of the sequences in them.
        ref_logps: ``[n]`` reference log-probs; None for reference-free losses.
    """
    sums, counts = segment_sum(logps, cu_seqlens), lengths(cu_seqlens)
    ref = torch.zeros_like(sums) if ref_logps is None else segment_sum(ref_logps.to(logps.dtype), cu_seqlens)
    return PairLogps(sums[0::2], sums[1::2], ref[0::2], ref[1::2], counts[0::2], counts[1::2])


def metrics(pair: PairLogps, losses: Tensor, name: str, beta: float) -> dict[str, Tensor]:
    """``[2]`` (sum, count) over pairs: ``loss``, ``rewards/*`` and ``logps/*`` under TRL's names.

    The implicit reward is ``beta`` times the log-ratio, per token for losses in ``LENGTH_NORMALISED``.
    """
    chosen, rejected = log_ratios(pair)
    if name in LENGTH_NORMALISED:
        chosen, rejected = chosen / token_counts(pair.chosen_lengths), rejected / token_counts(pair.rejected_lengths)
    values = {
        "loss": losses,
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": beta * (chosen - rejected),
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": pair.chosen,
        "logps/rejected": pair.rejected,
    }
    return {key: sum_and_count(value) for key, value in values.items()}


LOSSES = {"dpo": dpo, "ipo": ipo, "simpo": simpo}
ALIASES = {"sigmoid": "dpo"}
"""TRL's spellings."""
REFERENCE_FREE = frozenset({"simpo"})
LENGTH_NORMALISED = frozenset({"simpo"})
