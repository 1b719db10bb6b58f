"""``run_mutants.py [--jobs N] [NAME ...]``: applies deliberate faults, one at a time, and sees the tests turn red.

Each fault of ``mutants.py`` is made in a copy of the package and its tests, in a forked process that has the libraries
loaded already; of the native kernels only what the fault touches is compiled again, for the scalar level alone. A fault
is caught when a named test fails: a broken import, or no test at all, is an error of the list. ``control`` runs every
selection of tests on a copy without a fault, which must stay green.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("fastalign", "kernels", "csrc", "tests", "pyproject.toml")
TIMEOUT = 180
"""Seconds after which a fault that makes its tests hang is taken as caught."""


def copy_of_the_project(folder: Path) -> None:
    """What a test run needs; what Python has compiled goes with its sources, whose times are kept."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.egg-info"))
        else:
            shutil.copy(source, folder / name)


def apply(folder: Path, file: str, original: str, faulty: str) -> None:
    """Replaces the text; it must occur exactly once."""
    path = folder / file
    text = path.read_text()
    if text.count(original) != 1:
        raise ValueError(f"{file}: expected the text once, found it {text.count(original)} times: {original!r}")
    path.write_text(text.replace(original, faulty))


def objects() -> Path | None:
    """The folder of the last native build; None where there is none, or one that is instrumented."""
    found = sorted(path.parent for path in (ROOT / "build").glob("ninja-*/bindings.o"))
    return found[-1] if found and "-fsanitize" not in (found[-1] / "build.ninja").read_text() else None


def compile_natively(folder: Path, sources: tuple[str, ...]) -> None:
    """The named sources of the copy at the scalar level, linked with the other objects of the last build."""
    build = objects()
    assert build is not None
    commands = subprocess.run(["ninja", "-C", build, "-t", "commands"], capture_output=True, text=True, check=True)
    lines = commands.stdout.splitlines()
    link = lines[-1]
    for source in sources:
        made = f"{source}.scalar.o"
        (compile_,) = (line for line in lines if f"-o {made}" in line)
        ours = compile_.replace(f"{ROOT}/csrc", f"{folder}/csrc").replace(f"-o {made}", f"-O0 -o {folder / made}")
        shell(ours, build)
        link = link.replace(f" {made} ", f" {folder / made} ")
    head, target = link.split(" -o ")
    extension = folder / "fastalign" / Path(target.strip()).name
    extension.unlink(missing_ok=True)
    shell(f"{head} -o {extension}", build)


def shell(command: str, folder: Path) -> None:
    done = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the faulty source does not compile:\n{done.stderr[-2000:]}")


class Failures:
    """A pytest plugin that remembers what failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid.split("::", 1)[1])


def run_tests(folder: Path, tests: str) -> tuple[int, list[str], str]:
    """pytest's exit code on the copy, the tests that failed, what was printed."""
    import pytest

    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "kernels")]
    os.environ["PYTHONPATH"] = f"{folder}:{folder / 'kernels'}"
    os.environ.setdefault("FASTALIGN_SHARED", str(ROOT.parent / "shared"))
    options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    file, *selection = shlex.split(tests)
    plugin, printed = Failures(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = pytest.main([*options, str(folder / "tests" / file), *selection], plugins=[plugin])
    import fastalign

    assert Path(fastalign.__file__).is_relative_to(folder), f"the tests imported {fastalign.__file__}"
    return int(code), plugin.failed, printed.getvalue()


def judge(mutant, folder: Path) -> dict:
    """What became of one fault: caught, SURVIVED or ERROR, and by which test."""
    copy_of_the_project(folder)
    native = mutant.native
    if mutant.file:
        apply(folder, mutant.file, mutant.original, mutant.faulty)
    if native:
        os.environ["FASTALIGN_CPU"] = "scalar"
        compile_natively(folder, native)
    code, failed, printed = run_tests(folder, mutant.tests)
    if code == 1 and failed:
        return {"verdict": "caught", "by": failed[0]}
    if code == 0:
        return {"verdict": "SURVIVED", "by": mutant.tests}
    return {"verdict": "ERROR", "by": f"pytest ended with {code}\n{printed[-3000:]}"}


def start(mutant) -> tuple[int, Path]:
    """Forks a process that judges one fault and leaves its verdict in a folder."""
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    child = os.fork()
    if child:
        return child, folder
    signal.alarm(TIMEOUT)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    try:
        verdict = judge(mutant, folder)
    except Exception as error:  # whatever it is, it is the verdict
        verdict = {"verdict": "ERROR", "by": f"{type(error).__name__}: {error}"}
    (folder / "verdict.json").write_text(json.dumps(verdict))
    os._exit(0)


def finish(folder: Path, status: int) -> dict:
    path = folder / "verdict.json"
    ended = {"verdict": "caught", "by": f"ended by signal {os.WTERMSIG(status)}"} if os.WIFSIGNALED(status) else None
    verdict = json.loads(path.read_text()) if path.exists() else ended or {"verdict": "ERROR", "by": "no verdict"}
    shutil.rmtree(folder)
    return verdict


def run(mutants: list, jobs: int) -> int:
    """Judges every fault, prints a line for each; the number of those that were not caught."""
    waiting, running, missed = list(mutants), {}, 0
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            child, folder = start(mutant)
            running[child] = mutant, folder, time.monotonic()
        child, status = os.wait()
        mutant, folder, began = running.pop(child)
        verdict = finish(folder, status)
        wanted = "SURVIVED" if mutant.name.startswith("control") else "caught"
        missed += verdict["verdict"] != wanted
        shown = "green" if wanted == verdict["verdict"] == "SURVIVED" else verdict["verdict"]
        print(f"{shown:8} {time.monotonic() - began:6.1f} s  {mutant.name:62} {verdict['by']}", flush=True)
    return missed


def load_libraries() -> None:
    """What every copy would otherwise load for itself; nothing of the package."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # no test here needs one
    for library in ("hypothesis", "pytest", "torch.distributed.tensor", "triton.language"):
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    gc.freeze()  # pytest collects garbage at its end: a quarter of a second per fault to go through the libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("names", nargs="*", help="faults to apply, by name or the start of one; all by default")
    arguments = parser.parse_args()
    load_libraries()
    from mutants import controls, every_mutant

    every = every_mutant()
    every += controls(every)
    chosen = [m for m in every if not arguments.names or m.name.startswith(tuple(arguments.names))]
    if objects() is None:
        print("left out, for want of a native build in build/:", *(m.name for m in chosen if m.native), sep="\n  ")
        chosen = [m for m in chosen if not m.native]
    began = time.monotonic()
    missed = run(chosen, arguments.jobs)
    print(f"{len(chosen)} faults and controls, {missed} not as they should be, {time.monotonic() - began:.0f} s")
    sys.exit(1 if missed or not chosen else 0)


if __name__ == "__main__":
    main()
