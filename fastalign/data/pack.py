"""From groups of sequences to packed micro-batches: no padding, and a shared prompt computed once.

Layout of a group with a shared prefix of P tokens: ``[P | R1 | R2 | ...]``, every response a child of the prefix whose
positions restart at P; responses that agree further share further segments below it. A scored token is predicted by the
row before it in its own sequence, so the last prefix row predicts the first token of every response; a scalar head
reads the scored token's own row instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastalign.data.examples import TokenExample
from fastalign.data.forest import LEAST_SHARED, Node, grow
from fastalign.types import AXES, Columns, ForwardCost, PackedBatch, attended

Forest = tuple[list[Node], list[int]]
"""The segments of an example and the one in which each of its sequences ends."""
TOKENS_ALONE = ForwardCost()
"""Work counted in tokens, where the model is not known."""


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
    forests = [group_forest(e, share_prefix) for e in examples]
    bins = first_fit_decreasing([num_tokens(forest) for forest in forests], tokens)
    return [build_chosen(examples, forests, members, share_prefix) for members in bins]


def share(
    examples: Sequence[TokenExample],
    tokens: int,
    share_prefix: bool,
    rank: int,
    size: int,
    cost: ForwardCost = TOKENS_ALONE,
) -> list[PackedBatch]:
    """This rank's micro-batches of a step, packed so that all ranks work equally long on each; see `deal`.

    Every rank gets the same number of them; one with less work gets `empty_batch`.

    Args:
        examples: the whole step, the same on every rank.
        tokens: budget of computed tokens per micro-batch.
        share_prefix: compute what the sequences of a group begin with once.
        rank, size: which of how many shares.
        cost: of the model, by which ranks get equal work.
    """
    forests = [group_forest(e, share_prefix) for e in examples]
    costs = [example_cost(e, forest, cost) for e, forest in zip(examples, forests, strict=True)]
    mine = deal([num_tokens(forest) for forest in forests], costs, tokens, size)[rank]
    return [build_chosen(examples, forests, members, share_prefix) if members else empty_batch() for members in mine]


def example_cost(example: TokenExample, forest: Forest, cost: ForwardCost) -> float:
    """What a model pays for an example: attention grows with the square of the lengths, the head with scored tokens."""
    pairs = sum(attended(node.length, node.start) for node in forest[0])
    return cost.of(num_tokens(forest), pairs, sum(int(np.sum(scored)) for _, scored in example.sequences))


def deal(sizes: Sequence[int], costs: Sequence[float], capacity: int, num_ranks: int) -> list[list[list[int]]]:
    """Members of each micro-batch of each rank: as few as the budget allows, equally many and of equal cost.

    Ranks wait for each other in every micro-batch, and the largest one decides what memory is needed, so all are made
    alike: examples are spread over all micro-batches of all ranks, most expensive first, each into the cheapest that
    has room; where that needs more micro-batches than first-fit-decreasing, its bins are taken. Sorted by cost, they go
    to the ranks round by round, in turns.

    Args:
        sizes: computed tokens of each example.
        costs: what the model pays for each.
        capacity: tokens per micro-batch; an example above it has one of its own.
        num_ranks: ranks.

    Example:
        >>> deal([5, 3, 4, 2], [5, 3, 4, 2], capacity=7, num_ranks=2)
        [[[0, 3]], [[1, 2]]]
    """
    bins = first_fit_decreasing(sizes, capacity)
    rounds = -(-len(bins) // num_ranks)
    bins = spread(sizes, costs, capacity, rounds * num_ranks) or bins
    bins = sorted(bins, key=lambda members: -sum(costs[i] for i in members))
    bins += [[] for _ in range(rounds * num_ranks - len(bins))]
    turns = [bins[r * num_ranks : (r + 1) * num_ranks][:: -1 if r % 2 else 1] for r in range(rounds)]
    return [list(rank) for rank in zip(*turns, strict=True)] or [[] for _ in range(num_ranks)]


def spread(sizes: Sequence[int], costs: Sequence[float], capacity: int, num_bins: int) -> list[list[int]] | None:
    """Indices in ``num_bins`` bins of like cost: most expensive first, each to the cheapest with room, or None."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads, room = [0.0] * num_bins, [capacity] * num_bins
    for item in sorted(range(len(sizes)), key=lambda i: (-costs[i], i)):
        fitting = [b for b in range(num_bins) if not bins[b] or room[b] >= sizes[item]]
        if not fitting:
            return None
        place = min(fitting, key=lambda b: (loads[b], b))
        bins[place].append(item)
        loads[place] += costs[item]
        room[place] -= sizes[item]
    return [sorted(members) for members in bins]


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


def group_forest(example: TokenExample, share_prefix: bool, least: int = LEAST_SHARED) -> Forest:
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
    return num_tokens(group_forest(example, share_prefix, least))


def num_tokens(forest: Forest) -> int:
    """The tokens of all segments."""
    return sum(node.length for node in forest[0])


def build_chosen(
    examples: Sequence[TokenExample], forests: Sequence[Forest], members: Sequence[int], share_prefix: bool
) -> PackedBatch:
    """`build_batch` of the ``members`` of a step, whose forests are known."""
    return build_batch([examples[i] for i in members], share_prefix, forests=[forests[i] for i in members])


def build_batch(
    examples: Sequence[TokenExample],
    share_prefix: bool,
    least: int = LEAST_SHARED,
    forests: Sequence[Forest] | None = None,
) -> PackedBatch:
    """Lays the examples out in one packed row, whatever their size.

    A segment without tokens is left out: of identical sequences only the prefix remains. Common beginnings below
    ``least`` tokens are not shared. ``forests`` are the examples' own, where they have been grown already.
    """
    forest = _Forest()
    forests = forests or [group_forest(example, share_prefix, least) for example in examples]
    for example, (nodes, ends) in zip(examples, forests, strict=True):
        _add_group(forest, example, nodes, ends)
    compared = [_with_mismatched(e, e.mismatched) for e in examples if e.mismatched is not None]
    companion = build_batch(compared, share_prefix, least) if compared else None
    columns = Columns.join([e.columns for e in examples])
    return forest.batch(tuple(e.example_id for e in examples), columns, companion)


def empty_batch() -> PackedBatch:
    """One token that nobody scores, with every column known: keeps a rank without work in step with the others."""
    forest = _Forest()
    forest.add_segment(np.zeros(1, dtype=np.int64), start=0, parent=-1)
    return forest.batch((), Columns(**dict.fromkeys(AXES, torch.zeros(0))))


def _with_mismatched(example: TokenExample, other: TokenExample) -> TokenExample:
    """An example's sequence and the mismatched one as a group: they share their prompt."""
    columns = Columns.join([example.columns, other.columns])
    return TokenExample((*example.sequences, *other.sequences), example.example_id, columns=columns)


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
        forest.ends.append(base + end)
    forest.cu_groups.append(len(forest.cu_seqlens) - 1)


class _Forest:
    """The lists that grow while segments are laid out."""

    def __init__(self) -> None:
        self.input_ids: list[np.ndarray] = []
        self.position_ids: list[np.ndarray] = []
        self.cu_segments, self.parents, self.cu_groups = [0], [], [0]
        self.rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.cu_seqlens, self.ends, self.logical_tokens = [0], [], 0

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

    def batch(
        self, example_ids: tuple[int, ...], columns: Columns, companion: PackedBatch | None = None
    ) -> PackedBatch:
        """The packed batch."""
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
            columns=columns,
            ends=torch.tensor(self.ends, dtype=torch.int32),
            companion=companion,
        )


def _concatenate(parts: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, dtype=dtype)], dtype=dtype))
