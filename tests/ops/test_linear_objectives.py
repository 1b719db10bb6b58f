"""Label smoothing and the log-sum-exp on the hidden path: exact in every mode, alone and with everything else."""

import math
from itertools import pairwise

import pytest
import torch

from fastalign.ops import dispatch, linear_logps, linear_loss
from fastalign.ops.head import head, plan
from fastalign.ops.linear_logps import reference
from fastalign.testing import assert_matches, linear_example
from fastalign.types import TokenStats

pytestmark = pytest.mark.usefixtures("nan_memory")

N, D, V, ETA = 61, 37, 252, 0.15
ROWS = {"torch": N, "cpp": N, "triton": 9}
TIGHT = {"torch": 700_000, "cpp": 60_000, "triton": 20_000}


def example(case="everything", dtype=torch.float32, rows=N):
    """Coefficients of both signs for each statistic; some rows have none."""
    x = linear_example(case, rows, D, V, dtype)
    upstream = torch.randn(3, rows, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    upstream[:, 3::7] = 0
    return x, upstream


def eager(x):
    """``[3, N]`` by definition: smoothed log-prob, entropy, log-sum-exp."""
    asked = {**x.options, "label_smoothing": ETA, "entropy": True, "lse": True}
    return torch.stack(reference(**x.tensors, labels=x.labels, **asked))


def everything(x, upstream, frozen=(), **options):
    """Statistics and gradients of ``linear_logps``."""
    trained = {name: y.requires_grad_(name not in frozen) for name, y in x.tensors.items() if name not in frozen}
    run = {**x.options, "entropy": True, "lse": True, "label_smoothing": ETA, **options}
    found = torch.stack(linear_logps(**x.tensors, labels=x.labels, **run))
    return found.detach(), torch.autograd.grad((found * upstream).sum(), list(trained.values()))


def defined(x, upstream, frozen=()):
    trained = [y for name, y in x.tensors.items() if name not in frozen]
    found = eager(x)
    return found.detach(), torch.autograd.grad((found * upstream).sum(), trained)


def matches(ours, x, upstream, frozen=()):
    theirs, exact = defined(x, upstream, frozen), defined(x.to(torch.float64), upstream, frozen)
    for name, *results in zip(("logps", "entropy", "lse"), ours[0], theirs[0], exact[0], strict=True):
        assert_matches(*results, name=name)
    names = (name for name in x.tensors if name not in frozen)
    for name, *results in zip(names, ours[1], theirs[1], exact[1], strict=True):
        assert_matches(*results, name=name)


@pytest.mark.parametrize("tight", [False, True], ids=["ample", "tight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", dispatch.available("linear_logps"))
def test_log_probs_entropy_and_lse(backend, dtype, tight):
    x, upstream = example(dtype=dtype, rows=ROWS[backend])
    matches(everything(x, upstream, backend=backend, memory=TIGHT[backend] if tight else None), x, upstream)


@pytest.fixture
def plans(monkeypatch):
    """The plans that calls make, as they are made."""
    made, make_plan = [], plan.make_plan

    def watched(*args, **kwargs):
        made.append(make_plan(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(head, "cached_plan", watched)
    return made


def test_a_frozen_head(plans):
    """Smoothed log-probs alone need one direction per row; with others the logits are made again."""
    frozen = ("weight", "bias")
    for asked in ({"entropy": False, "lse": False}, {"entropy": False}, {"lse": False}, {}):
        x, upstream = example()
        x.tensors["weight"].requires_grad_(False)
        x.tensors["bias"].requires_grad_(False)
        kept = [True, asked.get("entropy", True), asked.get("lse", True)]
        run = {**x.options, "entropy": True, "lse": True, **asked, "label_smoothing": ETA}
        found = linear_logps(**x.tensors, labels=x.labels, **run)
        score = (torch.stack(found if isinstance(found, tuple) else [found]) * upstream[kept]).sum()
        (grad,) = torch.autograd.grad(score, [x.tensors["hidden"]])
        upstream[[not k for k in kept]] = 0
        results = [defined(y, upstream, frozen)[1][0] for y in (x, x.to(torch.float64))]
        assert_matches(grad, *results, name=f"hidden {asked}")
    assert plans[0].mode == "frozen" and {other.mode for other in plans[1:]} == {"slabs"}


def test_results_come_in_order():
    x, _ = example("plain")
    logps, entropy, lse = linear_logps(**x.tensors, labels=x.labels, entropy=True, lse=True)
    assert torch.equal(linear_logps(**x.tensors, labels=x.labels, lse=True)[1], lse)
    assert torch.equal(linear_logps(**x.tensors, labels=x.labels, entropy=True)[1], entropy)
    assert torch.equal(linear_logps(**x.tensors, labels=x.labels), logps)
    z = x.tensors["hidden"] @ x.tensors["weight"].T
    assert torch.allclose(lse, z.logsumexp(1), atol=1e-5)
    cross_entropy = torch.nn.functional.cross_entropy(z, x.labels, label_smoothing=ETA, reduction="none")
    smooth = linear_logps(**x.tensors, labels=x.labels, label_smoothing=ETA)
    assert torch.allclose(-smooth, cross_entropy, atol=1e-5)


CU_PAIRS = torch.tensor([0, 9, 9, 20, 33, 50, 61])


def token_loss(stats):
    """Smoothed cross-entropy with a z-loss and an entropy bonus."""
    return (0.01 * stats.lse.square() - stats.logps - 0.1 * stats.entropy).sum() / 7


def sums(stats):
    return torch.stack([stats.logps[start:stop].sum() for start, stop in pairwise(stats.cu_seqlens.tolist())])


def pair_loss(stats):
    margins = sums(stats)[1::2] - sums(stats)[::2]
    return torch.nn.functional.softplus(margins).sum() + 0.01 * stats.lse.square().sum()


def loss_of(x, loss_fn, found, options):
    """The same loss of eager's statistics."""
    scored = x.labels != -100
    offsets = torch.nn.functional.pad(scored.cumsum(0), (1, 0))[CU_PAIRS] if options else None
    logps, entropy, lse = found[:, scored]
    return loss_fn(TokenStats(logps, scored.nonzero()[:, 0], entropy, None, None, offsets, lse=lse))


LOSSES = {"token": (token_loss, {}), "pair": (pair_loss, {"align": "pair", "cu_seqlens": CU_PAIRS})}


@pytest.mark.parametrize("memory", [None, 60_000, 1], ids=["ample", "chunks", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss(name, dtype, memory):
    """One pass, or slabs where a pair is too long; a second backward makes everything again."""
    (loss_fn, options), (x, _) = LOSSES[name], example(dtype=dtype)
    run = {**x.options, **options, "entropy": True, "lse": True, "label_smoothing": ETA, "memory": memory}
    loss, stats = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, **run)
    made = [torch.autograd.grad(loss, list(x.tensors.values()), retain_graph=True) for _ in range(2)]
    results = []
    for y in (x, x.to(torch.float64)):
        found = eager(y)
        score = loss_of(y, loss_fn, found, options)
        results.append((found.detach(), score.detach(), torch.autograd.grad(score, list(y.tensors.values()))))
    assert_matches(loss.detach(), *(score for _, score, _ in results), name="loss")
    for i, (field, ours) in enumerate((("logps", stats.logps), ("entropy", stats.entropy), ("lse", stats.lse))):
        assert not ours.requires_grad and not ours[x.labels == -100].any()
        assert_matches(ours, *(found[i] for found, _, _ in results), name=field)
    for grads in made:
        for i, label in enumerate(x.tensors):
            assert_matches(grads[i], *(theirs[i] for *_, theirs in results), name=label)


def test_retained_chunks(plans, monkeypatch):
    """A sequence in pieces, whose logits partly stay."""
    monkeypatch.setattr(plan, "MIN_ROWS", 40)
    x = linear_example("everything", 331, 9, V, torch.float32)
    cut = {"align": "sequence", "cu_seqlens": torch.tensor([0, 40, 331])}
    options = {**x.options, **cut, "lse": True, "label_smoothing": ETA, "backend": "torch"}
    scratch = 64 * 331 + 5 * 331 * V * 4

    def loss_fn(stats):
        return (sums(stats) / 1000).exp().sum() + stats.lse.square().sum() / 99 + stats.entropy.sum()

    losses = []
    for memory in (None, 3 * 40 * plan.row_bytes_of(V, 9, 4) + scratch):
        loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, **options, memory=memory)
        losses.append((loss.detach(), *torch.autograd.grad(loss, list(x.tensors.values()))))
    assert [made.mode for made in plans] == ["one_pass", "retained"]
    for whole, pieces in zip(*losses, strict=True):
        assert torch.allclose(whole, pieces, rtol=1e-4, atol=1e-5) and whole.abs().max() > 1e-3


def test_top1_is_about_the_label_alone():
    x, _ = example("plain")
    best = (x.tensors["hidden"] @ x.tensors["weight"].T).argmax(1)
    labels = torch.where(torch.arange(N) % 2 == 0, best, x.labels)
    for eta in (0.0, 0.5):
        _, stats = linear_loss(**x.tensors, labels=labels, loss_fn=lambda s: s.logps.sum(), label_smoothing=eta)
        assert torch.equal(stats.is_top1, labels == best)


def test_a_banned_token_makes_the_smoothed_log_prob_infinite_and_no_gradient_nan():
    x, upstream = example("bias")
    bias = x.tensors["bias"].detach().clone()
    bias[7] = -math.inf
    x.tensors["bias"] = bias.requires_grad_()
    labels = torch.where(x.labels == 7, 8, x.labels)
    smooth, lse = linear_logps(**x.tensors, labels=labels, label_smoothing=ETA, lse=True)
    assert (smooth == -math.inf).all() and lse.isfinite().all()
    grads = torch.autograd.grad((smooth * upstream[0] + lse).sum(), list(x.tensors.values()))
    assert all(grad.isfinite().all() for grad in grads)


def test_one_graph():
    x, upstream = example("softcap")

    def function(hidden, weight):
        options = {"label_smoothing": ETA, "lse": True, "entropy": True, "softcap": 5.0}
        loss, stats = linear_loss(hidden, weight, x.labels, token_loss, **options)
        return loss + (torch.stack(linear_logps(hidden, weight, x.labels, **options)) * upstream).sum(), stats.lse

    inputs, results = list(x.tensors.values()), []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        score, lse = run(*inputs)
        results.append((score, lse, *torch.autograd.grad(score, inputs)))
    for plain, traced in zip(*results, strict=True):
        assert torch.allclose(plain, traced, rtol=1e-5, atol=1e-5) and traced.abs().max() > 0


@pytest.mark.parametrize("wrong", [-0.1, 1.0, math.nan])
def test_wrong_smoothing_is_named(wrong):
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        linear_logps(torch.zeros(2, D), torch.zeros(V, D), torch.zeros(2).long(), label_smoothing=wrong)
