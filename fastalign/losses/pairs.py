"""What the losses of preference pairs share: log-ratios, lengths, and the way from tokens to pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastalign.losses.reduce import lengths, segment_ids, segment_sum
from fastalign.types import Columns, PairLogps


def log_ratios(pair: PairLogps) -> tuple[Tensor, Tensor]:
    """``(a, b)``: the log-ratios to the reference of chosen and rejected, ``[P]`` each."""
    return pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected


def token_counts(sequence_lengths: Tensor) -> Tensor:
    """Lengths as divisors: an empty completion counts as one token, so that its mean is 0."""
    return sequence_lengths.clamp(min=1)


def per_token(pair: PairLogps, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the completions of a pair as means over their tokens."""
    return chosen / token_counts(pair.chosen_lengths), rejected / token_counts(pair.rejected_lengths)


def smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of the label "chosen is better", flipped with probability ``label_smoothing``, in the margin."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def check_smoothing(loss: str, label_smoothing: float, low: float, high: float) -> None:
    """Refuse a share of flipped labels for which the loss has no meaning.

    Raises:
        ValueError: unless ``low <= label_smoothing < high``.
    """
    if not low <= label_smoothing < high:
        raise ValueError(f"{loss}: label_smoothing must be in [{low}, {high}), got {label_smoothing}")


def pair_logps(
    logps: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None = None,
    *,
    tails: bool = False,
    columns: Columns | None = None,
) -> PairLogps:
    """Sum token log-probs into pairs; sequence 2p is chosen, 2p + 1 rejected.

    Args:
        logps: ``[n]`` policy log-probs of the scored tokens of 2P sequences.
        cu_seqlens: ``[2P+1]`` offsets of the sequences in them.
        ref_logps: ``[n]`` reference log-probs; None for reference-free losses.
        tails: also sum what lies beyond the shorter completion of each pair.
        columns: see `PairLogps`.
    """
    ref_logps = None if ref_logps is None else ref_logps.to(logps.dtype)
    sums, counts = segment_sum(logps, cu_seqlens), lengths(cu_seqlens)
    ref = torch.zeros_like(sums) if ref_logps is None else segment_sum(ref_logps, cu_seqlens)
    tail = tail_sums(logps, ref_logps, cu_seqlens) if tails else (None,) * 4
    whole = (sums[0::2], sums[1::2], ref[0::2], ref[1::2], counts[0::2], counts[1::2])
    return PairLogps(*whole, *tail, columns=columns)


def tail_sums(logps: Tensor, ref_logps: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Tail sums ``[P]`` of chosen, rejected and, under the reference (0 without one), of both again."""
    counts = lengths(cu_seqlens).long()
    shared = counts.view(-1, 2).amin(1).repeat_interleave(2)
    sequence = segment_ids(cu_seqlens, len(logps))
    place = torch.arange(len(logps), device=logps.device) - cu_seqlens[:-1].long()[sequence]
    beyond = place >= shared[sequence]
    sums = segment_sum(torch.where(beyond, logps, 0.0), cu_seqlens)
    ref = torch.zeros_like(sums)
    if ref_logps is not None:
        ref = segment_sum(torch.where(beyond, ref_logps, 0.0), cu_seqlens)
    return sums[0::2], sums[1::2], ref[0::2], ref[1::2]


def of_step(pair: PairLogps, name: str, loss: str, make: Callable[[PairLogps], Tensor]) -> Tensor:
    """``[2P]`` the column of that name, which depends on the whole step; made of the pairs where these are the step."""
    column = make(pair) if pair.columns is None else pair.columns.read(name, loss)
    return column.to(pair.chosen.dtype)


def given(loss: str, field: str, *values: Tensor | None) -> tuple[Tensor, ...]:
    """Optional fields of the pairs that a loss cannot do without.

    Raises:
        ValueError: they are None.
    """
    found = tuple(value for value in values if value is not None)
    if len(found) < len(values):
        raise ValueError(f"{loss} reads the {field} of the pairs, which were not computed: see PairLogps")
    return found
