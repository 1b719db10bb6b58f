"""Losses of pairs at their edges: extreme, tied, empty, single-token, and the same however a step is cut."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from fastalign.losses import preference
from fastalign.losses.mixture import settings, weighted_sum
from fastalign.losses.pairs import pair_logps
from fastalign.losses.preference_free import log1mexp, log_odds_ratio, mean_lengths
from fastalign.losses.preference_wide import rank_margins, rank_ratios
from fastalign.types import Columns, PairLogps


def complete(pair: PairLogps) -> PairLogps:
    """A pair with every optional field, for losses that read them."""
    kls = {"chosen_kls": pair.chosen.detach().abs() / 10, "rejected_kls": pair.rejected.detach().abs() / 7}
    tails = {name: getattr(pair, name.removesuffix("_tails")) / 4 for name in TAILS}
    return replace(pair, **kls, **{name: tail for name, tail in tails.items() if getattr(pair, name) is None})


TAILS = [field.name for field in fields(PairLogps) if field.name.endswith("_tails")]
PAIR_LOSSES = pytest.mark.parametrize("name", preference.LOSSES)


def coefficients(name: str, pair: PairLogps) -> tuple[Tensor, Tensor, Tensor]:
    losses = preference.LOSSES[name](complete(pair))
    zero = 0 * (pair.chosen + pair.rejected).sum()  # the imitation term alone never reads the rejected side
    return losses, *torch.autograd.grad(losses.sum() + zero, (pair.chosen, pair.rejected))


# --- pairs: extreme --------------------------------------------------------------------------------------------------


@PAIR_LOSSES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_stay_finite(name, dtype):
    sums = torch.tensor([-1.0, -1500.0, -1e4, -2.0], dtype=dtype)
    chosen, rejected = sums.clone().requires_grad_(), sums.flip(0).clone().requires_grad_()
    lengths = torch.tensor([3, 300, 2000, 1])
    pair = PairLogps(chosen, rejected, *torch.full((2, 4), -5.0, dtype=dtype), lengths, lengths)
    losses, c_w, c_x = coefficients(name, pair)
    assert losses.dtype == dtype and losses.shape == (4,)
    assert torch.isfinite(losses).all() and torch.isfinite(c_w).all() and torch.isfinite(c_x).all()


def test_extreme_coefficients_are_exact():
    chosen = torch.tensor([-1.0, -1500.0], requires_grad=True)
    rejected = chosen.detach().flip(0).requires_grad_()
    pair = PairLogps(chosen, rejected, *torch.full((2, 2), -5.0), *torch.full((2, 2), 3))
    loss = preference.cdpo(pair, beta=1.0, label_smoothing=0.25)
    loss.sum().backward()
    assert torch.equal(chosen.grad, torch.tensor([0.25, -0.75])) and torch.equal(rejected.grad, -chosen.grad)
    torch.testing.assert_close(loss, torch.tensor([0.25 * 1499, 0.75 * 1499]))


def test_orpo_near_certainty_keeps_its_digits_and_is_clamped_in_training():
    x = torch.tensor([-1e-9, -1e-3, -math.log(2), -1.0, -40.0, -120.0], dtype=torch.float64, requires_grad=True)
    y = log1mexp(x)
    expected = [math.log(-math.expm1(v)) if v > -0.7 else math.log1p(-math.exp(v)) for v in x.tolist()]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, x.detach().exp() / x.detach().expm1(), rtol=1e-12, atol=0)
    certain = torch.zeros(1, requires_grad=True)
    pair = PairLogps(certain, certain - 1, *torch.zeros(2, 1), *torch.ones(2, 1, dtype=torch.int64))
    losses, c_w, _ = coefficients("orpo", pair)
    assert torch.isfinite(losses).all() and torch.isfinite(c_w).all()
    assert log_odds_ratio(pair, -1e-4).item() < math.log(1e4) + 2


# --- pairs: tied -----------------------------------------------------------------------------------------------------

WHEN_EQUAL = {
    **dict.fromkeys(["dpo", "cdpo", "r_dpo", "ln_dpo", "ld_dpo", "dpop", "aot", "aot_unpaired"], math.log(2)),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "ipo_sum": 25.0,
    "nca": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo": 2 * 500.0**2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "exo": -math.log(2) - 0.5 * math.log(1e-3) - 0.5 * math.log1p(-1e-3),
}
"""The loss when policy and reference agree, for equal lengths and default settings."""


@pytest.mark.parametrize("name", WHEN_EQUAL)
def test_value_when_the_policy_is_the_reference(name):
    logps = -torch.rand(24, dtype=torch.float64)
    pair = pair_logps(logps, torch.tensor([0, 6, 12, 18, 24]), logps, tails=True)
    losses = preference.LOSSES[name](pair)
    expected = torch.full_like(losses, WHEN_EQUAL[name])
    if name == "aot":  # the reference's margins are met rank by rank: nothing is gained or lost
        assert torch.equal(pair.chosen - pair.rejected, pair.ref_chosen - pair.ref_rejected)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


def test_dpop_penalty_is_off_at_the_reference():
    chosen = torch.tensor([-3.0, -3.0, -2.9], requires_grad=True)
    refs = torch.tensor([-3.0, -2.9, -3.0])
    zeros, ones = torch.zeros(3), torch.ones(3, dtype=torch.int64)
    pair = PairLogps(chosen, zeros, refs, zeros, ones, ones)
    told = preference.dpop_metrics(pair)
    assert told["dpop/penalty_active"].tolist() == [False, True, False]
    preference.dpop(pair, beta=1.0, lam=9.0).sum().backward()
    slope = -torch.sigmoid(torch.tensor([-0.0, 1.0, -0.1]))
    torch.testing.assert_close(chosen.grad, slope * torch.tensor([1.0, 10.0, 1.0]))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_tied_ranks_are_matched_in_order(name):
    chosen = torch.full((3,), -2.0, requires_grad=True)
    rejected = torch.full((3,), -3.0, requires_grad=True)
    pair = PairLogps(chosen, rejected, torch.tensor([-1.0, -2.0, -3.0]), torch.zeros(3), *torch.ones(2, 3).long())
    losses, c_w, c_x = coefficients(name, pair)
    assert torch.isfinite(losses).all()
    torch.testing.assert_close(c_w.sum(), -c_x.sum())
    assert (c_w < 0).all() and (c_x > 0).all()


# --- pairs: empty and single token -----------------------------------------------------------------------------------


@PAIR_LOSSES
def test_no_pair_at_all(name):
    pair = pair_logps(torch.zeros(0, requires_grad=True), torch.tensor([0]), torch.zeros(0), tails=True)
    assert preference.LOSSES[name](complete(pair)).shape == (0,)


@PAIR_LOSSES
def test_empty_completions_and_single_tokens_stay_finite(name):
    logps = torch.tensor([-0.5, 0.0, -2.0], requires_grad=True)  # one token each, probability 1 among them
    pair = pair_logps(logps, torch.tensor([0, 1, 2, 2, 3]), torch.tensor([-0.5, -1.0, -1.0]), tails=True)
    assert pair.chosen_lengths.tolist() == [1, 0] and pair.rejected_lengths.tolist() == [1, 1]
    losses = preference.LOSSES[name](complete(pair))
    (g,) = torch.autograd.grad(losses.sum(), logps)
    assert torch.isfinite(losses).all() and torch.isfinite(g).all()


def test_tails_are_what_lies_beyond_the_shorter_completion():
    logps, ref = -torch.arange(1.0, 11.0), -torch.ones(10)
    pair = pair_logps(logps, torch.tensor([0, 3, 4, 6, 10]), ref, tails=True)
    assert pair.chosen_tails.tolist() == [-5.0, 0.0] and pair.rejected_tails.tolist() == [0.0, -19.0]
    assert pair.ref_chosen_tails.tolist() == [-2.0, 0.0] and pair.ref_rejected_tails.tolist() == [0.0, -2.0]
    torch.testing.assert_close(preference.ld_dpo(pair, ld_alpha=1.0), preference.dpo(pair))
    cut = replace(pair, chosen=pair.chosen - pair.chosen_tails, rejected=pair.rejected - pair.rejected_tails)
    cut = replace(cut, ref_chosen=pair.ref_chosen - pair.ref_chosen_tails)
    cut = replace(cut, ref_rejected=pair.ref_rejected - pair.ref_rejected_tails)
    torch.testing.assert_close(preference.ld_dpo(pair, ld_alpha=0.0), preference.dpo(cut))
    with pytest.raises(ValueError, match="ld_dpo reads the tails of the pairs, which were not computed"):
        preference.ld_dpo(pair_logps(logps, torch.tensor([0, 3, 4, 6, 10]), ref))


# --- pairs: however the step is cut ----------------------------------------------------------------------------------


@PAIR_LOSSES
def test_chunks_add_up_to_the_step(name):
    """The columns of the step are known beforehand: then each pair's loss and gradient depend on nothing else."""
    new = torch.Generator().manual_seed(3)
    counts = torch.tensor([5, 2, 1, 7, 3, 3, 4, 6, 2, 5])
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    logps = (-3 * torch.rand(38, generator=new, dtype=torch.float64)).requires_grad_()
    ref = -3 * torch.rand(38, generator=new, dtype=torch.float64)
    whole = complete(pair_logps(logps, cu_seqlens, ref, tails=True))
    expected = preference.LOSSES[name](whole)
    (g,) = torch.autograd.grad(expected.sum(), logps)

    step = Columns(**{make.__name__: make(whole) for make in (mean_lengths, rank_margins, rank_ratios)})
    parts = []
    for first, last in ((0, 2), (2, 2), (2, 5)):
        rows = slice(cu_seqlens[2 * first], cu_seqlens[2 * last])
        offsets = cu_seqlens[2 * first : 2 * last + 1] - cu_seqlens[2 * first]
        columns = step.pick({"sequence": slice(2 * first, 2 * last)})
        pair = complete(pair_logps(logps[rows], offsets, ref[rows], tails=True, columns=columns))
        parts.append(preference.LOSSES[name](pair))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)
    (in_parts,) = torch.autograd.grad(torch.cat(parts).sum(), logps)
    torch.testing.assert_close(in_parts, g, rtol=1e-12, atol=1e-12)
    alone = [preference.LOSSES[name](one(whole, p)) for p in range(5)]
    coupled = len(preference.LOSSES[name].columns) > 0
    assert torch.allclose(torch.cat(alone), expected, rtol=1e-9) != coupled, "the sets say which losses need the step"


@pytest.mark.parametrize(
    ("name", "column"), [("aot", "rank_margins"), ("aot_unpaired", "rank_ratios"), ("cpo", "mean_lengths")]
)
def test_a_column_of_the_step_that_was_not_filled_is_refused(name, column):
    """Made of a chunk's pairs alone it would be another loss."""
    pair = pair_logps(-torch.rand(6), torch.tensor([0, 1, 3, 5, 6]), -torch.rand(6), columns=Columns())
    with pytest.raises(ValueError, match=f"reads the column {column} of the batch, which was not filled: see Columns$"):
        preference.LOSSES[name](pair)


def one(pair: PairLogps, p: int) -> PairLogps:
    tensors = {f.name: getattr(pair, f.name) for f in fields(pair)}
    return PairLogps(**{name: x[p : p + 1] for name, x in tensors.items() if isinstance(x, Tensor)})


def test_a_weighted_sum_gives_each_loss_its_own_keywords():
    losses = {name: preference.LOSSES[name] for name in ("dpo", "simpo", "sft")}
    assert settings(losses) == {"loss_weights": None, "beta": 0.1, "gamma_beta_ratio": 0.5}
    pair = pair_logps(-torch.rand(12), torch.tensor([0, 2, 5, 9, 12]), -torch.rand(12))
    options = {"beta": 0.7, "gamma_beta_ratio": 0.2, "loss_weights": [1.0, 0.5, -2.0]}
    expected = preference.dpo(pair, beta=0.7) + 0.5 * preference.simpo(pair, beta=0.7, gamma_beta_ratio=0.2)
    torch.testing.assert_close(weighted_sum(losses, options, pair), expected - 2 * preference.sft(pair))
    alone = weighted_sum({"dpo": preference.dpo}, {"beta": 0.7}, pair)
    assert torch.equal(alone, preference.dpo(pair, beta=0.7))
