"""Sums over segments, and the reductions whose denominators are global.

Every denominator is an argument: the count over all ranks and all micro-batches of the optimizer step, known before the
first backward. A reduction therefore returns this micro-batch's share of the loss, and shares add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of each segment, in a fixed order, accumulated in fp64; an empty segment gives 0.

    In fp32 the running sum of a long sequence's log-probs loses more digits than eager's pairwise sum does.

    Args:
        x: ``[n]`` values, differentiable.
        cu_seqlens: ``[b+1]`` integer offsets.

    Returns:
        ``[b]`` in the dtype of ``x``.

    >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3]))
    tensor([3., 0., 4.])
    """
    return torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens.to(torch.int64), initial=0.0).to(x.dtype)


def lengths(cu_seqlens: Tensor) -> Tensor:
    """``[b]`` number of elements of each segment, from ``[b+1]`` offsets."""
    return cu_seqlens.diff()


def repeat_segments(values: Tensor, cu_seqlens: Tensor, size: int | None = None) -> Tensor:
    """``[b]`` numbers of segments as ``[n]`` numbers of their elements; with ``size``, n, no device is waited for."""
    return values.repeat_interleave(lengths(cu_seqlens).long(), output_size=size)


def segment_ids(cu_seqlens: Tensor, size: int) -> Tensor:
    """``[n]`` int64, the segment of each of ``size`` elements."""
    return repeat_segments(torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device), cu_seqlens, size)


def token_mean(losses: Tensor, num_tokens: int | Tensor) -> Tensor:
    """``sum_t l_t / num_tokens``: every scored token weighs the same (SFT, DAPO, PPO).

    Args:
        losses: ``[n]`` per-token losses.
        num_tokens: scored tokens of the whole optimizer step.
    """
    return losses.sum() / num_tokens


def seq_mean_token_mean(losses: Tensor, cu_seqlens: Tensor, num_sequences: int | Tensor) -> Tensor:
    """``sum_i mean_t l_it / num_sequences``: every sequence weighs the same (GRPO); empty sequences add 0."""
    return (segment_sum(losses, cu_seqlens) / lengths(cu_seqlens).clamp(min=1)).sum() / num_sequences


def seq_mean_token_sum(losses: Tensor, num_sequences: int | Tensor) -> Tensor:
    """``sum_i sum_t l_it / num_sequences``: sequence log-probs averaged over sequences (RLOO)."""
    return losses.sum() / num_sequences


def constant(losses: Tensor, num_sequences: int | Tensor, budget: int) -> Tensor:
    """``sum_t l_t / (num_sequences * budget)``: a fixed length in place of the true one (Dr.GRPO)."""
    return losses.sum() / (num_sequences * budget)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What reductions divide by: counts over all ranks and micro-batches of the optimizer step.

    Attributes:
        tokens: scored tokens.
        sequences: sequences with at least one scored token.
        examples: sequences, pairs or prompts, as the method counts.
        budget: the length that stands for every sequence's in ``constant``.
    """

    tokens: float | Tensor = 1
    sequences: float | Tensor = 1
    examples: float | Tensor = 1
    budget: float | Tensor = 1


def token_weights(reduction: str, cu_seqlens: Tensor, totals: Totals, num_tokens: int | None = None) -> Tensor:
    """``[n]`` fp64 weight of each token's loss, so that a reduction is a weighted sum; also ``policy_loss``'s weights.

    Args:
        reduction: a key of ``WEIGHTS``.
        cu_seqlens: ``[b+1]`` offsets of the sequences in the n tokens.
        totals: the denominators.
        num_tokens: n, which spares a wait for the device where the host knows it.

    Raises:
        ValueError: an unknown reduction.

    >>> token_weights("seq-mean-token-mean", torch.tensor([0, 1, 3]), Totals(tokens=3, sequences=2))
    tensor([0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    if reduction not in WEIGHTS:
        raise ValueError(f"unknown reduction {reduction!r}: expected one of {', '.join(WEIGHTS)}")
    counts = lengths(cu_seqlens).long()
    weights = WEIGHTS[reduction](counts.double(), totals)
    return weights.repeat_interleave(counts, output_size=num_tokens)


def weight_columns(reduction: str, cu_seqlens: Tensor, totals: Totals, num_tokens: int) -> dict[str, Tensor]:
    """The column of weights that makes `weighted` the named reduction: one of tokens, or of whole examples."""
    if reduction == "example-mean":
        return {"example_weights": WEIGHTS[reduction](lengths(cu_seqlens).double(), totals)}
    return {"weights": token_weights(reduction, cu_seqlens, totals, num_tokens)}


def weighted(losses: Tensor, weights: Tensor) -> Tensor:
    """``sum(weights * losses)``, a batch's share of the reduction that made the weights."""
    return (losses * weights.to(losses.dtype)).sum()


def sum_and_count(values: Tensor, count: int | None = None) -> Tensor:
    """A metric's ``[2]`` fp64 (sum, count), detached: pairs add over chunks, micro-batches and ranks, then divide."""
    total = values.detach().sum(dtype=torch.float64)
    return torch.stack([total, total.new_full((), values.numel() if count is None else count)])  # no copy from the host


WEIGHTS: dict[str, Callable[[Tensor, Totals], Tensor]] = {
    "token-mean": lambda counts, totals: torch.ones_like(counts) / totals.tokens,
    "seq-mean-token-mean": lambda counts, totals: 1 / counts.clamp(min=1) / totals.sequences,
    "seq-mean-token-sum": lambda counts, totals: torch.ones_like(counts) / totals.sequences,
    "constant": lambda counts, totals: torch.ones_like(counts) / (totals.sequences * totals.budget),
    "sum": lambda counts, totals: torch.ones_like(counts),
    "example-mean": lambda counts, totals: torch.ones_like(counts) / totals.examples,
}
"""The weight of a token in a sequence of ``counts`` tokens, by the reduction's name; of ``example-mean`` that of the
loss of the sequence's example."""
