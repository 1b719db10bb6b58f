"""Reductions share one rule: shares computed with global denominators add up to the whole."""

from itertools import pairwise

import pytest
import torch

from fastalign.losses import reduce, supervised
from fastalign.types import TokenStats

OFFSETS = torch.tensor([0, 3, 3, 10, 17])


def test_segment_sum_and_its_gradient():
    x = torch.randn(17, dtype=torch.float64, requires_grad=True)
    out = reduce.segment_sum(x, OFFSETS)
    expected = torch.stack([x[a:b].sum() for a, b in pairwise(OFFSETS)])
    torch.testing.assert_close(out, expected)
    weights = torch.tensor([1.5, 7.0, -2.0, 3.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    torch.testing.assert_close(grad, weights.repeat_interleave(OFFSETS.diff()))


def test_a_long_segment_loses_only_its_last_rounding():
    x = -(torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 8 + 6)  # a running fp32 sum is 11 ulp off
    total = reduce.segment_sum(x, torch.tensor([0, 4096]))
    assert total.dtype == torch.float32
    assert total.item() == x.double().sum().float().item()


def test_segment_sum_of_nothing():
    assert reduce.segment_sum(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0.0]
    assert reduce.segment_sum(torch.zeros(0), torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize(
    "share",
    [
        lambda x, cu: reduce.token_mean(x, 17),
        lambda x, cu: reduce.seq_mean_token_mean(x, cu, 4),
        lambda x, cu: reduce.seq_mean_token_sum(x, 4),
        lambda x, cu: reduce.constant(x, 4, budget=32),
    ],
)
def test_shares_add_up(share):
    x = torch.randn(17, dtype=torch.float64)
    parts = share(x[:3], OFFSETS[:3]) + share(x[3:], OFFSETS[2:] - 3)
    torch.testing.assert_close(parts, share(x, OFFSETS))


def test_sequence_mean_weighs_sequences_not_tokens():
    x = torch.tensor([1.0, 1.0, 1.0, 4.0])
    assert reduce.seq_mean_token_mean(x, torch.tensor([0, 3, 4]), 2).item() == 2.5


def test_sft_metrics_count_tokens():
    stats = TokenStats(torch.tensor([-1.0, -3.0]), torch.arange(2), is_top1=torch.tensor([True, False]))
    sums = supervised.metrics(stats, supervised.sft(stats.logps))
    assert sums["loss"].tolist() == [4.0, 2.0] and sums["mean_token_accuracy"].tolist() == [1.0, 2.0]
    assert "entropy" not in sums
