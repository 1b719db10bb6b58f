"""``logits="float32"``: the logits of bf16 and fp16 products, and a bias on them, are never rounded."""

from importlib import import_module

import pytest
import torch

from fastalign.ops import dispatch, linear_logps, linear_loss
from fastalign.ops.head import head as heads
from fastalign.ops.head import plan
from fastalign.ops.linear_logps import reference

pytestmark = pytest.mark.usefixtures("nan_memory")

N, D, V = 122, 37, 2051  # a vocabulary of no tile, and one column more than two blocks of products
HALVES = [torch.bfloat16, torch.float16]
EXTRAS = [{}, {"bias": True}, {"rank": 4}, {"frozen": True}]
SEQUENCES = {"align": "sequence", "cu_seqlens": torch.tensor([0, 20, N])}
# What a chunk holds: everything, some rows, a unit in one piece, in pieces, or only its statistics.
MODES = {
    "whole": ({}, "one_pass"),
    "chunks": ({"memory": 1_600_000}, "one_pass"),
    "units": (SEQUENCES, "one_pass"),
    "pieces": ({**SEQUENCES, "memory": 1_340_000}, "retained"),
    "slabs": ({**SEQUENCES, "memory": 400_000}, "slabs"),
    "invariant": ({"batch_invariant": True}, "one_pass"),
}


def head(dtype, *, bias=False, rank=0, frozen=False):
    """Leaves by name and labels; a bias takes back what one direction of the weight adds, and both are large."""
    new = torch.Generator().manual_seed(3)
    x = {"hidden": torch.randn(N, D, generator=new), "weight": 2 * torch.randn(V, D, generator=new) / D**0.5}
    if bias:
        x["bias"] = (50 * torch.randn(V, generator=new)).bfloat16()
        x["hidden"][:, 0], x["weight"][:, 0] = 8, -x["bias"] / 8
    if rank:
        x |= {"down": torch.randn(rank, D, generator=new) / 8, "up": torch.randn(V, rank, generator=new) / 8}
    labels = torch.randint(V, (N,), generator=new)
    labels[::7] = -100
    leaves = {name: y.to(dtype).requires_grad_(not frozen or name != "weight") for name, y in x.items()}
    return leaves, labels


def options_of(leaves):
    """The leaves beside hidden states and weight, as the ops take them."""
    found = {"bias": leaves["bias"]} if "bias" in leaves else {}
    return found | ({"lora": (leaves["down"], leaves["up"], 0.5)} if "up" in leaves else {})


def eager(leaves, labels, dtype):
    """Log-probs of the definition in a dtype, and the gradients of ``coefficients``, in float64."""
    wide = {name: x.detach().to(dtype).requires_grad_(x.requires_grad) for name, x in leaves.items()}
    logps, _ = reference(wide["hidden"], wide["weight"], labels, **options_of(wide))
    asked = [x for x in wide.values() if x.requires_grad]
    grads = torch.autograd.grad((logps * COEFFICIENTS).sum(), asked)
    return [x.double() for x in (logps.detach(), *grads)]


COEFFICIENTS = torch.linspace(0.5, 1.5, N) / N


def weighted(stats):
    return (stats.logps * COEFFICIENTS[stats.rows]).sum()


def rms(x, exact):
    return (x.double() - exact).square().mean().sqrt().item()


def check(made, leaves, labels, dtype):
    """Log-probs err like those of fp32 operands of the same values, gradients within twice eager's, as everywhere.

    The log-probs' sums have other orders: twice fp32's error, or, where its own is by chance next to nothing, 2 ulp of
    the largest logits, which are near 16 and with a bias near 200. Hidden states under an adapter's A are operands in
    half precision: there half of eager's error is left.
    """
    in_half, in_fp32, exact = (eager(leaves, labels, x) for x in (dtype, torch.float32, torch.float64))
    budget = 2 * rms(in_fp32[0], exact[0]) + (2**-17 if "bias" in leaves else 2**-21)
    assert rms(made[0], exact[0]) <= (rms(in_half[0], exact[0]) / 2 if "up" in leaves else budget)
    for ours, theirs, oracle in zip(made[1:], in_half[1:], exact[1:], strict=True):
        assert rms(ours, oracle) <= 2 * rms(theirs, oracle)


@pytest.fixture
def plans(monkeypatch):
    made = []

    def watched(*args, **given):
        made.append(plan.make_plan(*args, **given))
        return made[-1]

    monkeypatch.setattr(heads, "cached_plan", watched)
    monkeypatch.setattr(plan, "MIN_ROWS", 16)
    return made


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_loss_of_unrounded_logits(dtype, mode, extra, plans):
    """Both backwards, the one that hands gradients over and the one that makes them again."""
    leaves, labels = head(dtype, **extra)
    given, expected = MODES[mode]
    options = {**options_of(leaves), **given, "logits": "float32"}
    loss, stats = linear_loss(leaves["hidden"], leaves["weight"], labels, weighted, **options)
    assert plans[0].mode == expected
    asked = [x for x in leaves.values() if x.requires_grad]
    for keep in (True, False):
        made = torch.autograd.grad(loss, asked, retain_graph=keep)
        assert [x.dtype for x in made] == [dtype] * len(asked)
        check([stats.logps, *made], leaves, labels, dtype)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_log_probs_of_unrounded_logits(dtype, backend, extra):
    if why := dispatch.missing(backend):
        pytest.skip(f"{backend}: {why}")
    leaves, labels = head(dtype, **extra)
    options = {**options_of(leaves), "logits": "float32", "backend": backend}
    logps = linear_logps(leaves["hidden"], leaves["weight"], labels, **options)
    asked = [x for x in leaves.values() if x.requires_grad]
    check([logps.detach(), *torch.autograd.grad((logps * COEFFICIENTS).sum(), asked)], leaves, labels, dtype)
    with torch.no_grad():
        assert torch.equal(linear_logps(leaves["hidden"], leaves["weight"], labels, **options), logps)
        _, stats = linear_loss(leaves["hidden"], leaves["weight"], labels, weighted, **options)
    assert torch.equal(stats.logps, logps)


@pytest.mark.gpu
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton", "cuda"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_loss_on_a_device(dtype, backend, extra):
    if why := dispatch.missing(backend):
        pytest.skip(f"{backend}: {why}")
    leaves, labels = head(dtype, **extra)
    ours = {name: x.detach().cuda().requires_grad_(x.requires_grad) for name, x in leaves.items()}
    options, factors = {**options_of(ours), "logits": "float32", "backend": backend}, COEFFICIENTS.cuda()
    loss, stats = linear_loss(
        ours["hidden"],
        ours["weight"],
        labels.cuda(),
        lambda stats: (stats.logps * factors[stats.rows]).sum(),
        **options,
    )
    made = torch.autograd.grad(loss, [x for x in ours.values() if x.requires_grad])
    check([x.cpu() for x in (stats.logps, *made)], leaves, labels, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_processor_without_bf16_products_widens_the_operands(dtype, monkeypatch):
    for name in ("available", "preferred"):
        monkeypatch.setattr(import_module("fastalign.ops.backends.cpp.product"), name, lambda: False)
    leaves, labels = head(dtype, bias=True, rank=4)
    options = {**options_of(leaves), "logits": "float32", "memory": 1_600_000}
    loss, stats = linear_loss(leaves["hidden"], leaves["weight"], labels, weighted, **options)
    check([stats.logps, *torch.autograd.grad(loss, list(leaves.values()))], leaves, labels, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_products_have_such_logits_anyway(dtype):
    leaves, labels = head(dtype)
    made = []
    for logits in (None, "float32"):
        loss, stats = linear_loss(leaves["hidden"], leaves["weight"], labels, weighted, logits=logits)
        made.append((stats.logps, *torch.autograd.grad(loss, list(leaves.values()))))
    assert all(map(torch.equal, *made))


def test_the_plan_counts_them():
    """Six bytes instead of two: a logit in fp32 and its gradient beside it."""
    sizes, narrow, wide = (4096, 32000, 512), {"itemsize": 2}, {"itemsize": 2, "logit_bytes": 6}
    for memory in (8 << 20, 64 << 20, 512 << 20):
        one, other = (plan.make_plan(*sizes, memory=memory, **kind) for kind in (narrow, wide))
        assert other.workspace_bytes <= memory and len(other.chunks) >= 2 * len(one.chunks)
        assert other.workspace_bytes >= 6 * 32000 * other.chunk_rows
    one, other = (plan.make_plan(*sizes, coefficients="upstream", memory=32 << 20, **x) for x in (narrow, wide))
    assert other.workspace_bytes <= 1.01 * one.workspace_bytes and other.slab * other.block < one.slab * one.block / 2


def test_another_dtype_is_refused():
    leaves, labels = head(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r'^logits must be "float32" or None, the dtype of the products; got \'fp32\'$'
    ):
        linear_logps(leaves["hidden"], leaves["weight"], labels, logits="fp32")
