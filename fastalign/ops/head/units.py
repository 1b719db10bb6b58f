"""Coupling units of an aligned ``linear_loss``: sequences, pairs or groups, counted in scored rows on the host."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastalign.ops.checks import checked_offsets
from fastalign.ops.transfer import on_device
from fastalign.types import IGNORE_INDEX

Align = Literal["token", "sequence", "pair", "group"]


@dataclass(frozen=True)
class Units:
    """Where units and sequences begin.

    Attributes:
        offsets: ``[U+1]`` unit offsets in sequences.
        cu_scored: ``[B+1]`` sequence offsets in scored rows.
    """

    offsets: list[int]
    cu_scored: list[int]

    @property
    def lengths(self) -> list[int]:
        """Scored rows of each unit."""
        return [self.cu_scored[last] - self.cu_scored[first] for first, last in pairwise(self.offsets)]

    def sequences(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Global ids of the sequences of units ``start:stop``, and their offsets from the first one's first row."""
        first, last = self.offsets[start], self.offsets[stop]
        offsets = [offset - self.cu_scored[first] for offset in self.cu_scored[first : last + 1]]
        return torch.arange(first, last, device=device), on_device(offsets, device)


def make_units(
    labels: Tensor, cu_seqlens: Tensor | None, cu_groups: Tensor | None, align: Align, num_scored: int | None
) -> Units | None:
    """The units of a call, None for ``align="token"``; no sync when offsets are on the host and all rows are scored.

    Raises:
        ValueError: unknown ``align``, offsets that are missing or do not cover the rows, an odd number for pairs.
    """
    if align == "token":
        return None
    if align not in ("sequence", "pair", "group"):
        raise ValueError(f'align must be "token", "sequence", "pair" or "group", got {align!r}')
    if cu_seqlens is None:
        raise ValueError(f"align={align!r} needs cu_seqlens, the [B+1] offsets of the sequences in the N rows")
    ends = checked_offsets("cu_seqlens", cu_seqlens, len(labels), "rows")
    offsets = _unit_offsets(len(ends) - 1, cu_groups, align)
    if num_scored == len(labels):
        return Units(offsets, ends)
    scored = torch.nn.functional.pad((labels != IGNORE_INDEX).cumsum(0), (1, 0)).cpu()
    return Units(offsets, scored[torch.tensor(ends)].tolist())


def _unit_offsets(num_sequences: int, cu_groups: Tensor | None, align: Align) -> list[int]:
    if align == "pair":
        if num_sequences % 2:
            raise ValueError(f'align="pair" needs an even number of sequences (chosen, rejected), got {num_sequences}')
        return list(range(0, num_sequences + 1, 2))
    if align == "sequence":
        return list(range(num_sequences + 1))
    if cu_groups is None:
        raise ValueError('align="group" needs cu_groups, the [G+1] offsets of the groups in the B sequences')
    return checked_offsets("cu_groups", cu_groups, num_sequences, "sequences")
