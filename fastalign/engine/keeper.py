"""What signals and the clock ask of a run, answered between steps: a checkpoint, or one and the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.config import Config
from fastalign.engine.best import Best
from fastalign.engine.errors import as_one
from fastalign.engine.interrupt import FAILED, NOTHING, ORDER, SAVE, Interrupted, Requests, resume_command
from fastalign.engine.output.checkpoints import RUN_STATE, Retention, flaw
from fastalign.engine.output.metrics import MetricsLog, read_metrics
from fastalign.engine.output.saver import Saver
from fastalign.parallel.mesh import World, is_lost

log = logging.getLogger(__name__)

Record = dict[str, Any]


@dataclass
class Keeper:
    """Saves a run and ends it where all ranks are at the same step.

    Attributes:
        world: the ranks; the clock of the main one counts.
        signals: what this process was sent.
        metrics: whose lines go to the disk before the checkpoint that follows them.
        write: writes a checkpoint of a step, with the record of that step if its evaluation is still to come, and
            removes those that need not stay.
        saver: what writes it, perhaps beside the steps that follow.
        done, total: steps behind the run, and all of them.
    """

    config: Config
    world: World
    signals: Requests
    metrics: MetricsLog
    write: Callable[[int, Record | None, Retention], None]
    saver: Saver
    done: int
    total: int

    def __post_init__(self) -> None:
        self.since, self.is_due = time.monotonic(), False
        there = self.done if self.done and not flaw(self.path(self.done), **RUN_STATE) else 0
        metric, lines = self.config.run.keep_best, read_metrics(self.metrics.path) if self.world.is_main else []
        kept = (line for line in lines if metric and self.path(line["step"]).is_dir())
        self.saved, self.best = self.world.gather_objects((there, Best(metric, kept)))[0]
        self.command = resume_command(self.config)

    def path(self, step: int) -> Path:
        """The checkpoint of a step."""
        return Path(self.config.run.output_dir) / "checkpoints" / f"step-{step}"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are requests inside the block: `obey` answers them."""
        signals = self.signals
        signals.at_once = False
        self.tell_where(self.done)
        try:
            yield
        except RuntimeError as error:
            if self.world.watch is None or not is_lost(error):
                raise
            signals.lost = f"no new checkpoint, as a rank has ended ({self.world.watch.places(error)})"
            if not signals.number:  # torchrun is about to stop this one
                raise
            raise Interrupted(signals.number, signals.text) from error
        finally:
            signals.at_once = True
        if signals.number:  # came after the last look
            raise Interrupted(signals.number, signals.text)

    def asked(self, step: int) -> int:
        """What this rank asks for after a step, as a position in ``interrupt.ORDER``; in the exchange of every step."""
        self.tell_where(step)
        if self.metrics.failure is not None or self.saver.failed:
            return FAILED
        minutes = self.config.run.save_minutes
        is_late = self.world.is_main and minutes > 0 and time.monotonic() - self.since >= 60 * minutes
        self.is_due = is_late and step not in (0, self.saved)
        return max(self.signals.level, SAVE if self.is_due else 0)

    def look(self, step: int) -> None:
        """Raise `Interrupted` on all ranks when one was asked to stop: between the parts of an evaluation."""
        level = int(self.world.everyone.gather([self.asked(step)]).max())
        if level > SAVE:
            self.end(level)

    def obey(self, level: int, step: int, record: Record | None = None) -> None:
        """Save the state after ``step``, and end the run if that is what all ranks have agreed on."""
        if level == FAILED:
            self.end(level)
        fresh = step != self.saved
        self.save(step, record)
        self.since = time.monotonic()
        if level > SAVE:
            self.saver.finish()
            self.end(level, f"saved {self.path(step)}" if fresh else "")
        reason = f"run.save_minutes is {self.config.run.save_minutes:g}" if self.is_due else "as SIGUSR2 asked"
        self.signals.save = False
        does = "saving" if self.config.run.async_save else "saved"
        log.info("%s (%s)", f"{does} {self.path(step)}" if fresh else "nothing new to save", reason)

    def save(self, step: int, record: Record | None = None) -> None:
        """Write the checkpoint of a step, unless it is there."""
        if step != self.saved:
            with as_one(self.world):
                self.metrics.sync()
            stuck = self.metrics.alarms.zero_since is not None  # an older checkpoint may be the last good one
            self.write(step, record, Retention(None if stuck else self.config.run.keep, self.best.step))
            self.saved, self.since = step, time.monotonic()
        self.tell_where(step)

    def rate(self, step: int, evaluated: Record) -> None:
        """Save a step whose evaluation is the best so far, where `run.keep_best` asks for that."""
        if self.best.improves(step, evaluated):
            log.info("step %d has the best %s so far: %g", step, self.best.metric, self.best.value)
            self.save(step)
            self.saver.mark_best(step)

    def tell_where(self, step: int) -> None:
        """What a stop at once would say now."""
        self.signals.where = f"after step {step} of {self.total}" if step else "before step 1"
        nothing = "no checkpoint was saved" if step else NOTHING
        self.signals.rest = f"go on with: {self.command}" if self.saved else nothing

    def end(self, level: int, news: str = "") -> None:
        """Raise, on every rank, what ends the run."""
        if level == FAILED:
            with as_one(self.world):
                self.metrics.check()
            self.saver.finish()
        for words in (news, self.metrics.alarms.note):
            self.signals.where += f"; {words}" if words else ""
        raise Interrupted(ORDER[level], self.signals.text)
