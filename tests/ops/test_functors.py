"""The losses of ``policy_loss`` are defined once: every backend is held to them in every regime of their clips."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from op_table import HERE, place

from fastalign.losses import policy
from fastalign.ops import dispatch
from fastalign.ops.functors import COLUMNS, FUNCTORS, KL_ESTIMATORS, Knobs, columns, fill, ratio_of

KNOBS = Knobs(0.8, 1.2, 3.0, 1.0, 1.05, kl_coef=0.3)
RATIOS = [0.5, 0.799, 0.801, 1.0, 1.199, 1.201, 2.999, 3.001, 9.0]
"""Within, between and beyond the bounds, on either side of each."""
LOG_RATIOS = [*torch.tensor(RATIOS, dtype=torch.float64).log().tolist(), -19.9, -20.1, 19.9, 20.1]
REGIMES = list(product(LOG_RATIOS, (0.7, -0.7, 0.0)))
"""Log-ratio and advantage of each row."""
GAPS = [0.0, 1e-4, -0.05, 0.3, -2.0, 19.9, -20.1]
"""``l_ref - l`` of one row after the other."""
N = len(REGIMES)


def given(logps):
    """weights, advantages, old_logps and ref_logps for the log-probs that a backend finds."""
    logps, (log_ratios, advantages) = logps.double(), torch.tensor(REGIMES, dtype=torch.float64).T
    gaps = torch.tensor(GAPS, dtype=torch.float64).repeat(N)[:N]
    return torch.linspace(0.5, 1.5, N), advantages, logps - log_ratios, logps + gaps


def defined(found, rows, **choice):
    """The definition in float64, from the statistics of a backend's table."""
    table = torch.zeros(len(COLUMNS), N, dtype=torch.float64)
    for name in ("logps", "entropy"):
        columns(table)[name].copy_(columns(found)[name])
    fill(table, torch.zeros(N, dtype=torch.bool), *(x.double() for x in rows), **choice)
    return columns(table)


def assert_defined(run, device, loss, kl_estimator, dtype=torch.float32):
    """``run`` of a backend, row by row against the definition, to a few units in the last place."""
    logits = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    labels = torch.arange(N, device=device) % 5
    choice = {"loss": loss, "kl_estimator": kl_estimator, "knobs": replace(KNOBS, entropy_coef=0.1)}
    options = {**choice, "entropy": True, "temperature": 1.0, "softcap": None}
    nothing = torch.zeros(N, device=device, dtype=dtype)
    logps = columns(run(None, logits, labels, nothing, nothing, None, None, **options))["logps"]
    rows = [x.to(dtype) for x in given(logps.cpu())]
    found = run(None, logits, labels, *(x.to(device) for x in rows), **options).cpu()
    expected, unit = defined(found, rows, **choice), torch.finfo(dtype).eps
    for name in ("loss", "g", "alpha", "beta", "ratio", "kl"):
        # exp of 20 errs by 20 units; a sum of terms by a few of the largest, which the KL's exp(20) is not in every row
        slack = 64 * unit * (expected[name].abs() + expected["kl"].abs() + expected["ratio"].abs() + 1)
        assert ((columns(found)[name] - expected[name]).abs() <= slack).all(), name
    for name in ("clip_low", "clip_high"):
        assert torch.equal(columns(found)[name].double(), expected[name]), name


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("loss", ["pg", "ppo", "cispo", "sapo"])
@pytest.mark.parametrize("kl_estimator", KL_ESTIMATORS)
def test_every_backend_computes_what_is_defined(backend, loss, kl_estimator):
    device = torch.device(place(backend))
    assert_defined(dispatch.kernels("policy_loss", backend, device).run, device, loss, kl_estimator)


@pytest.mark.parametrize("loss", FUNCTORS)
def test_the_slope_is_the_derivative_of_the_value(loss):
    """By autograd, which the losses of trainers go through."""
    logps = -torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    _, advantages, old_logps, ref_logps = given(logps.detach())
    log_ratio = logps - old_logps
    value, slope, *_ = FUNCTORS[loss](logps, ratio_of(log_ratio), log_ratio.abs() <= 20, advantages, KNOBS)
    (grad,) = torch.autograd.grad(value.sum(), logps)
    assert torch.allclose(grad, slope, rtol=1e-12, atol=1e-12)
    for estimate in KL_ESTIMATORS.values():
        value, slope = estimate(ref_logps - logps)
        (grad,) = torch.autograd.grad(value.sum(), logps)
        assert torch.allclose(grad, slope, rtol=1e-12, atol=1e-12)


OPTIONS = {
    "pg": {},
    "ppo": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    "cispo": {"ratio_min": 0.8, "ratio_max": 1.2},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
}


@pytest.mark.parametrize("loss", OPTIONS)
def test_the_losses_of_trainers_are_those_of_the_op(loss):
    logps = -torch.rand(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    _, advantages, old_logps, _ = given(logps.detach())
    losses = getattr(policy, loss)(logps, old_logps, advantages, **OPTIONS[loss])
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    table = torch.zeros(len(COLUMNS), N, dtype=torch.float64)
    columns(table)["logps"].copy_(logps.detach())
    rows = (torch.ones(N), advantages, old_logps, None)
    fill(
        table, torch.zeros(N, dtype=torch.bool), *rows, loss=loss, kl_estimator="k3", knobs=replace(KNOBS, kl_coef=0.0)
    )
    assert torch.allclose(losses.detach(), columns(table)["loss"], rtol=1e-12)
    assert torch.allclose(grad, columns(table)["g"], rtol=1e-12, atol=1e-12)
