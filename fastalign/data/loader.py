"""Step batches: drawn at random, packed, balanced over ranks, and resumable to the exact position."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from fastalign.data.encode import encode_dataset
from fastalign.data.examples import TokenDataset, TokenExample
from fastalign.data.pack import build_batch, empty_batch, first_fit_decreasing, group_tokens
from fastalign.types import PackedBatch

__all__ = ["Loader", "TokenDataset", "TokenExample", "encode_dataset", "evaluation_steps"]

logger = logging.getLogger(__name__)


class Examples(Protocol):
    """What a loader reads: a `TokenDataset`, or anything with a length and ``fetch``."""

    def __len__(self) -> int: ...

    def fetch(self, indices: list[int]) -> list[TokenExample]: ...


class Loader:
    """An endless stream of optimizer steps; each item is this rank's list of micro-batches.

    Epoch e visits the dataset in the order of a permutation drawn from (seed, e) by a private generator, the same on
    all ranks. A step takes the next ``size`` examples of that stream, without regard to length; the last step of an
    epoch runs on into the next, so every step has exactly ``size``. With ``size`` above the dataset's length a step
    holds examples more than once (a warning says so). Every rank gets the same number of micro-batches; one with less
    work gets `empty_batch`.

    Args:
        dataset: tokenised examples.
        size: examples per step over all ranks.
        tokens: budget of computed tokens per micro-batch.
        share_prefix: compute a group's common prefix once.
        seed: of the order.
        rank, world_size: which share of each step is this process's.

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
    ) -> None:
        _check(dataset, size, tokens, seed, rank, world_size)
        self.dataset, self.size, self.tokens, self.share_prefix = dataset, size, tokens, share_prefix
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.drawn = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        if size > len(dataset):
            logger.warning("a step of %d examples repeats some of the dataset's %d", size, len(dataset))

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every example has been seen once, rounded up."""
        return -(-len(self.dataset) // self.size)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        return self

    def __next__(self) -> list[PackedBatch]:
        examples = self.dataset.fetch([self._at(i) for i in range(self.drawn, self.drawn + self.size)])
        self.drawn += self.size
        return rank_share(examples, self.tokens, self.share_prefix, self.rank, self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, as JSON scalars; the same on every rank."""
        return {"drawn": self.drawn, "seed": self.seed, "num_examples": len(self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position, whatever the world size and budget were.

        Raises:
            ValueError: the state belongs to another seed or another number of examples.
        """
        for key, mine in (("seed", self.seed), ("num_examples", len(self.dataset))):
            if state[key] != mine:
                message = f"the saved data order has {key}={state[key]}, this run has {mine}"
                raise ValueError(f"{message}: resume with the same data and seed")
        self.drawn = int(state["drawn"])

    def _at(self, position: int) -> int:
        """The dataset index at a position of the endless stream."""
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return int(self._order[offset])


def evaluation_steps(
    dataset: Examples, tokens: int, share_prefix: bool, rank: int = 0, world_size: int = 1, size: int = 256
) -> Iterator[list[PackedBatch]]:
    """Every example exactly once over all ranks, in the dataset's order, ``size`` examples at a time.

    Each item is this rank's list of micro-batches, equally long on all ranks; the arguments are `Loader`'s.
    """
    _check(dataset, size, tokens, 0, rank, world_size)
    for start in range(0, len(dataset), size):
        examples = dataset.fetch(list(range(start, min(start + size, len(dataset)))))
        yield rank_share(examples, tokens, share_prefix, rank, world_size)


def rank_share(
    examples: Sequence[TokenExample], tokens: int, share_prefix: bool, rank: int, world_size: int
) -> list[PackedBatch]:
    """This rank's micro-batches of a step: examples go to ranks by computed tokens, then into bins."""
    costs = [group_tokens(e, share_prefix) for e in examples]
    shares = balance(costs, world_size)
    bins = [first_fit_decreasing([costs[i] for i in share], tokens) for share in shares]
    mine = [build_batch([examples[shares[rank][i]] for i in members], share_prefix) for members in bins[rank]]
    return mine + [empty_batch() for _ in range(max(map(len, bins)) - len(mine))]


def balance(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of ``costs`` per rank: longest first, each to the rank with least work so far (ties: fewest, lowest).

    Example:
        >>> balance([5, 3, 4, 2], num_ranks=2)
        [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(share) for share in shares]


def _check(dataset: Examples, size: int, tokens: int, seed: int, rank: int, world_size: int) -> None:
    if len(dataset) == 0:
        raise ValueError("the dataset has no examples: nothing to load")
    if size < 1 or tokens < 1:
        raise ValueError(f"batch.size and batch.tokens must be at least 1, got size={size}, tokens={tokens}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}: set run.seed")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size), got rank={rank}, world_size={world_size}")
