"""Weights that move from layout to layout."""

from pathlib import Path

import forks
import pytest


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_move_between_all_layouts_to_the_bit(ranks):
    assert forks.run(Path(__file__).with_name("ranks_reallocate.py"), ranks=ranks).count("agreed") == ranks


def test_a_step_sends_what_the_formula_has_and_nothing_else():
    assert forks.run(Path(__file__).with_name("ranks_budget.py"), ranks=2).count("agreed") == 2
