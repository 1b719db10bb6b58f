"""What the integrations do on two ranks, in one launch."""

from pathlib import Path

import forks


def test_two_ranks_have_the_gradients_of_one():
    assert forks.run(Path(__file__).with_name("ranks_integrations.py"), ranks=2).count("agreed") == 2
