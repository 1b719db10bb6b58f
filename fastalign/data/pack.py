"""From groups of sequences to packed micro-batches: no padding, and a shared prompt computed once.

Layout of a group with a shared prefix of P tokens: ``[P | R1 | R2 | ...]``, every response a child of the prefix whose
positions restart at P; responses that agree further share further segments below it. A scored token is predicted by the
row before it in its own sequence, so the last prefix row predicts the first token of every response; a scalar head
reads the scored token's own row instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastalign.data.examples import TokenExample
from fastalign.data.forest import LEAST_SHARED, Node, grow
from fastalign.types import PackedBatch


def pack(examples: Sequence[TokenExample], tokens: int, share_prefix: bool) -> list[PackedBatch]:
    """Packs whole examples into micro-batches of at most ``tokens`` computed tokens.

    Bins are filled first-fit-decreasing; an example is never split, and one longer than the budget gets a micro-batch
    of its own. Within a micro-batch examples keep their order in ``examples``.

    Args:
        examples: the groups to pack.
        tokens: budget of computed tokens per micro-batch.
        share_prefix: compute what the sequences of a group begin with once.

    Returns:
        The micro-batches; empty when there are no examples.

    Raises:
        ValueError: the budget is not positive, or a sequence has no token.
    """
    bins = first_fit_decreasing([group_tokens(e, share_prefix) for e in examples], tokens)
    return [build_batch([examples[i] for i in members], share_prefix) for members in bins]


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``sizes`` in bins of at most ``capacity``; an item above it has a bin of its own. Deterministic.

    Example:
        >>> first_fit_decreasing([5, 3, 9, 4, 2], capacity=7)
        [[2], [0, 4], [1, 3]]
    """
    if capacity < 1:
        raise ValueError(f"the token budget of a micro-batch must be at least 1, got {capacity}: set batch.tokens")
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((b for b, free in enumerate(room) if free >= sizes[item]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= sizes[item]
    return [sorted(members) for members in bins]


def group_forest(example: TokenExample, share_prefix: bool, least: int = LEAST_SHARED) -> tuple[list[Node], list[int]]:
    """The segments of an example and the one in which each of its sequences ends; see `fastalign.data.forest.grow`.

    Raises:
        ValueError: a sequence has no token.
    """
    sequences = [np.asarray(ids) for ids, _ in example.sequences]
    if any(len(ids) == 0 for ids in sequences):
        raise ValueError(f"example {example.example_id} has a sequence without tokens: drop it before packing")
    if share_prefix:
        return grow(sequences, least)
    return [Node(i, 0, len(ids), -1) for i, ids in enumerate(sequences)], list(range(len(sequences)))


def group_tokens(example: TokenExample, share_prefix: bool, least: int = LEAST_SHARED) -> int:
    """The tokens that the backbone computes for one example."""
    return sum(node.length for node in group_forest(example, share_prefix, least)[0])


def build_batch(examples: Sequence[TokenExample], share_prefix: bool, least: int = LEAST_SHARED) -> PackedBatch:
    """Lays the examples out in one packed row, whatever their size.

    A segment without tokens is left out: of identical sequences only the prefix remains. Common beginnings below
    ``least`` tokens are not shared.
    """
    forest = _Forest()
    for example in examples:
        _add_group(forest, example, *group_forest(example, share_prefix, least))
    others = [e.mismatched for e in examples if e.mismatched is not None]
    reference = _reference(examples)
    pairs = [_with_mismatched(e) for e in examples if e.mismatched is not None and reference is None]
    return forest.batch(
        tuple(e.example_id for e in examples),
        scores=_concatenate([e.scores for e in examples], np.float32),
        mismatched=build_batch(others, share_prefix, least) if others else None,
        both=build_batch(pairs, share_prefix, least) if pairs else None,
        ref_logps=reference,
    )


def empty_batch() -> PackedBatch:
    """One token that nobody scores: keeps a rank without work in step with the others."""
    forest = _Forest()
    forest.add_segment(np.zeros(1, dtype=np.int64), start=0, parent=-1)
    return forest.batch((), _concatenate([], np.float32))


def _with_mismatched(example: TokenExample) -> TokenExample:
    """An example's sequence and the mismatched one as a group: they share their prompt."""
    assert example.mismatched is not None
    return TokenExample((*example.sequences, *example.mismatched.sequences), example.example_id)


def _reference(examples: Sequence[TokenExample]) -> torch.Tensor | None:
    """The reference's log-probs, when they are known of every example."""
    known = [e.ref_logps for e in examples if e.ref_logps is not None]
    return _concatenate(known, np.float32) if known and len(known) == len(examples) else None


def _add_group(forest: _Forest, example: TokenExample, nodes: Sequence[Node], ends: Sequence[int]) -> None:
    base, chains = len(forest.parents), []  # per node, the row of every position up to its last
    for node in nodes:
        ids = np.asarray(example.sequences[node.source][0])[node.start : node.stop]
        row = forest.add_segment(ids, node.start, base + node.parent if node.parent >= 0 else -1)
        before = chains[node.parent] if node.parent >= 0 else np.empty(0, dtype=np.int64)
        chains.append(np.concatenate([before, np.arange(row, row + node.length)]))
    for (ids, scored), end in zip(example.sequences, ends, strict=True):
        ids, scored = np.asarray(ids), np.asarray(scored, dtype=bool)
        targets = np.flatnonzero(scored) if example.own_rows else np.flatnonzero(scored[1:]) + 1
        forest.add_targets(chains[end][targets if example.own_rows else targets - 1], ids[targets], len(ids))
    forest.cu_groups.append(len(forest.cu_seqlens) - 1)


class _Forest:
    """The lists that grow while segments are laid out."""

    def __init__(self) -> None:
        self.input_ids: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.cu_segments, self.parents, self.cu_groups = [0], [], [0]
        self.rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.cu_seqlens, self.logical_tokens = [0], 0

    def add_segment(self, ids: np.ndarray, start: int, parent: int) -> int:
        """Appends a segment whose positions begin at ``start``; returns its first row."""
        row = self.cu_segments[-1]
        self.input_ids.append(ids)
        self.position_ids.append(np.arange(start, start + len(ids)))
        self.cu_segments.append(row + len(ids))
        self.parents.append(parent)
        return row

    def add_targets(self, rows: np.ndarray, labels: np.ndarray, length: int) -> None:
        """Appends the scored tokens of one sequence and the rows that are read for them."""
        self.rows.append(rows)
        self.labels.append(labels)
        self.cu_seqlens.append(self.cu_seqlens[-1] + len(labels))
        self.logical_tokens += length

    def batch(self, example_ids: tuple[int, ...], scores: torch.Tensor, **more: Any) -> PackedBatch:
        """The packed batch; ``more`` are its optional fields."""
        return PackedBatch(
            input_ids=_concatenate(self.input_ids, np.int64),
            position_ids=_concatenate(self.position_ids, np.int64),
            cu_segments=torch.tensor(self.cu_segments, dtype=torch.int32),
            parents=torch.tensor(self.parents, dtype=torch.int32),
            rows=_concatenate(self.rows, np.int64),
            labels=_concatenate(self.labels, np.int64),
            cu_seqlens=torch.tensor(self.cu_seqlens, dtype=torch.int32),
            cu_groups=torch.tensor(self.cu_groups, dtype=torch.int32),
            example_ids=example_ids,
            logical_tokens=self.logical_tokens,
            scores=scores,
            **more,
        )


def _concatenate(parts: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, dtype=dtype)], dtype=dtype))
