"""Step batches: drawn at random, packed, balanced over ranks, and resumable to the exact position."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from fastalign.data.encode import encode_dataset
from fastalign.data.examples import Examples, TokenDataset, TokenExample
from fastalign.data.forest import Node
from fastalign.data.pack import build_batch, empty_batch, first_fit_decreasing, group_forest
from fastalign.types import ForwardCost, PackedBatch, attended

__all__ = ["Examples", "Loader", "TokenDataset", "TokenExample", "encode_dataset", "evaluation_steps"]

logger = logging.getLogger(__name__)

TOKENS_ALONE = ForwardCost()
"""Work counted in tokens, where the model is not known."""


class Loader:
    """A stream of optimizer steps; each item is this rank's list of micro-batches.

    Epoch e visits the dataset in the order of a permutation drawn from (seed, e) by a private generator, the same on
    all ranks. A step takes the next ``size`` examples of that stream, without regard to length; the last step of an
    epoch runs on into the next. Only the last step of all may be shorter, where ``rows`` ends the stream: so that whole
    epochs read every example equally often. Where a step has room for more than one epoch it holds examples more than
    once (a warning says so). Every rank gets the same number of micro-batches; one with less work gets `empty_batch`.

    Args:
        dataset: tokenised examples.
        size: examples per step over all ranks.
        tokens: budget of computed tokens per micro-batch.
        share_prefix: compute a group's common prefix once.
        seed: of the order.
        rank, world_size: which share of each step is this process's.
        cost: of the model, by which ranks get equal work.
        max_group_tokens: an example of more computed tokens is refused when it is drawn.
        rows: examples drawn in all, repetitions counted; None: without end.

    Raises:
        ValueError: an empty dataset, or a size, budget, seed or rank out of range.

    Example:
        >>> loader = Loader(dataset, size=8, tokens=4096, share_prefix=True)    # doctest: +SKIP
        >>> for _, micro_batches in zip(range(100), loader): ...                # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: Examples,
        size: int,
        tokens: int,
        share_prefix: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        cost: ForwardCost = TOKENS_ALONE,
        max_group_tokens: int | None = None,
        rows: int | None = None,
    ) -> None:
        _check(dataset, size, tokens, seed, rank, world_size)
        self.dataset, self.size, self.tokens, self.share_prefix = dataset, size, tokens, share_prefix
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.cost, self.max_group_tokens, self.rows = cost, max_group_tokens, rows
        self.drawn = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        if min(size, size if rows is None else rows) > len(dataset):
            logger.warning("a step of %d examples repeats some of the dataset's %d", size, len(dataset))

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        return self

    def __next__(self) -> list[PackedBatch]:
        stop = self.drawn + self.size if self.rows is None else min(self.drawn + self.size, self.rows)
        if stop <= self.drawn:
            raise StopIteration
        examples = self.dataset.fetch([self._at(i) for i in range(self.drawn, stop)])
        self.drawn = stop
        check_sizes(examples, self.share_prefix, self.max_group_tokens)
        return rank_share(examples, self.tokens, self.share_prefix, self.rank, self.world_size, self.cost)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, as JSON scalars; the same on every rank."""
        return {"drawn": self.drawn, "seed": self.seed, "num_examples": len(self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position, whatever the world size and budget were.

        Raises:
            ValueError: the state belongs to another seed or another number of examples.
        """
        check_state(state, self.seed, len(self.dataset))
        self.drawn = int(state["drawn"])

    def _at(self, position: int) -> int:
        """The dataset index at a position of the endless stream."""
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(len(self.dataset), self.seed, epoch)
        return int(self._order[offset])


def check_state(state: dict[str, Any], seed: int, num_examples: int) -> None:
    """Refuses a loader's saved position in another order or other data."""
    if missing := [key for key in ("seed", "num_examples", "drawn") if not isinstance(state.get(key), int)]:
        raise ValueError(
            f"the saved data order is damaged: it has no number {missing[0]!r}; resume from another checkpoint"
        )
    for key, mine in (("seed", seed), ("num_examples", num_examples)):
        if state[key] != mine:
            message = f"the saved data order has {key}={state[key]}, this run has {mine}"
            raise ValueError(f"{message}: resume with the same data and seed")


def rows_of(epochs: float, num_examples: int) -> int:
    """Examples that so many passes read: of a last pass that is not whole, a share rounded up.

    The number counts as it is written, so that 1.1 passes over 10 examples are 11 and not 12.

    Example:
        >>> [rows_of(epochs, 9) for epochs in (0.5, 1, 2.5, 3)]
        [5, 9, 23, 27]
    """
    return math.ceil(Fraction(str(epochs)) * num_examples)


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """``[num_examples]`` int64, the order in which an epoch visits them; drawn from a generator of its own."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def visited(num_examples: int, seed: int, rows: int) -> list[int]:
    """The examples among the first ``rows`` drawn, each once, ascending."""
    first = epoch_order(num_examples, seed, epoch=0)[:rows]  # all of them from one epoch on
    return np.sort(first).tolist()


def evaluation_steps(
    dataset: Examples,
    tokens: int,
    share_prefix: bool,
    rank: int = 0,
    world_size: int = 1,
    size: int = 256,
    cost: ForwardCost = TOKENS_ALONE,
    order: Sequence[int] | np.ndarray | None = None,
) -> Iterator[list[PackedBatch]]:
    """Every example exactly once over all ranks, in the dataset's ``order`` or another, ``size`` examples at a time.

    Each item is this rank's list of micro-batches, equally long on all ranks; the arguments are `Loader`'s.
    """
    _check(dataset, size, tokens, 0, rank, world_size)
    for start in range(0, len(dataset), size):
        taken = range(start, min(start + size, len(dataset)))
        examples = dataset.fetch([i if order is None else int(order[i]) for i in taken])
        yield rank_share(examples, tokens, share_prefix, rank, world_size, cost)


def check_sizes(examples: Sequence[TokenExample], share_prefix: bool, limit: int | None, where: str = "") -> None:
    """Refuses an example of more computed tokens than ``limit``, which no micro-batch may hold; ``where`` it is."""
    if limit is None:
        return
    for example in examples:
        if (tokens := _tokens(group_forest(example, share_prefix)[0])) > limit:
            raise ValueError(
                f"{where}example {example.example_id} takes {tokens} computed tokens, more than batch.max_group_tokens "
                f"{limit}: lower data.max_length or raise the limit"
            )


def rank_share(
    examples: Sequence[TokenExample],
    tokens: int,
    share_prefix: bool,
    rank: int,
    world_size: int,
    cost: ForwardCost = TOKENS_ALONE,
) -> list[PackedBatch]:
    """This rank's micro-batches of a step, packed so that all ranks work equally long on each; see `deal`."""
    forests = [group_forest(e, share_prefix)[0] for e in examples]
    costs = [example_cost(e, nodes, cost) for e, nodes in zip(examples, forests, strict=True)]
    mine = deal([_tokens(nodes) for nodes in forests], costs, tokens, world_size)[rank]
    return [build_batch([examples[i] for i in members], share_prefix) if members else empty_batch() for members in mine]


def example_cost(example: TokenExample, nodes: Sequence[Node], cost: ForwardCost) -> float:
    """What a model pays for an example: attention grows with the square of the lengths, the head with scored tokens."""
    pairs = sum(attended(node.length, node.start) for node in nodes)
    return cost.of(_tokens(nodes), pairs, sum(int(np.sum(scored)) for _, scored in example.sequences))


def _tokens(nodes: Sequence[Node]) -> int:
    return sum(node.length for node in nodes)


def deal(sizes: Sequence[int], costs: Sequence[float], capacity: int, num_ranks: int) -> list[list[list[int]]]:
    """Members of each micro-batch of each rank: as few as the budget allows, equally many and of equal cost.

    Ranks wait for each other in every micro-batch, and the largest one decides what memory is needed, so all are made
    alike: examples are spread over all micro-batches of all ranks, dearest first, each into the cheapest that has room;
    where that needs more micro-batches than first-fit-decreasing, its bins are taken. Sorted by cost, they go to the
    ranks round by round, in turns.

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
    """Indices in ``num_bins`` bins of like cost: dearest first, each to the cheapest with room; None if it has none."""
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


def _check(dataset: Examples, size: int, tokens: int, seed: int, rank: int, world_size: int) -> None:
    if len(dataset) == 0:
        raise ValueError("the dataset has no examples: nothing to load")
    if size < 1 or tokens < 1:
        raise ValueError(f"batch.size and batch.tokens must be at least 1, got size={size}, tokens={tokens}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}: set run.seed")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank={rank}, world_size={world_size}")
