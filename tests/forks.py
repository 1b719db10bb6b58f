"""Processes that start at once: forked by a server that has the libraries loaded, where Python takes seconds to start.

A program is a file, or a module's name, as Python would be given it; it runs as ``__main__`` with the words given and
the environment of this process. Several ranks have what torchrun would set as well. Where a test is about the start or
the end of Python itself, it starts Python.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = (ROOT, ROOT / "kernels", ROOT / "tests")
LOADED = ["fastalign.cli", "fastalign.engine.train", "fastalign.engine.reference.precompute", "fastalign.testing"]
LOADED += ["torch.distributed.fsdp", "torch.distributed.tensor", "torch.multiprocessing"]
LOADED += [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2")]
"""Imported by the server, which computes nothing: a process that has may not be forked."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LOADED)


class Forked:
    """One program in one process or in several ranks, with what is needed of the interface of `subprocess.Popen`."""

    def __init__(
        self, program: str | Path, *words: object, ranks: int = 1, cwd: Path = ROOT, **environment: str | None
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="forked-")
        self.output = Path(self.folder.name) / "output"
        self.output.touch()
        self.store, common = None, {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        common = {name: value for name, value in common.items() if value is not None}
        if ranks > 1:
            self.store, there = rendezvous()
            common |= there | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            own = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            start = (str(program), [str(word) for word in words], own, str(self.output), str(cwd))
            self.processes.append(CONTEXT.Process(target=_run, args=start))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # read when the server loads the libraries
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, PATHS)))
            forkserver.ensure_running()
        for process in self.processes:
            process.start()
        atexit.register(self.kill)

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def returncode(self) -> int | None:
        """None while a rank runs; else that of one that failed, or 0."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Wait for the end; what was printed to both streams. A rank that fails ends the others, as under torchrun."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            if not wait(running, deadline - time.monotonic()):
                self.kill()
                raise subprocess.TimeoutExpired("forked", timeout, self.output.read_text(errors="replace"))
            if any(process.exitcode for process in self.processes):
                self.kill()
        for process in self.processes:
            process.join()
        atexit.unregister(self.kill)
        text = self.output.read_text(errors="replace")
        self.folder.cleanup()
        self.store = None
        return text, None


def run(program: str | Path, *words: object, ranks: int = 1, timeout: float = 300, **environment: str | None) -> str:
    """Run a program to its end, which must be good; what it printed."""
    process = Forked(program, *words, ranks=ranks, **environment)
    output, _ = process.communicate(timeout)
    assert process.returncode == 0, output[-8000:]
    return output


def rendezvous() -> tuple[object, dict[str, str]]:
    """A store at a free port of this process, which the ranks join; and its place, as torchrun would tell it."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    return store, there | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def _run(program: str, words: list[str], environment: dict[str, str], output: str, cwd: str) -> None:
    """The forked process."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.setsid()  # a process group of its own, as a shell gives its jobs
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [program, *words]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
