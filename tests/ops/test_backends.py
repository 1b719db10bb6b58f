"""Every op on every backend, in every dtype, in every case: within twice eager's own error against float64.

Sizes are odd on purpose: 507 rows and 252 or 507 columns are no multiple of a tile, 123 is odd, and rows of odd width
start unaligned. Fresh memory and masked inputs are NaN.
"""

from dataclasses import replace

import pytest
import torch

from fastalign.ops import dispatch, linear_logps, linear_loss, token_logps
from fastalign.ops.linear_logps import reference as linear_reference
from fastalign.ops.token_logps import reference as token_reference
from fastalign.testing import CASES, HIDDEN_ONLY, assert_matches, linear_example, logits_example, outputs_and_grads

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# The interpreter runs a Triton program at a time: few rows there.
ROWS = {"torch": 123, "cpp": 123, "triton": 13}
# The weight trains and memory is ample, or the head is frozen and several chunks are needed.
SETTINGS = ["trainable", "frozen-tight"]
MEMORY = {"torch": 800_000, "cpp": 100_000, "triton": 10_000}


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request):
    if why := dispatch.missing(request.param):
        pytest.skip(f"{request.param}: {why}")
    return request.param


def logits_case(name):
    return not any(special in CASES[name] for special in HIDDEN_ONLY)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*filter(logits_case, CASES)])
@pytest.mark.parametrize("vocab", [252, 507])
def test_token_logps(backend, case, dtype, vocab):
    example = logits_example(case, ROWS[backend], vocab, dtype)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_linear_logps(backend, case, dtype, setting):
    example = linear_example(case, ROWS[backend], 123, 252, dtype)
    options = {"backend": backend, "memory": MEMORY[backend] if setting == "frozen-tight" else None}

    def run(x):
        return with_grads(linear_logps(**x.tensors, labels=x.labels, **x.options, **options), x)

    check_linear(run, example, trainable=setting == "trainable")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_linear_loss(backend, case, dtype, setting):
    """The sum of upstream gradient times statistic is a loss like any other."""
    example = linear_example(case, ROWS[backend], 123, 252, dtype)
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
