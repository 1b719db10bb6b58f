"""A vocabulary split over real gloo ranks gives what one rank gives; the checks are in the scripts ``*_ranks.py``."""

import os
from pathlib import Path

import forks
import pytest
import torch

from fastalign.ops.parallel import Shard, localise


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its ranks")
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["vocab_ranks.py", "policy_ranks.py", "token_ranks.py", "divergence_ranks.py"])
def test_ranks_agree_with_one(name, size):
    assert forks.run(Path(__file__).with_name(name), size).endswith("agreed\n")


def test_a_label_belongs_to_one_shard_and_an_invalid_one_to_none():
    labels = torch.tensor([0, 2, 3, 6, 7, -5])
    seen = [localise(Shard("", (3, 0, 4), rank), labels) for rank in range(3)]
    assert [local.tolist() for local, _ in seen] == [
        [0, 2, -1, -1, 3, 3],
        [-1, -1, -1, -1, 0, 0],  # no column is valid here, and 0 is outside: both stay invalid
        [-1, -1, 0, 3, 4, 4],
    ]
    assert all(owners.tolist()[:4] == [0, 0, 2, 2] for _, owners in seen)
