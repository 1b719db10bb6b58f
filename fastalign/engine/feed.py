"""The steps of a source as this rank's micro-batches, on a GPU the next one packed while this one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastalign.data.loader import Source
from fastalign.data.pack import TokenExample
from fastalign.types import PackedBatch

Parts = list[list[PackedBatch]]
"""A step's micro-batches, update by update."""
Packed = tuple[Parts, dict[str, Any]]
"""Those, and the position of the source behind the step."""


class Feed:
    """Hands out step after step; close it when no more is wanted.

    What is handed out does not depend on the thread, and what goes wrong in it is raised by `peek`. A step that is not
    taken is not counted: the position is exact however far the thread has read.

    Args:
        source: of examples; one that may not be read ahead of its step is read when the step is asked for.
        pack: makes this rank's micro-batches of a step's examples.
        ahead: whether to pack the next step while this one computes: on a GPU. Where the step needs all cores itself, a
            thread that packs beside it makes the others wait: 5 % of a step's CPU time on two cores.

    Attributes:
        position: of the source behind the last step that was taken.
    """

    def __init__(self, source: Source, pack: Callable[[list[TokenExample]], Parts], *, ahead: bool = True) -> None:
        self.source, self.pack, self.position = source, pack, source.state_dict()
        self.ahead = ahead and source.reads_ahead
        self._next: Packed | Future[Packed] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packing")

    def peek(self) -> Parts:
        """The next step's micro-batches; it stays the next until it is taken."""
        if self._next is None:
            self._next = self._read()
        if isinstance(self._next, Future):
            self._next = self._next.result()
        return self._next[0]

    def take(self) -> None:
        """Count the step that `peek` gave as taken, and begin to pack the one behind it."""
        assert isinstance(self._next, tuple), "peek comes first"
        self.position = self._next[1]
        self._next = self._thread.submit(self._read) if self.ahead else None

    def close(self) -> None:
        """Leave what was read ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _read(self) -> Packed:
        return self.pack(self.source.next()), self.source.state_dict()
