"""What an on-policy run adapts between its steps, and a checkpoint holds: the price of KL, the scale of values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.losses.reduce import sum_and_count
from fastalign.parallel.mesh import Axis
from fastalign.rl.rewards import adapt_kl_coef


class KLPrice:
    """The price of a nat of KL in the reward, which a controller may have changed since the start."""

    def __init__(self) -> None:
        self.current: float | None = None

    def value(self, start: float) -> float:
        """The price now; at first that of the settings."""
        return start if self.current is None else self.current

    def adapt(self, start: float, kl: float, target: float, horizon: int, num_samples: int) -> None:
        """Move it after a step; see `adapt_kl_coef`."""
        price = self.value(start)
        self.current = adapt_kl_coef(price, kl, target=target, horizon=horizon, num_samples=num_samples)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"current": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to them."""
        self.current = state["current"]


class ValueNorm:
    """Running mean and deviation of returns, so that a critic learns numbers of mean 0 and deviation 1.

    ``m <- d m + (1 - d) mean(x)`` and likewise for squares, divided by ``1 - d^t``. Source: ReaLHF's value
    normalisation, after PopArt (Hessel et al. 2018, arXiv:1809.04474).
    """

    DECAY = 0.99995
    LEAST_VARIANCE = 1e-5

    def __init__(self) -> None:
        self.mean, self.square, self.weight = 0.0, 0.0, 0.0

    def update(self, returns: Tensor, ranks: Axis) -> Tensor:
        """Take the step's returns of all ranks in; gives this rank's as the critic is to predict them."""
        sums = ranks.sum(torch.stack([*sum_and_count(returns), returns.double().square().sum()])).tolist()
        total, count, squares = sums
        if count:
            share = 1 - self.DECAY
            self.mean = self.DECAY * self.mean + share * total / count
            self.square = self.DECAY * self.square + share * squares / count
            self.weight = self.DECAY * self.weight + share
        mean, deviation = self._scale()
        return (returns - mean) / deviation

    def restore(self, values: Tensor) -> Tensor:
        """The critic's outputs as rewards are measured."""
        mean, deviation = self._scale()
        return values * deviation + mean

    def _scale(self) -> tuple[float, float]:
        if not self.weight:
            return 0.0, 1.0
        mean = self.mean / self.weight
        return mean, max(self.square / self.weight - mean**2, self.LEAST_VARIANCE) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"mean": self.mean, "square": self.square, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to them."""
        self.mean, self.square, self.weight = state["mean"], state["square"], state["weight"]
