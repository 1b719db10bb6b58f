"""What all ranks of a run must have in common, looked up before any work: one disk, settings, data and weights."""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

from fastalign.engine.errors import as_one
from fastalign.parallel.mesh import World

LATE_SECONDS = 2.0
"""How long a file that another host wrote may take to be seen: some network disks are late."""


def require_same(world: World, mine: object, difference: str, remedy: str) -> None:
    """Refuse, on every rank, when one rank has another value than rank 0.

    All ranks call this. The ``difference`` is a part of the sentence "rank 1 on HOST `read other rows` than rank 0".
    """
    every = world.gather_objects((mine, socket.gethostname()))
    first, host = every[0]
    for rank, (value, place) in enumerate(every):
        if value != first:
            raise ValueError(f"rank {rank} on {place} {difference} than rank 0 on {host}; {remedy}")


def not_shared(directory: Path, world: World) -> str | None:
    """Which rank sees another directory under this name, or None when all see what rank 0 writes there.

    All ranks call this, and rank 0 can write there.
    """
    mark = directory / world.gather_objects(f".probe-{uuid.uuid4().hex}")[0]
    with as_one(world):
        if world.is_main:
            mark.touch()
    every = world.gather_objects((appears(mark), str(directory.absolute()), socket.gethostname()))
    if world.is_main:
        mark.unlink(missing_ok=True)
    _, ours, host = every[0]
    for rank, (sees, theirs, place) in enumerate(every):
        if not sees:
            return f"rank 0 on {host} writes to {ours}, and rank {rank} on {place} does not see that in {theirs}"
    return None


def appears(path: Path) -> bool:
    """Whether a file is there, or is soon."""
    deadline = time.monotonic() + LATE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
