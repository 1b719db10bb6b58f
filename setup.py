"""Build the native extension ``fastalign._C`` with ninja; everything else is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, not torch. ``csrc/cpu`` is compiled once per instruction set and
``csrc/cuda`` where ``nvcc`` is found.

Environment:
    FASTALIGN_CPP    1 demands the extension, 0 leaves it out; by default it is built where a compiler is.
    FASTALIGN_CUDA   1 demands the CUDA kernels, 0 leaves them out; by default they are built where nvcc is.
    CXX, NVCC        the compilers.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-maybe-uninitialized"
LEVELS = {"scalar": "", "avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"}
CUDA_ARCHS = ("80", "90", "100")
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -Werror=all-warnings"


def demanded(name: str) -> bool | None:
    """The environment's word on an optional part: True, False, or None when it is silent."""
    return {"1": True, "0": False, "": None}[os.environ.get(name, "")]


def find_cxx() -> str | None:
    """A C++ compiler that can build Python extensions, or None."""
    for cxx in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(cxx.split()[0]) and compiles(cxx, "#include <Python.h>\n"):
            return cxx
    return None


def compiles(cxx: str, code: str, flags: str = "") -> bool:
    """Whether ``cxx`` accepts the source ``code``."""
    command = f"{cxx} -std=c++17 {flags} -I{sysconfig.get_path('include')} -x c++ -fsyntax-only -".split()
    return subprocess.run(command, input=code, text=True, capture_output=True).returncode == 0


def find_nvcc() -> str | None:
    """The CUDA compiler, unless FASTALIGN_CUDA=0."""
    wanted = demanded("FASTALIGN_CUDA")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if wanted and not nvcc:
        sys.exit("fastalign: FASTALIGN_CUDA=1 demands the CUDA kernels, but no nvcc was found: set NVCC or CUDA_HOME")
    return None if wanted is False else nvcc


def gencode(nvcc: str) -> str:
    """One machine code per architecture this nvcc knows, and PTX of the last for what comes later."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def ninja_file(cxx: str | None, output: Path) -> str:
    """The build as ninja text: one object per source and instruction set, one link."""
    import pybind11  # a build requirement: absent when setup.py is only asked for metadata

    openmp = "-fopenmp" if compiles(cxx, "#include <omp.h>\n", "-fopenmp") else ""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = LEVELS if x86 else {"scalar": ""}
    nvcc = find_nvcc()
    # nvcc as linker knows where the static CUDA runtime lies; with it the extension imports without a driver.
    linker = f"{nvcc} -shared -cudart static -Xcompiler=-s,{openmp}" if nvcc else f"{cxx} -shared -s {openmp}"
    linker += " -undefined dynamic_lookup" if sys.platform == "darwin" else ""
    include = f"-I{ROOT}/csrc -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    defines = " ".join(f"-DFASTALIGN_{name.upper()}" for name in (*levels, *(["cuda"] if nvcc else [])))
    lines = [
        f"rule cxx\n  command = {cxx} {CXX_FLAGS} {openmp} {include} {defines} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {linker} $in -o $out",
    ]
    objects = ["bindings.o"]
    lines.append(f"build bindings.o: cxx {ROOT}/csrc/bindings.cpp\n  flags = -O1")  # glue: compile time is its cost
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        for level, flags in levels.items():
            objects.append(f"{source.stem}.{level}.o")
            lines.append(f"build {objects[-1]}: cxx {source}\n  flags = {flags} -DLEVEL={level} -DLEVEL_{level}")
    if nvcc:
        lines.append(f"rule nvcc\n  command = {nvcc} {NVCC_FLAGS} {gencode(nvcc)} -t 0 -I{ROOT}/csrc -MD -MF $out.d -c $in -o $out")
        lines.append("  depfile = $out.d\n  deps = gcc")
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects.append(f"{source.stem}.cuda.o")
            lines.append(f"build {objects[-1]}: nvcc {source}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Hands the extension to ninja: parallel, incremental, different flags per file."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(find_cxx(), output))
        subprocess.run(["ninja", "-C", str(folder)], check=True)


def extensions() -> list[Extension]:
    """The native extension, where it can be built and is not declined."""
    wanted = demanded("FASTALIGN_CPP")
    cxx = None if wanted is False else find_cxx()
    if cxx:
        return [Extension("fastalign._C", sources=[])]
    reason = "FASTALIGN_CPP=0" if wanted is False else "no C++17 compiler with the Python headers was found"
    if wanted:
        sys.exit(f"fastalign: FASTALIGN_CPP=1 demands the native extension, but {reason}: install g++, or set CXX")
    print(f"fastalign: building without the native extension ({reason}); torch and Triton serve instead", file=sys.stderr)
    return []


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
