"""The native extension as a part that may be of another version, or short of memory."""

import json
import re
import shutil
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest

from fastalign import cli
from fastalign.ops.backends import cpp

if reason := cpp.unavailable():
    pytest.skip(reason, allow_module_level=True)

from fastalign import _C

BINDINGS = {3: "6e879a7bed02ac3c", 4: "97191eb0a741f0cd", 5: "a9d2e039da0f71a9"}
"""A hash of the names that are bound and of their arguments, for each number of theirs."""
OPTIONAL = {"cuda", "ShortWaits"}
"""What a build has or not, whose users ask for it."""


def bound(scope, prefix=""):
    """The signatures below a module or class, without their types, which pybind11 spells as it likes."""
    for name, value in sorted(vars(scope).items()):
        if (name.startswith("_") and name != "__init__") or name in OPTIONAL:
            continue
        if isinstance(value, type):
            yield from bound(value, f"{name}.")
        elif callable(value):
            yield f"{prefix}{name} {re.findall(r'([*]|[a-z_0-9]+)(?=[:,])', (value.__doc__ or '').splitlines()[0])}"


def test_a_change_of_the_bindings_changes_their_number():
    found = blake2b("\n".join(bound(_C)).encode(), digest_size=8).hexdigest()
    assert BINDINGS[cpp.ABI] == found, "raise kAbi in csrc/bindings.cpp and cpp.ABI, and put the new hash here"


@pytest.mark.parametrize("abi", [None, cpp.ABI - 1, cpp.ABI + 1])
def test_an_extension_of_another_version_is_refused_in_one_line(abi, monkeypatch, capsys):
    """It is there, and would take other arguments than it is given: None is of a build before there was a number."""
    cpp.unavailable.cache_clear()
    monkeypatch.setattr(_C, "abi", abi) if abi is not None else monkeypatch.delattr(_C, "abi")
    assert cli.main(["info"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"fastalign: error: the native extension {_C.__file__} was built for another version of fastalign: build it "
        "again with `pip install .` (beside the sources: `python setup.py build_ext --inplace`), or remove the file\n"
    )


def shared_code(level):
    """The functions in a level's objects of which the linker may keep any object's copy."""
    folders = sorted(path.parent for path in Path(__file__).parents[2].glob("build/ninja-*/bindings.o"))
    if not folders or "-fsanitize" in (folders[-1] / "build.ninja").read_text():
        pytest.skip("no objects of a plain native build in build/: python setup.py build_ext --inplace")
    objects = folders[-1].glob(f"*.{level}.o")
    symbols = subprocess.run(["nm", "--defined-only", *objects], capture_output=True, text=True, check=True).stdout
    weak = re.findall(r"^[0-9a-f]+ [WVu] (\S+)$", symbols, re.MULTILINE)
    return [name for name in weak if not name.startswith(("_ZTI", "_ZTS", "DW.ref."))]  # which are data


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="reads objects with nm")
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_no_instruction_set_lends_its_code_to_another(level):
    """An inline function that stands in several objects is linked once, from any of them: with AVX-512 in it, it would
    end the process where the processor has none. Each level's own namespace keeps its functions apart."""
    assert [name for name in shared_code(level) if f"{len(level)}{level}" not in name] == []


SHORT_OF_MEMORY = """
import ctypes, json, resource, sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("fastalign._C", sys.argv[1])
spec.loader.exec_module(C := module_from_spec(spec))
numbers = ctypes.create_string_buffer(1 << 16)
at = ctypes.addressof(numbers)
many, threads = 1 << 22, {"threads": 2}
table = lambda *values: (ctypes.c_int64 * len(values))(*values)


def rows(count, columns, **more):
    given = {"logits": (at, columns, 1), "labels": at, "labels_are_int64": False, "logps": at, "max": at, "logsum": at}
    return C.TokenLogps(dtype=0, rows=count, vocabulary=columns, **given, **more)


def policy_loss(count):
    settings = dict.fromkeys(("ratio_low", "ratio_high", "ratio_cap", "tau_pos", "tau_neg", "kl_coef"), 1.0)
    op = rows(count, 256 * many, grad=(at, 1, 1))
    C.PolicyLoss(rows=op, surrogate=0, k2=False, table=at, weights=at, entropy_coef=0.0, **settings).run(**threads)


def divergence(walk, kind):
    op = C.Divergence(policy=rows(4 * many, 1), reference=rows(4 * many, 1), kind=kind, mix=0.5, value=at, stats=at)
    getattr(op, walk)(**threads)


def norm(count, columns, **more):
    each = dict.fromkeys(("x", "y", "weight", "grad_y", "grad_x"), (at, 0, 0))
    C.rms_norm(**each, inverse=at, rows=count, columns=columns, eps=1.0, **more, **threads)


def attention(length, heads, **more):
    q = (at, 0, heads * 64, 64)
    calls, spans, trees = table(0, length, 0, 1), table(0, length), table(0, 1)
    tables = {"calls": calls, "spans": spans, "trees": trees}
    tables = {name: ctypes.addressof(value) for name, value in tables.items()}
    each = {"q": q, "k": q, "v": q, "out": q, "grad_out": q, "grad_q": q, "lse": at, "shape": (heads, heads, 64)}
    C.attention(**each, **tables, scale=1.0, num_calls=1, num_trees=1, **more, **threads)


def decode(length, heads):
    q, lengths, order, groups = (at, 0, heads * 64, 64), table(length), table(0), table(0, 1, 0)
    tables = {"lengths": lengths, "order": order, "groups": groups}
    tables = {name: ctypes.addressof(value) for name, value in tables.items()}
    each = {"q": q, "k": q, "v": q, "out": q, "keys": at, "values": at, "dtype": 0, "shape": (heads, heads, 64)}
    C.forest_decode(**each, **tables, chains=at, width=1, scale=1.0, num_groups=1, **threads)


def product():
    each = {"out": (at, 1, many), "a": (at, 2048, 1), "b": (at, many, 1), "dtype": 1, "shape": (1, many, 2048)}
    C.product(**each, accumulate=False, **threads)


ASKS = {
    "token_logps": lambda: rows(many, 1).forward(**threads),
    "policy_loss, rows shared by threads": lambda: policy_loss(1),
    "policy_loss, rows to each thread": lambda: policy_loss(4),
    "divergence": lambda: divergence("forward", 0),
    "divergence, the mixture": lambda: divergence("mixture", 2),
    "rms_norm": lambda: norm(1, 16 * many),
    "rms_norm, backward": lambda: norm(64 * 65536, 1024, grad_weight=at),
    "attention, its tasks": lambda: attention(1, many),
    "attention": lambda: attention(many, 1),
    "forest_decode, its tasks": lambda: decode(1, many),
    "forest_decode": lambda: decode(many, 1),
    "attention, backward": lambda: attention(many, 1, grad_k=at, grad_v=at),
}
if C.has_product():
    ASKS["product"] = product
norm(1 << 13, 8)  # starts the threads, which are kept
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), -1))
told = {}
for name, ask in ASKS.items():
    try:
        ask()
        told[name] = "there was enough"
    except MemoryError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_an_allocation_that_fails_is_an_error_and_not_the_end_of_the_process():
    """Within kernels, their parallel regions and their threads, in a process that may have 8 MiB more."""
    command = [sys.executable, "-c", SHORT_OF_MEMORY, _C.__file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr}"
    told = json.loads(done.stdout)
    assert len(told) >= 10
    for name, text in told.items():
        op, _, rest = text.partition(": no memory for ")
        assert op == name.split(",")[0] and int(rest.split(" bytes to work in")[0]) > 1 << 20, text
    assert told["token_logps"] == f"token_logps: no memory for {(1 << 22) * 32} bytes to work in"
