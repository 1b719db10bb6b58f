"""Advantages, rewards and what else surrounds a rollout, at their edges."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from fastalign.losses import unpaired
from fastalign.ops import gae
from fastalign.rl import advantages, rewards, selection

OFFSETS = torch.tensor([0, 2, 2, 3, 6])


def test_groups_in_any_order_and_of_any_size():
    scores = torch.tensor([1.0, 5.0, 3.0, 2.0, 9.0, 3.0])
    groups = torch.tensor([7, -1, 7, -1, -1, 7])
    order = groups.argsort(stable=True)
    for estimator in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        sorted_result = estimator(scores[order], groups[order])
        torch.testing.assert_close(estimator(scores, groups)[order], sorted_result)
    others = [(5 + 9) / 2, (5 + 2) / 2]
    assert advantages.rloo(scores, groups)[3].item() == pytest.approx(2 - others[0])
    assert advantages.rloo(scores, groups)[4].item() == pytest.approx(9 - others[1])


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7e7])
def test_equal_rewards_have_no_advantage_to_the_last_bit(value):
    scores, groups = torch.full((7,), value), torch.zeros(7, dtype=torch.int64)
    for estimator in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        assert (estimator(scores, groups) == 0).all()
    assert rewards.informative_groups(scores, groups).tolist() == [False]


def test_a_group_of_one_is_refused():
    for estimator in (advantages.grpo, advantages.dr_grpo, advantages.rloo):
        with pytest.raises(ValueError, match="sample at least 2 answers per prompt"):
            estimator(torch.ones(3), torch.tensor([0, 0, 1]))
        assert estimator(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_advantages_are_detached_and_keep_their_dtype():
    scores = torch.rand(4, requires_grad=True)
    groups, offsets = torch.tensor([0, 0, 1, 1]), OFFSETS
    made = [f(scores, groups) for f in (advantages.grpo, advantages.dr_grpo, advantages.rloo)]
    made += [advantages.batch_mean(scores), advantages.reinforce_pp_baseline(scores, groups, offsets)]
    made += [advantages.remax(scores, scores.detach() / 2, torch.zeros(6), offsets)]
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in made)


def test_scores_are_paid_at_the_last_token_and_empty_answers_are_passed_over():
    old, ref = torch.zeros(6), torch.full((6,), -0.5)
    scores = torch.tensor([1.0, 100.0, 2.0, 3.0])  # the second answer is empty
    made = rewards.token_rewards(old, ref, scores, OFFSETS, kl_coef=0.2)
    assert made.tolist() == pytest.approx([-0.1, 0.9, 1.9, -0.1, -0.1, 2.9])
    charged = rewards.charge_kl(scores, old, ref, OFFSETS, kl_coef=0.2)
    assert charged.tolist() == pytest.approx([0.8, 100.0, 1.9, 2.7])
    k3 = rewards.token_rewards(old, ref, torch.zeros(4), OFFSETS, kl_coef=1.0, estimator="k3")
    assert k3.tolist() == pytest.approx([-(math.exp(-0.5) + 0.5 - 1)] * 6)


def test_suffix_sums_are_gae_without_discount():
    tokens, values = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    credit, returns = gae(tokens, values, OFFSETS, 1.0, 1.0)
    _, to_go = advantages.reinforce_pp(tokens, OFFSETS)
    torch.testing.assert_close(returns, to_go, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(credit, to_go - values, rtol=1e-12, atol=1e-12)


def test_remax_gives_a_tied_prompt_its_kl_alone():
    scores, kls = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.arange(6.0)
    assert advantages.remax(scores, scores, kls, OFFSETS).tolist() == [1.0, 1.0, 2.0, 12.0, 9.0, 5.0]
    assert advantages.remax_local(scores, scores, kls, OFFSETS).tolist() == kls.tolist()


def test_process_rewards_end_with_their_steps():
    credit = advantages.grpo_process(
        torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0, 2, 4]), torch.tensor([0, 0, 0, 0]), OFFSETS
    )
    assert credit[1] == 0 and credit[5] == 0  # nothing follows there
    assert credit[3] == credit[4] == 0  # a reward of the mean
    assert credit[0] == -credit[2] > 0.99


def test_scores_are_shaped():
    scores = torch.tensor([-9.0, 0.5, 9.0])
    assert rewards.shape_scores(scores, scale=2.0, bias=1.0, clip=5.0).tolist() == [-5.0, 2.0, 5.0]


def test_the_kl_controller_moves_by_a_fifth_per_horizon_at_most():
    assert rewards.adapt_kl_coef(0.1, 6.0) == 0.1
    assert rewards.adapt_kl_coef(0.1, 1e9, num_samples=10_000) == pytest.approx(0.12)
    assert rewards.adapt_kl_coef(0.1, 0.0, num_samples=10_000) == pytest.approx(0.08)


def test_pairs_of_equal_answers_are_dropped():
    chosen, rejected, keep = selection.best_and_worst(torch.tensor([[2.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 3.0, 3.0]]))
    assert chosen.tolist() == [0, 0, 1] and rejected.tolist() == [2, 0, 0] and keep.tolist() == [True, False, True]


@pytest.mark.parametrize("shares", [[10, 2], [12, 0]])
def test_statistics_of_all_ranks_are_those_of_one_process(monkeypatch, shares):
    barrier, slots = threading.Barrier(2), [torch.empty(0)] * 2

    def all_reduce(values, group):
        slots[group] = values.clone()
        barrier.wait()
        values.copy_(slots[0] + slots[1])
        barrier.wait()

    monkeypatch.setattr(dist, "all_reduce", all_reduce)  # two ranks that live in threads; the group is the rank
    logps, refs = (-torch.rand(12, dtype=torch.float64) for _ in range(2))
    before = unpaired.make_baseline(0.25, 3.0)

    def rank(group):
        x, ref = logps.split(shares)[group], refs.split(shares)[group]
        baselines = [
            update(before, x, ref, beta=0.5, process_group=group)
            for update in (unpaired.kto_baseline, unpaired.bco_baseline)
        ]
        return [*baselines, advantages.batch_mean(x, process_group=group)]

    with ThreadPoolExecutor(2) as pool:
        kto, bco, centred = zip(*pool.map(rank, (0, 1)), strict=True)
    for mine, update in ((kto, unpaired.kto_baseline), (bco, unpaired.bco_baseline)):
        whole = update(before, logps, refs, beta=0.5)
        assert all(one.count == whole.count for one in mine) and torch.equal(mine[0].mean, mine[1].mean)
        torch.testing.assert_close(mine[0].mean, whole.mean, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat(centred), advantages.batch_mean(logps), rtol=1e-12, atol=1e-15)
