"""A group of a packed batch as the ordinary sequences it stands for, and packed rows made of parts of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fastalign.types import PackedBatch


@dataclass(frozen=True)
class Sequences:
    """The logical sequences of a group, and where each of the group's scored tokens lies in them.

    Attributes:
        input_ids: `[n, L]` padded on the right, which causal attention never reads.
        lengths: of the n sequences.
        segments: the group's segments in the batch.
        scored: `[m]` positions in the batch's N scored tokens.
        sequence, position: `[m]` the sequence and the position in it that predict the scored token.
        labels: `[m]` the scored tokens.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    segments: tuple[int, ...]
    scored: Tensor
    sequence: Tensor
    position: Tensor
    labels: Tensor

    def sample(self, most: int) -> tuple[Sequences, Tensor]:
        """At most so many of the scored tokens, evenly spaced, and which."""
        count = len(self.scored)
        kept = torch.linspace(0, count - 1, min(most, count), device=self.scored.device).round().long()
        names = ("scored", "sequence", "position", "labels")
        return replace(self, **{name: getattr(self, name)[kept] for name in names}), kept


def unpack_group(batch: PackedBatch, own_rows: bool = False) -> Sequences:
    """The sequences of the group to compare: one with a shared prefix, not the first, small; as far as there is one.

    With ``own_rows`` a scored token is read at its own row, not at the one before.
    """
    tree, leaves = _choose_group(batch)
    chains = [_chain_rows(batch, leaf) for leaf in leaves]
    ids = batch.input_ids.tolist()
    if own_rows:
        places = [{(row, ids[row]): t for t, row in enumerate(rows)} for rows in chains]
    else:
        places = [{(row, ids[after]): t for t, (row, after) in enumerate(pairwise(rows))} for rows in chains]
    group_rows = {row for rows in chains for row in rows}
    scored, where = [], []
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        predictions = list(zip(batch.rows[start:stop].tolist(), batch.labels[start:stop].tolist(), strict=True))
        if predictions and predictions[0][0] in group_rows:
            scored += range(start, stop)
            where += _locate(predictions, places, start)
    device = batch.labels.device
    padded = torch.zeros(len(chains), max(map(len, chains)), dtype=torch.int64, device=device)
    for n, rows in enumerate(chains):
        padded[n, : len(rows)] = batch.input_ids[rows]
    sequence, position = torch.tensor(where, device=device).T
    marked = torch.tensor(scored, device=device)
    return Sequences(padded, tuple(map(len, chains)), tree, marked, sequence, position, batch.labels[marked])


def _locate(
    predictions: list[tuple[int, int]], places: list[dict[tuple[int, int], int]], start: int
) -> list[tuple[int, int]]:
    """`(sequence, position)` of one sequence's predictions `(row, label)`: all in one sequence of the group."""
    for n, place in enumerate(places):
        if all(prediction in place for prediction in predictions):
            return [(n, place[prediction]) for prediction in predictions]
    raise ValueError(
        f"scored tokens {start}:{start + len(predictions)} are not the next tokens of any sequence of their group: "
        "rows and labels do not match the segments"
    )


def _roots(batch: PackedBatch) -> list[int]:
    """The root segment above each segment."""
    roots: list[int] = []
    for s, parent in enumerate(batch.parents.tolist()):
        roots.append(s if parent < 0 else roots[parent])
    return roots


def _choose_group(batch: PackedBatch) -> tuple[tuple[int, ...], list[int]]:
    """The segments of the group, and which of them are leaves."""
    segments, roots = batch.segments, _roots(batch)
    depths: list[int] = []
    sizes: dict[int, int] = {}
    deepest: dict[int, int] = {}
    leaves: dict[int, list[int]] = {}
    for s, (root, parent) in enumerate(zip(roots, segments.parents, strict=True)):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        sizes[root] = sizes.get(root, 0) + segments.offsets[s + 1] - segments.offsets[s]
        deepest[root] = max(deepest.get(root, 0), depths[s])
        if s not in segments.parents:
            leaves.setdefault(root, []).append(s)
    ends = torch.tensor(segments.offsets[1:])
    homes = torch.searchsorted(ends, batch.rows.cpu(), right=True)
    scored_roots = {roots[s] for s in homes.unique().tolist()}
    first = min(scored_roots)
    best = min(scored_roots, key=lambda root: (-deepest[root], len(leaves[root]) < 2, root == first, sizes[root]))
    return tuple(s for s, root in enumerate(roots) if root == best), leaves[best]


def _chain_rows(batch: PackedBatch, leaf: int) -> list[int]:
    """Rows of the sequence that ends in a leaf segment, from its root on."""
    segments, rows = batch.segments, []
    while leaf >= 0:
        rows = [*range(segments.offsets[leaf], segments.offsets[leaf + 1]), *rows]
        leaf = segments.parents[leaf]
    return rows


def cut_out(batch: PackedBatch, group: Sequences) -> tuple[PackedBatch, Sequences]:
    """The group and a neighbour, which it must not read, alone in a packed row; only the group is scored."""
    roots = _roots(batch)
    others = set(roots) - {roots[s] for s in group.segments}
    beside = max((root for root in others if root < group.segments[0]), default=min(others, default=-1))
    kept = [s for s, root in enumerate(roots) if s in group.segments or root == beside]
    ids, positions, lengths, above, places = _segments(batch, kept)
    row = _row(ids, positions, lengths, above, places[batch.rows[group.scored]], group)
    segments = map(kept.index, group.segments)
    return row, replace(group, segments=tuple(segments), scored=_count(group.labels))


def pick_sequences(batch: PackedBatch, which: slice) -> PackedBatch:
    """One sequence of each example of a batch, in a packed row with their columns; no device is waited for.

    Args:
        batch: from `fastalign.data.pack`, on any device.
        which: among its B sequences.
    """
    assert batch.ends is not None
    parents, kept, ends = batch.parents.tolist(), set(), batch.ends[which].tolist()
    for segment in ends:
        while segment >= 0:
            kept.add(segment)
            segment = parents[segment]
    kept = sorted(kept)
    scored = tokens_of(batch, which)
    ids, positions, lengths, above, places = _segments(batch, kept)
    return replace(
        batch,
        input_ids=ids,
        position_ids=positions,
        cu_segments=_offsets(lengths),
        parents=torch.tensor(above, dtype=torch.int32),
        rows=places[batch.rows[scored]],
        labels=batch.labels[scored],
        cu_seqlens=_offsets(batch.cu_seqlens.diff()[which].tolist()),
        cu_groups=torch.arange(len(ends) + 1, dtype=torch.int32),
        ends=torch.tensor([kept.index(end) for end in ends], dtype=torch.int32),
        logical_tokens=len(ids),
        columns=batch.columns.pick({"token": scored, "sequence": which}),
        companion=None,
    )


def tokens_of(batch: PackedBatch, which: slice) -> Tensor:
    """Positions in the N scored tokens of those of some sequences; counted on the host."""
    counts = batch.cu_seqlens.diff().long()
    mask = torch.zeros_like(counts, dtype=torch.bool)
    mask[which] = True
    return mask.repeat_interleave(counts).nonzero()[:, 0].to(batch.rows.device)


def _segments(batch: PackedBatch, kept: Sequence[int]) -> tuple[Tensor, Tensor, list[int], list[int], Tensor]:
    """Ids, positions, lengths and parents of some segments alone, and where each of the batch's T rows is there."""
    offsets, parents, device = batch.cu_segments.tolist(), batch.parents.tolist(), batch.input_ids.device
    number = {s: i for i, s in enumerate(kept)}
    rows = torch.cat([torch.arange(offsets[s], offsets[s + 1]) for s in kept]).to(device)
    places = torch.zeros_like(batch.input_ids)
    places[rows] = torch.arange(len(rows), device=device)
    lengths, above = [offsets[s + 1] - offsets[s] for s in kept], [number.get(parents[s], -1) for s in kept]
    return batch.input_ids[rows], batch.position_ids[rows], lengths, above, places


def separate(group: Sequences) -> tuple[PackedBatch, Sequences]:
    """The group's sequences in a packed row, none of them shared with another."""
    lengths, device = group.lengths, group.input_ids.device
    ids = torch.cat([row[:length] for row, length in zip(group.input_ids, lengths, strict=True)])
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    firsts = torch.tensor([0, *accumulate(lengths)], device=device)
    row = _row(ids, positions, lengths, [-1] * len(lengths), firsts[group.sequence] + group.position, group)
    return row, replace(group, segments=tuple(range(len(lengths))), scored=_count(group.labels))


def _row(
    ids: Tensor, positions: Tensor, lengths: Sequence[int], parents: Sequence[int], rows: Tensor, group: Sequences
) -> PackedBatch:
    """A packed row of segments in which the group's tokens alone are scored."""
    return PackedBatch(
        input_ids=ids,
        position_ids=positions,
        cu_segments=_offsets(lengths),
        parents=torch.tensor(parents, dtype=torch.int32),
        rows=rows,
        labels=group.labels,
        cu_seqlens=torch.tensor([0, len(rows)], dtype=torch.int32),
        example_ids=(),
        logical_tokens=len(ids),
        cu_groups=torch.zeros(1, dtype=torch.int32),
    )


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _count(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)
