"""Writes the checkpoints of a run, one at a time: while the run waits, or in a thread beside the steps that follow."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fastalign.config import Config
from fastalign.engine.errors import as_one
from fastalign.engine.output.checkpoint import write_checkpoint
from fastalign.engine.output.checkpoints import Retention, mark_best
from fastalign.engine.output.snapshot import Snapshot, on_host, on_main
from fastalign.parallel.mesh import World


class Saver:
    """The writer of a run's checkpoints; close it when the run ends, however it ends.

    Args:
        config: with `run.async_save` a thread writes, from copies on the host; without `run.shared_disk` rank 0 writes
            all.
        world: the ranks.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.directory, self.run, self.world = Path(config.run.output_dir) / "checkpoints", config.run, world
        ours = world if self.run.shared_disk else world.alone
        self.writers = ours.beside(config.parallel.timeout_minutes) if self.run.async_save else ours
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None

    @property
    def failed(self) -> bool:
        """Whether the checkpoint that was being written could not be."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def save(self, snapshot: Snapshot, retention: Retention) -> None:
        """Write a checkpoint, or begin to once the one before is whole; all ranks call this.

        Raises:
            RunError: this one could not be written, or the one before.
        """
        self.finish()
        if not self.run.shared_disk:
            snapshot = on_main(snapshot, self.world)
        elif self.run.async_save:
            snapshot = on_host(snapshot)
        write = partial(write_checkpoint, self.directory, snapshot, self.writers, retention)
        writes = self.run.shared_disk or self.world.is_main
        if writes and self.run.async_save:
            self.pending = self.thread.submit(write)
        elif not self.run.async_save:
            with as_one(self.world):
                write() if writes else None

    def mark_best(self, step: int) -> None:
        """Make ``checkpoints/best`` name the checkpoint of a step, once it is whole; all ranks call this."""
        mark = partial(mark_best, self.directory, step)
        with as_one(self.world):
            if self.world.is_main:
                self.thread.submit(mark) if self.run.async_save else mark()

    def finish(self) -> None:
        """Wait until the checkpoint that was begun is whole on the disk; all ranks call this."""
        pending, self.pending = self.pending, None
        with as_one(self.world):
            if pending is not None:
                pending.result()

    def close(self) -> None:
        """Let what is being written become whole."""
        self.thread.shutdown()
