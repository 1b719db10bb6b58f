"""The source of an on-policy run: what it samples in evaluations, and when its times are told."""

import numpy as np
import pytest
import torch
from sampling import VOCAB, make_policy, make_sampler

from fastalign.engine.methods import make_objective
from fastalign.parallel.mesh import Axis, World
from fastalign.rl.rollouts import NoScorer, Rollouts
from fastalign.rl.sampler import Stops


class Lists:
    """Prompts of so many random tokens, one after the other."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def ids(self, index):
        return np.random.default_rng(index).integers(VOCAB, size=5)

    def columns(self, index):
        return {}

    def prompt(self, index):
        return ""


@pytest.fixture
def source():
    sampler = make_sampler(make_policy(), Stops(), max_new_tokens=3)
    plan, world = make_objective("grpo", {}).on_policy, World(Axis(), torch.device("cpu"))
    return Rollouts(Lists(4), 2, 0, None, plan, sampler, NoScorer(), world)


def test_the_times_of_a_step_are_told_once(source):
    """A step that is asked for again, after a checkpoint between, has taken its time before."""
    source.next()
    first = source.take_seconds()
    assert first["generate"] > 0 and source.take_seconds() == {}
    source.next()
    assert source.take_seconds()["generate"] > 0


def test_an_evaluation_can_be_ended_between_its_prompts(source):
    looks = []

    def look():
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    training = source.prompts
    found = source.evaluate(Lists(5), batch=4, between=lambda: looks.append(0))
    assert looks == [0, 0] and found["completions/mean_length"] == 3 and source.prompts is training
    looks.clear()
    with pytest.raises(KeyboardInterrupt):
        source.evaluate(Lists(9), batch=2, between=look)
    assert len(looks) == 3 and source.prompts is training
