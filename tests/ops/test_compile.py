"""The compile gates: every Triton kernel for every target, ``compile_gates.py`` in processes that compile, and every
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
from importlib.util import find_spec
from pathlib import Path

import pytest

GATES = Path(__file__).with_name("compile_gates.py")
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
ROOT = Path(__file__).resolve().parents[2]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Dynamic shared memory is what the launchers ask the device for; this is what a kernel has of its own.
STATIC_SHARED = 48 << 10
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+).*?Used (\d+) registers(.*?)\n", re.S
)
DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32", "d": "fp64"}
CLUSTER_ONLY = ("cp.async.bulk", "barrier.cluster", "mapa", "mbarrier")


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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("target", TARGETS[:3])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_gates(source, target, tmp_path):
    """With the flags of the build, warnings among them: no spills; clusters of blocks from sm_90 on, and not before.

    The table has dtype and flags: with softcap, and of the forward with entropy or total.
    """
    flags = shlex.split(runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"])
    arch = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    keep = ["--keep", f"--keep-dir={tmp_path}", "-o", str(tmp_path / "kernels.o")]
    command = ["nvcc", *flags, f"-I{ROOT / 'csrc'}", arch, "-Xptxas=-v", *keep, "-c", str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    kernels = ENTRY.findall(run.stderr)
    assert len(kernels) == run.stderr.count("Compiling entry function") >= 8
    for name, *spills, registers, rest in kernels:
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", rest)))
        kernel, dtype, flags = re.search(r"([a-z]+)_kernelI(13__nv_bfloat16|6__half|f|d)(\w*?)E+v", name).groups()
        print(f"\n{kernel:8} {DTYPES[dtype]}{flags.replace('Lb', ' ').replace('E', ''):5}", end=" ")
        print(f"{target:7} {registers:>4} registers {shared:6} B shared {spills[0]} B spilled", end="")
        assert spills == ["0", "0"] and shared <= STATIC_SHARED, name
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    expected = len(CLUSTER_ONLY) if target != "sm_80" and "cluster_kernel" in ptx else 0
    assert sum(word in ptx for word in CLUSTER_ONLY) == expected
