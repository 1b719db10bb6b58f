"""Around the updates of a step: when they stop, what follows them, what is left of a step with nothing to learn."""

import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from onpolicy import ALONE, Given, make_group, make_groups, make_job, make_models, run

from fastalign.config import OptimConfig
from fastalign.engine.onpolicy import kept
from fastalign.engine.optim import Trained, make_optimizer
from fastalign.engine.output.checkpoint import load_checkpoint, save_checkpoint
from fastalign.parallel.mesh import Axis
from fastalign.rl.answers import make_scores
from fastalign.rl.controllers import ValueNorm
from fastalign.rl.credit import Experience, gae
from fastalign.rl.rewards import adapt_kl_coef
from fastalign.types import Rollout


def weights(models):
    return [p.detach().clone() for p in models.policy.parameters()]


def with_adam(job):
    """The job with the optimizer of runs."""
    options = OptimConfig(lr=0.01, weight_decay=0.1)
    return replace(
        job, trained={role: Trained(t.module, make_optimizer(t.module, options)) for role, t in job.trained.items()}
    )


def state_of(job):
    return [
        x.clone() for p in job.models.policy.parameters() for x in job.trained["policy"].optimizer.state[p].values()
    ]


@pytest.mark.parametrize("limit", [{"target_kl": 1e-9}, {"max_ratio": 1 + 1e-12}])
def test_an_early_stop_leaves_weights_and_moments_as_the_update_before_did(tmp_path, limit):
    ends = []
    for name, settings in (("once", {}), ("stopped", {"num_iterations": 5, **limit})):
        job = with_adam(make_job("grpo", make_models(), make_groups(), tmp_path / name, **settings))
        (tmp_path / name).mkdir()
        run(job)
        ends.append((weights(job.models), state_of(job)))
    for mine, theirs in zip(*ends, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name, groups, settings",
    [
        ("grpo", [make_group(0, (3, 2), missing=[0, 1]), make_group(1, (3, 2), missing=[1])], {}),
        ("ppo", [make_group(0, (3, 2), missing=[0, 1])], {}),
        ("grpo", [make_group(0, (3, 2), cut=[0, 1])], {"truncation": "mask"}),
        ("ppo", [make_group(0, (3, 2), cut=[0, 1])], {"truncation": "mask"}),
        ("raft", [make_group(0, (3, 2), missing=[0, 1])], {}),
        ("online_dpo", [make_group(0, (3, 2), missing=[1])], {}),
    ],
)
def test_a_step_with_nothing_to_learn_changes_nothing(tmp_path, name, groups, settings):
    models = make_models("shared" if name == "ppo" else "none")
    before = weights(models)
    got = run(make_job(name, models, groups, tmp_path, **settings))
    assert got["tokens_response"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(models), strict=True))


def test_masked_completions_count_for_their_group_alone(tmp_path):
    models, groups = make_models(), [make_group(0, (3, 8, 4), cut=[1])]
    got = run(make_job("grpo", models, groups, tmp_path, truncation="mask"))
    assert got["tokens_response"] == 7 and got["objective/scores"] == pytest.approx(groups[0].rewards.mean())


@pytest.mark.parametrize("target, sign", [(1e-3, 1), (1e6, -1)])
def test_the_price_of_kl_follows_its_target(tmp_path, target, sign):
    job = make_job("rloo", make_models(), make_groups(), tmp_path, optim_lr=0.0, kl_target=target, kl_horizon=100)
    first, second = run(job), run(job)
    assert first["kl_coef"] == 0.05 and first["objective/kl"] == pytest.approx(second["objective/kl"])
    moved = adapt_kl_coef(0.05, first["objective/kl"], target=target, horizon=100, num_samples=first["sequences"])
    assert second["kl_coef"] == moved and sign * (moved - 0.05) > 0
    price = -second["objective/non_score_reward"] / second["objective/kl"]
    assert price == pytest.approx(moved)


def test_values_are_normalised_without_bias_and_restored():
    norm, d = ValueNorm(), ValueNorm.DECAY
    first, second = torch.tensor([1.0, 3.0, 8.0]).double(), torch.tensor([-2.0, 4.0]).double()
    assert norm.restore(first).tolist() == first.tolist()
    torch.testing.assert_close(norm.update(first, Axis()), (first - 4) / first.std(correction=0))
    norm.update(second, Axis())
    whole = 1 - d**2
    mean = (d * (1 - d) * 4 + (1 - d) * 1) / whole
    square = (d * (1 - d) * 74 / 3 + (1 - d) * 10) / whole
    torch.testing.assert_close(
        norm.restore(torch.tensor([0.0, 1.0]).double()).diff()[0].item(), (square - mean**2) ** 0.5
    )
    again = ValueNorm()
    again.load_state_dict(norm.state_dict())
    assert again.restore(first).tolist() == norm.restore(first).tolist()


@pytest.mark.parametrize(
    "sync", [{"reference_sync": "ema", "reference_alpha": 0.25}, {"reference_sync": "periodic", "reference_steps": 2}]
)
def test_a_reference_follows_the_policy_and_is_in_the_checkpoint(tmp_path, sync):
    job = make_job("grpo", make_models(), make_groups(), tmp_path, kl_coef=0.1, **sync)
    start = [p.clone() for p in job.models.reference.parameters()]
    run(job, 1)
    policy = weights(job.models)
    follows = sync["reference_sync"] == "ema"
    for ref, old, new in zip(job.models.reference.parameters(), start, policy, strict=True):
        torch.testing.assert_close(ref, old + 0.25 * (new - old) if follows else old, rtol=1e-14, atol=1e-14)
    job.models.reference.load_state_dict(job.models.policy.state_dict()) if not follows else None
    job = with_adam(job)
    path = save_checkpoint(tmp_path, 1, kept(job), {}, ALONE, None)
    fresh = with_adam(make_job("grpo", make_models(seed=3), make_groups(), tmp_path, kl_coef=0.1, **sync))
    load_checkpoint(path, kept(fresh), ALONE)
    for a, b in zip(fresh.models.reference.parameters(), job.models.reference.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_is_made_every_so_many_steps(tmp_path):
    settings = {"kl_coef": 0.1, "reference_sync": "periodic", "reference_steps": 2}
    job = make_job("grpo", make_models(), make_groups(), tmp_path, **settings)
    run(job, 3)
    alone = make_job("grpo", make_models(), make_groups(), tmp_path, **settings)
    run(alone, 2)
    for a, b in zip(job.models.reference.parameters(), alone.models.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_critic_warms_up_at_its_own_rate(tmp_path):
    models = make_models("separate")
    job = make_job(
        "ppo", models, make_groups(), tmp_path, critic="separate", critic_warmup=1, critic_lr=0.1, optim_lr=0.0
    )
    before, critic = weights(models), [p.detach().clone() for p in models.critic.parameters()]
    run(job, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(models), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(critic, models.critic.parameters(), strict=True))


# --- rewards ---------------------------------------------------------------------------------------------------------


def finish(given, settings, name="grpo", finish="eos"):
    """The group that a source makes of what functions gave, one list of rewards each; completions of three tokens."""
    number = len(given[0])
    draw = np.arange(3)
    rollouts = [Rollout(draw, draw, np.zeros(3, np.float32), 0, i, finish, 0) for i in range(number)]
    source = Given(
        make_job(name, make_models("shared" if name == "ppo" else "none"), [], None, **settings).source.plan, ALONE, []
    )
    source.scorer = SimpleNamespace(names=tuple("ab"[: len(given)]), weights=(2.0, 1.0)[: len(given)])
    done: Future = Future()
    done.set_result(make_scores(given, [3] * number))
    return source._finish(rollouts, done, None)


def test_rewards_are_weighed_scaled_clipped_and_may_be_missing():
    group = finish(
        [[1.0, np.nan, np.nan], [0.5, 3.0, np.nan]], {"reward_scale": 2.0, "reward_bias": 1.0, "reward_clip": 6.5}
    )
    assert group.rewards[0] == 6.0 and group.rewards[1] == 6.5 and np.isnan(group.rewards[2])


def test_a_cut_completion_is_fined():
    settings = {"truncation": "penalty", "truncation_penalty": 0.75}
    assert finish([[1.0, 2.0]], settings, finish="length").rewards.tolist() == [1.25, 3.25]
    assert finish([[1.0, 2.0]], settings).rewards.tolist() == [2.0, 4.0]


def test_rewards_of_steps_and_of_completions_are_paid_once():
    steps = [np.array([np.nan, 1.0, np.nan]), np.array([0.5, np.nan, 2.0])]
    group = finish([steps, [1.0, np.nan]], {"reward_scale": 2.0})
    assert [tokens.tolist()[1:] for tokens in group.tokens] == [[4.0, 2.0], [pytest.approx(np.nan, nan_ok=True), 8.0]]
    assert group.rewards.tolist() == [6.0, 10.0]


def test_process_rewards_are_standardised_over_the_group(tmp_path):
    groups = [make_group(0, (3, 4))]
    groups[0].tokens = [np.array([np.nan, 1.0, 3.0]), np.array([np.nan, 2.0, np.nan, -1.0])]
    run(make_job("grpo", make_models(), groups, tmp_path))
    r = torch.tensor([1.0, 3.0, 2.0, -1.0]).double()
    a, b, c, d = ((r - r.mean()) / (r.std() + 1e-4)).tolist()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    means = [(2 * (a + b) + b) / 3, (2 * (c + d) + 2 * d) / 4]
    assert [line["advantage"] for line in lines] == pytest.approx(means, rel=1e-9)


@pytest.mark.parametrize(
    "truncation, advantages",
    [("terminal", [2.0 - 0.5, 2.0 - 0.25]), ("bootstrap", [4.0 - 0.5, 4.0 - 0.25])],
)
def test_a_cut_completion_is_valued_as_asked(truncation, advantages):
    """Gamma and lambda 1: what is paid, or the value behind the cut, less the value of the state."""
    score, last = (
        (torch.tensor([2.0]), None) if truncation == "terminal" else (torch.tensor([0.0]), torch.tensor([4.0]))
    )
    values = torch.tensor([0.5, 0.25])
    found = gae(Experience(score, torch.zeros(1), torch.tensor([0, 2]), torch.zeros(2), values, last))
    assert found.advantages.tolist() == advantages


def test_two_ranks_take_the_steps_of_one(tmp_path):
    output = forks.run(Path(__file__).with_name("ranks_algorithms.py"), tmp_path, ranks=2)
    assert output.count("agreed on") == 2 * 15
