"""Selecting samples: RAFT, best-of-n, AI labels."""

import itertools
import math

import pytest
import torch

from fastalign.pipelines import best_of_n, rlaif
from fastalign.rl import selection


def test_discarded_answers_are_never_selected():
    rewards = torch.tensor([[-math.inf, 0.5], [-math.inf, -math.inf], [2.0, 2.0]])
    best, keep = selection.best_of_each(rewards)
    assert best[keep].tolist() == [1, 0] and keep.tolist() == [True, False, True]
    assert selection.top_fraction(rewards, 1.0).tolist() == [[2, 0], [2, 1], [0, 1]]
    assert selection.top_fraction(rewards, 0.1).tolist() == []


def test_expected_best_counts_every_draw():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.3]], dtype=torch.float64)
    draws = torch.tensor([max(pair) for pair in itertools.product(scores[0].tolist(), repeat=3)], dtype=torch.float64)
    torch.testing.assert_close(best_of_n.expected_best(scores, 3)[0], draws.mean())
    assert best_of_n.kl_bound(1) == 0


def test_labels_sum_to_one_over_swapped_options():
    a, b = torch.tensor([-1.0, -900.0]), torch.tensor([-3.0, -1.0])
    torch.testing.assert_close(rlaif.preference(a, b) + rlaif.preference(b, a), torch.ones(2))
    assert rlaif.preference(a, b, clamp=(0.4, 0.6)).tolist() == pytest.approx([0.6, 0.4])
    biased = rlaif.debiased_preference((a, b), (a, b))  # option A wins in either order: a draw
    torch.testing.assert_close(biased, torch.full((2,), 0.5))
