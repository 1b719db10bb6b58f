"""Rewards of programs: the share of tests that a completion's program passes, each run in a sandbox of its own.

    rewards: [{code: {tests: input_output, timeout: 5, memory_mb: 512}}]

What a program prints for an input, or what its function returns for arguments, is judged outside of the sandbox, which
never sees the right answer. Assertions run behind the program in its own process: a program that only ends early fails
them, but one that is made to cheat, by objects that equal everything for example, can pass.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fastalign.rl.answers import Group
from fastalign.rl.builtins import text_of
from fastalign.rl.sandbox import Limits, Outcome, Sandbox, SandboxError
from fastalign.words import kind_of

FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
CALL = """
import json as _json, sys as _sys
_call = Solution().{name} if "Solution" in globals() else {name}
print({done!r} + _json.dumps(_call(*_json.loads(_sys.stdin.read()))))
"""
PYTHON_TAGS = ("python", "py", "python3", "")


@dataclass(frozen=True)
class CodeSettings:
    """The settings of a code reward."""

    tests: str
    """Column of the data with the tests of the row, see `read_tests`."""
    timeout: float = 5.0
    """Seconds of one test. A program that takes longer is not tested further."""
    memory_mb: int = 512
    """Address space of the program; Python itself takes 30 MB of it."""
    all_or_nothing: bool = False
    """1 when every test passes, else 0; default: the share that passes."""
    language: Literal["python"] = "python"
    """Of the programs."""
    unsafe: bool = False
    """Run programs with this user's rights, where the kernel does not let them be isolated."""


class Case(NamedTuple):
    """One test.

    Attributes:
        stdin: what the program reads; for a function its arguments as JSON.
        expected: what it must print, for a function the JSON of what it must return; None for an assertion.
        assertion: code that must run to its end behind the program.
        function: the function that is called.
    """

    stdin: str = ""
    expected: str | None = None
    assertion: str = ""
    function: str = ""

    def tail(self, done: str) -> str:
        """What runs behind the program; a line of ``done`` and maybe more is the last that it prints."""
        if self.function:
            return CALL.format(name=self.function, done=done)
        return f"\n{self.assertion}\nprint({done!r})\n" if self.expected is None else ""

    def passes(self, printed: str, done: str) -> bool:
        """Whether what was printed is right."""
        _, mark, value = last_line(printed).partition(done)
        if self.expected is None:
            return bool(mark)
        return bool(mark) and same(value, self.expected) if self.function else printed.split() == self.expected.split()


STATUSES = ("passed", "wrong", "error", "timeout", "output", "compile_error")


class Verdict(NamedTuple):
    """How a program did.

    Attributes:
        passed: tests.
        status: one of `STATUSES`: ``passed`` all, or how the first other one failed: with a ``wrong`` answer, an
            ``error``, a ``timeout``, too much ``output``; or ``compile_error``, where Python cannot read the program.
        message: the last line of the error, or what was printed instead.
    """

    passed: int
    status: str
    message: str = ""


class CodeReward:
    """Scores the programs of a group; `counts` says how many ended with which status."""

    def __init__(self, settings: CodeSettings) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter(dict.fromkeys(STATUSES, 0))
        self._lock, self._running, self._closed = threading.Lock(), set[Sandbox](), False

    def __call__(self, group: Group) -> list[float | None]:
        """The reward of each sample; None for a row without tests."""
        columns = group.arguments
        return [
            self.score(text_of(c), t) for c, t in zip(columns["completions"], columns[self.settings.tests], strict=True)
        ]

    def score(self, completion: str, tests: Any) -> float | None:
        """The reward of one completion."""
        known = read_tests(tests, self.settings.tests)
        if not known:
            return None
        one = self.settings
        limits = Limits(one.timeout, one.memory_mb, isolated=not one.unsafe)
        with self._opened(find_program(completion), limits) as sandbox:
            verdict = run_tests(sandbox, known, stop=one.all_or_nothing)
        with self._lock:
            self.counts[verdict.status] += 1
        return float(verdict.passed == len(known)) if one.all_or_nothing else verdict.passed / len(known)

    def close(self) -> None:
        """Kill the programs that still run; none is started any more."""
        with self._lock:
            self._closed = True
            for sandbox in self._running:
                sandbox.process.kill()

    @contextmanager
    def _opened(self, program: str, limits: Limits) -> Iterator[Sandbox]:
        """A sandbox that `close` ends."""
        with Sandbox(program, limits) as sandbox:
            with self._lock:
                if self._closed:
                    raise SandboxError("the run has ended")
                self._running.add(sandbox)
            try:
                yield sandbox
            finally:
                with self._lock:
                    self._running.discard(sandbox)


def find_program(completion: str) -> str:
    """The last fenced block of Python, or of no named language; without a fence the whole completion.

    Example:
        >>> find_program("So:\\n```python\\nprint(1)\\n```\\nThis prints 1.")
        'print(1)'
    """
    blocks = [(tag.lower(), body) for tag, body in FENCE.findall(completion)]
    ours = [body for tag, body in blocks if tag in PYTHON_TAGS]
    return ours[-1] if ours else blocks[-1][1] if blocks else completion


def read_tests(tests: Any, column: str) -> list[Case]:
    """The tests of a row.

    Args:
        tests: ``{"inputs": [...], "outputs": [...]}`` as in APPS, with ``fn_name`` for a function that is called, or
            with ``input`` and ``output`` as in CodeContests; a list of ``{"input": ..., "output": ...}``; a list of
            assertions as in MBPP; any of these as JSON; or lines of assertions. None for no tests.
        column: where they come from, for errors.

    Raises:
        ValueError: they have another form.

    Example:
        >>> read_tests('{"inputs": ["1"], "outputs": ["2"]}', "tests")
        [Case(stdin='1', expected='2', assertion='', function='')]
        >>> read_tests("assert f(1) == 2", "tests")
        [Case(stdin='', expected=None, assertion='assert f(1) == 2', function='')]
    """
    if isinstance(tests, str):
        tests = parse(tests, column)
    if isinstance(tests, dict):
        return pairs(tests, column)
    if isinstance(tests, list) and all(isinstance(test, str) for test in tests):
        return [Case(assertion=test) for test in tests if test.strip()]
    if isinstance(tests, list) and all(isinstance(test, dict) for test in tests):
        return [one for test in tests for one in pairs({k: [v] for k, v in test.items()}, column)]
    if tests is None:
        return []
    raise ValueError(
        f"column {column!r}: expected tests such as {{inputs: [...], outputs: [...]}}, got {kind_of(tests)}"
    )


def parse(text: str, column: str) -> Any:
    """JSON, or else assertions: one a line, or a whole piece of code with some in it."""
    try:
        return json.loads(text)
    except ValueError as error:
        rows = [line for line in text.splitlines() if line.strip()]
        if all(line.startswith("assert") for line in rows):
            return rows
        if "assert" in text:
            return [text]
        raise ValueError(
            f"column {column!r}: expected tests as JSON or assertions, got other text ({error})"
        ) from error


def pairs(tests: dict[str, Any], column: str) -> list[Case]:
    """Pairs of input and output: of the program, or with ``fn_name`` arguments and results of that function."""
    given = next((tests[name] for name in ("inputs", "input") if name in tests), None)
    wanted = next((tests[name] for name in ("outputs", "output") if name in tests), None)
    if not isinstance(given, list) or not isinstance(wanted, list) or len(given) != len(wanted):
        got = f"{kind_of(given)} and {kind_of(wanted)}"
        raise ValueError(f"column {column!r}: expected as many inputs as outputs, got {got}")
    if name := tests.get("fn_name"):
        if not str(name).isidentifier() or not all(isinstance(arguments, list) for arguments in given):
            raise ValueError(f"column {column!r}: expected a list of arguments in each input for the function {name!r}")
        return [Case(json.dumps(a), json.dumps(b), function=name) for a, b in zip(given, wanted, strict=True)]
    return [Case(lines(a), lines(b)) for a, b in zip(given, wanted, strict=True)]


def lines(text: Any) -> str:
    """A text, which APPS also has as a list of its lines."""
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


def judge(program: str, tests: Sequence[Case], limits: Limits, stop: bool = False) -> Verdict:
    """Runs a program on its tests, as `run_tests` says."""
    with Sandbox(program, limits) as sandbox:
        return run_tests(sandbox, tests, stop)


def run_tests(sandbox: Sandbox, tests: Sequence[Case], stop: bool = False) -> Verdict:
    """Runs a program on its tests, each in a new process; ``stop``: until one fails.

    After a compile error, or once the time is up, no further test is run: all that are left count as failed.
    """
    passed, first = 0, Verdict(0, "passed")
    for test in tests:
        verdict = run_test(sandbox, test)
        passed += verdict.passed
        if not verdict.passed and first.status == "passed":
            first = verdict
        if verdict.status in ("compile_error", "timeout") or (stop and not verdict.passed):
            break
    return first._replace(passed=passed)


def run_test(sandbox: Sandbox, test: Case) -> Verdict:
    """Whether one test passes: its output has the same words, or its assertion was reached and held."""
    done = secrets.token_hex(16)
    outcome = sandbox.run(test.stdin, test.tail(done))
    if outcome.status != "ok":
        status = "compile_error" if is_compile_error(outcome) else outcome.status
        return Verdict(0, status, last_line(outcome.stderr))
    return Verdict(1, "passed") if test.passes(outcome.stdout, done) else Verdict(0, "wrong", last_line(outcome.stdout))


def same(printed: str, expected: str) -> bool:
    """Whether two values in JSON are equal; APPS has many an expected one in a list of its own."""
    value, right = json.loads(printed), json.loads(expected)
    return value == right or (isinstance(right, list) and right == [value])


def is_compile_error(outcome: Outcome) -> bool:
    """Whether Python ended before the program began: it reports no traceback."""
    kinds = ("SyntaxError:", "IndentationError:", "TabError:")
    return "Traceback" not in outcome.stderr and last_line(outcome.stderr).startswith(kinds)


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
