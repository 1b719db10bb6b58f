"""Signals as requests: Ctrl-C, SIGTERM and SIGUSR1 stop a run with a checkpoint, SIGUSR2 saves one; a second stop is at
once. SIGUSR1 is what Slurm sends before the time is up: its exit code says that the run is to be started again.

Outside the loop (start-up, export) the first signal raises `Interrupted` where it arrives. Inside it is only noted: the
loop asks between steps what any rank was sent, so that all ranks do the same at the same step.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fastalign.config import Config

STOPS = (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
ORDER = (0, int(signal.SIGUSR2), *map(int, STOPS))
"""What ranks ask for, weakest first: they agree on the largest position in it."""
SAVE = 1
"""Position of a checkpoint that a signal or the clock asks for; those above it stop the run."""
FAILED = len(ORDER)
"""One rank cannot go on: all stop, without a checkpoint."""
NOTHING = "nothing to save"
ECHO_SECONDS = 0.2
"""A second stop within this is the same one, passed on by a launcher as well."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the text says what was saved and how to go on."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.code = 128 + number


class Requests:
    """What signals have asked of this process.

    Attributes:
        number: the signal that asked to stop; 0 for none.
        save: whether a checkpoint was asked for.
        at_once: whether a stop raises where it arrives, or is only noted.
        where: when in the run that is, for the user: ``before step 1``; empty outside of one.
        lost: where the ranks were when one of them ended.
        rest: what is left of the run, or how it goes on.
    """

    def __init__(self) -> None:
        self.number, self.save, self.at_once = 0, False, True
        self.where, self.lost, self.rest = "", "", NOTHING

    @property
    def level(self) -> int:
        """Position in ``ORDER``."""
        return ORDER.index(self.number or (int(signal.SIGUSR2) if self.save else 0))

    @property
    def text(self) -> str:
        """What a stop at once says."""
        words = f"interrupted {self.where}", self.lost, self.rest
        return "; ".join(filter(None, words)) if self.where else "interrupted"

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of every signal."""
        if number == signal.SIGUSR2:
            self.save = True
        elif not self.number:
            self.number = number
            if self.at_once:
                raise Interrupted(number, self.text)
            # To ranks torchrun sends a SIGTERM also when another has died: the end of the run says which it was.
            if number != signal.SIGTERM or os.environ.get("WORLD_SIZE", "1") == "1":
                tell(f"{signal.Signals(number).name}: saving after this step, then stopping (once more: at once)")

    def watch(self, pipe: int) -> None:
        """End the process at the second stop, even where Python code is not reached: in a collective that hangs."""
        first = None
        while numbers := os.read(pipe, 64):
            for number in (number for number in numbers if number in STOPS):
                first = first or time.monotonic()
                if time.monotonic() - first > ECHO_SECONDS:
                    tell(f"fastalign: error: stopped at once by a second {signal.Signals(number).name}; {self.rest}")
                    os._exit(128 + number)
        os.close(pipe)


def tell(text: str) -> None:
    """One line of the main rank on stderr, safe in a handler; a progress bar has hidden the cursor."""
    if os.environ.get("RANK", "0") == "0":
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{cursor}{text}\n".encode())


_current: Requests | None = None


@contextmanager
def leaving(rest: str) -> Iterator[None]:
    """What a stop inside the block leaves: reported instead of the run's ``rest``."""
    requests = _current or Requests()
    before, requests.rest = requests.rest, rest
    try:
        yield
    finally:
        requests.rest = before


@contextmanager
def handled() -> Iterator[Requests]:
    """Take this process's signals until the block ends; an inner block shares the outer one's requests.

    Signals that the parent had ignored stay so (nohup), SIGINT excepted: a shell's background job is sent it by `kill`.
    Only the main thread can take signals; elsewhere nothing changes.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Requests()
        return
    _current = requests = Requests()
    ignored = {number for number in STOPS if signal.getsignal(number) is signal.SIG_IGN} - {signal.SIGINT}
    taken = [number for number in (signal.SIGUSR2, *STOPS) if number not in ignored]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=requests.watch, args=(reader,), name="signals", daemon=True).start()
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, requests.handle) for number in taken}
    try:
        yield requests
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)  # ends the thread


def _in_child() -> None:
    """A forked worker (of tokenising) leaves Ctrl-C to its parent and ends at its signals, which it must not hear."""
    if _current is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)


def resume_command(config: Config) -> str:
    """The shell command that goes on with a run, started as this process was."""
    file = Path(config.run.output_dir) / "config.yaml"
    return f"{launcher()} {config.method} --config {shlex.quote(str(file))} --run.resume true"


def launcher() -> str:
    """``fastalign``, or ``python -m fastalign``, below ``torchrun`` when that started this process."""
    python = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, nodes = os.environ["LOCAL_WORLD_SIZE"], os.environ.get("GROUP_WORLD_SIZE", "1")
        found = shutil.which("torchrun")
        beside = found is not None and Path(found).parent == Path(sys.executable).parent
        start = "torchrun" if beside else f"{python} -m torch.distributed.run"
        place = "--standalone" if nodes == "1" else f"--nnodes {nodes} RENDEZVOUS-OPTIONS-AS-BEFORE"
        return f"{start} {place} --nproc-per-node {here} -m fastalign"
    script = sys.argv[0]
    if Path(script).name == "fastalign" and os.access(script, os.X_OK):
        return "fastalign" if shutil.which("fastalign") == script else shlex.quote(script)
    return f"{python} -m fastalign"
