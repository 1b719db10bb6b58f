"""Every Triton kernel is compiled ahead of time for the architectures it must serve; no GPU is needed.

The launchers run as usual, on small CPU tensors, with the launch itself replaced by a recorder: what is compiled here
is what would be launched. ``pytest tests/ops/test_compile.py -s`` runs this file in a process that compiles, and prints
the table of registers, shared memory and spills.

On sm_90 and gfx942 all of {bf16, fp32, fp64} x {entropy} x {total} x {soft-cap} are compiled; on sm_80 and sm_100 bf16
and fp32 with nothing and with everything; the narrow variants (fp16, int32 labels, a temperature per row, an odd
vocabulary, a small one) on sm_90 and gfx942, with everything. The policy losses with nothing and with everything, the
scans, and decoding with heads of several shapes, are compiled for every target.
"""

import ast
import importlib
import inspect
import math
import pkgutil
import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import fastalign_kernels
from fastalign.ops.functors import Knobs
from fastalign.ops.sample import Cut
from fastalign_kernels import divergence, forest_decode, launch, policy_loss, sample, scan, token_logps

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def launch_token_logps(
    dtype=torch.bfloat16, entropy=True, total=True, softcap=30.0, vocab_size=8192, labels=torch.int64, rows=False
):
    logits = torch.zeros(2, vocab_size, dtype=dtype)
    labels = torch.zeros(2, dtype=labels)
    options = {"temperature": torch.ones(2) if rows else 0.7, "softcap": softcap}
    asked = {"entropy": entropy, "total": total, "top1": total}
    x, _, top, logsum, *_ = token_logps.forward(logits, labels, **asked, **options)
    row = (x, x if entropy else None, x if entropy else None, x if total else None)
    token_logps.backward(torch.zeros_like(logits), logits, labels, top, logsum, row, **options)


def launch_scan(dtype=torch.float32, offsets=torch.int32):
    x, cu_seqlens = torch.zeros(4, dtype=dtype), torch.zeros(3, dtype=offsets)
    scan.scan(x, cu_seqlens, 0.9, reverse=True)
    scan.scan(x, cu_seqlens, x, reverse=False)
    scan.advantages(x, x, cu_seqlens, None, 0.9, 0.8)
    scan.advantages(x, x, cu_seqlens, x[:2], 0.9, 0.8)


def launch_policy_loss(dtype=torch.bfloat16, loss="ppo", full=True, vocab_size=8192):
    logits, labels = torch.zeros(2, vocab_size, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    x = torch.zeros(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    knobs = Knobs(0.8, 1.2, math.inf, 1.0, 1.05, 0.1 * full, 0.1 * full)
    scaling = {"temperature": 0.7, "softcap": 30.0 if full else None}
    rows = (x, x, x, x) if full else (x, x, x, None)
    policy_loss.run(logits, logits, labels, *rows, loss=loss, kl_estimator="k3", knobs=knobs, entropy=full, **scaling)
    policy_loss.scale(logits, x[0])


def launch_divergence(
    dtype=torch.bfloat16, ref_dtype=None, kind="jsd", softcap=30.0, vocab_size=8192, algebra=False, entropy=False
):
    logits, ref_logits = torch.zeros(2, vocab_size, dtype=dtype), torch.zeros(2, vocab_size, dtype=ref_dtype or dtype)
    scaling = {"softcap": softcap, "ref_softcap": softcap}
    streams, options = (logits, ref_logits, torch.zeros(2, dtype=torch.int64)), {"kind": kind, **scaling}
    value, stats, *_ = divergence.forward(*streams, **options, tokens=algebra, entropy=entropy)
    if kind == "jsd":
        divergence.mixture(*streams, stats, **scaling)
    row = (value, *(value if entropy else None for _ in range(3))) if algebra else None
    divergence.backward(torch.zeros_like(logits), *streams, stats, value, row, **options)


def launch_forest_decode(dtype=torch.bfloat16, heads=8, key_heads=4, size=32, softcap=None, rows=2):
    q, k = torch.zeros(rows, heads, size, dtype=dtype), torch.zeros(rows, key_heads, size, dtype=dtype)
    arenas = torch.zeros(3, key_heads, size, 16, dtype=dtype), torch.zeros(3, key_heads, 16, size, dtype=dtype)
    step = SimpleNamespace(chains=torch.zeros(rows, 2, dtype=torch.int32), lengths=torch.ones(rows, dtype=torch.int64))
    forest_decode.decode(q, k, k, *arenas, step, 0.1, softcap, dtype)


def launch_sample(dtype=torch.bfloat16, softcap=30.0, vocab_size=8192, rows=False):
    logits, noise = torch.zeros(2, vocab_size, dtype=dtype), torch.zeros(2, dtype=torch.float64)
    scaling = {"temperature": torch.ones(2) if rows else 0.7, "softcap": softcap, "logit_scale": 1.0}
    sample.draw(logits, noise, cut=Cut(), **scaling)


PLAIN = {"entropy": False, "total": False, "softcap": None}
FULL = [
    {"dtype": dtype, "entropy": entropy, "total": total, "softcap": softcap}
    for dtype in (torch.bfloat16, torch.float32, torch.float64)
    for entropy in (False, True)
    for total in (False, True)
    for softcap in (None, 30.0)
]
ENDS = [{"dtype": dtype, **options} for dtype in (torch.bfloat16, torch.float32) for options in (PLAIN, {})]
NARROW = [{"dtype": torch.float16, "rows": True}, {"labels": torch.int32, "vocab_size": 8191}, {"vocab_size": 100}]
WIDTHS = {"sm_80": ENDS, "sm_90": FULL + NARROW, "sm_100": ENDS, "gfx942": FULL + NARROW}
SCANS = [{}, {"dtype": torch.float64, "offsets": torch.int64}]
CASES = [(target, launch_token_logps, options) for target, cases in WIDTHS.items() for options in cases]
POLICIES = [{"dtype": dtype, "full": full} for dtype in (torch.bfloat16, torch.float32) for full in (False, True)]
POLICIES_FULL = [{"dtype": torch.float64}, {"dtype": torch.float16, "vocab_size": 8191}]
POLICIES_FULL += [{"loss": loss} for loss in ("pg", "cispo", "sapo")]
CASES += [(target, launch_policy_loss, options) for target in TARGETS for options in POLICIES]
CASES += [(target, launch_policy_loss, options) for target in ("sm_90", "gfx942") for options in POLICIES_FULL]
CASES += [(target, launch_scan, options) for target in TARGETS for options in SCANS]
DRAWS = [{}, {"dtype": torch.float32, "softcap": None}, {"dtype": torch.float64}]
DRAWS += [{"dtype": torch.float16, "rows": True, "vocab_size": 8191}]
CASES += [(target, launch_sample, options) for target in TARGETS for options in DRAWS]
DIVERGENCES = [{"kind": kind, "softcap": None} for kind in ("forward_kl", "reverse_kl", "jsd")]
DIVERGENCES += [{"kind": kind, "algebra": True, "entropy": True} for kind in ("forward_kl", "reverse_kl", "jsd")]
DIVERGENCES += [{"dtype": torch.float64, "algebra": True, "entropy": True}]
DIVERGENCES += [{"ref_dtype": torch.float32, "vocab_size": 8191}, {"algebra": True, "softcap": None}]
CASES += [(target, launch_divergence, options) for target in TARGETS for options in DIVERGENCES]
DECODES = [{}, {"dtype": torch.float32, "softcap": 50.0}, {"heads": 14, "key_heads": 2, "size": 64}]
DECODES += [{"heads": 32, "key_heads": 8, "size": 128, "softcap": 50.0}, {"size": 256}, {"size": 33, "heads": 4}]
DECODES += [{"dtype": torch.float64, "size": 128}]
CASES += [(target, launch_forest_decode, options) for target in TARGETS for options in DECODES]
"""Target, a function that launches kernels, its arguments: a new kernel gets its entry here."""


def describe(value):
    return ",".join(f"{k}={v}" for k, v in value.items()).replace("torch.", "") if isinstance(value, dict) else None


def record(launcher, target, **arguments):
    """The launches of ``launcher``: kernel and keyword arguments, as on a device with the warps of ``target``."""
    launches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda kernel, *, grid, warmup, **kwargs: launches.append((kernel, kwargs)))
        patch.setattr(launch, "warp_size", lambda _: target.warp_size)
        launcher(**arguments)
    return launches


def specialise(kernel, target, kwargs):
    """What Triton would compile for a launch: its key, and the source and options."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return str((specialization, options)), ASTSource(kernel, signature, constexprs, attrs), vars(options)


def measure(compiled, target, folder):
    """Registers per thread, bytes of shared memory, and spills: bytes on the stack, and registers for AMD."""
    if target.backend == "hip":
        kinds = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        counts = {kind: int(re.search(rf"\.{kind}:\s+(\d+)", compiled.asm["amdgcn"])[1]) for kind in kinds}
        return counts["vgpr_count"], compiled.metadata.shared, counts["vgpr_spill_count"] + counts[kinds[2]]
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {kind: int(count) for kind, count in re.findall(r"(\w+):(\d+)", report)}
    return counts["REG"], compiled.metadata.shared, counts["STACK"] + counts["LOCAL"]


@pytest.mark.parametrize(("name", "launcher", "options"), CASES, ids=describe)
def test_compiles(name, launcher, options, tmp_path):
    target = TARGETS[name]
    for kernel, kwargs in record(launcher, target, **options):
        _, source, compile_options = specialise(kernel, target, kwargs)
        compiled = triton.compile(source, target=target, options=compile_options)
        registers, shared, spills = measure(compiled, target, tmp_path)
        print(
            f"\n{kernel.__name__:18} {name:7} {registers:4} registers {shared:6} B shared {spills} B spilled", end="  "
        )
        assert shared <= SHARED_LIMIT[name]
        assert spills == 0


def jit_functions():
    modules = pkgutil.walk_packages(fastalign_kernels.__path__, "fastalign_kernels.")
    members = (vars(importlib.import_module(module.name)).items() for module in modules)
    return {name: value for module in members for name, value in module if isinstance(value, JITFunction)}


def test_every_kernel_has_a_case():
    functions = jit_functions()
    trees = (ast.walk(ast.parse(inspect.getsource(function.fn))) for function in functions.values())
    calls = [node for tree in trees for node in tree if isinstance(node, ast.Call)]
    called = {ast.unparse(part).split(".")[-1] for call in calls for part in (call.func, *call.args)}
    launchers = {launcher for _, launcher, _ in CASES}
    compiled = {kernel.__name__ for launcher in launchers for kernel, _ in record(launcher, TARGETS["sm_90"])}
    assert functions.keys() - called == compiled


def test_aligned_rows_are_read_and_written_sixteen_bytes_at_a_time():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for kernel, kwargs in record(launch_token_logps, TARGETS["sm_90"], dtype=dtype):
            _, source, options = specialise(kernel, TARGETS["sm_90"], kwargs)
            ptx = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]
            wide = Counter(re.findall(r"(ld|st)\.global\S*\.v[24]\.b(?:32|64)", ptx))
            assert wide["ld"] >= 4 and ("out_ptr" not in kwargs or wide["st"] >= 4)


def test_row_offsets_have_64_bits():
    for kernel, kwargs in record(launch_token_logps, TARGETS["sm_90"]):
        _, source, options = specialise(kernel, TARGETS["sm_90"], kwargs)
        ttir = triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ttir"]
        offsets = re.findall(r"tt\.addptr %(?:logits|out)_ptr, \S+ : \S+, (i\d+)", ttir)
        assert offsets and set(offsets) == {"i64"}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_nothing_compiles_again_for_another_size_or_setting(target):
    """Rows, vocabulary, strides, temperature, soft-cap and scale are arguments; a slice of the rows changes nothing."""

    def keys(num_rows, vocab_size, pitch, start, temperature, softcap):
        def launcher():
            logits = torch.zeros(num_rows, pitch, dtype=torch.bfloat16)[:, :vocab_size]
            labels = torch.zeros(num_rows + 1, dtype=torch.int64)[start : start + num_rows]
            x = torch.zeros(num_rows + 1)[start : start + num_rows]
            settings = {"temperature": temperature, "softcap": softcap, "logit_scale": temperature}
            token_logps.forward(logits, labels, entropy=True, total=True, top1=True, **settings)
            token_logps.backward(logits, logits, labels, x, x, (x, x, x, x), **settings)

        return [specialise(kernel, TARGETS[target], kwargs)[0] for kernel, kwargs in record(launcher, TARGETS[target])]

    expected = keys(16, 8192, 8192, 0, 1.0, 30.0)
    assert len(set(expected)) == 2
    assert keys(1, 8192, 8192, 1, 0.7, 50.0) == expected
    assert keys(7, 9008, 9032, 1, 2.0, 1.0) == expected


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_scan_compiles_again_for_another_size_or_setting(target):
    def keys(num_tokens, start, decay):
        def launcher():
            x, cu_seqlens = torch.zeros(num_tokens + 1)[start:], torch.zeros(num_tokens + 1, dtype=torch.int32)[start:]
            scan.scan(x, cu_seqlens, decay, reverse=True)
            scan.advantages(x, x, cu_seqlens, x, decay, decay)

        return [specialise(kernel, TARGETS[target], kwargs)[0] for kernel, kwargs in record(launcher, TARGETS[target])]

    expected = keys(16, 0, 1.0)
    assert len(set(expected)) == 2
    assert keys(1, 0, 0.5) == keys(3, 1, 0.99) == expected


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_policy_loss_compiles_again_for_another_size_or_setting(target):
    """Rows, vocabulary, strides, clips and coefficients are arguments; a slice of the rows changes nothing."""

    def keys(num_rows, vocab_size, start, knob):
        def launcher():
            logits = torch.zeros(num_rows, vocab_size, dtype=torch.bfloat16)
            labels = torch.zeros(num_rows + 1, dtype=torch.int64)[start : start + num_rows]
            vectors = [torch.zeros(num_rows + 1)[start : start + num_rows] for _ in range(4)]
            settings = {"loss": "ppo", "kl_estimator": "k3", "entropy": True, "temperature": knob, "softcap": knob}
            policy_loss.run(logits, logits, labels, *vectors, knobs=Knobs(*[knob] * 7), **settings)
            policy_loss.scale(logits, vectors[0][0])

        return [specialise(kernel, TARGETS[target], kwargs)[0] for kernel, kwargs in record(launcher, TARGETS[target])]

    expected = keys(16, 8192, 0, 1.0)
    assert len(set(expected)) == 2
    assert keys(1, 8192, 0, 0.5) == keys(7, 9008, 1, 2.0) == expected


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_decoding_compiles_again_for_another_number_of_rows(target):
    def keys(rows):
        launches = record(launch_forest_decode, TARGETS[target], rows=rows)
        return [specialise(kernel, TARGETS[target], kwargs)[0] for kernel, kwargs in launches]

    assert keys(1) == keys(2) == keys(48)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_draw_compiles_again_for_another_size_or_setting(target):
    def keys(num_rows, vocab_size, start, knob):
        def launcher():
            logits, noise = torch.zeros(num_rows, vocab_size, dtype=torch.bfloat16), torch.zeros(num_rows + 1)
            scaling = {"temperature": knob, "softcap": knob, "logit_scale": knob}
            sample.draw(logits, noise.double()[start : start + num_rows], cut=Cut(), **scaling)

        return [specialise(kernel, TARGETS[target], kwargs)[0] for kernel, kwargs in record(launcher, TARGETS[target])]

    expected = keys(16, 8192, 0, 1.0)
    assert len(set(expected)) == 2
    assert keys(1, 8192, 0, 0.5) == keys(7, 9008, 1, 2.0) == expected
