"""Divergences from hidden states, traced, and what both ops refuse."""

import pytest
import torch
from divergence_cases import LABELS, N, of_kinds

from fastalign.ops import dispatch, divergence, linear_divergence
from fastalign.ops.divergence import _backward_op, _op
from fastalign.ops.linear_divergence import _backward_op as linear_backward
from fastalign.ops.linear_divergence import _op as linear_op
from fastalign.ops.linear_divergence import reference as linear_eager
from fastalign.ops.linear_logps import reference as logps_eager
from fastalign.ops.linear_logps import scale_directions_op
from fastalign.testing import assert_matches

pytestmark = pytest.mark.usefixtures("nan_memory")

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def linear_case(dtype, ref_dtype=None, rows=61, frozen=False):
    new = torch.Generator().manual_seed(7)
    labels = torch.zeros(rows, dtype=torch.int64)
    labels[torch.rand(rows, generator=new) < 0.4] = -100
    hidden, ref_hidden = torch.randn(rows, 37, generator=new), torch.randn(rows, 21, generator=new)
    hidden[labels == -100], ref_hidden[labels == -100] = torch.nan, torch.nan
    weight, bias = torch.randn(3001, 37, generator=new) / 3, torch.randn(3001, generator=new)
    ref_weight, ref_bias = torch.randn(3001, 21, generator=new) / 3, torch.randn(3001, generator=new)
    ours = {"hidden": hidden, "weight": weight, "bias": bias}
    ours = {k: x.to(dtype).requires_grad_(k == "hidden" or not frozen) for k, x in ours.items()}
    theirs = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    theirs = {k: x.to(ref_dtype or dtype) for k, x in theirs.items()}
    tau = 0.5 + torch.rand(rows, generator=new)
    return ours, theirs, {"labels": labels, "temperature": tau, "softcap": 5.0}, torch.randn(rows, generator=new)


def run_linear(op, ours, theirs, options, g, **more):
    value = op(**ours, **theirs, **options, **more)
    trained = [x for x in ours.values() if x.requires_grad]
    return value.detach(), *torch.autograd.grad((value * g.to(value.dtype)).sum(), trained)


@pytest.mark.parametrize("backend", dispatch.available("linear_divergence")[:2])
@of_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("setting", ["trainable", "tight", "frozen", "frozen-tight"])
def test_linear_matches_float64(backend, kind, dtype, setting):
    ours, theirs, options, g = linear_case(dtype, frozen="frozen" in setting)
    wide = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in ours.items()}
    more = {"kind": kind, "mix": 0.3}
    settings = {"backend": backend, "memory": 300_000 if "tight" in setting else None}
    actual = run_linear(linear_divergence, ours, theirs, options, g, **more, **settings)
    rival = run_linear(linear_eager, ours, theirs, options, g, **more)
    exact = run_linear(linear_eager, wide, {k: x.double() for k, x in theirs.items()}, options, g, **more)
    for name, *results in zip(["value", *ours], actual, rival, exact, strict=False):
        assert_matches(*results, name=name)
    masked = options["labels"] == -100
    assert not actual[0][masked].any() and not actual[1][masked].any()


TIGHT = {"torch": 8_000_000, "cpp": 300_000}
"""A few slabs of the vocabulary; the torch sweep's temporaries are counted."""


def with_tokens(ours, theirs, options, **more):
    return linear_divergence(**ours, **theirs, **options, tokens=True, **more)


def without_tokens(ours, theirs, options, **more):
    """The same by the definitions, in three passes."""
    value = linear_eager(**ours, **theirs, **options, **more)
    logps, entropy = logps_eager(**ours, **options, entropy=True)
    ref_hidden, ref_weight, ref_bias = theirs.values()
    reference, *_ = logps_eager(ref_hidden, ref_weight, bias=ref_bias, **{**options, "softcap": None})
    return value, logps, reference, entropy.detach()


@pytest.mark.parametrize("backend", dispatch.available("linear_divergence")[:2])
@of_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("setting", ["trainable", "frozen-tight"])
def test_tokens_come_with_the_divergence(backend, kind, dtype, setting):
    """Log-probs under both models, entropy, and the gradient of divergence and log-prob together."""
    ours, theirs, options, g = linear_case(dtype, frozen="frozen" in setting)
    wide = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in ours.items()}
    exact = {k: x.double() for k, x in theirs.items()}
    settings = {"backend": backend, "memory": TIGHT[backend] if "tight" in setting else None}
    results = []
    for op, streams, more in (
        (with_tokens, (ours, theirs), settings),
        (without_tokens, (ours, theirs), {}),
        (without_tokens, (wide, exact), {}),
    ):
        value, logps, *others = op(*streams, options, kind=kind, **more)
        trained = [x for x in streams[0].values() if x.requires_grad]
        score = (value * g.to(value.dtype)).sum() + (logps * g.flip(0).to(value.dtype)).sum()
        results.append([value.detach(), logps.detach(), *others, *torch.autograd.grad(score, trained)])
    for name, *found in zip(["value", "logps", "ref_logps", "entropy", *ours], *results, strict=False):
        assert_matches(*found, name=name)
    assert not any(x.requires_grad for x in results[0][2:4])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
def test_linear_streams_keep_their_dtypes(dtypes):
    ours, theirs, options, g = linear_case(*dtypes)
    value, *grads = run_linear(linear_divergence, ours, theirs, options, g, kind="reverse_kl")
    logits = (ours["hidden"] @ ours["weight"].T + ours["bias"]).detach()
    ref_logits = theirs["ref_hidden"] @ theirs["ref_weight"].T + theirs["ref_bias"]
    expected = divergence(logits, ref_logits, kind="reverse_kl", **options)
    assert value.dtype == expected.dtype and torch.allclose(value, expected, rtol=2e-2)
    assert [x.dtype for x in grads] == [dtypes[0]] * 3


def test_linear_under_autocast():
    ours, theirs, options, g = linear_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, *grads = run_linear(linear_divergence, ours, theirs, options, g)
    narrow = [{k: x.detach().bfloat16() for k, x in part.items()} for part in (ours, theirs)]
    assert torch.equal(value, linear_divergence(**narrow[0], **narrow[1], **options))
    assert [x.dtype for x in grads] == [torch.float32] * 3


def test_nothing_scored_and_no_rows():
    weight = torch.randn(35, 5, requires_grad=True)
    for rows in (0, 3):
        hidden, labels = torch.full((rows, 5), torch.nan, requires_grad=True), torch.full((rows,), -100)
        value = linear_divergence(hidden, weight, hidden, weight, labels=labels)
        grads = torch.autograd.grad(value.sum(), [hidden, weight])
        assert value.shape == (rows,) and not value.any() and not any(x.any() for x in grads)
        assert not divergence(hidden, hidden, labels=labels.clone()).any()


def test_the_reference_gets_no_gradient_and_nothing_is_differentiated_twice():
    logits, ref_logits = torch.randn(2, N, 35, requires_grad=True).unbind()
    hidden, weight = torch.randn(N, 5, requires_grad=True), torch.randn(35, 5, requires_grad=True)
    for value, x in (
        (divergence(logits, ref_logits), logits),
        (linear_divergence(hidden, weight, hidden * 2, weight), hidden),
        (linear_divergence(hidden, weight.detach(), hidden * 2, weight), hidden),
    ):
        (grad,) = torch.autograd.grad(value.sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()
    assert torch.autograd.grad(divergence(logits, ref_logits).sum(), [ref_logits], allow_unused=True) == (None,)


@of_kinds
def test_custom_ops(kind):
    logits, ref_logits = torch.randn(N, 35, requires_grad=True), torch.randn(N, 35)
    args = (logits, ref_logits, LABELS, torch.linspace(0.5, 1.5, N), 1.0, kind, 0.3, 5.0, None, None, None, None)
    torch.library.opcheck(_op, args, test_utils=CHECKS)
    saved = (_op(*args)[1], torch.randn(N))
    torch.library.opcheck(_backward_op, (logits.detach(), *args[1:], *saved), test_utils=CHECKS)


@pytest.mark.parametrize("trainable", [True, False])
def test_linear_custom_ops(trainable):
    hidden, weight = torch.randn(N, 5, requires_grad=True), torch.randn(35, 5, requires_grad=trainable)
    ref = (torch.randn(N, 3), torch.randn(35, 3), None)
    options = (LABELS, None, 0.7, "jsd", 0.3, 5.0, None, 1.0, 1.0, torch.float32, torch.float32, None, None, None, None)
    args = (hidden, weight, None, *ref, *options)
    for tokens in (False, True):
        torch.library.opcheck(linear_op, (*args, tokens, True, trainable), test_utils=CHECKS)
    *_, stats, directions = linear_op(*args, False, True, trainable)
    for g in (None, torch.randn(N)):
        plain = (hidden.detach(), weight.detach(), *args[2:], stats, torch.randn(N), g, True, trainable, False)
        torch.library.opcheck(linear_backward, plain, test_utils=CHECKS)
    if not trainable:
        torch.library.opcheck(
            scale_directions_op, (hidden.detach(), None, directions, torch.randn(N)), test_utils=CHECKS
        )


@pytest.mark.parametrize("op", ["logits", "hidden"])
def test_one_graph(op):
    ref_hidden, ref_weight = torch.randn(N, 3), torch.randn(35, 3)

    def function(hidden, weight):
        if op == "hidden":
            return linear_divergence(hidden, weight, ref_hidden, ref_weight, labels=LABELS, kind="jsd").sum()
        return divergence(hidden @ weight.T, ref_hidden @ ref_weight.T, labels=LABELS, temperature=0.7).square().sum()

    inputs = [torch.randn(N, 5, requires_grad=True), torch.randn(35, 5, requires_grad=True)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(loss := f(*inputs), *torch.autograd.grad(loss, inputs)) for f in (function, compiled)]
    for eagerly, traced in zip(*results, strict=True):
        assert torch.allclose(eagerly, traced, rtol=1e-5, atol=1e-6) and traced.abs().max() > 0


WRONG = {
    "logits must be": {"logits": torch.zeros(2, 3, 35)},
    "ref_logits must be": {"ref_logits": torch.zeros(N, 34)},
    "ref_logits is on meta": {"ref_logits": torch.zeros(N, 35, device="meta")},
    "ref_logits must be float32": {"ref_logits": torch.zeros(N, 35, dtype=torch.int64)},
    'kind must be "forward_kl", "reverse_kl" or "jsd", got \'kl\'': {"kind": "kl"},
    'mix must lie inside .*use kind="forward_kl"': {"kind": "jsd", "mix": 0.0},
    'mix must lie inside .*use kind="reverse_kl"': {"kind": "jsd", "mix": 1.0},
    "got 1.5": {"kind": "jsd", "mix": 1.5},
    "labels must be": {"labels": torch.zeros(N + 1, dtype=torch.int64)},
    "label 35 at row 0": {"labels": torch.full((N,), 35)},
    "temperature must be positive": {"temperature": 0.0},
    "temperature must be a number": {"temperature": torch.ones(N + 1)},
    "^softcap must be positive": {"softcap": -1.0},
    "ref_softcap must be positive": {"ref_softcap": 0.0},
    "available: ": {"backend": "cuda"},
}
WRONG_LINEAR = {
    "hidden must be": {"hidden": torch.zeros(1, N, 5)},
    r"ref_hidden must be \[N, Dr\]": {"ref_hidden": torch.zeros(N + 1, 3)},
    "of the reference: .*D = 3, got": {"ref_weight": torch.zeros(35, 4)},
    "ref_weight must have the V = 35": {"ref_weight": torch.zeros(36, 3)},
    "process_group": {"process_group": object()},
    "memory must be": {"memory": 0},
    'use kind="reverse_kl"': {"kind": "jsd", "mix": 1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        divergence(**{"logits": torch.zeros(N, 35), "ref_logits": torch.zeros(N, 35), **WRONG[message]})


@pytest.mark.parametrize("message", WRONG_LINEAR)
def test_wrong_linear_arguments_are_named(message):
    right = {"hidden": torch.zeros(N, 5), "weight": torch.zeros(35, 5)}
    right |= {"ref_hidden": torch.zeros(N, 3), "ref_weight": torch.zeros(35, 3)}
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**right, **WRONG_LINEAR[message]})
