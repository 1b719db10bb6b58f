"""Preference losses against hand-computed values, and their behaviour at the edges."""

import math

import pytest
import torch

from fastalign.losses import preference
from fastalign.losses.pairs import pair_logps
from fastalign.types import PairLogps

# One pair with a = -0.4, b = -0.9: L_w = -10.4, L_x = -12.9, references -10 and -12, lengths 5 and 6.
HAND = {
    ("dpo", 0.5): (0.5759394199, -0.2189117496, 0.2189117496),
    ("ipo", 0.5): (0.8649, -0.372, 0.31),
    ("simpo", 2.0): (1.2128812145, -0.2810642617, 0.2342202181),
}


def hand_pair(dtype=torch.float64):
    chosen, rejected = (torch.tensor([x], dtype=dtype, requires_grad=True) for x in (-10.4, -12.9))
    references = (torch.tensor([x], dtype=dtype) for x in (-10.0, -12.0))
    return PairLogps(chosen, rejected, *references, torch.tensor([5]), torch.tensor([6]))


@pytest.mark.parametrize(("name", "beta"), HAND)
def test_value_and_coefficients_of_the_hand_pair(name, beta):
    pair = hand_pair()
    loss = preference.LOSSES[name](pair, beta=beta)
    grads = torch.autograd.grad(loss.sum(), (pair.chosen, pair.rejected))
    torch.testing.assert_close(torch.cat([loss, *grads]).tolist(), list(HAND[name, beta]), rtol=0, atol=1e-9)


def test_dpo_is_ln2_to_the_last_bit_when_policy_is_reference():
    logps = -torch.rand(23)
    cu_seqlens = torch.tensor([0, 5, 9, 9, 23])
    pair = pair_logps(logps, cu_seqlens, logps.clone())
    loss = preference.dpo(pair)
    sums = preference.metrics(pair, loss, [preference.LOSSES["dpo"]], {"beta": 0.1})
    assert loss.tolist() == [torch.tensor(math.log(2)).item()] * 2
    assert sums["rewards/margins"][0] == 0 and sums["rewards/chosen"][0] == 0


def test_extreme_margins_stay_finite_with_exact_coefficients():
    sums = torch.tensor([-1.0, -1500.0], requires_grad=True)
    pair = PairLogps(sums, sums.flip(0).detach(), *torch.full((2, 2), -5.0), *torch.full((2, 2), 3))
    loss = preference.dpo(pair, beta=1.0)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.0, 1499.0]))
    torch.testing.assert_close(sums.grad, torch.tensor([-0.0, -1.0]))


def test_pairs_are_neighbours_and_empty_completions_are_legal():
    pair = pair_logps(-torch.arange(1.0, 5.0), torch.tensor([0, 2, 2, 3, 4]))
    assert pair.chosen.tolist() == [-3.0, -3.0] and pair.rejected.tolist() == [0.0, -4.0]
    assert pair.chosen_lengths.tolist() == [2, 1] and pair.rejected_lengths.tolist() == [0, 1]
    assert torch.isfinite(preference.simpo(pair)).all()


def test_metrics_are_sums_that_add_over_micro_batches():
    logps, ref = -torch.rand(12), -torch.rand(12)
    offsets = torch.tensor([0, 2, 5, 9, 12])
    whole = pair_logps(logps, offsets, ref)
    halves = [
        pair_logps(logps[:5], offsets[:3], ref[:5]),
        pair_logps(logps[5:], offsets[2:] - 5, ref[5:]),
    ]
    sums = [
        preference.metrics(p, preference.dpo(p), [preference.LOSSES["dpo"]], {"beta": 0.1}) for p in (whole, *halves)
    ]
    for key in sums[0]:
        torch.testing.assert_close(sums[1][key] + sums[2][key], sums[0][key])


def test_simpo_reports_rewards_per_token():
    pair = hand_pair()
    sums = preference.metrics(pair, preference.simpo(pair), [preference.LOSSES["simpo"]], {"beta": 2.0})
    assert sums["rewards/chosen"][0].item() == pytest.approx(2.0 * (-10.4 + 10.0) / 5)
