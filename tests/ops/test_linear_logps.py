"""Log-probs from logits and from hidden states: any autograd may follow, wrong arguments are named, no bit depends on
the batch."""

import logging

import pytest
import torch

from fastalign.ops import dispatch, entropy_from_logits, linear_logps, linear_loss, selective_log_softmax, token_logps
from fastalign.ops.linear_logps import reference
from fastalign.testing import assert_matches, linear_example, logits_example, outputs_and_grads

pytestmark = pytest.mark.usefixtures("nan_memory")

N, D, V = 61, 37, 252


def example(case="masked", dtype=torch.float32):
    return linear_example(case, N, D, V, dtype)


def test_any_autograd_may_follow():
    """A loss coupled over all rows, as no chunk could compute it."""
    x = example("everything")
    wide = x.to(torch.float64)

    def loss(logps, entropy):
        return (logps.sum() / 50).tanh() * entropy.square().sum().sqrt() + logps[::3].logsumexp(0)

    def grads(score, y):
        return torch.autograd.grad(score, list(y.tensors.values()))

    ours = grads(loss(*linear_logps(**x.tensors, labels=x.labels, **x.options)), x)
    eager = grads(loss(*reference(**x.tensors, labels=x.labels, **x.options)), x)
    oracle = grads(loss(*reference(**wide.tensors, labels=wide.labels, **wide.options)), wide)
    for name, *results in zip(x.tensors, ours, eager, oracle, strict=True):
        assert_matches(*results, name=name)


@pytest.mark.parametrize("memory", [None, 200_000], ids=["one tile", "slabs and blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", dispatch.available("linear_logps"))
def test_vocabulary_slabs(backend, dtype, memory):
    """3001 columns are three slabs, the last one narrow; 61 rows are several blocks."""
    if memory is not None and backend == "torch":
        memory += 5 * 4 * 3001 * N  # its temporaries count
    x = linear_example("everything", N, D, 3001, dtype)
    wide = x.to(torch.float64)
    results = []
    for op, y in ((linear_logps, x), (reference, x), (reference, wide)):
        options = {"memory": memory, "backend": backend} if op is linear_logps else {}
        results.append(outputs_and_grads(op(**y.tensors, labels=y.labels, **y.options, **options), y))
    for name in results[0]:
        assert_matches(*(result[name] for result in results), name=name)


@pytest.mark.parametrize("frozen", [True, False])
def test_masked_rows_get_exact_zeros(frozen):
    x = example("everything")
    x.tensors["weight"].requires_grad_(not frozen)
    x.tensors["bias"].requires_grad_(not frozen)
    options = {**x.options, "entropy": not frozen}
    result = linear_logps(**x.tensors, labels=x.labels, **options)
    logps = result if frozen else result[0]
    masked = x.labels == -100
    upstream = torch.where(masked, torch.nan, 1.0)  # what belongs to a masked row is never read
    (grad,) = torch.autograd.grad(logps, [x.tensors["hidden"]], upstream)
    assert not logps[masked].any() and not grad[masked].any() and grad[~masked].abs().sum() > 0


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
)
def test_mixed_dtypes(dtypes):
    """GEMMs in the narrower dtype; each gradient in its input's."""
    x = example("plain")
    hidden, weight = (
        x.tensors[n].detach().to(d).requires_grad_() for n, d in zip(("hidden", "weight"), dtypes, strict=True)
    )
    narrow = min(dtypes, key=lambda d: d.itemsize)
    logps = linear_logps(hidden, weight, x.labels)
    alone = linear_logps(hidden.detach().to(narrow), weight.detach().to(narrow), x.labels)
    assert torch.equal(logps, alone.to(logps.dtype))
    assert logps.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    grads = torch.autograd.grad(logps.sum(), [hidden, weight])
    assert tuple(g.dtype for g in grads) == dtypes


def test_retain_graph_and_double_backward():
    x = example()
    tensors = list(x.tensors.values())
    score = linear_logps(**x.tensors, labels=x.labels).sum()
    first = torch.autograd.grad(score, tensors, retain_graph=True)
    second = torch.autograd.grad(score, tensors, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="double backward"):
        second[0].sum().backward()
    frozen = linear_logps(x.tensors["hidden"], x.tensors["weight"].detach(), x.labels).sum()
    (grad,) = torch.autograd.grad(frozen, [x.tensors["hidden"]], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("op", [linear_logps, lambda h, w, y: linear_loss(h, w, y, lambda s: s.logps.sum())[1].logps])
def test_nothing_scored(op):
    for labels in (torch.empty(0, dtype=torch.int64), torch.full((3,), -100)):
        hidden = torch.full((len(labels), D), torch.nan, requires_grad=True)
        assert not op(hidden, torch.randn(V, D), labels).any()
    logps = linear_logps(hidden, torch.randn(V, D, requires_grad=True), labels)
    logps.sum().backward()
    assert not hidden.grad.any()


@pytest.mark.parametrize("backend", dispatch.available("token_logps"))
def test_a_row_alone_has_the_bits_it_has_in_a_batch(backend):
    x = logits_example("everything", 9, 507, torch.float32)
    whole = token_logps(**x.tensors, labels=x.labels, backend=backend, entropy=True)
    (grad,) = torch.autograd.grad((whole[0] * x.grad_logps).sum(), [x.tensors["logits"]])
    for row in range(9):
        one = slice(row, row + 1)
        logits = x.tensors["logits"].detach()[one].clone().requires_grad_()
        alone = token_logps(logits, x.labels[one], backend=backend, entropy=True)
        assert torch.equal(alone[0], whole[0][one]) and torch.equal(alone[1], whole[1][one])
        (g,) = torch.autograd.grad((alone[0] * x.grad_logps[one]).sum(), [logits])
        assert torch.equal(g, grad[one])


@pytest.mark.parametrize("trainable", [True, False])
def test_batch_invariant_covers_the_gemms(trainable):
    x = linear_example("plain", 507, 123, 252, torch.float32)
    weight = x.tensors["weight"].requires_grad_(trainable)

    def run(rows):
        hidden = x.tensors["hidden"].detach()[rows].clone().requires_grad_()
        logps = linear_logps(hidden, weight, x.labels[rows], batch_invariant=True)
        return logps, torch.autograd.grad(logps.sum(), [hidden])[0]

    logps, grad = run(slice(None))
    for rows in (slice(0, 1), slice(33, 34), slice(400, 507)):
        alone = run(rows)
        assert torch.equal(alone[0], logps[rows]) and torch.equal(alone[1], grad[rows])
    plain = linear_logps(x.tensors["hidden"], weight, x.labels)
    assert ((plain - logps).abs() <= 5e-6 * plain.abs()).all()


def test_inplace_backward_writes_into_the_logits_and_says_so():
    x = logits_example("everything", 9, 507, torch.float32)
    options = {**x.options, "entropy": False}
    leaf = x.tensors["logits"]
    (expected,) = torch.autograd.grad((token_logps(leaf, x.labels, **options) * x.grad_logps).sum(), [leaf])
    logits = leaf * 1
    score = (token_logps(logits, x.labels, **options, inplace_backward=True) * x.grad_logps).sum()
    other = logits.square().sum()
    (grad,) = torch.autograd.grad(score, [logits], retain_graph=True)
    assert torch.equal(grad, expected) and grad.data_ptr() == logits.data_ptr()
    for consumer in (other, score):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            consumer.backward(retain_graph=True)


def test_double_backward_through_logits_raises():
    logits = torch.randn(3, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(token_logps(logits, torch.arange(3)).sum(), [logits], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_trl_spellings():
    logits = torch.randn(2, 5, 33, requires_grad=True)
    index = torch.randint(0, 33, (2, 5))
    exact = logits.detach().log_softmax(-1)
    assert torch.allclose(selective_log_softmax(logits, index), exact.gather(-1, index[..., None])[..., 0], atol=1e-6)
    top = exact.topk(3).indices
    assert torch.allclose(selective_log_softmax(logits[:, 1:], top[:, 1:]), exact.gather(-1, top)[:, 1:], atol=1e-6)
    assert torch.allclose(entropy_from_logits(logits), -(exact.exp() * exact).sum(-1), atol=1e-6)
    entropy_from_logits(logits).sum().backward()
    assert logits.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="index must be"):
        selective_log_softmax(logits, index[0])


def test_int32_labels():
    x = example()
    assert torch.equal(linear_logps(**x.tensors, labels=x.labels.int()), linear_logps(**x.tensors, labels=x.labels))


WRONG = {
    "hidden must be": {"hidden": torch.zeros(2, 3, D)},
    "flatten the leading dimensions": {"hidden": torch.zeros(2, 3, D)},
    "hidden must be float32": {"hidden": torch.zeros(N, D, dtype=torch.int64)},
    f"D = {D}, got": {"weight": torch.zeros(V, D + 1)},
    f"V = {V}, got": {"bias": torch.zeros(V + 1)},
    f"N = {N} rows": {"labels": torch.zeros(N + 1, dtype=torch.int64)},
    "labels must be int64": {"labels": torch.zeros(N)},
    "weight is on meta but hidden on cpu": {"weight": torch.zeros(V, D, device="meta")},
    "label 252 at row 3": {"labels": torch.tensor([0, 1, -100, V, -1] + [0] * (N - 5))},
    "label -1 at row 4": {"labels": torch.tensor([0, 1, -100, 5, -1] + [0] * (N - 5))},
    "temperature must be positive": {"temperature": 0.0},
    "temperature must be a number": {"temperature": torch.ones(N + 1)},
    "temperature gets no gradient": {"temperature": torch.ones(N, requires_grad=True)},
    "softcap must be positive": {"softcap": -1.0},
    "memory must be": {"memory": -5},
    "process_group": {"process_group": object()},
    "available: ": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    right = {"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D), "labels": torch.zeros(N, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logps(**{**right, **WRONG[message]})
    if message.startswith("label ") or "labels" in message:
        with pytest.raises(ValueError, match=message.replace("hidden", "logits")):
            token_logps(torch.zeros(N, V), WRONG[message]["labels"])


def test_the_choice_is_logged_once_with_its_reason(caplog):
    dispatch.choose.cache_clear()
    dispatch.kernels.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastalign"):
        for _ in range(2):
            token_logps(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    (line,) = [record.message for record in caplog.records if record.message.startswith("token_logps: ")]
    assert "(cpu tensor, " in line and dispatch.choose("token_logps", None, "cpu") in line
    assert set(dispatch.reasons("linear_loss")) == {"torch", "cpp", "triton", "cuda"}
    with pytest.raises(ValueError, match="unknown op"):
        dispatch.available("nonsense")
