"""The compile gates: every Triton kernel for every target, ``compile_gates.py`` in processes that compile.

The other tests' process interprets the kernels where there is no GPU, and Triton settles that once for a process. Print
the table of registers, shared memory and spills with ``pytest tests/ops/test_compile.py -s``.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

GATES = Path(__file__).with_name("compile_gates.py")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("gates", [*TARGETS, "not " + " and not ".join(TARGETS)])
def test_compile_gates(gates):
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(GATES),
        "-k",
        gates,
        "-q",
        "-s",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout, run.stdout[-2000:]
