"""Runs a Python program that nobody trusts and gives back what it printed. Linux 5.12 or later, x86_64 and aarch64.

    with Sandbox("print(int(input()) + 1)", Limits(seconds=2)) as sandbox:
        sandbox.run("41").stdout                      # "42\\n"

What isolates it, what that protects and what not, is told at the top of `fastalign.rl.isolate`, which does it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

from fastalign.rl import isolate
from fastalign.rl.isolate import Limits, Outcome


class SandboxError(RuntimeError):
    """The kernel forbids a step of the isolation; nothing was run."""


class Sandbox:
    """A program that is run as often as wanted, each time in a new process.

    Args:
        program: its source.
        limits: of each run.

    Attributes:
        process: the trusted one, `fastalign.rl.isolate`.
    """

    def __init__(self, program: str, limits: Limits | None = None) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-I", "-S", isolate.__file__]
        self.process = subprocess.Popen(command, env={}, cwd="/", start_new_session=True, text=True, **pipes)
        self.ask([program, limits or Limits()])

    def run(self, stdin: str = "", tail: str = "") -> Outcome:
        """One run with this input; ``tail`` is source that follows the program's own.

        Raises:
            SandboxError: the kernel does not let it be isolated, with the step and the reason.
        """
        self.ask([stdin, tail])
        answer = self.process.stdout.readline() if self.process.stdout else ""
        if not answer:
            raise SandboxError(f"its launcher ended: {self._last_words()}")
        status, stdout, stderr = json.loads(answer)
        if status == "refused":
            raise SandboxError(stderr)
        return Outcome(status, stdout, stderr)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()  # between runs; a program that still runs is killed with it
        self.process.communicate()

    def ask(self, what: Any) -> None:
        """Sends the trusted process what it reads next."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise SandboxError(f"its launcher ended: {self._last_words()}") from error

    def _last_words(self) -> str:
        lines = self.process.stderr.read().split("\n") if self.process.stderr else []
        return next(filter(None, reversed(lines)), f"exit code {self.process.wait()}")


@functools.cache
def refusal() -> str | None:
    """Why programs cannot be isolated here, or None where they can; found by running one."""
    try:
        with Sandbox("print(6 * 7)", Limits(seconds=30)) as sandbox:
            outcome = sandbox.run()
    except SandboxError as error:
        return str(error)
    return None if outcome.stdout == "42\n" else f"a trial printed {outcome.stdout!r}, {outcome.stderr[-200:]!r}"
