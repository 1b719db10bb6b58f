"""Where the steps of a run come from: a `Source`, which can be resumed at any step; that of a dataset is `Rows`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from fastalign.data.encode import encode_dataset
from fastalign.data.examples import Examples, TokenDataset, TokenExample
from fastalign.data.pack import TOKENS_ALONE, share
from fastalign.types import ForwardCost, PackedBatch

__all__ = ["Examples", "Rows", "Source", "TokenDataset", "TokenExample", "encode_dataset", "evaluation_steps"]

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where training takes its steps from; it cannot tell a dataset from prompts that a sampler completes.

    Attributes:
        reads_ahead: whether `next` may be called, from another thread, before the step before it is done.
    """

    reads_ahead: bool

    def next(self) -> list[TokenExample]:
        """The whole step, equal on all ranks; it is packed and dealt to the ranks afterwards."""
        ...

    def after(self, policy: Any, step: int) -> None:
        """Called when a step has changed the policy."""
        ...

    def close(self) -> None:
        """Called when the run ends, however it does: end threads and processes."""
        ...

    def describe(self) -> str:
        """How much each step holds, and all of them from here on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, as JSON values, ``drawn`` among them; equal on all ranks."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a position."""
        ...


class Rows:
    """The source of a dataset: every epoch reads each example once, in an order of its own.

    Epoch e visits the dataset in the order of a permutation drawn from (seed, e) by a private generator, the same on
    all ranks. A step takes the next ``size`` examples, without regard to length. The last step of an epoch takes what
    is left of it and may be shorter; so may the last of all, where ``rows`` ends the run.

    Args:
        dataset: tokenised examples.
        size: examples per step over all ranks.
        seed: of the order.
        rows: examples drawn in all, repetitions counted; None: without end.

    Raises:
        ValueError: an empty dataset, or a size or seed out of range.

    Example:
        >>> source = Rows(dataset, size=8)                                      # doctest: +SKIP
        >>> examples = source.next()                                            # doctest: +SKIP
    """

    reads_ahead = True

    def __init__(self, dataset: Examples, size: int, seed: int = 0, rows: int | None = None) -> None:
        _check(dataset, size, seed)
        self.dataset, self.size, self.seed, self.rows, self.drawn = dataset, size, seed, rows, 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        if size > len(dataset):
            text = "batch.size is %d and there are %d training examples: every step has %d"
            logger.warning(text, size, len(dataset), len(dataset))

    def next(self) -> list[TokenExample]:
        """The examples of the next step; StopIteration after the last."""
        return self.dataset.fetch(self.draw())

    def draw(self) -> list[int]:
        """The positions of the next step's examples."""
        epoch, offset = divmod(self.drawn, len(self.dataset))
        left = (
            len(self.dataset) - offset if self.rows is None else min(len(self.dataset) - offset, self.rows - self.drawn)
        )
        if left <= 0:
            raise StopIteration
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.dataset), self.seed, epoch)
        taken = self._order[offset : offset + min(self.size, left)].tolist()
        self.drawn += len(taken)
        return taken

    def after(self, policy: Any, step: int) -> None:
        """Rows do not depend on the policy."""

    def close(self) -> None:
        """Nothing to end."""

    def describe(self) -> str:
        """How large the steps are, the short ones apart, and the epochs up to ``rows``."""
        assert self.rows is not None, "rows without end make no number of epochs"
        number = len(self.dataset)
        size, end = min(self.size, number), self.rows // number * number
        shorter = [f"the last of each epoch of {left}"] if self.drawn < end and (left := number % size) else []
        shorter += [f"the last of the run of {left}"] if (left := (self.rows - max(self.drawn, end)) % size) else []
        epochs = f"{self.rows / number:.3g} epochs of {number:,} examples"
        return f"{', '.join([f'{size} examples each', *shorter])}: {epochs}"

    def state_dict(self) -> dict[str, Any]:
        """The position after the last step handed out, as JSON scalars; the same on every rank."""
        return {"drawn": self.drawn, "seed": self.seed, "num_examples": len(self.dataset)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position, whatever the number of ranks and the budget were.

        Raises:
            ValueError: the state belongs to another seed or another number of examples.
        """
        check_state(state, self.seed, len(self.dataset))
        self.drawn = int(state["drawn"])


def check_state(state: dict[str, Any], seed: int, num_examples: int) -> None:
    """Refuses a saved position in another order or other data."""
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


def rows_after(steps: int, num_examples: int, size: int, drawn: int = 0) -> int:
    """Examples drawn after so many further steps of `Rows`, from ``drawn`` on.

    Example:
        >>> [rows_after(steps, 9, 8) for steps in (0, 1, 2, 3, 4)]
        [0, 8, 9, 17, 18]
    """
    epoch, offset = divmod(drawn, num_examples)
    this_epoch = -(-(num_examples - offset) // size)
    if steps < this_epoch:
        return drawn + steps * size
    epochs, rest = divmod(steps - this_epoch, -(-num_examples // size))
    return (epoch + 1 + epochs) * num_examples + rest * size


def steps_until(rows: int, num_examples: int, size: int, drawn: int = 0) -> int:
    """Steps of `Rows` until ``rows`` examples are drawn, from ``drawn`` on.

    Example:
        >>> [steps_until(rows, 9, 8) for rows in (0, 5, 9, 18, 23)]
        [0, 1, 2, 4, 5]
    """
    (epoch, offset), (last, rest) = divmod(drawn, num_examples), divmod(rows, num_examples)
    if epoch == last:
        return -(-(rest - offset) // size)
    whole = (last - epoch - 1) * -(-num_examples // size)
    return -(-(num_examples - offset) // size) + whole + -(-rest // size)


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

    Each item is this rank's list of micro-batches, equally long on all ranks; see `fastalign.data.pack.share`.
    """
    _check(dataset, size)
    for start in range(0, len(dataset), size):
        taken = range(start, min(start + size, len(dataset)))
        examples = dataset.fetch([i if order is None else int(order[i]) for i in taken])
        yield share(examples, tokens, share_prefix, rank, world_size, cost)


def _check(dataset: Examples, size: int, seed: int = 0) -> None:
    if len(dataset) == 0:
        raise ValueError("the dataset has no examples: nothing to load")
    if size < 1:
        raise ValueError(f"batch.size must be at least 1, got {size}")
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}: set run.seed")
