"""The native kernels against float64, at every instruction set that this machine has."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp import token_logps as sweep
from fastalign.ops.rows import Coefficients, coefficients

if reason := cpp.unavailable():
    pytest.skip(reason, allow_module_level=True)

from fastalign import _C

N = 9
ROWS = torch.arange(N)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "rows": {"temperature": 0.5 + ROWS / 8},
    "capped": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3},
    "capped_rows": {"softcap": 30.0, "temperature": 0.5 + ROWS / 8},
}


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_level()
    try:
        _C.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_cpu_level(before)


def case(num_labels: int, dtype: torch.dtype, rows: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, and upstream gradients of both signs."""
    generator = torch.Generator().manual_seed(num_labels)
    logits = (4 * torch.randn(rows, num_labels, generator=generator)).to(dtype)
    labels = torch.randint(0, num_labels, (rows,), generator=generator)
    grads = torch.randn(2, rows, generator=generator)
    return logits, labels, grads[0], grads[1]


def eager(logits: Tensor, labels: Tensor, dtype: torch.dtype, temperature=1.0, softcap=None, logit_scale=1.0):
    """The definition in ``dtype``: log-probs and entropies."""
    z = logits.to(dtype) * logit_scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    z = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    log_p = z.log_softmax(-1)
    return log_p.gather(1, labels[:, None])[:, 0], -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(-1)


def eager_with_grad(logits: Tensor, labels: Tensor, g: Tensor, e: Tensor, dtype: torch.dtype, **options):
    x = logits.to(dtype).requires_grad_()
    logps, entropy = eager(x, labels, dtype, **options)
    (grad,) = torch.autograd.grad((logps * g).sum() + (entropy * e).sum(), x)
    return logps.detach(), entropy.detach(), grad


def native(logits: Tensor, labels: Tensor, g: Tensor, e: Tensor | None, out: Tensor | None = None, **options):
    """Forward and backward, the gradient into NaN-filled memory."""
    logps, entropy, top, logsum, *_ = sweep.forward(logits, labels, entropy=True, **options)
    out = torch.full_like(logits, torch.nan) if out is None else out
    sweep.backward(out, logits, labels, top, logsum, coefficients(g, entropy=entropy, grad_entropy=e), **options)
    return logps, entropy, out


def worst(x: Tensor, y: Tensor) -> float:
    return (x.double() - y).abs().max().item()


@pytest.mark.parametrize("num_labels", [1, 7, 252, 507, 32001])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(level, dtype, options, num_labels, nan_memory):
    options = OPTIONS[options]
    logits, labels, g, e = case(num_labels, dtype)
    expected = eager_with_grad(logits, labels, g, e, torch.float64, **options)
    # Straightforward code gets the same rounded inputs, computes in the dtype of the outputs and rounds its gradient.
    usual = eager_with_grad(logits, labels, g, e, torch.float32, **options)
    ours = native(logits, labels, g, e, **options)
    # The constant: 8 ulp of an lse near 10, for cases where the usual code happens to be exact.
    ulp = torch.finfo(torch.float32).eps
    for name, mine, theirs, oracle in zip(("logps", "entropy"), ours, usual, expected, strict=False):
        assert worst(mine, oracle) <= 2 * worst(theirs, oracle) + 80 * ulp, name
    slack = 2 * worst(usual[2].to(dtype), expected[2]) + 16 * ulp * expected[2].abs().max().item()
    assert worst(ours[2], expected[2]) <= slack
    relative = (ours[2].double() - expected[2]).norm() / expected[2].norm().clamp(min=1e-12)
    assert num_labels == 1 or relative < {torch.bfloat16: 3e-3, torch.float16: 1e-3}.get(dtype, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_gradient_of_either_output_alone(level, dtype, entropy):
    logits, labels, g, e = case(507, dtype)
    g, e = (torch.zeros(N), e) if entropy else (g, torch.zeros(N))
    expected = eager_with_grad(logits, labels, g, e, torch.float64)[2]
    out = native(logits, labels, g, e if entropy else None)[2]
    assert worst(out, expected) <= 2 * torch.finfo(dtype).eps * expected.abs().max() + 2e-6


@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_labels_outside_the_vocabulary(level, dtype, label_dtype, softcap, nan_memory):
    logits, labels, g, e = case(507, dtype)
    labels[:5] = torch.tensor([-100, -1, 507, -2, -100])
    labels = labels.to(label_dtype)
    logits[[0, 4]] = torch.nan
    g[[0, 4]] = torch.nan
    logps, entropy, out = native(logits, labels, g, e, softcap=softcap)
    expected, expected_entropy = eager(logits, labels.clamp(0, 506).long(), torch.float64, softcap=softcap)

    assert logps[[0, 1, 4]].tolist() == [0, 0, 0] and logps[2:4].isnan().all()
    assert worst(logps[5:], expected[5:]) < 1e-5
    assert entropy[[0, 4]].tolist() == [0, 0] and worst(entropy[[1, 2, 3, 5]], expected_entropy[[1, 2, 3, 5]]) < 1e-5
    assert (out[[0, 4]] == 0).all() and out[2:4].isnan().all() and out[5:].isfinite().all()
    # Without its target a row's gradient sums to -g (times nothing else here), with it to 0.
    if softcap is None and dtype == torch.float32:
        torch.testing.assert_close(out[1].sum().float(), -g[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out[5].sum().float(), torch.tensor(0.0), atol=1e-5, rtol=0)
    top, logsum = sweep.forward(logits, labels)[2:4]
    assert top[[0, 4]].tolist() == logsum[[0, 4]].tolist() == [0, 0]


def test_zero_coefficients_are_not_multiplied(level):
    logits, labels, g, e = case(507, torch.float32)
    g[0], e[0] = -0.0, 0.0
    g[1] = torch.nan
    _, entropy, top, logsum, *_ = sweep.forward(logits, labels, entropy=True)
    logits[0] = torch.nan
    out = torch.full_like(logits, torch.nan)
    sweep.backward(out, logits, labels, top, logsum, coefficients(g, entropy=entropy, grad_entropy=e))
    assert (out[0] == 0).all() and out[1].isnan().all() and out[2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "capped_rows"])
def test_in_place_is_bitwise_the_same(level, dtype, options):
    options = OPTIONS[options]
    logits, labels, g, e = case(20011, dtype)
    expected = native(logits, labels, g, e, **options)[2]
    native(logits, labels, g, e, out=logits, **options)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_labels", [131, 20011])
def test_strides_do_not_change_a_bit(level, dtype, num_labels):
    logits, labels, g, e = case(num_labels, dtype)
    expected = native(logits, labels, g, e, temperature=0.7)
    columns = torch.empty(num_labels, N, dtype=dtype).T.copy_(logits)
    every_other = torch.full((N, 2 * num_labels + 3), torch.nan, dtype=dtype)[:, 1:-2:2].copy_(logits)
    padded = torch.full((N, num_labels + 5), torch.nan, dtype=dtype)[:, 1 : num_labels + 1].copy_(logits)
    for view in (columns, every_other, padded):
        out = torch.full_like(padded._base, torch.nan)[:, 1 : num_labels + 1]
        for mine, theirs in zip(native(view, labels, g, e, out=out, temperature=0.7), expected, strict=True):
            assert torch.equal(mine, theirs)
        assert out._base[:, 0].isnan().all() and out._base[:, num_labels + 1 :].isnan().all()
        native(view, labels, g, e, out=view, temperature=0.7)
        assert torch.equal(view, expected[2])


@pytest.mark.parametrize("rows", [1, N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_company_do_not_change_a_bit(level, dtype, rows):
    logits, labels, g, e = case(50021, dtype, rows)  # four slabs
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(native(logits, labels, g, e))
    finally:
        torch.set_num_threads(threads)
    alone = [native(*(x[i : i + 1] for x in (logits, labels, g, e))) for i in range(rows)]
    results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_banned_tokens(level, dtype, temperature):
    logits, labels, g, e = case(20011, dtype)
    banned = torch.ones(20011, dtype=torch.bool)
    banned[17003:17903] = False  # the first slab holds nothing else
    labels = 17003 + labels % 900
    logits[:, banned] = -torch.inf
    allowed = logits[:, ~banned].double()
    expected = eager_with_grad(allowed, labels - 17003, g, e, torch.float64, temperature=temperature)
    logps, entropy, out = native(logits, labels, g, e, temperature=temperature)
    assert worst(logps, expected[0]) < 1e-5 and worst(entropy, expected[1]) < 1e-5
    assert (out[:, banned] == 0).all()
    assert worst(out[:, ~banned], expected[2]) <= torch.finfo(dtype).eps * expected[2].abs().max() + 1e-5


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_high_logit_levels(level, offset, temperature):
    logits, labels, g, e = case(507, torch.float32)
    logits += offset
    expected = eager_with_grad(logits, labels, g, e, torch.float64, temperature=temperature)
    usual = eager_with_grad(logits, labels, g, e, torch.float32, temperature=temperature)
    ours = native(logits, labels, g, e, temperature=temperature)
    for mine, theirs, oracle in zip(ours, usual, expected, strict=True):
        assert worst(mine, oracle) <= 2 * worst(theirs, oracle) + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_spoiled_row_spoils_no_other(level, dtype, poison):
    logits, labels, g, e = case(20011, dtype)
    clean = native(logits, labels, g, e)
    logits[3, 20009] = poison
    spoiled = native(logits, labels, g, e)
    assert all(x[3].isnan().any() for x in spoiled)
    others = ROWS != 3
    assert all(torch.equal(x[others], y[others]) for x, y in zip(spoiled, clean, strict=True))


@pytest.mark.parametrize("options", ["plain", "rows", "capped"])
def test_the_largest_logit_is_recognised_exactly(level, options):
    logits = case(507, torch.float32)[0]
    top = logits.argmax(-1)
    for chosen, is_top1 in ((top, True), ((top + 1) % 507, False)):
        logps, _, _, logsum, *_ = sweep.forward(logits, chosen, **OPTIONS[options])
        assert ((logps + logsum == 0) == is_top1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_widened_exactly(level, dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    halves = halves[halves.isfinite()][:, None]
    top = sweep.forward(halves, torch.zeros(len(halves), dtype=torch.int64))[2]
    assert torch.equal(top, halves[:, 0].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_narrowed_to_the_nearest_even(level, dtype):
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(-(2**15), 2**15) * 2**16 + 2**15  # halfway between two bf16
    near_halves = (bits[:50_000] % 2**28) + 0x33000000  # the range of fp16, subnormals included
    g = torch.cat([bits, ties, near_halves]).to(torch.int32).view(torch.float32)
    g = g[g.isfinite() & (g != 0)]
    # One column and p = 1: the gradient is -g, rounded.
    logits = torch.zeros(len(g), 1, dtype=dtype)
    out = torch.full_like(logits, torch.nan)
    zeros = torch.zeros(len(g))
    sweep.backward(out, logits, torch.full((len(g),), -1), zeros, zeros, Coefficients(g))
    assert torch.equal(out[:, 0], -g.to(dtype))


def test_no_rows(level):
    logits, labels = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    outputs = sweep.forward(logits, labels, entropy=True, total=True, top1=True)
    assert all(x.shape == (0,) for x in outputs)
    sweep.backward(logits, logits, labels, outputs[2], outputs[3], Coefficients(torch.empty(0)))


def test_all_masked(level, nan_memory):
    logits, labels = torch.full((3, 507), torch.nan), torch.full((3,), -100)
    logps, _, top, logsum, *_ = sweep.forward(logits, labels)
    sweep.backward(logits, logits, labels, top, logsum, Coefficients(torch.full((3,), torch.nan)))
    assert not logps.any() and not logits.any()


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"expected logits \[N, V\].*\(2, 3, 4\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"labels \[N\].*\(3,\)"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), r"\(2, 0\)"),
        (torch.zeros(2, 3), torch.zeros(2), "int32 or int64 labels, got torch.float32 and torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), "got torch.int32"),
        (
            torch.zeros(2, 3).double(),
            torch.zeros(2, dtype=torch.int64),
            "expected fp32, bf16 or fp16 logits .*float64",
        ),
        (
            torch.zeros(2, 3, device="meta"),
            torch.zeros(2, dtype=torch.int64),
            "on cpu tensors of one device, got logits on meta",
        ),
    ],
)
def test_wrong_arguments(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        sweep.forward(logits, labels)


def test_wrong_arguments_of_backward():
    logits, labels, g, _ = case(7, torch.float32)
    top, logsum = sweep.forward(logits, labels)[2:4]
    with pytest.raises(ValueError, match=r"out must be torch\.float32"):
        sweep.backward(logits.double(), logits, labels, top, logsum, Coefficients(g))
    with pytest.raises(ValueError, match=r"beta must be \[9\]"):
        sweep.backward(logits, logits, labels, top, logsum, Coefficients(g, None, g[1:]))


@pytest.mark.parametrize("wanted", ["scalar", "mmx"])
def test_the_environment_forces_a_level(wanted):
    # The extension alone: torch takes seconds to import and has no part in this.
    code = f"""
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("fastalign._C", {_C.__file__!r})
spec.loader.exec_module(module := module_from_spec(spec))
print(module.cpu_level())
"""
    env = os.environ | {"FASTALIGN_CPU": wanted}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if wanted == "scalar":
        assert run.stdout.strip() == "scalar", run.stderr
    else:
        assert "FASTALIGN_CPU must be avx512, avx2 or scalar, not 'mmx'" in run.stderr
