"""Tokenised examples: what the packer takes and what the cache keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor

from fastalign.types import Columns

Sequence = tuple[np.ndarray, np.ndarray]
"""One tokenised sequence: ``input_ids [n]`` integers and ``scored [n]`` bool, true where a token is a target."""


@dataclass(frozen=True)
class TokenExample:
    """A group of sequences that belong together: one for sft, chosen then rejected for a preference pair.

    Attributes:
        sequences: ``(input_ids [n], scored [n])`` of each sequence.
        example_id: position of the row in the dataset it came from; names it in error messages.
        kind: a label carried from the data (column ``kind``) to report metrics apart.
        own_rows: a scored token's own hidden state is read, as scalar heads do, not the one that predicts it.
        mismatched: the same prompt with the completion of another example, for losses that compare with it.
        columns: what the data say of the sequences or scored tokens, and log-probs under the reference when known.
    """

    sequences: tuple[Sequence, ...]
    example_id: int
    kind: str | None = None
    own_rows: bool = False
    mismatched: TokenExample | None = None
    columns: Columns = field(default_factory=Columns)

    def fill(self, **columns: Tensor | np.ndarray) -> TokenExample:
        """The same example with these columns, in fp32."""
        filled = {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}
        return replace(self, columns=replace(self.columns, **filled))


class Examples(Protocol):
    """What a loader reads: a `TokenDataset`, or anything like it."""

    def __len__(self) -> int: ...

    def fetch(self, indices: list[int]) -> list[TokenExample]:
        """The examples at ``indices``, in that order."""
        ...

    def lengths(self) -> np.ndarray:
        """``[n]`` tokens of the longest sequence of each example."""
        ...


class TokenDataset:
    """Tokenised examples in arrow files, read by position.

    Attributes:
        table: columns ``input_ids``, ``scored`` (the sequences of an example back to back), ``lengths``, ``scores``,
            ``example_id`` and ``kind``.
        counts: what happened on the way: ``kept``, ``truncated`` and the reasons for which rows were dropped.
        fingerprint: hash of rows, tokenizer and options.
        own_rows: see `TokenExample`.
        says: the column of the batch that ``scores`` are.
    """

    def __init__(
        self, table: Dataset, counts: dict[str, int], fingerprint: str, own_rows: bool = False, says: str = "scores"
    ) -> None:
        self.table = table.with_format("numpy")
        self.counts = counts
        self.fingerprint = fingerprint
        self.own_rows, self.says = own_rows, says

    def __len__(self) -> int:
        return len(self.table)

    def lengths(self) -> np.ndarray:
        """``[n]`` tokens of the longest sequence of each example, its mismatched one included; read from one column."""
        return self._over_sequences(np.maximum)

    def totals(self) -> np.ndarray:
        """``[n]`` tokens of all sequences of each example together, what they share counted for each."""
        return self._over_sequences(np.add)

    def scores(self) -> np.ndarray:
        """``[m]`` the scores of all examples, back to back."""
        return self._column("scores").combine_chunks().flatten().to_numpy()

    def ties(self) -> int:
        """Examples in which no sequence has a better score than another."""
        return int((self._over_sequences(np.maximum, "scores") == self._over_sequences(np.minimum, "scores")).sum())

    def _over_sequences(self, reduce: np.ufunc, name: str = "lengths") -> np.ndarray:
        column = self._column(name).combine_chunks()
        starts = np.cumsum(column.value_lengths().to_numpy()[:-1], dtype=np.int64)
        return reduce.reduceat(column.flatten().to_numpy(), np.concatenate([[0], starts]))

    def _column(self, name: str) -> pa.ChunkedArray:
        """A whole column; `Dataset` would make it a row at a time."""
        return cast(pa.Table, self.table.select_columns(name).with_format("arrow")[:])[name]

    def __getitem__(self, index: int) -> TokenExample:
        return self.fetch([index])[0]

    def __iter__(self) -> Iterator[TokenExample]:
        return (self[i] for i in range(len(self)))

    def fetch(self, indices: list[int]) -> list[TokenExample]:
        """The examples at ``indices``, in that order, read at once."""
        batch = self.table[indices]
        columns = [batch[name] for name in ("input_ids", "scored", "lengths", "example_id", "kind", "scores")]
        examples = []
        for ids, scored, lengths, example_id, kind, scores in zip(*columns, strict=True):
            example = TokenExample(_split(ids, scored, lengths), int(example_id), kind or None, self.own_rows)
            examples.append(example.fill(**{self.says: scores}) if len(scores) else example)
        return examples


def _split(ids: np.ndarray, scored: np.ndarray, lengths: np.ndarray) -> tuple[Sequence, ...]:
    ends = np.cumsum(lengths)[:-1]
    return tuple(zip(np.split(ids, ends), np.split(scored.astype(bool), ends), strict=True))
