"""Policy-gradient losses at their edges, against the fused op, and chunk by chunk."""

import math

import pytest
import torch
from torch import Tensor

from fastalign.losses import policy
from fastalign.losses.reduce import Totals, seq_mean_token_mean, seq_mean_token_sum, token_mean, token_weights
from fastalign.ops import linear_loss, policy_loss
from fastalign.rl import algorithms

# --- policy gradients ------------------------------------------------------------------------------------------------

TOKEN_LOSSES = [name for name, loss in policy.LOSSES.items() if not loss.sequences]


def call(name: str, logps: Tensor, old: Tensor, credit: Tensor, cu_seqlens: Tensor, **options) -> Tensor:
    sequences = (cu_seqlens,) if policy.LOSSES[name].sequences else ()
    return policy.LOSSES[name](logps, old, credit, *sequences, **options)


@pytest.mark.parametrize("name", policy.LOSSES)
def test_extreme_ratios_stay_finite(name):
    logps = torch.tensor([-1e4, -0.1, -2.0, -1e-7], requires_grad=True)
    old, credit = torch.tensor([-0.1, -1e4, -2.0, -30.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    losses = call(name, logps, old, credit, torch.arange(5))
    (g,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.dtype == torch.float32 and torch.isfinite(losses).all() and torch.isfinite(g).all()


@pytest.mark.parametrize("name", policy.LOSSES)
def test_on_policy_every_loss_is_the_policy_gradient(name):
    logps = -torch.rand(7, dtype=torch.float64)
    leaf, cu_seqlens = logps.clone().requires_grad_(), torch.tensor([0, 3, 3, 4, 7])  # an empty and a single-token one
    credit = torch.tensor([1.5, -0.5, 0.0, 2.0], dtype=torch.float64).repeat_interleave(cu_seqlens.diff())
    losses = call(name, leaf, logps, credit, cu_seqlens)
    (g,) = torch.autograd.grad(losses.sum(), leaf)
    shares = {"rloo": 1 / cu_seqlens.diff().repeat_interleave(cu_seqlens.diff())}  # a token holds a share of q's loss
    torch.testing.assert_close(g, -credit, rtol=1e-12, atol=0)
    if name in ("ppo", "sapo", "gspo", "rloo"):
        scale = {"sapo": 2 / torch.where(credit > 0, 1.0, 1.05)}.get(name, shares.get(name, 1.0))
        torch.testing.assert_close(losses, -credit * scale, rtol=1e-6, atol=0)


def test_a_clip_acts_beyond_its_bound_not_on_it():
    ratio = torch.tensor([1.25, 1.25 + 1e-6, 0.75, 0.75 - 1e-6, 3.0, 3.0 + 1e-5], requires_grad=True)
    credit = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    policy.surrogate(ratio, credit, 0.25, 0.25, 3.0).sum().backward()
    assert ratio.grad.tolist() == [-1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def test_log_ratios_beyond_the_clamp_have_no_gradient_and_nan_is_not_hidden():
    logps = torch.tensor([25.0, -25.0, 1.0, math.nan], requires_grad=True)
    ratio = policy.token_ratio(logps, torch.zeros(4))
    ratio[:3].sum().backward()
    assert ratio[0] == ratio.new_tensor(20.0).exp() and logps.grad[:2].tolist() == [0.0, 0.0] and logps.grad[2] > 2.7
    assert ratio[3].isnan()


def test_kl_estimators_at_the_edges():
    leaf = torch.tensor([0.0, -30.0, 3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.zeros(3, dtype=torch.float64)
    value = policy.k3(leaf, ref)
    assert value[0] == 0 and (value >= 0).all()
    assert torch.autograd.grad(value.sum(), leaf)[0][1] == 0  # clamped
    plus = policy.k3_plus(leaf, ref)
    torch.testing.assert_close(plus, policy.k3(leaf, ref))
    torch.testing.assert_close(torch.autograd.grad(plus.sum(), leaf)[0], leaf.detach())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_value_loss_at_its_bounds(old, value_clip):
    values = torch.tensor([0.5, 1.0, -1.0], requires_grad=True)
    before = values.detach() if old else torch.zeros(3)
    loss = policy.value_loss(values, before, torch.tensor([0.0, 0.1, 0.0]), value_clip=value_clip)
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.5, 0.9, -1.0])  # the unclipped error is the larger here
    away = torch.tensor([1.0], requires_grad=True)
    policy.value_loss(away, torch.zeros(1), torch.tensor([1.0]), value_clip=0.2).sum().backward()
    assert away.grad.tolist() == [0.0]


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_losses_equal_the_fused_op(name):
    """The functors of ``policy_loss`` and these functions are two copies of one mathematics."""
    new = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 13, generator=new, dtype=torch.float64).requires_grad_()
    labels = torch.randint(13, (9,), generator=new)
    old, ref, credit = (torch.randn(9, generator=new, dtype=torch.float64) - 2 for _ in range(3))
    options = {"dual_clip": 3.0, "clip_low": 0.1, "clip_high": 0.3} if name == "ppo" else {}
    fused = {"clip_low": None, "clip_high": 0.28} if name == "cispo" else options
    expected, _ = policy_loss(logits, labels, old, credit, ref_logps=ref, loss=name, kl_coef=0.1, **fused)
    logps = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    losses = policy.LOSSES[name](logps, old, credit, **options) + 0.1 * policy.k3(logps, ref)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (losses.mean(), expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", policy.LOSSES)
def test_losses_run_chunk_by_chunk(name):
    """Through ``linear_loss`` in chunks of a few rows: token losses anywhere, sequence losses on whole sequences."""
    new = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(24, 8, generator=new), torch.randn(32, 8, generator=new)
    labels, cu_seqlens = torch.randint(32, (24,), generator=new), torch.tensor([0, 5, 6, 6, 14, 24])
    old, credit = torch.randn(24, generator=new) - 4, torch.randn(5, generator=new).repeat_interleave(cu_seqlens.diff())
    weights = token_weights("seq-mean-token-mean", cu_seqlens, Totals(sequences=4)).float()

    def loss_fn(stats):
        rows, offsets = stats.rows, cu_seqlens if stats.cu_seqlens is None else stats.cu_seqlens
        return (weights[rows] * call(name, stats.logps, old[rows], credit[rows], offsets)).sum()

    results = []
    for memory in (None, 4 * 32 * 4):
        leaf = hidden.clone().requires_grad_()
        aligned = {"align": "sequence", "cu_seqlens": cu_seqlens} if policy.LOSSES[name].sequences else {}
        loss, _ = linear_loss(leaf, weight, labels, loss_fn, memory=memory, **aligned)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_reductions_are_weighted_sums():
    x, cu_seqlens = torch.randn(9, dtype=torch.float64), torch.tensor([0, 2, 2, 9])
    totals = Totals(tokens=9, sequences=2, budget=7)
    reduced = {name: (token_weights(name, cu_seqlens, totals) * x).sum() for name in policy_reductions()}
    torch.testing.assert_close(reduced["token-mean"], token_mean(x, 9))
    torch.testing.assert_close(reduced["seq-mean-token-mean"], seq_mean_token_mean(x, cu_seqlens, 2))
    torch.testing.assert_close(reduced["seq-mean-token-sum"], seq_mean_token_sum(x, 2))
    torch.testing.assert_close(reduced["constant"], x.sum() / 14)
    assert token_weights("token-mean", torch.tensor([0]), totals).shape == (0,)
    with pytest.raises(ValueError, match="unknown reduction 'mean': expected one of token-mean, seq-mean-token-mean"):
        token_weights("mean", cu_seqlens, totals)


def policy_reductions() -> set[str]:
    return {variant.reduction for variant in algorithms.ALGORITHMS.values()}


def test_the_weight_of_a_sampler_that_computes_other_numbers_is_capped_and_carries_no_gradient():
    old = torch.tensor([-1.0, -1.0, -1.0, -1e4, -0.1], requires_grad=True)
    sampler = torch.tensor([-1.0, -1.5, -9.0, -0.1, -1e4])
    weights = policy.sampler_correction(old, sampler)
    assert weights.tolist() == pytest.approx([1.0, math.exp(0.5), 2.0, 0.0, 2.0]) and not weights.requires_grad
