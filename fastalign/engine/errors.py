"""The error that stops a run, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastalign.parallel.mesh import World


class RunError(ValueError):
    """A run cannot go on: its numbers are no longer finite, or a file could not be written."""


@contextmanager
def as_one(world: World) -> Iterator[None]:
    """A block that all ranks enter: what one raises all raise, so that nobody waits for a rank that is gone.

    Raises:
        RunError: with the text of the first rank's OSError or ValueError.
    """
    mine: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        mine = error
    told = [text for text in world.gather_objects(None if mine is None else str(mine)) if text is not None]
    if told:
        raise RunError(told[0]) from mine
