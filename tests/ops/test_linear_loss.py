"""Any loss of log-probs in one pass: equal to autograd, aligned as asked, exact about what is not scored."""

import math
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from fastalign.ops import linear_logps, linear_loss
from fastalign.ops.head import head as heads
from fastalign.ops.head import plan
from fastalign.ops.linear_logps import reference
from fastalign.testing import assert_matches, linear_example

pytestmark = pytest.mark.usefixtures("nan_memory")

N, D, V = 123, 37, 252
CU_SEQLENS = torch.tensor([0, 20, 20, 31, 60, 90, 91, 123])  # 7 sequences, one of them empty
CU_PAIRS = torch.tensor([0, 20, 20, 31, 60, 90, 123])
CU_GROUPS = torch.tensor([0, 3, 3, 4, 7])
REFERENCE = torch.linspace(-40, 10, 7)


def inputs(dtype=torch.float32, case="masked"):
    return linear_example(case, N, D, V, dtype)


def segment_sums(x, cu_seqlens):
    return torch.stack([x[a:b].sum() for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)])


def sft(stats):
    return -stats.logps.sum() / 70, {"count": torch.tensor(float(len(stats.logps)))}


def dpo(stats):
    scores = segment_sums(stats.logps, stats.cu_seqlens) - REFERENCE[stats.sequences]
    losses = -torch.nn.functional.logsigmoid(0.1 * (scores[::2] - scores[1::2]))
    return losses.sum() / 3, {"pairs": torch.tensor(float(len(losses)))}


def per_sequence(stats):
    """GSPO-like: a ratio per sequence, clipped; and an entropy bonus."""
    sums = segment_sums(stats.logps, stats.cu_seqlens) / 100 - REFERENCE[stats.sequences] / 100
    weights = torch.cos(stats.sequences.float())
    losses = -torch.minimum(sums.exp() * weights, sums.exp().clamp(0.8, 1.2) * weights)
    return losses.sum() - 0.01 * stats.entropy.sum(), {"sequences": torch.tensor(float(len(sums)))}


def per_group(stats):
    return (segment_sums(stats.logps, stats.cu_seqlens) * torch.sin(stats.sequences + 1.0)).logsumexp(0)


LOSSES = {
    "sft": (sft, {}),
    "dpo": (dpo, {"align": "pair", "cu_seqlens": CU_PAIRS}),
    "per_sequence": (per_sequence, {"align": "sequence", "cu_seqlens": CU_SEQLENS, "entropy": True}),
}


def eager(loss_fn, options, x):
    """The same loss through autograd, all rows at once."""
    from fastalign.types import TokenStats

    entropy = options.get("entropy", False)
    logps, entropies = reference(**x.tensors, labels=x.labels, **{**x.options, "entropy": entropy})
    rows = (x.labels != -100).nonzero().squeeze(1)
    scored = [None if s is None else s[rows] for s in (logps, entropies)]
    cu = options.get("cu_seqlens")
    if cu is not None:
        cu = torch.nn.functional.pad((x.labels != -100).cumsum(0), (1, 0))[cu]
    sequences = None if cu is None else torch.arange(len(cu) - 1)
    loss, metrics = loss_fn(TokenStats(scored[0], rows, scored[1], None, sequences, cu))
    return loss, metrics, torch.autograd.grad(loss, list(x.tensors.values()))


@pytest.mark.parametrize("memory", [None, 60_000, 1], ids=["ample", "chunks", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_autograd(name, dtype, memory):
    loss_fn, options = LOSSES[name]
    x = inputs(dtype)
    loss, stats = linear_loss(
        **x.tensors, labels=x.labels, loss_fn=loss_fn, **x.options, **options, memory=memory, backend=None
    )
    grads = torch.autograd.grad(loss, list(x.tensors.values()))
    theirs, exact = eager(loss_fn, options, x), eager(loss_fn, options, x.to(torch.float64))
    assert_matches(loss.detach(), theirs[0].detach(), exact[0].detach(), name="loss")
    for label, ours, g, oracle in zip(x.tensors, grads, theirs[2], exact[2], strict=True):
        assert_matches(ours, g, oracle, name=label)
    assert {k: v.item() for k, v in stats.metrics.items()} == {k: v.item() for k, v in exact[1].items()}
    assert (grads[0][x.labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [3, 4])
def test_a_unit_longer_than_a_chunk_keeps_logits(dtype, slots, monkeypatch):
    """The middle one of three sequences is cut into five pieces, of which all but ``slots`` are projected twice."""
    x = linear_example("everything", 1531, 9, 37, dtype)
    cu_seqlens, projected, plans = torch.tensor([0, 90, 1400, 1531]), [], []
    scored = (x.labels != -100).cumsum(0).tolist()

    def make_plan(*args, **kwargs):
        plans.append(plan.make_plan(*args, **{**kwargs, "scratch": 0}))
        return plans[0]

    def project(head, hidden, *rest):
        projected.append(len(hidden))
        return heads.project(head, hidden, *rest)

    def loss_fn(stats):
        sums = segment_sums(stats.logps, stats.cu_seqlens) / 1000
        return (sums.exp() * torch.cos(stats.sequences.float())).sum() - 0.01 * stats.entropy.sum(), {}

    piece = -(-(scored[1399] - scored[89]) // 5)
    monkeypatch.setattr(plan, "MIN_ROWS", piece)
    monkeypatch.setattr(heads, "cached_plan", make_plan)
    monkeypatch.setattr(import_module("fastalign.ops.linear_loss"), "project", project)
    memory = slots * piece * plan.row_bytes_of(37, 9, dtype.itemsize) + 64 * scored[-1]
    options = {"align": "sequence", "cu_seqlens": cu_seqlens, "entropy": True}
    loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, **{**x.options, **options}, memory=memory)
    grads = torch.autograd.grad(loss, list(x.tensors.values()))
    assert plans[0].mode == "retained" and [len(group) for group in plans[0].groups] == [1, 5, 1]
    assert sum(projected) == scored[-1] * (2 - plans[0].phi) and len(projected) == 7 + 5 - slots
    theirs, exact = eager(loss_fn, options, x), eager(loss_fn, options, x.to(torch.float64))
    assert_matches(loss.detach(), theirs[0].detach(), exact[0].detach(), name="loss")
    for label, ours, g, oracle in zip(x.tensors, grads, theirs[2], exact[2], strict=True):
        assert_matches(ours, g, oracle, name=label)


@pytest.mark.parametrize("memory", [None, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_coefficient_cost_no_gradient(dtype, memory, monkeypatch):
    """Zero coefficients leave the two GEMMs of a chunk; a NaN coefficient is not zero."""
    x, widths = inputs(dtype, case="everything"), []
    weights = torch.where(torch.arange(N) % 5 < 2, 1.0, 0.0)

    def loss_fn(stats):
        return (stats.logps * weights[stats.rows]).sum(), {}

    def differentiate(head, start, stop, logits, *rest):
        widths.append(len(logits))
        return real(head, start, stop, logits, *rest)

    real = heads.differentiate
    for module in ("linear_loss", "head.backward"):
        monkeypatch.setattr(import_module(f"fastalign.ops.{module}"), "differentiate", differentiate)
    options = {**x.options, "entropy": False, "memory": memory}
    loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, **options)
    again = torch.autograd.grad(loss, list(x.tensors.values()), retain_graph=True)
    assert sum(widths) == (weights.bool() & (x.labels != -100)).sum()
    seconds = torch.autograd.grad(loss, list(x.tensors.values()))
    theirs, exact = eager(loss_fn, {}, x), eager(loss_fn, {}, x.to(torch.float64))
    for label, *ours, g, oracle in zip(x.tensors, again, seconds, theirs[2], exact[2], strict=True):
        for grad in ours:
            assert_matches(grad, g, oracle, name=label)
    assert not again[0][weights == 0].any() and not seconds[0][weights == 0].any()
    row = int((x.labels != -100).nonzero()[7])
    weights[row] = torch.nan
    loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, **options)
    (spoiled,) = torch.autograd.grad(loss, [x.tensors["hidden"]])
    assert spoiled.isnan().all(1).nonzero().tolist() == [[row]]


def test_no_coefficient_at_all_costs_nothing_and_gives_zeros():
    x = inputs(case="plain")
    for memory in (None, 60_000):
        loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=lambda s: 0 * s.logps.sum(), memory=memory)
        assert not any(g.any() for g in torch.autograd.grad(loss, list(x.tensors.values()), retain_graph=True))
        assert not any(g.any() for g in torch.autograd.grad(loss, list(x.tensors.values())))


@pytest.mark.parametrize("memory", [None, 60_000, 1], ids=["ample", "chunks", "one row"])
@pytest.mark.parametrize(
    ("align", "cu_seqlens", "unit_ends"),
    [("sequence", CU_SEQLENS, range(8)), ("pair", CU_PAIRS, (0, 2, 4, 6)), ("group", CU_SEQLENS, CU_GROUPS.tolist())],
)
def test_units_are_whole_and_each_sequence_comes_once(align, cu_seqlens, unit_ends, memory):
    x, seen = inputs(), []

    def loss_fn(stats):
        seen.append((stats.sequences.tolist(), stats.cu_seqlens.tolist(), stats.rows.tolist()))
        return stats.logps.sum()

    linear_loss(
        **x.tensors,
        labels=x.labels,
        loss_fn=loss_fn,
        align=align,
        cu_seqlens=cu_seqlens,
        cu_groups=CU_GROUPS,
        memory=memory,
    )
    assert [s for sequences, *_ in seen for s in sequences] == list(range(len(cu_seqlens) - 1))
    assert [row for *_, rows in seen for row in rows] == (x.labels != -100).nonzero().squeeze(1).tolist()
    for sequences, offsets, rows in seen:
        assert sequences[0] in unit_ends and sequences[-1] + 1 in unit_ends
        for s, a, b in zip(sequences, offsets[:-1], offsets[1:], strict=True):
            assert all(cu_seqlens[s] <= row < cu_seqlens[s + 1] for row in rows[a:b])
        assert offsets[0] == 0 and offsets[-1] == len(rows)


def test_no_grad_gives_the_same_bits():
    """The reference pass and the policy pass agree exactly when the weights do."""
    x = inputs()
    run = dict(**x.tensors, labels=x.labels, loss_fn=sft, memory=60_000)
    loss, stats = linear_loss(**run)
    with torch.no_grad():
        silent, silent_stats = linear_loss(**run)
    assert torch.equal(loss.detach(), silent) and torch.equal(stats.logps, silent_stats.logps)
    assert loss.requires_grad and not silent.requires_grad and not stats.logps.requires_grad
    frozen = {name: tensor.detach() for name, tensor in x.tensors.items()}
    assert torch.equal(linear_loss(**{**run, **frozen})[0], silent)


def test_returned_stats_cover_all_rows():
    x = inputs(case="everything")
    _, stats = linear_loss(**x.tensors, labels=x.labels, loss_fn=lambda s: s.logps.sum(), **x.options)
    logps, entropy = reference(**x.tensors, labels=x.labels, **x.options)
    masked = x.labels == -100
    assert torch.allclose(stats.logps, logps, atol=1e-5) and torch.allclose(stats.entropy, entropy, atol=1e-5)
    assert not stats.logps[masked].any() and not stats.entropy[masked].any() and not stats.is_top1[masked].any()
    assert stats.rows.tolist() == list(range(N))


def test_top1_is_the_argmax():
    x = inputs(case="plain")
    logits = x.tensors["hidden"] @ x.tensors["weight"].T
    labels = torch.where(torch.arange(N) % 2 == 0, logits.argmax(1), logits.argmin(1))
    _, stats = linear_loss(**x.tensors, labels=labels, loss_fn=lambda s: s.logps.sum())
    assert stats.is_top1.tolist() == [row % 2 == 0 for row in range(N)]


@pytest.mark.parametrize("memory", [None, 60_000])
def test_upstream_scales_and_a_second_backward_recomputes(memory):
    x = inputs()
    tensors = list(x.tensors.values())
    loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=sft, memory=memory)
    first = torch.autograd.grad(loss * -3.0, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, -3 * b, rtol=1e-4, atol=1e-6) and b.abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_raises():
    x = inputs()
    loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=sft)
    (grad,) = torch.autograd.grad(loss, [x.tensors["weight"]], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x = inputs(case="bias")
    x.tensors[frozen].requires_grad_(False)
    linear_loss(**x.tensors, labels=x.labels, loss_fn=sft)[0].backward()
    for name, tensor in x.tensors.items():
        assert (tensor.grad is None) == (name == frozen)
        assert name == frozen or tensor.grad.abs().max() > 0


@pytest.mark.parametrize("align", ["token", "sequence"])
@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_scored_row_gives_a_zero_connected_to_the_graph(num_rows, align):
    hidden = torch.full((num_rows, D), torch.nan, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    labels = torch.full((num_rows,), -100)
    cu_seqlens = torch.tensor([0, 0, num_rows])
    loss, stats = linear_loss(hidden, weight, labels, lambda s: s.logps.sum(), align=align, cu_seqlens=cu_seqlens)
    loss.backward()
    assert loss.item() == 0 and stats.logps.shape == (num_rows,)
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_loss_that_ignores_the_stats_has_zero_gradients():
    x = inputs()
    loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=lambda s: torch.ones(()) * len(s.rows))
    grads = torch.autograd.grad(loss, list(x.tensors.values()))
    assert loss.item() == (x.labels != -100).sum() and not any(g.any() for g in grads)


def test_a_trainable_tensor_inside_the_loss_is_refused():
    x, scale = inputs(), torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="trainable tensor of shape"):
        linear_loss(**x.tensors, labels=x.labels, loss_fn=lambda s: (s.logps * (scale * 2).exp()).sum())


@pytest.mark.parametrize("wrong", [lambda s: s.logps, lambda s: 1.0, lambda s: (s.rows.sum(), {}), lambda s: None])
def test_a_loss_that_is_no_scalar_is_refused(wrong):
    x = inputs()
    with pytest.raises(ValueError, match="loss_fn must return a floating scalar tensor"):
        linear_loss(**x.tensors, labels=x.labels, loss_fn=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": "pairs"}, "align must be"),
        ({"align": "pair"}, "needs cu_seqlens"),
        ({"align": "pair", "cu_seqlens": CU_SEQLENS}, "even number of sequences"),
        ({"align": "group", "cu_seqlens": CU_SEQLENS}, "needs cu_groups"),
        (
            {"align": "group", "cu_seqlens": CU_SEQLENS, "cu_groups": torch.tensor([0, 9])},
            "cu_groups must rise from 0 to 7",
        ),
        ({"align": "sequence", "cu_seqlens": torch.tensor([0, 50])}, "cu_seqlens must rise from 0 to 123"),
        ({"align": "sequence", "cu_seqlens": torch.tensor([0, 90, 50, 123])}, "not in order"),
        ({"memory": 0}, "memory must be"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    x = inputs()
    with pytest.raises(ValueError, match=message):
        linear_loss(**x.tensors, labels=x.labels, loss_fn=sft, **options)


def test_step_zero_of_dpo_is_ln2_to_the_last_bit():
    x = inputs()
    run = dict(**x.tensors, labels=x.labels, align="pair", cu_seqlens=CU_PAIRS, memory=60_000)
    with torch.no_grad():
        ref = linear_loss(**run, loss_fn=lambda s: s.logps.sum())[1].logps

    def loss_fn(stats):
        margins = segment_sums(stats.logps - ref[stats.rows], stats.cu_seqlens)
        assert not margins.any()
        return -torch.nn.functional.logsigmoid(margins[::2] - margins[1::2]).sum() / 3

    assert linear_loss(**run, loss_fn=loss_fn)[0].item() == torch.tensor(math.log(2)).item()


def test_autocast_is_honoured():
    x = inputs(case="plain")
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = linear_loss(**x.tensors, labels=x.labels, loss_fn=sft)
    halves = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in x.tensors.items()}
    assert torch.equal(stats.logps, linear_loss(**halves, labels=x.labels, loss_fn=sft)[1].logps)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, list(x.tensors.values())))


@pytest.mark.parametrize("memory", [None, 60_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["linear_loss", "linear_logps"])
def test_a_tied_weight_sums_both_of_its_gradients(op, dtype, memory):
    """The same matrix embeds the tokens and projects to logits, as small language models do."""
    x, ids = inputs(dtype), torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))
    blocks = torch.randn(D, D, generator=torch.Generator().manual_seed(4)) / D**0.5

    def gradient(tied, head):
        hidden = torch.tanh(torch.nn.functional.embedding(ids, tied) @ blocks.to(tied.dtype))
        return torch.autograd.grad(head(hidden, tied), [tied])[0]

    def ours(hidden, tied):
        options = {"labels": x.labels, "memory": memory}
        if op == "linear_logps":
            return (linear_logps(hidden, tied, **options) * x.grad_logps).sum()
        return linear_loss(hidden, tied, loss_fn=lambda s: (s.logps * x.grad_logps[s.rows]).sum(), **options)[0]

    def eager(hidden, tied):
        return (reference(hidden, tied, x.labels)[0] * x.grad_logps).sum()

    tied = x.tensors["weight"]
    wide = tied.detach().double().requires_grad_()
    assert_matches(gradient(tied, ours), gradient(tied, eager), gradient(wide, eager), name="tied weight")
    assert gradient(tied, eager).norm() > 1.05 * gradient(tied, lambda hidden, w: eager(hidden.detach(), w)).norm()


PEAK = """
import re, torch
from fastalign.ops import linear_loss
from fastalign.ops.head.plan import make_plan
torch.set_num_threads(1)
def peak_rss():   # VmHWM begins anew with exec; ru_maxrss would begin at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
N, D, V = 4096, 256, 50257
hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
labels = torch.randint(0, V, (N,))
loss_fn = lambda stats: -stats.logps.sum() / N
linear_loss(hidden[:2], weight[:64], labels[:2] % 64, loss_fn)[0].backward()   # libraries, kernels
hidden.grad = weight.grad = None
before = peak_rss()
linear_loss(hidden, weight, labels, loss_fn)[0].backward()
peak = peak_rss() - before
plan = make_plan(N, V, D)
outputs = 4 * (V * D + N * D + 16 * N)
print(peak, plan.workspace_bytes, outputs)
assert 4 * V * 256 < peak < plan.workspace_bytes + outputs, plan
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_under_the_plan():
    """The fp32 weight gradient is both accumulator and output here; all logits at once would be 823 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
