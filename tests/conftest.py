"""What every test shares: no network, data that may be absent, fresh memory that is not kind, Triton without a GPU."""

import functools
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def _interpreter() -> str:
    """Without a GPU, sets Triton to interpret its kernels on the CPU, and says so; or says why it does not.

    Triton settles this once, when it is imported: the tests of its compiler (``test_compile.py``) have processes of
    their own.
    """
    if torch.cuda.is_available():
        return "compiled for this GPU"
    try:
        release = {name: tuple(int(part) for part in version(name).split(".")[:2]) for name in ("triton", "numpy")}
    except PackageNotFoundError as absent:
        return f"not tested: {absent.name} is not installed"
    if release["triton"] < (3, 7) and release["numpy"] >= (2, 4):
        return f"not tested: the interpreter of Triton {version('triton')} needs NumPy < 2.4, found {version('numpy')}"
    if "TRITON_INTERPRET" not in os.environ:
        assert "triton" not in sys.modules, "triton was imported before it could be told to interpret"
        os.environ["TRITON_INTERPRET"] = "1"
    return "interpreted" if os.environ["TRITON_INTERPRET"] == "1" else "not run: TRITON_INTERPRET=0"


def _patch_once(interpreter: ModuleType) -> None:
    """Let the interpreter leave Triton's language as its launch has patched it: it would patch the whole of it anew in
    every call of a device function, which took most of its time."""
    call, language = interpreter.InterpretedFunction.__call__, interpreter.tl

    @functools.cache
    def languages(function: Callable) -> list[ModuleType]:
        return [x for x in function.__globals__.values() if x is language or x is language.core]

    def patched_call(device: Any, *args: Any, **kwargs: Any) -> Any:
        if any(language.core.is_builtin(found.load) for found in languages(device.fn)):
            return call(device, *args, **kwargs)
        return device.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = patched_call


def _make_types_once(interpreter: ModuleType) -> None:
    """Let the interpreter keep what it would work out anew for every value: shapes of tensors, the dtypes of NumPy."""
    core, numpy_dtype = interpreter.tl.core, interpreter._get_np_dtype
    equal, of_block, of_tensor = core.dtype.__eq__, core.block_type.__init__, core.tensor.__init__
    dtypes, blocks, tensors = {}, {}, {}

    def get_np_dtype(kind: Any) -> Any:
        if type(kind) is not core.dtype:
            return numpy_dtype(kind)
        return dtypes.get(kind.name) or dtypes.setdefault(kind.name, numpy_dtype(kind))

    def make_block(self: Any, element: Any, shape: Any) -> None:
        key = (element.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            of_block(self, element, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element)

    def make_tensor(self: Any, handle: Any, kind: Any) -> None:
        if kind.name not in tensors:
            of_tensor(self, handle, kind)
            tensors[kind.name] = vars(self) | {"handle": None}
        vars(self).update(tensors[kind.name], handle=handle, type=kind, dtype=kind.scalar)

    interpreter._get_np_dtype = get_np_dtype
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    core.block_type.__init__, core.tensor.__init__ = make_block, make_tensor


TRITON = _interpreter()
ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FASTALIGN_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """``shared_file("data/gsm8k/train.jsonl")``: a file of the shared folder; skips the test when it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{path} is absent: set FASTALIGN_SHARED to the folder that holds {name}")
        return path

    return find


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same for all of xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def new_cache(common: Path) -> Callable[[Path], str]:
    """``new_cache(path)``: makes a cache there, empty but for the built-in text, which takes seconds to read."""

    def make(path: Path) -> str:
        (common / "builtin").mkdir(exist_ok=True)
        path.mkdir(parents=True)
        (path / "builtin").symlink_to(common / "builtin")
        return str(path)

    return make


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element nobody wrote shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


def pytest_configure(config: pytest.Config) -> None:
    """NumPy, with which Triton interprets, warns of every NaN that a test puts in on purpose."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")


def pytest_report_header() -> str:
    """How Triton's kernels are run."""
    return f"triton kernels: {TRITON}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow ones first, so that no worker ends alone with one. Where there is no CUDA device, a test marked ``gpu``
    is skipped, once for all of its cases."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    if TRITON == "interpreted":
        interpreter = importlib.import_module("triton.runtime.interpreter")
        _patch_once(interpreter)
        _make_types_once(interpreter)
    if torch.cuda.is_available():
        return
    cases = Counter(_function(item) for item in items if "gpu" in item.keywords)
    kept, left_out, seen = [], [], set()
    for item in items:
        function = _function(item)
        if function in cases:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device ({cases[function]} cases)"))
        (left_out if function in cases and function in seen else kept).append(item)
        seen.add(function)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]
