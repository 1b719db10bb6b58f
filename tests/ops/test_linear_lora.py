"""An adapter on the head itself: trained exactly, in every mode, and never a reason to read what is not scored."""

import pytest
import torch

from fastalign.ops import dispatch, linear_logps, linear_loss
from fastalign.ops.head import backward
from fastalign.ops.head.plan import make_plan
from fastalign.ops.linear_logps import reference
from fastalign.testing import assert_matches, linear_example
from fastalign.types import TokenStats

pytestmark = pytest.mark.usefixtures("nan_memory")

N, D, V, R, SCALE = 61, 37, 252, 5, 0.7
CU_PAIRS = torch.tensor([0, 9, 9, 20, 33, 50, 61])
TIGHT = {"torch": 900_000, "cpp": 100_000, "triton": 60_000}


def example(case="everything", dtype=torch.float32, adapter=None, rank=R):
    x, new = linear_example(case, N, D, V, dtype), torch.Generator().manual_seed(1)
    down, up = torch.randn(rank, D, generator=new) / D**0.5, torch.randn(V, rank, generator=new)
    return x, {name: y.to(adapter or dtype).requires_grad_() for name, y in {"A": down, "B": up}.items()}


def double(x, adapter):
    return x.to(torch.float64), {name: y.detach().double().requires_grad_() for name, y in adapter.items()}


def leaves(x, adapter, frozen=()):
    """The trained tensors by name; those named in ``frozen`` are not."""
    every = {**x.tensors, **adapter}
    for name, tensor in every.items():
        tensor.requires_grad_(name not in frozen)
    return {name: tensor for name, tensor in every.items() if name not in frozen}


def logps_and_grads(op, x, adapter, frozen=(), **options):
    trained = leaves(x, adapter, frozen)
    logps, entropy = op(**x.tensors, labels=x.labels, lora=(adapter["A"], adapter["B"], SCALE), **x.options, **options)
    score = (logps * x.grad_logps.to(logps)).sum() + (entropy * x.grad_entropy.to(entropy)).sum()
    grads = torch.autograd.grad(score, list(trained.values()))
    return {"logps": logps.detach(), "entropy": entropy.detach(), **dict(zip(trained, grads, strict=True))}


def coupled(stats):
    """Pairs, an entropy bonus, and rows without a coefficient."""
    sums = torch.stack([stats.logps[a:b].sum() for a, b in zip(*cut(stats), strict=True)])
    return torch.nn.functional.softplus(sums[1::2] - sums[::2]).sum() - 0.01 * stats.entropy.square().sum()


def cut(stats):
    return stats.cu_seqlens[:-1].tolist(), stats.cu_seqlens[1:].tolist()


def loss_and_grads(x, adapter, frozen=(), **options):
    trained = leaves(x, adapter, frozen)
    lora = (adapter["A"], adapter["B"], SCALE)
    loss, _ = linear_loss(
        **x.tensors,
        labels=x.labels,
        loss_fn=coupled,
        lora=lora,
        align="pair",
        cu_seqlens=CU_PAIRS,
        **x.options,
        **options,
    )
    first, second = (torch.autograd.grad(loss, list(trained.values()), retain_graph=True) for _ in range(2))
    return {
        "loss": loss.detach(),
        **dict(zip(trained, first, strict=True)),
        **{f"second {name}": g for name, g in zip(trained, second, strict=True)},
    }


def eager_loss_and_grads(x, adapter, frozen=()):
    trained = leaves(x, adapter, frozen)
    lora = (adapter["A"], adapter["B"], SCALE)
    logps, entropy = reference(**x.tensors, labels=x.labels, lora=lora, **x.options)
    scored = x.labels != -100
    offsets = torch.nn.functional.pad(scored.cumsum(0), (1, 0))[CU_PAIRS]
    loss = coupled(TokenStats(logps[scored], scored.nonzero()[:, 0], entropy[scored], None, None, offsets))
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    return {"loss": loss.detach(), **grads, **{f"second {name}": g for name, g in grads.items()}}


DTYPES = [torch.float32, torch.bfloat16, torch.float64]
FROZEN = {"all trains": (), "frozen weight": ("weight", "bias"), "frozen but A": ("weight", "bias", "B")}


GRID = [(torch.float32, True, "frozen weight")]
GRID += [(dtype, tight, frozen) for dtype in DTYPES for tight in (False, True) for frozen in FROZEN]
BACKENDS = dispatch.available("linear_logps")
CASES = [(name, *case) for name in BACKENDS for case in (GRID[:1] if name == "triton" else GRID[1:])]
"""The interpreter runs a Triton program at a time, and the adapter meets no kernel: once is enough there."""


@pytest.mark.parametrize(("backend", "dtype", "tight", "frozen"), CASES)
def test_equals_autograd(backend, dtype, tight, frozen):
    """Everything at once: mask, bias, softcap, scale, temperature per row, entropy, in slabs and chunks."""
    x, adapter = example(dtype=dtype)
    frozen, options = FROZEN[frozen], {"backend": backend, "memory": TIGHT[backend] if tight else None}
    pairs = (
        (logps_and_grads(linear_logps, x, adapter, frozen, **options), logps_and_grads, (reference,)),
        (loss_and_grads(x, adapter, frozen, **options), eager_loss_and_grads, ()),
    )
    for ours, eager, first in pairs:
        theirs, oracle = eager(*first, x, adapter, frozen), eager(*first, *double(x, adapter), frozen)
        for name in ours:
            assert_matches(ours[name], theirs[name], oracle[name], name=name)
    assert not ours["hidden"][x.labels == -100].any()


@pytest.mark.parametrize("rank", [0, 1, 40])
def test_a_frozen_head_serves_any_upstream_gradient(rank):
    """One direction per row, for the hidden states and for their image under A, which still trains."""
    x, adapter = example("masked", rank=rank)
    frozen, results = ("weight", "B"), []
    for op, (y, lora) in ((linear_logps, (x, adapter)), (reference, (x, adapter)), (reference, double(x, adapter))):
        trained = leaves(y, lora, frozen)
        logps = op(**y.tensors, labels=y.labels, lora=(lora["A"], lora["B"], SCALE))
        logps = logps[0] if isinstance(logps, tuple) else logps
        grads = torch.autograd.grad((logps * y.grad_logps).sum(), list(trained.values()))
        results.append(dict(zip(trained, grads, strict=True)))
    for name in ("hidden", "A"):
        assert_matches(*(result[name] for result in results), name=name)


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_an_adapter_of_another_dtype(dtype, adapter):
    """GEMMs keep the base's dtype; A and B get gradients in theirs."""
    x, given = example("masked", dtype, adapter)
    same = {name: y.detach().to(dtype).requires_grad_() for name, y in given.items()}
    results = []
    for lora in (given, same):
        loss, stats = linear_loss(
            **x.tensors,
            labels=x.labels,
            loss_fn=lambda s: (s.logps * x.grad_logps[s.rows]).sum(),
            lora=(lora["A"], lora["B"], SCALE),
        )
        results.append((stats.logps, *torch.autograd.grad(loss, [lora["A"], lora["B"]])))
    assert torch.equal(results[0][0], results[1][0])
    for ours, plain in zip(results[0][1:], results[1][1:], strict=True):
        assert ours.dtype == adapter and torch.allclose(ours.float(), plain.float(), rtol=1e-2, atol=1e-3)


def test_accumulation_over_chunks_is_fp32():
    """In bf16 the gradients of A and B lose no digits to the number of chunks."""
    x, adapter = example("plain", torch.bfloat16)
    oracle = None
    for memory in (None, 30_000, 10_000):
        loss, _ = linear_loss(
            **x.tensors,
            labels=x.labels,
            loss_fn=lambda s: (s.logps * x.grad_logps[s.rows]).sum(),
            lora=(*adapter.values(), SCALE),
            memory=memory,
        )
        grads = torch.autograd.grad(loss, list(adapter.values()))
        oracle = oracle or grads
        for g, whole in zip(grads, oracle, strict=True):
            assert (g - whole).norm() <= 3e-3 * whole.norm()


def test_a_frozen_weight_costs_no_weight_gradient(monkeypatch):
    """The adapter trains in one pass: no ``[V, D]`` buffer and two GEMMs over the head, not three."""
    shapes = []

    def add_product(total, a, b, *, first, alpha):
        shapes.append((a.shape[0], b.shape[1]))
        return original(total, a, b, first=first)

    original = backward.add_product
    monkeypatch.setattr(backward, "add_product", add_product)
    x, adapter = example("masked")
    loss_and_grads(*example("entropy"), frozen=("weight",))
    assert {(V, R)} == {shape for shape in shapes if shape[0] == V}
    plan = make_plan(1024, 32000, 512 + 8, trained=8)
    assert plan.mode == "one_pass" and plan.flops == 4 + 16 / 520 and plan.accumulator_bytes == 4 * 32000 * 8
    with torch.no_grad():
        silent = linear_logps(**x.tensors, labels=x.labels, lora=(*adapter.values(), SCALE))
    assert torch.equal(silent, linear_logps(**x.tensors, labels=x.labels, lora=(*adapter.values(), SCALE)))


@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_scored(num_rows):
    hidden = torch.full((num_rows, D), torch.nan, requires_grad=True)
    adapter = [torch.randn(R, D, requires_grad=True), torch.randn(V, R, requires_grad=True)]
    labels, weight = torch.full((num_rows,), -100), torch.randn(V, D)
    for op in (linear_logps, lambda *args, **kw: linear_loss(*args, lambda s: s.logps.sum(), **kw)[0]):
        op(hidden, weight, labels, lora=(*adapter, 2.0)).sum().backward()
    assert not any(x.grad.any() for x in (hidden, *adapter))


def test_one_graph():
    x, adapter = example("masked")

    def function(hidden, weight, down, up):
        logps, entropy = linear_logps(hidden, weight, x.labels, lora=(down, up, SCALE), entropy=True)
        return (logps * x.grad_logps).sum() + entropy.sum()

    inputs, results = [*x.tensors.values(), *adapter.values()], []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        score = run(*inputs)
        results.append((score, *torch.autograd.grad(score, inputs)))
    for eager, traced in zip(*results, strict=True):
        assert torch.allclose(eager, traced, rtol=1e-5, atol=1e-5) and traced.abs().max() > 0


@pytest.mark.parametrize("frozen", [(), ("weight", "B")], ids=["all trains", "frozen but A"])
def test_batch_invariant(frozen):
    x, adapter = example("plain")
    leaves(x, adapter, frozen)

    def run(rows):
        hidden = x.tensors["hidden"].detach()[rows].clone().requires_grad_()
        lora = (*adapter.values(), SCALE)
        logps = linear_logps(hidden, x.tensors["weight"], x.labels[rows], lora=lora, batch_invariant=True)
        return logps, torch.autograd.grad(logps.sum(), [hidden])[0]

    whole = run(slice(None))
    for rows in (slice(33, 34), slice(20, 61)):
        assert all(torch.equal(alone, batch[rows]) for alone, batch in zip(run(rows), whole, strict=True))


WRONG = {
    "must be a tuple": [torch.zeros(R, D), torch.zeros(V, R), 1.0],
    f"D = {D} and V = {V}, got A torch.float32": (torch.zeros(R, D + 1), torch.zeros(V, R), 1.0),
    r"B torch.float32 \[252, 6\]": (torch.zeros(R, D), torch.zeros(V, R + 1), 1.0),
    "A torch.int64": (torch.zeros(R, D, dtype=torch.int64), torch.zeros(V, R), 1.0),
    "finite number": (torch.zeros(R, D), torch.zeros(V, R), float("nan")),
    "scale must be": (torch.zeros(R, D), torch.zeros(V, R), torch.ones(())),
    "lora B is on meta": (torch.zeros(R, D), torch.zeros(V, R, device="meta"), 1.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_adapters_are_named(message):
    x, _ = example("plain")
    with pytest.raises(ValueError, match=message):
        linear_logps(**x.tensors, labels=x.labels, lora=WRONG[message])
