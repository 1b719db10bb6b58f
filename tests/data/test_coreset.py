"""The core set: deterministic on ties and duplicates, covering, and as large as asked."""

import math

import pytest
import torch

from fastalign.data import coreset


def clusters(sizes, spread=0.01, dtype=torch.float32):
    """Points around the corners of a cube, on the sphere."""
    new = torch.Generator().manual_seed(0)
    corners = torch.eye(len(sizes), 8).repeat_interleave(torch.tensor(sizes), 0)
    points = corners + spread * torch.randn(corners.shape, generator=new)
    return (points / points.norm(dim=1, keepdim=True)).to(dtype)


def test_clusters_are_found_and_shared_by_size():
    chosen = coreset.select(clusters([30, 10, 4]), num_clusters=3, budget=11)
    labels = [chosen.clusters[:30].unique(), chosen.clusters[30:40].unique(), chosen.clusters[40:].unique()]
    assert all(len(label) == 1 for label in labels)
    assert chosen.quotas[torch.cat(labels)].tolist() == [8, 2, 1]  # 7.5, 2.5 and 1: the first of equal remainders
    assert len(set(chosen.selected.tolist())) == 11
    assert chosen.radius < 0.1 and chosen.inertia < 44 * 8 * 0.02**2


def test_more_budget_covers_more():
    x = clusters([20, 20], spread=0.3)
    radii = [coreset.select(x, num_clusters=2, budget=budget).radius for budget in (2, 8, 20, 40)]
    assert radii == sorted(radii, reverse=True) and radii[-1] == pytest.approx(0, abs=1e-3)


def test_duplicates_are_taken_once_each_and_lowest_first():
    x = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2)
    chosen = coreset.select(x, num_clusters=2, budget=3)
    assert sorted(chosen.selected.tolist()) == [0, 1, 4]
    everything = coreset.select(x, num_clusters=2, budget=6)
    assert sorted(everything.selected.tolist()) == list(range(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_examples_as_near_are_a_tie(dtype):
    x = clusters([2, 2], spread=0.2, dtype=dtype)
    chosen = coreset.select(x, num_clusters=2, budget=2)
    assert sorted(chosen.selected.tolist()) == [0, 2]


def test_what_is_masked_is_not_read():
    hidden = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    hidden[0, 2] = math.nan
    embedding = coreset.embed(hidden, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert embedding.dtype == torch.float32
    assert embedding.tolist() == [[0.5] * 4, [0.0] * 4]


@pytest.mark.parametrize("num_clusters, budget", [(0, 1), (3, 2), (2, 7)])
def test_impossible_budgets_are_refused(num_clusters, budget):
    with pytest.raises(ValueError, match=f"1 <= num_clusters <= budget <= examples, got {num_clusters}, {budget}, 6"):
        coreset.select(clusters([3, 3]), num_clusters=num_clusters, budget=budget)


def test_every_cluster_gets_one_and_none_more_than_it_has():
    assert coreset.share_budget(torch.tensor([97, 1, 1, 1]), 5).tolist() == [2, 1, 1, 1]
    assert coreset.share_budget(torch.tensor([1, 1, 98]), 3).tolist() == [1, 1, 1]
    assert coreset.share_budget(torch.tensor([0, 5, 5]), 10).tolist() == [0, 5, 5]
