"""A core set of examples: embed, cluster, and take from each cluster what covers it best.

Source: Chen et al. 2023, "Maybe only 0.5% data is needed" (arXiv:2305.09246). Where it is silent the choices here are
deterministic: farthest-first centres, Lloyd's iterations until nothing moves, lowest index on ties, quotas by largest
remainder, k-center-greedy inside a cluster. Encoding texts is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ITERATIONS = 50
SMALLEST_NORM = 1e-12
ROUNDING = 16
"""Distances that differ by fewer units of rounding of a squared length of 1 are a tie: the lowest index wins."""


@dataclass(frozen=True)
class Coreset:
    """What was selected and why.

    Attributes:
        selected: ``[budget]`` int64 positions, cluster by cluster.
        clusters: ``[S]`` int64 cluster of each example.
        quotas: ``[k]`` int64 examples taken from each.
        inertia: sum of squared distances to the centres.
        radius: largest distance of an example to the nearest selected one.
    """

    selected: Tensor
    clusters: Tensor
    quotas: Tensor
    inertia: float
    radius: float


def embed(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens, scaled to length 1: ``[S, D]`` from ``[S, T, D]`` hidden states and ``[S, T]`` mask.

    What the mask leaves out is not read. fp32, or fp64 for fp64 states.
    """
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    keep = mask.bool().unsqueeze(-1)
    means = torch.where(keep, wide, 0.0).sum(1) / keep.sum(1).clamp(min=1)
    return means / means.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)


def select(embeddings: Tensor, *, num_clusters: int, budget: int) -> Coreset:
    """Choose ``budget`` of S examples.

    Args:
        embeddings: ``[S, D]`` of length 1, see `embed`.
        num_clusters: k of k-means.
        budget: how many to take, at least one per cluster.

    Raises:
        ValueError: unless ``num_clusters <= budget <= S``.
    """
    if not 1 <= num_clusters <= budget <= len(embeddings):
        raise ValueError(
            f"expected 1 <= num_clusters <= budget <= examples, got {num_clusters}, {budget}, {len(embeddings)}"
        )
    centres, clusters = k_means(embeddings, num_clusters)
    quotas = share_budget(torch.bincount(clusters, minlength=num_clusters), budget)
    picked = [
        pick(embeddings, (clusters == c).nonzero().squeeze(1), centres[c], int(quotas[c])) for c in range(num_clusters)
    ]
    selected = torch.cat(picked)
    radius = distances(embeddings, embeddings[selected]).amin(1).max().sqrt()
    inertia = distances(embeddings, centres).gather(1, clusters[:, None]).sum()
    return Coreset(selected, clusters, quotas, inertia.item(), radius.item())


def distances(x: Tensor, centres: Tensor) -> Tensor:
    """Squared distances ``[S, k]`` by one matrix product; not below 0."""
    squares = x.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * x @ centres.T).clamp(min=0)


def k_means(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Centres ``[k, D]``, which are not scaled back to length 1, and the cluster of each example ``[S]``."""
    farthest = nearest(-distances(x, x.mean(0, keepdim=True)).squeeze(1))  # from the mean
    centres = x[grow(x, farthest, k)]
    for _ in range(MAX_ITERATIONS):
        clusters = nearest(distances(x, centres))
        counts = torch.bincount(clusters, minlength=k)[:, None]
        sums = torch.zeros_like(centres).index_add(0, clusters, x)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres, nearest(distances(x, centres))


def pick(x: Tensor, members: Tensor, centre: Tensor, number: int) -> Tensor:
    """Positions of ``number`` members: the one nearest the centre, then k-center-greedy."""
    if not number:
        return members[:0]
    inside = x[members]
    return members[grow(inside, nearest(distances(inside, centre[None]).squeeze(1)), number)]


def grow(x: Tensor, first: Tensor, number: int) -> Tensor:
    """``[number]`` positions from ``first`` on, each the example farthest from those before it."""
    chosen, gaps = [first], distances(x, x[first][None]).squeeze(1)
    while len(chosen) < number:
        gaps[chosen[-1]] = -1.0  # an example is taken once, even if others equal it
        chosen.append(nearest(-gaps))
        gaps = torch.minimum(gaps, distances(x, x[chosen[-1]][None]).squeeze(1))
    return torch.stack(chosen)


def nearest(gaps: Tensor) -> Tensor:
    """Position of the least along the last dimension, the lowest of those that tie within rounding."""
    slack = ROUNDING * torch.finfo(gaps.dtype).eps
    return (gaps <= gaps.amin(-1, keepdim=True) + slack).int().argmax(-1)


def share_budget(sizes: Tensor, budget: int) -> Tensor:
    """Quota of each cluster: its share by largest remainder, at least 1 if it has members, at most its size."""
    shares = sizes.double() * budget / sizes.sum()
    quotas = shares.floor().long().clamp(min=1).minimum(sizes)
    while quotas.sum() < budget:
        quotas[torch.where(quotas < sizes, shares - quotas, -torch.inf).argmax()] += 1
    while quotas.sum() > budget:
        quotas[torch.where(quotas > 1, shares - quotas, torch.inf).argmin()] -= 1
    return quotas
