"""Losses of labels, rankings and rewards at their edges: extreme, tied, empty and single-token cases."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastalign.losses import ranking, reward, unpaired
from fastalign.losses.mixture import keywords
from fastalign.types import LabelledLogps, RankedLogps

# --- unpaired --------------------------------------------------------------------------------------------------------


def labelled(logps: Tensor, *labels: bool) -> LabelledLogps:
    ref_logps, zero = torch.full_like(logps, -5.0).detach(), torch.zeros((), dtype=torch.float64)
    return LabelledLogps(logps, ref_logps, torch.tensor(labels, dtype=torch.bool), zero)


@pytest.mark.parametrize("name", unpaired.LOSSES)
@pytest.mark.parametrize("labels", [(), (True,), (False,), (True, False, True, False)], ids=len)
def test_unpaired_losses_of_one_label_of_nothing_and_at_extremes(name, labels):
    logps = torch.tensor([-1.0, -1e4, -1500.0, -2.0])[: len(labels)].requires_grad_()
    batch = labelled(logps, *labels)
    baseline = unpaired.LOSSES[name].baseline(unpaired.make_baseline(), logps, batch.ref_logps, beta=0.1)
    batch = replace(batch, baseline=baseline.mean)
    losses = unpaired.LOSSES[name](batch)
    told = unpaired.metrics(batch, losses, beta=0.1, loss=unpaired.LOSSES[name])
    assert losses.dtype == torch.float32 and losses.shape == (len(labels),) and torch.isfinite(losses).all()
    assert told["rewards/chosen"][1] == sum(labels) and told["loss"][1] == len(labels)
    if labels:
        (g,) = torch.autograd.grad(losses.sum(), logps)
        assert torch.isfinite(g).all()
    assert not baseline.mean.requires_grad and baseline.mean.dtype == torch.float64


def test_kto_at_the_reference_and_its_weights():
    batch = labelled(torch.full((2,), -5.0), True, False)
    assert unpaired.kto(batch, desirable_weight=2.0, undesirable_weight=3.0).tolist() == [1.0, 1.5]


def test_bco_baseline_is_the_mean_of_all_rewards_and_survives_a_checkpoint():
    logps = -5 * torch.rand(30, dtype=torch.float64)
    refs, state = torch.full_like(logps, -2.0), unpaired.make_baseline()
    for part, ref in zip(logps.split([7, 0, 11, 12]), refs.split([7, 0, 11, 12]), strict=True):
        state = unpaired.bco_baseline(state, part, ref, beta=0.3)
        kept, state = state.state_dict(), unpaired.make_baseline()
        state.load_state_dict(kept)
    torch.testing.assert_close(state.mean, 0.3 * (logps - refs).mean(), rtol=1e-12, atol=0)
    assert state.count == 30


# --- ranking ---------------------------------------------------------------------------------------------------------


def test_ties_single_candidates_and_prompts_without_any():
    logps = torch.tensor([-4.0, -2.0, -9.0, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    batch = RankedLogps(logps, torch.tensor([2, 1, 3, 0, 1]), rewards, torch.tensor([0, 2, 2, 3, 5]))
    losses = ranking.rrhf(batch)
    assert losses.tolist() == [4.0, 0.0, 9.0, 3.0]  # equal rewards form no pair, the first of them is imitated
    told = ranking.metrics(batch, losses, **keywords(ranking.rrhf))
    assert told["rank_accuracy"].tolist() == [0, 0] and told["best_is_top1"].tolist() == [2, 3]
    (g,) = torch.autograd.grad(losses.sum(), logps)
    assert g.tolist() == [-1.0, 0.0, -1.0, -1.0, 0.0]
    with pytest.raises(ValueError, match="rrhf: sft must be sum or mean, got 'max'"):
        ranking.rrhf(batch, sft="max")


def test_candidates_of_another_prompt_are_not_compared():
    logps = -torch.rand(7, dtype=torch.float64) * 5
    batch = RankedLogps(logps, torch.arange(1, 8), torch.arange(7.0).flip(0), torch.tensor([0, 3, 7]))
    halves = [
        RankedLogps(logps[a:b], torch.arange(1, 8)[a:b], torch.arange(7.0).flip(0)[a:b], torch.tensor([0, b - a]))
        for a, b in ((0, 3), (3, 7))
    ]
    torch.testing.assert_close(ranking.rrhf(batch), torch.cat([ranking.rrhf(half) for half in halves]))


# --- reward models ---------------------------------------------------------------------------------------------------


def test_reward_losses_at_the_edges():
    extreme = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = reward.reward(extreme, extreme.flip(0).detach())
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2e4] and extreme.grad.tolist() == [-0.0, -1.0]
    nothing = torch.zeros(0)
    assert reward.reward(nothing, nothing).shape == (0,)
    assert all(total.tolist() == [0.0, 0.0] for total in reward.metrics(nothing, nothing, nothing).values())
    tied = torch.zeros(3, requires_grad=True)
    loss = reward.k_wise(tied, torch.tensor([0, 0, 0]), torch.tensor([0, 2, 2, 3]))
    assert loss.tolist() == [0.0, 0.0, 0.0]
    loss = reward.k_wise(tied, torch.tensor([1, 0, 0]), torch.tensor([0, 2, 2, 3]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2), 0.0, 0.0]))


def test_process_rewards_without_steps_and_masked_logits():
    logits = torch.tensor([math.nan, 100.0, -100.0, 0.0], requires_grad=True)
    labels = torch.tensor([-100, 1, 1, 0])
    losses = reward.process(logits, labels)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.0, 0.0, 100.0, math.log(2)])
    assert logits.grad.tolist() == pytest.approx([0.0, 0.0, -1.0, 0.5])
    scores = reward.solution_scores(logits, labels, torch.tensor([0, 1, 4]), "prod")
    assert scores.tolist() == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="how must be min or prod"):
        reward.solution_scores(logits, labels, torch.tensor([0, 4]), "mean")


def test_calibration_error_of_margins():
    margins = torch.tensor([math.log(3)] * 3 + [-math.log(3)], dtype=torch.float64)  # sure of 3/4, right in 3 of 4
    bins = torch.stack(list(reward.calibration_bins(margins).values()))
    assert bins[:, 1].sum() == 4 and reward.calibration_error(bins).item() == pytest.approx(0.0, abs=1e-12)
    wrong = torch.stack(list(reward.calibration_bins(-margins.abs()).values()))
    assert reward.calibration_error(wrong).item() == pytest.approx(0.75)
    halves = [torch.stack(list(reward.calibration_bins(part).values())) for part in margins.split(2)]
    torch.testing.assert_close(halves[0] + halves[1], bins)


def test_calibration_of_margins_that_are_not_numbers_and_of_none():
    broken = torch.stack(list(reward.calibration_bins(torch.tensor([math.nan, 1.0, math.inf])).values()))
    assert broken[:, 1].sum() == 3 and math.isnan(reward.calibration_error(broken))
    nothing = torch.stack(list(reward.calibration_bins(torch.empty(0)).values()))
    assert math.isnan(reward.calibration_error(nothing))
