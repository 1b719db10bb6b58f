"""The schedule of LIMA: dropout that grows with depth, a learning rate that falls in a line."""

from __future__ import annotations


def residual_dropout(layer: int, num_layers: int, *, top: float = 0.3) -> float:
    """Dropout of a layer's residual branch: 0 at the bottom, ``top`` at the last layer, linear in between.

    Source: Zhou et al. 2023 (arXiv:2305.11206), section 3.
    """
    return top * layer / max(num_layers - 1, 1)


def learning_rate(progress: float, *, first: float = 1e-5, last: float = 1e-6) -> float:
    """Learning rate at a share of the run between 0 and 1, without warm-up.

    Source: Zhou et al. 2023 (arXiv:2305.11206), section 3.
    """
    return first + (last - first) * progress
