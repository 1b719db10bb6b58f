"""Run under torchrun with a directory and a small disk: what one rank cannot write, both refuse."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from fastalign.config import OptimConfig, ParallelConfig
from fastalign.data.ref_cache import RefCache
from fastalign.disk import free_bytes
from fastalign.engine.errors import RunError, as_one
from fastalign.engine.optim import Trained, make_optimizer
from fastalign.engine.output.checkpoint import save_checkpoint
from fastalign.engine.output.rundir import HOLDER, LOCK, held
from fastalign.parallel.mesh import World, world


def in_use(directory: Path, small: Path, ranks: World) -> None:
    """Another process holds the run directory."""
    lock = FileLock(directory / LOCK)
    if ranks.is_main:
        lock.acquire()
        (directory / HOLDER).write_text(f'{{"host": "here", "pid": {os.getpid()}, "since": "now"}}')
    ranks.barrier()
    with held(directory, ranks):
        print("held twice")


def checkpoint(directory: Path, small: Path, ranks: World) -> None:
    """The disk is full when the tensors come."""
    model = nn.Linear(256, 256)
    trained = {"policy": Trained(model, make_optimizer(model, OptimConfig()))}
    if ranks.is_main:
        (small / "filler").write_bytes(b"x" * (free_bytes(small) - model.weight.nbytes - 4096))
    ranks.barrier()
    try:
        save_checkpoint(small / "checkpoints", 1, trained, {}, ranks, keep=1)
    finally:
        assert not list((small / "checkpoints").glob("*"))


def cache(directory: Path, small: Path, ranks: World) -> None:
    """The disk is full for the second rank only."""
    where = directory if ranks.is_main else small
    with as_one(ranks):
        RefCache(where / "logps").write({b"k" * 16: np.zeros(1 << 20, dtype=np.float32)})


if __name__ == "__main__":
    torch.manual_seed(0)
    with world(ParallelConfig()) as ranks:
        for number, case in enumerate((checkpoint, cache, in_use)):
            try:
                case(Path(sys.argv[1]), Path(sys.argv[2]), ranks)
            except RunError as error:
                os.write(1, f"{number} {error}\n".encode())  # whole lines of both ranks
