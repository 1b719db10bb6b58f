"""The compile gates: every Triton kernel for every target, ``compile_gates.py`` in a process that compiles, and every
CUDA source for every NVIDIA target.

The other tests' process interprets the kernels where there is no GPU, and Triton settles that once for a process. Print
the table of registers, shared memory and spills with ``pytest tests/ops/test_compile.py -s``.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from filelock import FileLock

GATES = Path(__file__).with_name("compile_gates.py")
CUDA_TARGETS = ["sm_80", "sm_90", "sm_100"]
TARGETS = [*CUDA_TARGETS, "gfx942"]
ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Dynamic shared memory is what the launchers ask the device for; this is what a kernel has of its own.
STATIC_SHARED = 48 << 10
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+).*?Used (\d+) registers(.*?)\n",
    re.S,
)
DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", "d": "fp64"}
CLUSTER_ONLY = ("cp.async.bulk", "barrier.cluster", "mapa", "mbarrier")


@pytest.fixture(scope="session")
def shared(common):
    """``shared(name, make)``: the folder of that name which ``make(folder)`` fills, once for all of xdist's workers."""

    def made(name, make):
        folder = common / name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                make(folder)
        return folder

    return made


def run_gates(folder):
    """All of ``compile_gates.py`` in one process; what became of each case is in ``results.xml``."""
    options = ["-q", "-o", "addopts=", "-o", "junit_logging=system-out", f"--junitxml={folder / 'results.xml'}"]
    command = [sys.executable, "-m", "pytest", str(GATES), *options, "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (folder / "output").write_text(run.stdout[-8000:] + run.stderr[-2000:])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", [*TARGETS, "any target"])
def test_compile_gates(target, shared):
    folder = shared("compile_gates", run_gates)
    assert (folder / "results.xml").exists(), (folder / "output").read_text()
    cases = [case for case in ElementTree.parse(folder / "results.xml").iter("testcase") if target_of(case) == target]
    assert cases
    for case in cases:
        printed = {part.tag: part.text or part.get("message") for part in case}
        print(printed.get("system-out", ""), end="")
        assert not printed.keys() & {"failure", "error", "skipped"}, (case.get("name"), printed)


def target_of(case):
    return next((target for target in TARGETS if target in case.get("name")), "any target")


def compile_cuda(source, folder):
    """One object for all targets, as in the build; the compiler's messages are in ``messages``."""
    flags = shlex.split(runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"].replace("-t 0", "-t 1"))  # in one order
    archs = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in CUDA_TARGETS]
    keep = ["--keep", f"--keep-dir={folder}", "-o", str(folder / "kernels.o")]
    command = ["nvcc", *flags, f"-I{ROOT / 'csrc'}", *archs, "-Xptxas=-v", *keep, "-c", str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "messages").write_text(f"{run.returncode}\n{run.stderr}")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("target", CUDA_TARGETS)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_gates(source, target, shared):
    """With the flags of the build, warnings among them: no spills; clusters of blocks from sm_90 on, and not before.

    The table has dtype and flags: with softcap, and of the forward with entropy or total.
    """
    folder = shared(source.stem, partial(compile_cuda, source))
    code, messages = (folder / "messages").read_text().split("\n", 1)
    assert code == "0", messages
    kernels = [(name, *found) for name, arch, *found in ENTRY.findall(messages) if arch == target]
    assert len(kernels) == messages.count(f"' for '{target}'") >= 8
    for name, *spills, registers, rest in kernels:
        shared_bytes = sum(map(int, re.findall(r"(\d+) bytes smem", rest)))
        kernel, dtype, flags = re.search(r"([a-z]+)_kernelI(13__nv_bfloat16|6__half|f|d)(\w*?)E+v", name).groups()
        print(f"\n{kernel:8} {DTYPES[dtype]}{flags.replace('Lb', ' ').replace('E', ''):5}", end=" ")
        print(f"{target:7} {registers:>4} registers {shared_bytes:6} B shared {spills[0]} B spilled", end="")
        assert spills == ["0", "0"] and shared_bytes <= STATIC_SHARED, name
    (ptx,) = (path.read_text() for path in folder.glob("*.ptx") if f".target {target}\n" in path.read_text())
    expected = len(CLUSTER_ONLY) if target != "sm_80" and "cluster_kernel" in ptx else 0
    assert sum(word in ptx for word in CLUSTER_ONLY) == expected
