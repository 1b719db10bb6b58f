"""Trouble that finite numbers show: steps without a gradient, a loss that explodes, pairs that prefer nothing.

Alarms read what metrics have read back already, the same sums on every rank, so that all ranks stop at the same step.
"""

from __future__ import annotations

import logging
from typing import Any

from fastalign.data.loader import TokenDataset
from fastalign.engine.errors import RunError
from fastalign.engine.output.collapse import Collapse

log = logging.getLogger(__name__)

PATIENCE = 5
"""Steps in a row with a loss but no gradient at all that stop a run. One may be chance; five hold five batches of
different examples, and without a gradient the weights will not come back by themselves."""
EXPLODED = 100
"""Times the first loss, or 1 where that is less. No loss grows so far while it learns: a dpo pair starts at 0.69."""


class Alarms:
    """Looks at the record of every step, in their order.

    Args:
        speaks: whether to warn; every rank stops, one rank speaks.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks = speaks
        self.warned: set[str] = set()
        self.first_loss: float | None = None
        self.zero_since: int | None = None
        self.collapse = Collapse(self.say)

    def check(self, record: dict[str, Any]) -> None:
        """Warn about a step, once for each kind of trouble."""
        step, loss = record["step"], record["loss"]
        first = self.first_loss = loss if self.first_loss is None else self.first_loss  # of this process
        if loss > EXPLODED * max(1.0, abs(first)):
            self.warn("exploded", EXPLODING, step, loss)
        if record["grad_norm"] != 0 or loss == 0:
            self.zero_since = None
        elif self.zero_since is None:
            self.zero_since = step
        samples = "reward" in record
        if samples:
            self.collapse.check(record)
        if record["grad_norm"] == 0 and not (samples and loss == 0):
            self.warn("solved" if loss == 0 else "no gradient", SOLVED if loss == 0 else NO_GRADIENT, step, loss)
        if self.zero_since is not None and step - self.zero_since + 1 >= PATIENCE:
            raise RunError(STUCK.format(step=step, first=self.zero_since, number=PATIENCE, loss=loss, lr=record["lr"]))

    @property
    def note(self) -> str:
        """What the last line of a run says when its last steps had a loss but no gradient."""
        return "" if self.zero_since is None else UNMOVED.format(first=self.zero_since)

    def warn(self, kind: str, message: str, step: int, loss: float) -> None:
        """Once for each kind."""
        self.say(kind, message.format(step=step, loss=loss, first=self.first_loss, number=PATIENCE))

    def say(self, kind: str, text: str) -> None:
        """Once for each kind."""
        if self.speaks and kind not in self.warned:
            log.warning(text)
        self.warned.add(kind)


NO_GRADIENT = (
    "step {step}: grad_norm is exactly 0 while the loss is {loss:.4g}: this step teaches nothing; the weights may have "
    "blown up (lower optim.lr), or the loss is saturated; after {number} such steps in a row the run stops; until a "
    "gradient is back no older checkpoint is removed"
)
UNMOVED = (
    "grad_norm has been exactly 0 since step {first} while the loss is not: nothing was learned from there on; the "
    "weights may have blown up (start again with a lower optim.lr), or the loss is saturated"
)
SOLVED = (
    "step {step}: loss and grad_norm are exactly 0: these examples have nothing left to teach; "
    "fewer run.steps or other data may be better"
)
STUCK = (
    "step {step}: grad_norm has been exactly 0 since step {first}, {number} steps in a row, while the loss is "
    "{loss:.4g}: nothing is learned any more; the weights have probably blown up: start again with a lower optim.lr "
    "(now {lr:.2e}); of the checkpoints that are left, those of steps below {first} are from before it happened"
)
EXPLODING = (
    "step {step}: the loss is {loss:.4g}, the first was {first:.4g}: the run may be diverging; "
    "if it does not come down, start again with a lower optim.lr"
)


def check_choices(dataset: TokenDataset, max_length: int, name: str, *, refuse: bool) -> None:
    """Warn of examples whose completions, chosen and rejected or all candidates, are the same tokens."""
    counts = dataset.counts
    same, cut = counts.get("identical_completions", 0), sum(counts.get(reason, 0) for reason in CUT)
    found = f"{name}: chosen and rejected, or all candidates, are the same tokens in {same} of {len(dataset)} examples"
    hint = f"; {cut} were cut at data.max_length {max_length}, beyond which they may differ: raise it" if cut else ""
    if refuse and same == len(dataset):
        raise ValueError(f"{found}: there is nothing to prefer; look at the columns of the data{hint}")
    if same:
        log.warning("%s: these prefer nothing%s", found, hint)


def warn_of_one_label(dataset: TokenDataset, name: str) -> None:
    """Warn where completions that were called good or bad are all of one kind."""
    labels = dataset.scores()
    if len(labels) and (labels == labels[0]).all():
        kind, other = ("good", "bad") if labels[0] else ("bad", "good")
        log.warning(
            "%s: all %d completions are labelled %s: kto also learns from %s ones; look at the column 'label'",
            *(name, len(labels), kind, other),
        )


def warn_of_ties(dataset: TokenDataset, name: str) -> None:
    """Warn of candidates that were all given the same score."""
    if ties := dataset.ties():
        log.warning(
            "%s: no candidate has a better score than another in %d of %d examples: nothing is ranked there; look at "
            "the column 'scores'",
            *(name, ties, len(dataset)),
        )


CUT = ("truncated", "candidates_truncated")
