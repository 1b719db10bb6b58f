"""What is installed: two packages and the extension, from wheel and sdist, and no package called ``kernels``."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREE = ("csrc", "fastalign", "kernels", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("with space")  # where people do put their repositories
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(function: str, tree: Path, out: Path, **env: str) -> Path:
    """Call the build backend as pip does without build isolation, and return what it built."""
    code = f"import sys, setuptools.build_meta as b; print(b.{function}(sys.argv[1]))"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "FASTALIGN_CUDA": "0"} | env
    command = [sys.executable, "-c", code, str(out)]
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return out / run.stdout.split()[-1]


def test_kernels_is_no_package_of_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import kernels; print(getattr(kernels, '__file__', None))"
    elsewhere = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert str(ROOT) not in elsewhere.stdout
    at_root = importlib.util.find_spec("kernels")  # at most a namespace, which yields to any real package
    assert at_root is None or at_root.origin is None or not Path(at_root.origin).is_relative_to(ROOT)
    assert importlib.util.find_spec("fastalign_kernels") is not None


def test_wheel_without_a_compiler_is_pure_python(tree, tmp_path):
    names = zipfile.ZipFile(wheel := build("build_wheel", tree, tmp_path, FASTALIGN_CPP="0")).namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {"fastalign/config.py", "fastalign/ops/backends/cpp/__init__.py", "fastalign_kernels/__init__.py"} <= set(
        names
    )
    assert {name.split("/")[0] for name in names} == {"fastalign", "fastalign_kernels", "fastalign-0.1.0.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastalign").rglob("*.py")}
    assert modules <= set(names), "a folder without __init__.py is not packaged"


def test_sdist_holds_the_sources_of_the_kernels(tree, tmp_path):
    with tarfile.open(build("build_sdist", tree, tmp_path)) as sdist:
        names = sdist.getnames()
    for path in (*(ROOT / "csrc").rglob("*.*"), *(ROOT / "kernels").rglob("*.py")):
        assert f"fastalign-0.1.0/{path.relative_to(ROOT)}" in names
    assert "fastalign-0.1.0/fastalign/config.py" in names and "fastalign-0.1.0/setup.py" in names


def test_demands_are_not_ignored(tree):
    for env, message in (
        ({"FASTALIGN_CPP": "1", "CXX": "/nowhere", "PATH": "/nowhere"}, "FASTALIGN_CPP=1 demands"),
        ({"FASTALIGN_CPP": "yes"}, "FASTALIGN_CPP must be 0, 1 or unset, not 'yes'"),
    ):
        command = [sys.executable, "setup.py", "--name"]
        run = subprocess.run(command, cwd=tree, env=os.environ | env, capture_output=True, text=True, check=False)
        assert run.returncode != 0 and message in run.stderr


MODULE = """
#include <Python.h>
static int nobody_calls_this() { return 1; }  // which -Wall warns of
#if defined(FASTALIGN_CUDA)
#define CUDA 1
#else
#define CUDA 0
#endif
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "cuda", CUDA);
  return module;
}
"""
NVCC = """#!/bin/sh
echo "$@" >> called
case "$*" in
  *" -E "*) exit 0 ;;
  *--list-gpu-arch*) echo compute_90; exit 0 ;;
esac
echo "nvcc: unsupported GNU version" >&2
exit 1
"""
"""A compiler that is there, preprocesses, and then does not get on with the C++ compiler."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """setup.py beside an extension of one file, whose compiler warns, and one for a broken nvcc in ``bin``."""
    for folder in ("csrc/cuda", "fastalign", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc/bindings.cpp").write_text(MODULE)
    (tmp_path / "csrc/cuda/kernel.cu").touch()
    (tmp_path / "bin/nvcc").write_text(NVCC)
    (tmp_path / "bin/nvcc").chmod(0o755)
    return tmp_path


def build_in(tree: Path, **env: str) -> tuple[int, str]:
    """Build the extension beside its sources; the exit code and all that was printed."""
    path = os.pathsep.join([str(tree / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = (
        {name: value for name, value in os.environ.items() if not name.startswith("FASTALIGN_")} | {"PATH": path} | env
    )
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.returncode, run.stdout


def test_a_broken_nvcc_and_a_warning_end_no_users_build(small):
    code, said = build_in(small)
    assert code == 0, said
    assert f"fastalign: building without the CUDA kernels (the build with {small}/bin/nvcc failed: see above)" in said
    assert "unsupported GNU version" in said and "nobody_calls_this" in said  # the compilers' own words
    (built,) = (small / "fastalign").glob("_C*.so")
    spec = importlib.util.spec_from_file_location("_C", built)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert module.cuda == 0


def test_what_is_demanded_of_a_build_ends_it(small):
    code, said = build_in(small, FASTALIGN_CUDA="1")
    assert code != 0 and said.splitlines()[-1].startswith("fastalign: FASTALIGN_CUDA=1 demands the CUDA kernels, but")
    (small / "called").unlink()
    code, said = build_in(small, FASTALIGN_CUDA="0", FASTALIGN_WERROR="1")
    assert code != 0 and "[-Werror=unused-function]" in said and not (small / "called").exists()
    assert "FASTALIGN_CPP=0 installs fastalign without native kernels" in said.splitlines()[-1]
    assert not list((small / "fastalign").iterdir())


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch):
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    for name in ("FASTALIGN_CUDA", "NVCC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize("nvcc", ["/nowhere/nvcc", "false", "echo compute_30"])
def test_an_nvcc_that_cannot_be_used_is_passed_over_and_named(recipe, monkeypatch, capsys, nvcc):
    """Absent, broken, and too old for any architecture that the kernels are made for."""
    monkeypatch.setenv("NVCC", nvcc)
    assert recipe.find_nvcc() is None
    assert capsys.readouterr().err == f"fastalign: building without the CUDA kernels ({nvcc} does not compile here)\n"
    monkeypatch.setenv("FASTALIGN_CUDA", "1")
    with pytest.raises(SystemExit, match=rf"demands the CUDA kernels, but {nvcc} does not compile here: set NVCC"):
        recipe.find_nvcc()


def test_a_compiler_that_cannot_be_used_is_named(recipe, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert recipe.find_cxx() != "/nowhere/c++"
    said = "fastalign: CXX=/nowhere/c++ does not compile here: looking for c++, g++ and clang++\n"
    assert capsys.readouterr().err == said


COMPILER = """#!/bin/sh
for object; do :; done  # the last word
case "$object" in
  kernels.*) ;;  # compiled like the rest: a file from each level shows that its rule works here
  *) [ -e "{made}/$object" ] && exec cp "{made}/$object" "$object" ;;
esac
exec {cxx} "$@" -O0
"""
"""Takes what the install has compiled of csrc/cpu; the rest without the optimiser, which changes nothing here."""


def objects_of_the_install(recipe: ModuleType) -> list[Path]:
    """What the extension beside the sources was linked from, if these sources and rules have made it."""
    folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
    names = [name for name, rule, source, _ in recipe.objects(None) if f"{ROOT}/csrc/cpu/" in source]
    if not (folder / "build.ninja").exists():
        return []
    wanted, made = (
        {line.replace(" -Werror", "").replace(" -DFASTALIGN_CUDA", "") for line in text.splitlines()}
        for text in (recipe.ninja_file(recipe.find_cxx(), None, folder), (folder / "build.ninja").read_text())
    )
    changed = [line for line in wanted - made if "link" not in line and "-shared" not in line]
    said = subprocess.run(["ninja", "-C", folder, "-n", *names], capture_output=True, text=True, check=False).stdout
    return [] if changed or "no work to do" not in said else [folder / name for name in names]


@pytest.mark.slow
def test_wheel_has_a_working_extension(tree, tmp_path, recipe):
    if importlib.util.find_spec("fastalign._C") is None:
        pytest.skip("fastalign._C is not built here (no C++ compiler when fastalign was installed)")
    made = tmp_path / "made"
    made.mkdir()
    for path in objects_of_the_install(recipe):
        (made / path.name).symlink_to(path)
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(made=made, cxx=recipe.find_cxx()))
    compiler.chmod(0o755)
    wheel = build("build_wheel", tree, tmp_path, FASTALIGN_CPP="1", CXX=str(compiler))
    name = f"fastalign/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    extension = zipfile.ZipFile(wheel).extract(name, tmp_path)
    # Loaded alone, from a folder that knows nothing of the repository, in a process without torch.
    code = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("fastalign._C", sys.argv[1])
spec.loader.exec_module(module := module_from_spec(spec))
print(module.cpu_level(), "torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, extension]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split()[0] in ("avx512", "avx2", "scalar") and run.stdout.split()[1] == "False"
