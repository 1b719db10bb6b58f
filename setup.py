"""Build the native extension ``fastalign._C`` with ninja; everything else is in pyproject.toml.

The extension needs a C++17 compiler and pybind11, not torch. ``csrc/cpu`` is compiled once per instruction set and
``csrc/cuda`` where ``nvcc`` is found; where that fails the extension is built without it, and the build says so.

Environment:
    FASTALIGN_CPP     1 demands the extension, 0 leaves it out; by default it is built where a compiler is.
    FASTALIGN_CUDA    1 demands the CUDA kernels, 0 leaves them out; by default they are built where nvcc is.
    FASTALIGN_WERROR  1 makes every warning of the compilers an error, as our own checks do; by default none is.
    CXX, NVCC         the compilers.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# No contraction, here and in nvcc's flags: a * b + c is fused where the source says fma, and forward and backward round
# alike.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off"
# GCC 12 warns that its own AVX-512 headers use uninitialised values; without OpenMP its pragmas mean nothing.
WARNINGS = "-Wall -Wextra -Wno-maybe-uninitialized -Wno-unknown-pragmas"
LEVELS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
}
CUDA_ARCHS = ("80", "90", "100")
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -t 0 -Xcompiler=-fPIC,-fvisibility=hidden"


def demanded(name: str) -> bool | None:
    """The environment's word on an optional part: True, False, or None when it is silent."""
    word = os.environ.get(name, "")
    if word not in ("", "0", "1"):
        sys.exit(f"fastalign: {name} must be 0, 1 or unset, not {word!r}")
    return None if not word else word == "1"


def say(message: str) -> None:
    """One line for who reads the build's output (pip shows it with -v)."""
    print(f"fastalign: {message}", file=sys.stderr)


def accepts(command: str, code: str | None = None) -> bool:
    """Whether a compiler is there and takes the source given or named."""
    return run(command, code) is not None


def run(command: str, code: str | None = None) -> str | None:
    """What a program prints, None when it cannot be started or fails."""
    try:
        done = subprocess.run(shlex.split(command), input=code, text=True, capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


@cache
def find_cxx() -> str | None:
    """A C++17 compiler that can build Python extensions, or None."""
    include, asked = shlex.quote(sysconfig.get_path("include")), os.environ.get("CXX")
    for cxx in filter(None, (asked, "c++", "g++", "clang++")):
        if accepts(f"{cxx} -std=c++17 -I{include} -x c++ -fsyntax-only -", "#include <Python.h>\n"):
            return cxx
        if cxx == asked:
            say(f"CXX={cxx} does not compile here: looking for c++, g++ and clang++")
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler if it is wanted, present and can preprocess with its C++ compiler, else None."""
    wanted = demanded("FASTALIGN_CUDA")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    nvcc = os.environ.get("NVCC") or (found and shlex.quote(found))
    if wanted is False or not (wanted or nvcc):
        return None
    # The kernels have code for sm_90: an nvcc older than 11.8 refuses the name.
    check = ["-std=c++17", "-arch=sm_90", f"-I{ROOT}/csrc", "-E", *sources("cuda/*.cu")[:1]]
    if nvcc and accepts(f"{nvcc} {shlex.join(check)}") and gencode(nvcc):
        return nvcc
    without_cuda(f"{nvcc} does not compile here" if nvcc else "no nvcc was found")
    return None


def without_cuda(reason: str) -> None:
    """Say that there will be no CUDA kernels, or end a build that demands them."""
    if demanded("FASTALIGN_CUDA"):
        sys.exit(f"fastalign: FASTALIGN_CUDA=1 demands the CUDA kernels, but {reason}: set NVCC or CUDA_HOME")
    say(f"building without the CUDA kernels ({reason})")


def sources(pattern: str) -> list[str]:
    """Sources under csrc, in an order that does not change."""
    return sorted(str(path) for path in (ROOT / "csrc").glob(pattern))


def gencode(nvcc: str) -> str:
    """Machine code for each architecture that this nvcc knows, PTX of the last for what comes later; or nothing."""
    known = (run(f"{nvcc} --list-gpu-arch") or "").split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    if not archs:
        return ""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def levels() -> dict[str, str]:
    """The instruction sets to compile for, with their flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return LEVELS if x86 else {"scalar": ""}


def rules(cxx: str, nvcc: str | None) -> Iterator[str]:
    """How ninja compiles and links."""
    import pybind11  # not needed, and perhaps not there, when only metadata is asked for

    openmp = "-fopenmp" if accepts(f"{cxx} -fopenmp -x c++ -fsyntax-only -", "#include <omp.h>\n") else ""
    folders = (f"{ROOT}/csrc", pybind11.get_include(), sysconfig.get_path("include"))
    include = " ".join(shlex.quote(f"-I{folder}") for folder in folders)
    defines = " ".join(f"-DFASTALIGN_{name.upper()}" for name in (*levels(), *(["cuda"] if nvcc else [])))
    dependencies = "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
    cxx_errors, nvcc_errors = ("-Werror", "-Werror=all-warnings") if demanded("FASTALIGN_WERROR") else ("", "")
    cxx_flags = f"{CXX_FLAGS} {WARNINGS} {cxx_errors} {openmp} {include} {defines}"
    yield f"rule cxx\n  command = {cxx} {cxx_flags} $flags {dependencies}"
    if nvcc:
        yield f"rule cu\n  command = {nvcc} {NVCC_FLAGS} {nvcc_errors} {gencode(nvcc)} {include} {dependencies}"
    # nvcc as linker knows where the static CUDA runtime lies; with that the extension imports without a driver.
    linker = f"{nvcc} -shared -cudart static -Xcompiler={openmp or '-fPIC'}" if nvcc else f"{cxx} -shared {openmp}"
    undefined = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    yield f"rule link\n  command = {linker} {undefined} $in -o $out"


def objects(nvcc: str | None) -> Iterator[tuple[str, str, str, str]]:
    """Each object file with its rule, its source and its own flags."""
    yield "bindings.o", "cxx", f"{ROOT}/csrc/bindings.cpp", "-O1"  # glue: its cost is the compile time
    for source in sources("cpu/*.cpp"):
        for level, flags in levels().items():
            yield f"{Path(source).stem}.{level}.o", "cxx", source, f"{flags} -DLEVEL={level} -DLEVEL_{level}"
    for source in sources("cuda/*.c*") if nvcc else ():
        rule, flags = ("cu", "") if source.endswith(".cu") else ("cxx", "-O1")
        yield f"{Path(source).stem}.cuda.o", rule, source, flags


def ninja_file(cxx: str, nvcc: str | None, output: Path) -> str:
    """The whole build: one object per source and instruction set, one link."""

    def escaped(path: str | Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines, names = list(rules(cxx, nvcc)), []
    for name, rule, source, flags in objects(nvcc):
        names.append(name)
        lines.append(f"build {name}: {rule} {escaped(source)}\n  flags = {flags}")
    return "\n".join([*lines, f"build {escaped(output)}: link {' '.join(names)}", ""])


class NinjaBuild(build_ext):
    """Hands the extension to ninja: parallel, incremental, its own flags for every file."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        output.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        cxx, nvcc = find_cxx() or "c++", find_nvcc()
        if nvcc and not ninja(folder, ninja_file(cxx, nvcc, output)):
            without_cuda(f"the build with {nvcc} failed: see above")
            nvcc = None
        if nvcc is None and not ninja(folder, ninja_file(cxx, None, output)):
            sys.exit(f"fastalign: {cxx} failed: see above; FASTALIGN_CPP=0 installs fastalign without native kernels")


def ninja(folder: Path, rules: str) -> bool:
    """Whether ninja makes everything that the rules say, in a folder."""
    (folder / "build.ninja").write_text(rules)
    return subprocess.run(["ninja", "-C", str(folder)]).returncode == 0


def extensions() -> list[Extension]:
    """The native extension, where it can be built and is not declined."""
    wanted = demanded("FASTALIGN_CPP")
    if wanted is not False and find_cxx():
        return [Extension("fastalign._C", sources=[])]
    reason = "FASTALIGN_CPP=0" if wanted is False else "no C++17 compiler with the headers of Python was found"
    if wanted:
        sys.exit(f"fastalign: FASTALIGN_CPP=1 demands the native extension, but {reason}: install g++ or set CXX")
    say(f"building without the native extension ({reason}): torch and Triton serve instead")
    return []


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
