"""How far a run is: a bar on a terminal, lines at intervals anywhere else.

At most one display is on the terminal: the bar of training, below which the bar of a stage such as evaluation comes and
goes, or that of a stage alone.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
"""Between lines of a stage where there is no terminal; a shorter stage has none."""
CELLS = 10
"""Width of a bar in characters."""
NARROW = 44
"""Terminals of fewer columns have no bar, only its numbers."""

displays: list[Progress] = []
"""The one that is on the terminal now, if any."""


def is_terminal() -> bool:
    """Whether standard output is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class Pace:
    """The time left at the pace since the first step that was seen: it is rarely like the others."""

    def __init__(self, total: int, begins_now: bool = False) -> None:
        self.total = total
        self.first: tuple[float, int] | None = (time.monotonic(), 0) if begins_now else None

    def left(self, done: int) -> str:
        """As h:mm:ss; ``?`` as long as nothing can be said."""
        now = time.monotonic()
        self.first = self.first or (now, done)
        since, before = self.first
        return clock((now - since) / (done - before) * (self.total - done)) if done > before else "?"


def clock(seconds: float) -> str:
    """Example:
    >>> clock(3723.9)
    '1:02:03'
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


class Line(ProgressColumn):
    """``step  12/300 ━━━━━━━━━━ eta 0:01:23  loss 0.69 ...``: a task on one line, whatever the terminal's width."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        """What comes first keeps its width; of what follows, as much as fits is shown, and nothing in part."""
        total = int(task.total or 0)
        numbers = f"{task.description} {int(task.completed):>{len(str(total))}}/{total}"
        eta = f"eta {task.fields['left']:<7}"
        wide = self.console.width >= NARROW
        text = Text(f"{numbers} ", no_wrap=True, overflow="crop")
        text.append_text(self.bar(task.completed / total if total else 1.0) if wide else Text())
        text.append(eta)
        for word in fitting(task.fields["words"], self.console.width - len(text)):
            text.append(word)
        return text

    def bar(self, share: float) -> Text:
        """``CELLS`` characters and a space."""
        mark, filled = "#" if self.console.options.ascii_only else "━", round(CELLS * min(share, 1.0))
        rest = "." if self.console.options.ascii_only or not self.console.color_system else mark
        dark = (rest * (CELLS - filled), "bright_black")
        return Text.assemble((mark * filled, "green"), dark, " ")


def fitting(words: Sequence[str], width: int) -> Iterator[str]:
    """The words that fit into a width, two spaces before each; the first that does not ends them.

    Example:
        >>> list(fitting(["loss 0.5", "accuracy 1", "lr 1e-5"], 22))
        ['  loss 0.5', '  accuracy 1']
    """
    for word in words:
        width -= len(word) + 2
        if width < 0:
            return
        yield f"  {word}"


class Bar:
    """The bar of a training run, or where there is no terminal nothing but its lines."""

    def __init__(self, display: Progress | None, total: int, done: int) -> None:
        self.display = display
        self.task = display and display.add_task("step", total=total, completed=done, left="?", words=[])

    def move(self, step: int, left: str, words: Sequence[str]) -> None:
        """Show a step: its number, the time left, and what is said of it."""
        if self.display is not None and self.task is not None:
            self.display.update(self.task, completed=step, left=left, words=words)

    def write(self, line: str) -> None:
        """A line that stays, above the bar."""
        if self.display is None:
            print(line, flush=True)
        else:
            self.display.console.print(Text(line), soft_wrap=True)


@contextmanager
def training_bar(total: int, done: int) -> Iterator[Bar]:
    """The bar of a run's steps; it stays on the terminal when the run has ended."""
    if not is_terminal():
        yield Bar(None, total, done)
        return
    with open_display(transient=False) as display:
        yield Bar(display, total, done)


@contextmanager
def stage(name: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show how far a part of a run is; call the function that it gives with how many of ``total`` are done.

    It is ``shown`` on the main rank alone.
    """
    if not shown:
        yield lambda done: None
    elif not is_terminal():
        yield lines(name, total)
    else:
        with open_display(transient=True) as display:
            pace = Pace(total, begins_now=True)
            task = display.add_task(name, total=total, left="?", words=[])
            try:
                yield lambda done: display.update(task, completed=done, left=pace.left(done))
            finally:
                display.remove_task(task)


def lines(name: str, total: int) -> Callable[[int], None]:
    """A line of the log every ``LINE_SECONDS``."""
    pace, last = Pace(total, begins_now=True), [time.monotonic()]

    def tell(done: int) -> None:
        if time.monotonic() - last[0] >= LINE_SECONDS:
            last[0] = time.monotonic()
            log.info("%s: %d of %d, eta %s", name, done, total, pace.left(done))

    return tell


@contextmanager
def open_display(transient: bool) -> Iterator[Progress]:
    """The display that is there, or one for as long as this lasts; what others print appears above it."""
    if displays:
        yield displays[-1]
        return
    console = Console(highlight=False)
    options = {"transient": transient, "redirect_stderr": sys.stderr.isatty(), "refresh_per_second": 4}
    with Progress(Line(console), console=console, **options) as display:
        displays.append(display)
        try:
            yield display
        finally:
            displays.remove(display)
