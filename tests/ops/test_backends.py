"""Every op on every backend, in every dtype, in every case: within twice eager's own error against float64.

Sizes are odd on purpose: 507 rows and 252 or 507 columns are no multiple of a tile, 123 is odd, and rows of odd width
start unaligned. Fresh memory and masked inputs are NaN. Without a GPU Triton is interpreted. A new backend is
one entry of ``op_table.BACKENDS``, a new case one of ``fastalign.testing.CASES``, a new op one of ``op_table.OPS``.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from op_table import BACKENDS, DEVICE, HERE, INTERPRETED, OPS, place

from fastalign import ops
from fastalign.ops import dispatch, linear_logps, linear_loss, token_logps
from fastalign.ops.linear_logps import reference as linear_reference
from fastalign.ops.token_logps import reference as token_reference
from fastalign.testing import (
    CASES,
    HIDDEN_ONLY,
    assert_matches,
    linear_example,
    logits_example,
    outputs_and_grads,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FEW = ("plain", "bias", "everything", "objectives")
# The interpreter runs a Triton program at a time: few rows there.
ROWS = {"torch": 123, "cpp": 123, "triton": 13, "cuda": 123}
# The weight trains and memory is ample, or the head is frozen and several chunks are needed.
SETTINGS = ["trainable", "frozen-tight"]
MEMORY = {"torch": 800_000, "cpp": 100_000, "triton": 10_000, "cuda": 100_000}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_tested_here(backend):
    """One skip, with its reason, for all cases of a backend that is not usable here."""
    if why := dispatch.missing(backend):
        pytest.skip(f"{backend}: {why}")


def matrix(*names):
    """Backend, dtype, case: those in which none of ``names`` is special; fp16, another range than bf16's, in few.

    fp64 is torch's where C++ is asked for.
    """
    cases = [case for case, special in CASES.items() if not special.keys() & set(names)]
    every = (x for x in product(HERE, DTYPES, cases) if x[:2] != ("cpp", torch.float64))
    return [(backend, dtype, case) for backend, dtype, case in every if dtype != torch.float16 or case in FEW]


@pytest.mark.parametrize(("backend", "dtype", "case"), matrix(*HIDDEN_ONLY), ids=str)
@pytest.mark.parametrize("vocab", [252, 507])
def test_token_logps(backend, case, dtype, vocab):
    example = logits_example(case, ROWS[backend], vocab, dtype, place(backend))
    wide = example.to(torch.float64)
    actual = outputs_and_grads(
        token_logps(**example.tensors, labels=example.labels, **example.options, backend=backend), example
    )
    eager = outputs_and_grads(
        strip(token_reference(**example.tensors, labels=example.labels, **example.options)), example
    )
    oracle = outputs_and_grads(strip(token_reference(**wide.tensors, labels=wide.labels, **wide.options)), wide)
    for name, value in actual.items():
        assert_matches(value, eager[name], oracle[name], name=name, budget=None if name.startswith("d_") else 1e-4)


@pytest.mark.parametrize(("backend", "dtype", "case"), matrix(), ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_linear_logps(backend, case, dtype, setting):
    example = linear_example(case, ROWS[backend], 123, 252, dtype, place(backend))
    options = {"backend": backend, "memory": MEMORY[backend] if setting == "frozen-tight" else None}

    def run(x):
        return with_grads(linear_logps(**x.tensors, labels=x.labels, **x.options, **options), x)

    check_linear(run, example, trainable=setting == "trainable")


@pytest.mark.parametrize(("backend", "dtype", "case"), matrix(), ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_linear_loss(backend, case, dtype, setting):
    """The sum of upstream gradient times statistic is a loss like any other."""
    example = linear_example(case, ROWS[backend], 123, 252, dtype, place(backend))
    options = {"backend": backend, "memory": MEMORY[backend] if setting == "frozen-tight" else None}

    def run(x):
        upstream = {"logps": x.grad_logps, "entropy": x.grad_entropy, "lse": x.grad_logps.flip(0)}

        def seen(stats):
            return {name: value for name in upstream if (value := getattr(stats, name)) is not None}

        def loss_fn(stats):
            return sum((value * upstream[name][stats.rows]).sum() for name, value in seen(stats).items())

        loss, stats = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, **x.options, **options)
        trained = [name for name, tensor in x.tensors.items() if tensor.requires_grad]
        made = torch.autograd.grad(loss, [x.tensors[name] for name in trained])
        return {**seen(stats), **{f"d_{name}": grad for name, grad in zip(trained, made, strict=True)}}

    check_linear(run, example, trainable=setting == "trainable")


def check_linear(run, example, trainable):
    wide = example.to(torch.float64)
    for x in (example, wide):
        for name, tensor in x.tensors.items():
            tensor.requires_grad_(trainable or name == "hidden")
    actual = run(example)
    eager, oracle = (
        with_grads(strip(linear_reference(**x.tensors, labels=x.labels, **x.options)), x) for x in (example, wide)
    )
    for name, value in actual.items():
        assert_matches(value, eager[name], oracle[name], name=name)


def with_grads(result, example):
    trained = {name: x for name, x in example.tensors.items() if x.requires_grad}
    return outputs_and_grads(result, replace(example, tensors=trained))


def strip(result):
    """The references return None for an entropy that was not asked for."""
    found = tuple(x for x in result if x is not None)
    return found if len(found) > 1 else found[0]


# --- the other ops ----------------------------------------------------------------------------------------------------


def worthwhile(name, case, backend, dtype):
    """Interpreted, the other dtypes are tried in the case that has everything; attention has backends of its own.

    fp16, which differs from bf16 in its range, is for what takes logits or hidden states.
    """
    if name == "packed_attention":
        return dtype != torch.float16 and not dispatch.without_attention(backend, DEVICE, dtype)
    if dtype == torch.float16 and (
        name in ("segment_scan", "gae") or ("everything" not in case and "plain" not in case)
    ):
        return False
    if (backend, dtype) == ("cpp", torch.float64) and name not in ("segment_scan", "gae"):
        return False
    slow = backend == "triton" and INTERPRETED and name in ("divergence", "linear_divergence", "policy_loss")
    return not slow or dtype == torch.float32 or "everything" in case


MATRIX = [
    (name, case, backend, dtype)
    for name, op in OPS.items()
    if name not in ("token_logps", "linear_logps", "linear_loss")
    for case, backend, dtype in product(op.cases, op.backends, DTYPES)
    if worthwhile(name, case, backend, dtype)
]


@pytest.mark.parametrize(("name", "case", "backend", "dtype"), MATRIX, ids=str)
def test_op(name, case, backend, dtype):
    op = OPS[name]
    example = op.cases[case](ROWS.get(backend, 0) // 3 + 10, dtype).on(place(backend))
    actual = with_gradients(op.run(example, backend), example)
    eager, oracle = (with_gradients(op.define(x), x) for x in (example, example.to(torch.float64)))
    towards_zero = backend == "triton" and INTERPRETED and dtype == torch.bfloat16  # the interpreter's rounding
    for key, value in actual.items():
        if value.dim() == 0:
            check_total(value, eager[key], oracle[key])
        else:
            assert_matches(value, eager[key], oracle[key], name=key, factor=max(op.factor, 4.0 * towards_zero))
            assert oracle[key].abs().max() > 0


def check_total(value, eager, oracle):
    """Eager's total may be right by luck; what its terms lose is a few ulp of the largest."""
    slack = 64 * torch.finfo(value.dtype).eps * max(1.0, abs(oracle.item()))
    assert value.dtype == eager.dtype and abs(value - oracle) <= 2 * abs(eager - oracle) + slack


def test_every_op_has_a_place_in_the_matrix():
    scored_by_trl_names = {"selective_log_softmax", "entropy_from_logits"}
    drawn = {"sample", "linear_sample", "sample_keys", "uniforms"}  # tokens, not gradients: test_sample.py
    assert set(ops.__all__) == {*OPS, "whiten", *scored_by_trl_names, *drawn}, "a new op needs an entry in OPS"
