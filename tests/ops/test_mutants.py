"""The tests can fail: deliberate faults turn them red. Here a few of them; ``make mutants`` tries all."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutants import every_mutant
from run_mutants import ROOT, objects

MUTANTS = every_mutant()
CONTROL = "control: ops/test_backends.py -k 'test_token_logps and 252 and not cpp and not triton'"
QUICK = {
    "ops": [CONTROL, *(m.name for m in MUTANTS if m.quick and m.file.startswith("fastalign"))],
    "kernels": [m.name for m in MUTANTS if m.quick and not m.file.startswith("fastalign")],
}


def test_every_fault_can_still_be_made():
    """Its text occurs exactly once: a fault that lost its place must be written anew, not forgotten."""
    sources = {file: (ROOT / file).read_text() for file in {m.file for m in MUTANTS}}
    lost = [m.name for m in MUTANTS if sources[m.file].count(m.original) != 1 or m.original == m.faulty]
    assert not lost
    assert [name for name, times in Counter(m.name for m in MUTANTS).items() if times > 1] == []
    files = {m.tests.split()[0] for m in MUTANTS} | {f"../csrc/cpu/{name}.cpp" for m in MUTANTS for name in m.native}
    assert [file for file in files if not (ROOT / "tests" / file).exists()] == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process for each fault")
@pytest.mark.parametrize("group", QUICK)
def test_faults_are_caught(group):
    if group == "kernels" and objects() is None:
        pytest.skip("no objects of a plain native build in build/: python setup.py build_ext --inplace")
    names = QUICK[group]
    command = [sys.executable, str(Path(__file__).with_name("run_mutants.py")), "--jobs", "1", *names]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert f"{len(names)} faults and controls, 0 not as they should be" in run.stdout
