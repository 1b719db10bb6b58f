"""Prompts with completions of other examples: what kto measures the policy's drift from its reference on.

Source: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1. TRL rotates the completions of a batch by one; here
those of the dataset are rotated, so that the mismatched sequences depend neither on batches nor on their order, and
their reference log-probs can be kept.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa

from fastalign.data.examples import Sequence, TokenDataset, TokenExample


class MismatchedDataset(TokenDataset):
    """A dataset of single completions, each example with `TokenExample.mismatched`, made when it is read.

    The prompt is everything before the first scored token: the row's own prompt with all its earlier turns; the
    completion is the rest. Example i is given the completion of example i + k, cyclically, k the most
    examples that one row of the data gave (two for a preference: a good completion is so matched with a good one of
    the next row). The completions of the mismatched sequences are then the dataset's own, each once.

    Args:
        dataset: one sequence per example.
        max_length: where the new sequences are cut.

    Raises:
        ValueError: all examples come from one row.
    """

    def __init__(self, dataset: TokenDataset, max_length: int) -> None:
        super().__init__(dataset.table, dataset.counts, dataset.fingerprint)
        self.max_length = max_length
        self.partners = choose_partners(self._column("example_id").to_numpy())

    def lengths(self) -> np.ndarray:
        """``[n]`` tokens of the longer of each example's sequence and its mismatched one, which is never made here."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        own, starts = super().lengths(), self._boundaries()
        return np.maximum(own, np.minimum(starts + (own - starts)[self.partners], self.max_length))

    def _boundaries(self) -> np.ndarray:
        """``[n]`` positions of the first scored token of each example."""
        scored, found = self.table.select_columns("scored").with_format("arrow"), []
        for batch in scored.iter(batch_size=10_000):
            column = cast(pa.Table, batch)["scored"].combine_chunks()
            firsts = np.cumsum(column.value_lengths().to_numpy(), dtype=np.int64) - column.value_lengths().to_numpy()
            marked = np.flatnonzero(column.flatten().to_numpy().view(bool))
            found.append(marked[np.searchsorted(marked, firsts)] - firsts)
        return np.concatenate(found)

    def fetch(self, indices: list[int]) -> list[TokenExample]:
        """The examples at ``indices`` with their mismatched sequences, read at once."""
        examples = super().fetch([*indices, *(int(self.partners[i]) for i in indices)])
        pairs = zip(examples[: len(indices)], examples[len(indices) :], strict=True)
        return [replace(example, mismatched=mismatch(example, other, self.max_length)) for example, other in pairs]


def choose_partners(rows: np.ndarray) -> np.ndarray:
    """For each example the one whose completion it is given: some way on, cyclically, and from another row.

    Args:
        rows: ``[n]`` ascending row numbers.

    Example:
        >>> choose_partners(np.array([4, 4, 5, 5, 9, 9])).tolist()
        [2, 3, 4, 5, 0, 1]
    """
    if rows[0] == rows[-1]:
        raise ValueError(
            "kto compares completions of different rows: expected two rows or more to train on, and as many held out "
            "if any are; got one"
        )
    count = len(rows)
    partners = (np.arange(count) + int(np.bincount(rows - rows[0]).max())) % count
    for i in np.flatnonzero(rows[partners] == rows):  # very few examples: the way on leads back to the row
        partners[i] = next(j % count for j in range(i + 1, i + count) if rows[j % count] != rows[i])
    return partners


def mismatch(example: TokenExample, other: TokenExample, max_length: int) -> TokenExample:
    """The prompt of ``example`` with the completion of ``other``, scored as there, at most ``max_length`` tokens."""
    (ids, scored), (others, theirs) = example.sequences[0], other.sequences[0]
    start, begin = _boundary((ids, scored)), _boundary((others, theirs))
    joined = np.concatenate([ids[:start], others[begin:]])[:max_length]
    mask = np.concatenate([scored[:start], theirs[begin:]])[:max_length]
    return TokenExample(((joined, mask),), example.example_id, example.kind)


def _boundary(sequence: Sequence) -> int:
    """Position of the first scored token."""
    return int(np.argmax(sequence[1]))
