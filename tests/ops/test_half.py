"""fp16 gradients that wait for a loss scaler: as right as eager's, which are made with the scale in place.

A loss divided by 65536 has gradients that fp16 cannot hold until they are multiplied by 65536; one multiplied by as
much has those that it cannot hold before they are divided.
"""

import pytest
import torch

from fastalign.ops import dispatch, linear_divergence, linear_logps, linear_loss, policy_loss
from fastalign.ops.functors import Knobs, make_knobs
from fastalign.ops.half import one_for_all, power_of_two
from fastalign.ops.linear_divergence import reference as divergence_reference
from fastalign.ops.linear_logps import reference as linear_reference
from fastalign.ops.policy_loss import reference as policy_reference

pytestmark = pytest.mark.usefixtures("nan_memory")

N, D, V = 64, 32, 8192
SCALES = {"scaled up": (1 / 65536, 65536.0), "scaled down": (65536.0, 1 / 65536), "once": (1.0, 1.0)}
in_scales = pytest.mark.parametrize("scale", SCALES)
# What a chunk holds: everything, a third of the rows, one row; and units that are longer, whose coefficients come late.
SETTINGS = {
    "whole": {},
    "chunks": {"memory": 3_000_000},
    "slabs": {"memory": 3_000_000, "align": "sequence", "cu_seqlens": torch.tensor([0, N])},
    "invariant": {"batch_invariant": True},
    "frozen": {},
}
BACKENDS = [name for name in dispatch.available("linear_loss") if name != "triton" or torch.cuda.is_available()]


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def head(dtype=torch.float16, seed=0):
    new = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=new), torch.randn(V, D, generator=new) / D**0.5
    bias, labels = torch.randn(V, generator=new), torch.randint(V, (N,), generator=new)
    labels[::5] = -100
    return [x.half().to(dtype).requires_grad_() for x in (hidden, weight, bias)], labels


def check(made, eager, exact, names, budget=3e-3):
    """Within twice eager's error, whose gradients may be lost or infinite, and within the budget of half precision."""
    for name, *grads in zip(names, made, eager, exact, strict=True):
        ours, theirs = error(grads[0], grads[2]), error(grads[1], grads[2])
        assert grads[0].dtype == grads[1].dtype
        assert ours <= min(2 * theirs + 2**-11, budget) or theirs != theirs, f"{name}: {ours:.3g}, eager {theirs:.3g}"


def eager_grads(dtype, labels, coefficient, upstream, trained):
    leaves, _ = head(dtype)
    logps, _ = linear_reference(*leaves[:2], labels, bias=leaves[2])
    loss = (logps * torch.linspace(0.1, 1, N)).sum() * (coefficient * upstream)
    return torch.autograd.grad(loss, leaves[:trained])


@in_scales
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_loss(backend, setting, scale):
    coefficient, upstream = SCALES[scale]
    leaves, labels = head()
    trained = 1 if setting == "frozen" else 3
    for x in leaves[trained:]:
        x.requires_grad_(False)
    weights = torch.linspace(0.1, 1, N) * coefficient

    def loss_fn(stats):
        return (stats.logps * weights[stats.rows]).sum()

    options = {**SETTINGS[setting], "bias": leaves[2], "backend": backend}
    loss, _ = linear_loss(*leaves[:2], labels, loss_fn, **options)
    given = torch.tensor(upstream)
    first = torch.autograd.grad(loss, leaves[:trained], given, retain_graph=True)
    second = torch.autograd.grad(loss, leaves[:trained], given)
    theirs, exact = (eager_grads(x, labels, coefficient, upstream, trained) for x in (torch.float16, torch.float64))
    for made in (first, second):
        check(made, theirs, exact, ["hidden", "weight", "bias"][:trained])
        assert not made[0][labels == -100].any()


@in_scales
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_policy_loss(backend, inplace, scale):
    if why := dispatch.missing(backend):
        pytest.skip(f"{backend}: {why}")
    coefficient, upstream = SCALES[scale]
    new = torch.Generator().manual_seed(1)
    logits, labels = (3 * torch.randn(N, V, generator=new)).half(), torch.randint(V, (N,), generator=new)
    rows = {"advantages": torch.randn(N, generator=new), "weights": torch.rand(N, generator=new) * coefficient}
    labels[::5] = -100
    x = logits.clone().requires_grad_()
    options = {"loss": "pg", "entropy_coef": 0.1, "backend": backend}
    loss, _ = policy_loss(x, labels, **rows, **options, inplace=inplace)
    (made,) = torch.autograd.grad(loss, [x], torch.tensor(upstream))
    results, knobs = [], Knobs(*make_knobs(0.2, 0.2, None, 1.0, 1.05, 0.0, 0.1))
    for dtype in (torch.float16, torch.float64):
        y, given = logits.to(dtype).requires_grad_(), (rows["weights"], rows["advantages"], None, None)
        total = policy_reference(y, labels, *given, loss="pg", kl_estimator="k3", knobs=knobs) * upstream
        results.append(torch.autograd.grad(total, [y]))
    check((made,), *results, ["logits"])
    assert not made[labels == -100].any()


def confident(dtype, gap=18.0):
    """Rows that are sure of token 0, by ``gap``; the other columns share a direction, so that they matter together."""
    (hidden, weight, _), labels = head(dtype)
    with torch.no_grad():
        weight *= 0.125
        hidden[:, 0], weight[:, 0], weight[0, 0] = 4, 0, gap / 4
        hidden[:, 1], weight[:, 1], weight[0, 1] = 0, 3, 0
    return hidden, weight.detach(), labels.clamp(max=0)


OF_STREAMS = (torch.float16, torch.float16, torch.float64)


def test_directions_of_a_frozen_head():
    """What the forward keeps of a confident row is tiny before the upstream is there."""
    results = []
    for op, dtype in zip((linear_logps, linear_reference, linear_reference), OF_STREAMS, strict=True):
        hidden, weight, labels = confident(dtype)
        logps = op(hidden, weight, labels)
        logps = logps if isinstance(logps, torch.Tensor) else logps[0]
        results.append(torch.autograd.grad(logps.sum() * 1000, [hidden]))
    check(*results, ["hidden"], budget=0.02)  # of the logits' rounding


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_near_its_teacher(kind, trainable):
    results = []
    for op, dtype in zip((linear_divergence, divergence_reference, divergence_reference), OF_STREAMS, strict=True):
        hidden, weight, labels = confident(dtype)
        weight.requires_grad_(trainable)
        value = op(hidden, weight, hidden.detach(), confident(dtype, 18.5)[1], labels=labels, kind=kind)
        leaves = [hidden, weight] if trainable else [hidden]
        results.append(torch.autograd.grad(value.sum() * 1000, leaves))
    check(*results, ["hidden", "weight"][: len(leaves)], budget=0.02)  # of the logits' rounding


def test_a_power_of_two_changes_no_digit():
    bound = torch.tensor([1.0, 3e-5, 16384.0, 1e30, 1e-38, 0.0, torch.inf, torch.nan])
    scale = power_of_two(bound)
    assert ((bound * scale)[:4] <= 2**14).all() and ((bound * scale)[:4] >= 2**13).all()
    assert scale[5:].tolist() == [1.0] * 3 and (torch.frexp(scale).mantissa == 0.5).all()
    assert one_for_all(bound) == power_of_two(bound[3]) and one_for_all(bound[:0]) == 1
