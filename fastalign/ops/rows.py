"""The row algebra: the gradient of any objective in a row of logits follows from four coefficients.

    dz_v = g (1[v=y] - p_v) + p_v (alpha + beta ln p_v) + delta

    objective                              g            alpha        beta     delta
    log-prob, upstream g                   g
    entropy H, upstream e                               -e H         -e
    log-sum-exp, upstream zeta                          zeta
    smoothed log-prob, upstream g          (1-eta) g    -eta g                eta g / V

A smoothed log-prob is ``(1-eta) l + eta mean_v ln p_v``, and ``mean_v ln p_v = total / V - logsum`` with
``total = sum_v (z_v - max)``. Objectives add up: one backward sweep serves them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEGLIGIBLE = -87.0
"""The least ln p with a share in a divergence; below, about where normal fp32 numbers end, instruction sets differ."""


class Coefficients(NamedTuple):
    """What a backward sweep is given of each row, each ``[N]`` in the statistics' dtype; None is zero everywhere."""

    g: Tensor
    alpha: Tensor | None = None
    beta: Tensor | None = None
    delta: Tensor | None = None


class Stats(NamedTuple):
    """What one sweep knows of each row, each ``[N]``; None for what was not asked for.

    Attributes:
        logps: log-prob of the label.
        entropy: in nats.
        max, logsum: ``max_v z_v`` and ``ln sum_v exp(z_v - max)``.
        total: ``sum_v (z_v - max)``.
        top1: 1 (True behind ``head.sweep``) where the label is the first of the largest z over all ranks, else 0.
    """

    logps: Tensor
    entropy: Tensor | None
    max: Tensor
    logsum: Tensor
    total: Tensor | None = None
    top1: Tensor | None = None


def coefficients(
    grad_logps: Tensor,
    *,
    entropy: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    grad_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    vocab: int = 0,
) -> Coefficients:
    """The coefficients of upstream gradients.

    Args:
        grad_logps: ``[N]`` upstream of the log-prob; of the smoothed one where ``label_smoothing`` is not 0.
        entropy, grad_entropy: ``[N]`` the entropy and its upstream; without either there is none.
        grad_lse: ``[N]`` upstream of the log-sum-exp.
        label_smoothing: eta.
        vocab: V, over all ranks; needed with ``label_smoothing``.
    """
    g, alpha, beta, delta = grad_logps, grad_lse, None, None
    if grad_entropy is not None and entropy is not None:
        beta = -grad_entropy
        pull = torch.where(beta == 0, 0.0, beta * entropy)  # a row that asks for nothing stays free of its NaN
        alpha = pull if alpha is None else alpha + pull
    if label_smoothing != 0:
        share = label_smoothing * grad_logps
        g, delta = grad_logps - share, share / vocab
        alpha = -share if alpha is None else alpha - share
    return Coefficients(g, alpha, beta, delta)


def smoothed(logps: Tensor, logsum: Tensor, total: Tensor, label_smoothing: float, vocab: int) -> Tensor:
    """``(1-eta) l + eta mean_v ln p_v`` of each row, 0 where the statistics of a masked row are 0."""
    return (1 - label_smoothing) * logps + label_smoothing * (total / vocab - logsum)


def zero_rows(coefficients: Coefficients) -> Tensor:
    """``[N]`` whether all coefficients of a row are 0: its logits are not read. A NaN is not zero."""
    zero = coefficients.g == 0
    for x in coefficients[1:]:
        zero = zero if x is None else zero & (x == 0)
    return zero


def pick(coefficients: Coefficients, rows: slice | Tensor) -> Coefficients:
    """The coefficients of some rows."""
    g, *rest = coefficients
    return Coefficients(g[rows], *(None if x is None else x[rows] for x in rest))


def joined(rows: list[Coefficients], like: Tensor) -> Coefficients:
    """The coefficients of consecutive rows as one vector each; of none, empty as ``like``."""
    if not rows:
        return Coefficients(torch.empty_like(like))
    g, *rest = zip(*rows, strict=True)
    return Coefficients(torch.cat(g), *(filled(column, g) for column in rest))


def filled(column: tuple[Tensor | None, ...], like: tuple[Tensor, ...]) -> Tensor | None:
    """The parts as one vector, zero where one is absent; None when all are."""
    if all(x is None for x in column):
        return None
    return torch.cat([torch.zeros_like(y) if x is None else x for x, y in zip(column, like, strict=True)])
