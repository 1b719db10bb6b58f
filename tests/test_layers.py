"""Who imports whom, held over the syntax trees of every file, imports inside functions included."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest

import fastalign
from fastalign import ops

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastalign"
KERNELS = ROOT / "kernels" / "fastalign_kernels"
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])

TIERS = [
    {"_C", "fastalign_kernels"},
    {"config", "types", "words", "hub", "disk"},
    {"ops", "commands"},
    {"losses", "data", "models"},
    {"parallel"},
    {"rl"},
    {"engine"},
    {"pipelines"},
    {"cli"},
]
"""Lowest first. A room imports lower tiers and itself, never a room of its own tier."""
COMMAND_LINE = {"api", "cli", "process", "run_commands", "arguments", "trl_names", "written", "info", "__main__"}
"""The modules that form the room `cli`."""
ALLOWED = {room: set().union(*TIERS[:i], {room}) for i, tier in enumerate(TIERS) for room in tier}
ALLOWED["integrations"] = {"integrations", "ops", "losses", "data", "models", "config", "types"}
ALLOWED["testing"] = {"testing", "ops", "types"}
ALLOWED["root"] = {"ops", "losses", "types", "cli"}  # fastalign/__init__.py: the public names
ALLOWED["cli"] |= {"root"}  # for the version


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """Dotted names that a file imports: statements anywhere in it, and constant arguments of import_module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def room(name: str) -> str:
    """The room of a dotted name of this project, else the distribution it starts with."""
    parts = name.split(".")
    if parts[0] != "fastalign":
        return parts[0]
    head = parts[1] if len(parts) > 1 else "__init__"
    exists = head == "_C" or (PACKAGE / head).is_dir() or (PACKAGE / f"{head}.py").exists()
    return "cli" if head in COMMAND_LINE else head if exists and head != "__init__" else "root"


def module_name(path: Path) -> str:
    base = ROOT if path.is_relative_to(PACKAGE) else ROOT / "kernels"
    return ".".join(path.relative_to(base).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_a_file_imports_only_what_lies_below_it(path):
    module = module_name(path)
    rooms = {room(name) for name in imported(ast.parse(path.read_text()), module)}
    if path.is_relative_to(KERNELS):
        allowed = {"torch", "triton", "fastalign_kernels", *sys.stdlib_module_names}
        assert rooms <= allowed, f"{module} may import torch and triton only, it imports {rooms - allowed}"
        return
    ours = {name for name in rooms if name in ALLOWED}
    assert ours <= ALLOWED[room(module)], f"{module} reaches up to {ours - ALLOWED[room(module)]}"
    assert not rooms & {"tests", "bench"}, f"{module} imports {rooms & {'tests', 'bench'}}"


@pytest.mark.parametrize(
    "source, rooms",
    [
        ("import fastalign.engine.train", {"engine"}),
        ("def f():\n    from fastalign import ops, linear_loss", {"ops", "root"}),
        ("from fastalign.losses.preference import dpo", {"losses"}),
        ("from ..data import pack", {"data"}),
        ("import importlib\nimportlib.import_module('fastalign.cli')", {"importlib", "cli"}),
    ],
)
def test_the_reader_of_imports_sees_every_form(source, rooms):
    assert {room(name) for name in imported(ast.parse(source), "fastalign.models.load")} == rooms


def test_kernels_folder_is_not_a_package():
    # A top-level importable `kernels` would shadow the package of that name that transformers and TRL import.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_files_stay_small(path):
    tree, lines = ast.parse(path.read_text()), path.read_text().count("\n")
    assert lines <= 400, f"{path.name} has {lines} lines: split it"
    if path.is_relative_to(PACKAGE):
        sizes = {node.name: size_of(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        long = {name: size for name, size in sizes.items() if size > 65}
        assert not long, f"{path.name}: {long} lines in one function: split it"


def size_of(function: ast.FunctionDef) -> int:
    """Lines of a function's body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return body[-1].end_lineno - body[0].lineno + 1


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys, fastalign.cli, fastalign.arguments; print(*{'torch', 'transformers', 'datasets'} & {*sys.modules})"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == ""


PUBLIC = [
    "divergence",
    "entropy_from_logits",
    "forest_decode",
    "gae",
    "linear_divergence",
    "linear_logps",
    "linear_loss",
    "linear_sample",
    "packed_attention",
    "policy_loss",
    "preference_loss",
    "sample",
    "sample_keys",
    "segment_scan",
    "selective_log_softmax",
    "token_logps",
    "uniforms",
    "whiten",
]
"""A name leaves or joins the public surface here first."""


def test_public_names_are_pinned():
    assert sorted(ops.__all__) == PUBLIC
    assert sorted({*fastalign.__all__} - {*PUBLIC}) == ["Run", "evaluate", "generate", "score", "train"]
    assert all(getattr(fastalign, name) is getattr(ops, name) and callable(getattr(ops, name)) for name in PUBLIC)
    assert not hasattr(fastalign, "no_such_name")


DROP_IN = {
    "liger": [
        "CrossEntropyOutput",
        "LigerCrossEntropyLoss",
        "LigerFusedLinearCPOLoss",
        "LigerFusedLinearCrossEntropyLoss",
        "LigerFusedLinearDPOLoss",
        "LigerFusedLinearGRPOLoss",
        "LigerFusedLinearJSD",
        "LigerFusedLinearJSDLoss",
        "LigerFusedLinearKTOLoss",
        "LigerFusedLinearORPOLoss",
        "LigerFusedLinearSimPOLoss",
    ],
    "transformers": ["FusedTrainer", "patch_model", "plain_forward", "unpatch_model"],
    "trl": ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "Patch", "RLOOTrainer", "patch"],
    "verl": ["FusedLinearForPPO", "Patch", "linear_cross_entropy", "patch"],
}
"""The integrations' names, which exist whether or not the peer is installed."""


@pytest.mark.parametrize("peer", DROP_IN)
def test_names_of_the_integrations_are_pinned(peer):
    module = importlib.import_module(f"fastalign.integrations.{peer}")
    assert sorted(module.__all__) == DROP_IN[peer]


def test_importing_an_integration_imports_no_peer(tmp_path):
    code = "import sys\nfrom fastalign.integrations import liger, transformers, trl, verl\n"
    code += "print('found:', *{'trl', 'liger_kernel', 'verl'} & {*sys.modules})"
    (tmp_path / "program.py").write_text(code)
    assert forks.run(tmp_path / "program.py") == "found:\n"


def test_the_version_is_told_once():
    line = f'version = "{fastalign.__version__}"'
    assert line in (ROOT / "pyproject.toml").read_text().splitlines()


def test_underscore_names_stay_in_their_module():
    found = {str(path.relative_to(ROOT)): [*borrowed(ast.parse(path.read_text()))] for path in PACKAGE.rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}


def borrowed(tree: ast.Module) -> Iterator[str]:
    """Underscore names that a file takes from other modules of fastalign, imported or read as attributes."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastalign"):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
            yield from (alias.name for alias in node.names if private(alias.name))
            yield from filter(private, (node.module or "").removeprefix("fastalign.integrations.").split(".")[1:])
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield from filter(private, [node.attr])


def private(name: str) -> bool:
    """Whether a name is its module's own; ``fastalign._C`` is the native extension."""
    return name.startswith("_") and not name.startswith("__") and name != "_C"


def test_the_reader_of_underscore_names_sees_both_forms():
    source = "from fastalign.ops import dispatch\nfrom fastalign.ops.scan import _op\ndispatch._level\ntorch._C"
    assert [*borrowed(ast.parse(source))] == ["_op", "_level"]
