"""Weights that move from layout to layout."""

from pathlib import Path

import forks
import pytest


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_move_between_all_layouts_to_the_bit(ranks):
    assert forks.run(Path(__file__).with_name("ranks_reallocate.py"), ranks=ranks).count("agreed") == ranks
