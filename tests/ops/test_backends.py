"""Every op on every backend, in every dtype, in every case: within twice eager's own error against float64.

Sizes are odd on purpose: 507 rows and 252 or 507 columns are no multiple of a tile, 123 is odd, and rows of odd width
start unaligned. Fresh memory and masked inputs are NaN. Without a GPU Triton is interpreted. A new backend is
one entry of BACKENDS, a new case one of ``fastalign.testing.CASES``, a new op one of OPS.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch

from fastalign import ops
from fastalign.losses.preference import LOSSES as PAIR_LOSSES
from fastalign.ops import attention, dispatch, linear_logps, linear_loss, token_logps
from fastalign.ops._functors import FUNCTORS, Knobs
from fastalign.ops.attention import reference as attention_reference
from fastalign.ops.divergence import reference as divergence_reference
from fastalign.ops.linear_divergence import reference as linear_divergence_reference
from fastalign.ops.linear_logps import reference as linear_reference
from fastalign.ops.policy_loss import reference as policy_reference
from fastalign.ops.preference_loss import reference as preference_reference
from fastalign.ops.scan import gae_reference
from fastalign.ops.scan import reference as scan_reference
from fastalign.ops.token_logps import reference as token_reference
from fastalign.testing import (
    CASES,
    HIDDEN_ONLY,
    Example,
    assert_matches,
    attention_example,
    linear_example,
    logits_example,
    outputs_and_grads,
    pairs_example,
    policy_example,
    scan_example,
    two_stream_example,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
BACKENDS = ["torch", "cpp", "triton"]
HERE = [name for name in BACKENDS if not dispatch.missing(name)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
# The interpreter runs a Triton program at a time: few rows there.
ROWS = {"torch": 123, "cpp": 123, "triton": 13}
# The weight trains and memory is ample, or the head is frozen and several chunks are needed.
SETTINGS = ["trainable", "frozen-tight"]
MEMORY = {"torch": 800_000, "cpp": 100_000, "triton": 10_000}

on_backends = pytest.mark.parametrize("backend", HERE)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_tested_here(backend):
    """One skip, with its reason, for all cases of a backend that is not usable here."""
    if why := dispatch.missing(backend):
        pytest.skip(f"{backend}: {why}")


def place(backend):
    """CUDA kernels want CUDA tensors, native ones want them on the CPU."""
    return "cpu" if backend == "cpp" else DEVICE


def logits_case(name):
    return not any(special in CASES[name] for special in HIDDEN_ONLY)


@on_backends
@in_dtypes
@pytest.mark.parametrize("case", [*filter(logits_case, CASES)])
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


@on_backends
@in_dtypes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_linear_logps(backend, case, dtype, setting):
    example = linear_example(case, ROWS[backend], 123, 252, dtype, place(backend))
    options = {"backend": backend, "memory": MEMORY[backend] if setting == "frozen-tight" else None}

    def run(x):
        return with_grads(linear_logps(**x.tensors, labels=x.labels, **x.options, **options), x)

    check_linear(run, example, trainable=setting == "trainable")


@on_backends
@in_dtypes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_linear_loss(backend, case, dtype, setting):
    """The sum of upstream gradient times statistic is a loss like any other."""
    example = linear_example(case, ROWS[backend], 123, 252, dtype, place(backend))
    options = {"backend": backend, "memory": MEMORY[backend] if setting == "frozen-tight" else None}

    def run(x):
        def loss_fn(stats):
            score = (stats.logps * x.grad_logps[stats.rows]).sum()
            return score if stats.entropy is None else score + (stats.entropy * x.grad_entropy[stats.rows]).sum()

        loss, stats = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, **x.options, **options)
        trained = [name for name, tensor in x.tensors.items() if tensor.requires_grad]
        made = torch.autograd.grad(loss, [x.tensors[name] for name in trained])
        found = {"logps": stats.logps, **{f"d_{name}": grad for name, grad in zip(trained, made, strict=True)}}
        return found if stats.entropy is None else {**found, "entropy": stats.entropy}

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
    """The references always return a pair."""
    return result if result[1] is not None else result[0]


# --- the other ops ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """A column of the matrix: examples by case for a number of rows and a dtype, the op, its definition.

    Both return outputs by name; the op is told its backend. ``factor`` is what it may err more than eager: in fp32 more
    than 2 where few differences of log-probs, or one large ratio, decide which of the two was lucky.
    """

    cases: dict[str, Callable[[int, torch.dtype], Example]]
    run: Callable[[Example, str], dict]
    define: Callable[[Example], dict]
    backends: list[str]
    factor: float = 2.0


def given(x):
    return {**x.tensors, **x.constants, **x.options}


def chosen(cases, **choices):
    """Example makers for every case and every choice of each option, named by them."""

    def maker(make, picked, num_rows, dtype):
        x = make(num_rows, dtype)
        return replace(x, options={**x.options, **picked})

    named = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    return {
        "-".join([case, *(str(getattr(v, "__name__", v)) for v in picked.values())]): partial(maker, make, picked)
        for case, make in cases.items()
        for picked in named
    }


def plain_value(op):
    return lambda x, backend: {"value": op(**given(x), backend=backend)}


STREAMS = ("plain", "masked", "softcap", "row_temperature", "level", "everything")
LOGITS_STREAMS = {case: lambda rows, dtype, case=case: two_stream_example(case, rows, 507, dtype) for case in STREAMS}
HIDDEN_STREAMS = {
    case: lambda rows, dtype, case=case: two_stream_example(case, rows, 252, dtype, width=37)
    for case in ("plain", "everything")
}
KINDS = ["forward_kl", "reverse_kl", "jsd"]


def run_policy_loss(x, backend):
    loss, stats = ops.policy_loss(**given(x), backend=backend)
    return {"loss": loss, "logps": stats.logps}


def define_policy_loss(x):
    rows = {name: x.options.get(name) for name in ("weights", "advantages", "old_logps", "ref_logps")}
    scaling = {name: x.options[name] for name in ("temperature", "softcap") if name in x.options}
    coefs = (x.options.get("kl_coef", 0.0), x.options.get("entropy_coef", 0.0))
    knobs = Knobs(0.8, 1.2, float("inf"), 1.0, 1.05, *coefs)
    settings = {"loss": x.options["loss"], "kl_estimator": x.options.get("kl_estimator", "k3"), "knobs": knobs}
    loss = policy_reference(*x.tensors.values(), x.options["labels"], *rows.values(), **settings, **scaling)
    logps, _ = token_reference(*x.tensors.values(), x.options["labels"], **scaling)
    return {"loss": loss, "logps": logps.detach()}


def policy_case(num_rows, dtype, case, loss, **coefs):
    x = policy_example(case, num_rows, 252, dtype)
    rows = {"advantages": None} if loss == "sft" else {}
    return replace(x, options={**x.options, **rows, "loss": loss, **coefs})


POLICIES = {f"{loss}-plain": partial(policy_case, case="plain", loss=loss) for loss in FUNCTORS}
POLICIES |= {
    f"{loss}-everything": partial(policy_case, case="everything", loss=loss, kl_coef=0.3, entropy_coef=0.1)
    for loss in FUNCTORS
}
POLICIES["ppo-k2"] = partial(policy_case, case="masked", loss="ppo", kl_coef=0.3, kl_estimator="k2")
PAIRS = {case: lambda _, dtype, case=case: pairs_example(case, 507, dtype) for case in ("plain", "everything")}
SCANS = {
    name: lambda _, dtype, decay=decay: scan_example(decay, dtype)
    for name, decay in {"sums": 1.0, "discount": 0.93, "per_token": None}.items()
}


def gae_case(_, dtype, bootstrap):
    x = scan_example(1.0, dtype, ("rewards", "values"))
    last = torch.linspace(-1, 1, len(x.options["cu_seqlens"]) - 1) if bootstrap else None
    return replace(x, options={"cu_seqlens": x.options["cu_seqlens"], "gamma": 0.99, "lam": 0.95, "last_values": last})


def both(result):
    return dict(zip(("advantages", "returns"), result, strict=True))


HEADS = {"one_head": (1, 1, 3), "grouped": (6, 3, 16)}
OPS = {
    "divergence": Op(
        chosen(LOGITS_STREAMS, kind=KINDS),
        plain_value(ops.divergence),
        lambda x: {"value": divergence_reference(**given(x))},
        HERE,
        factor=3.0,
    ),
    "linear_divergence": Op(
        chosen(HIDDEN_STREAMS, kind=KINDS),
        plain_value(ops.linear_divergence),
        lambda x: {"value": linear_divergence_reference(**given(x))},
        HERE,
        factor=3.0,
    ),
    "policy_loss": Op(POLICIES, run_policy_loss, define_policy_loss, HERE, factor=4.0),
    "preference_loss": Op(
        chosen(PAIRS, loss_fn=list(PAIR_LOSSES.values())),
        lambda x, backend: {"loss": ops.preference_loss(**given(x), backend=backend)[0]},
        lambda x: {"loss": preference_reference(**given(x))},
        HERE,
    ),
    "segment_scan": Op(
        SCANS,
        lambda x, backend: {"y": ops.segment_scan(**given(x), backend=backend)},
        lambda x: {"y": scan_reference(**given(x))},
        HERE,
    ),
    "gae": Op(
        {name: partial(gae_case, bootstrap=name == "bootstrap") for name in ("ended", "bootstrap")},
        lambda x, backend: both(ops.gae(**given(x), backend=backend)),
        lambda x: both(gae_reference(**given(x))),
        HERE,
    ),
    "packed_attention": Op(
        {name: lambda _, dtype, heads=heads: attention_example(*heads, dtype) for name, heads in HEADS.items()},
        lambda x, backend: {"out": ops.packed_attention(**given(x), backend=backend)},
        lambda x: {"out": attention_reference(**given(x))},
        list(attention.BACKENDS),
    ),
}


def worthwhile(name, case, backend, dtype):
    """Interpreted, the other dtypes are tried in the case that has everything; attention has backends of its own."""
    if name == "packed_attention":
        return not attention.unavailable(backend, DEVICE, dtype)
    slow = backend == "triton" and INTERPRETED and name in ("divergence", "linear_divergence", "policy_loss")
    return not slow or dtype == torch.float32 or "everything" in case


MATRIX = [
    (name, case, backend, dtype)
    for name, op in OPS.items()
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
    named = {*OPS, "token_logps", "linear_logps", "linear_loss", "whiten", *scored_by_trl_names}
    assert set(ops.__all__) == named, "a new op needs an entry in OPS"
