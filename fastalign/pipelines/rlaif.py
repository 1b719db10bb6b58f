"""Labels by AI feedback: from the log-probs of two options to the probability that one answer is the better."""

from __future__ import annotations

import torch
from torch import Tensor


def preference(logps_a: Tensor, logps_b: Tensor, *, clamp: tuple[float, float] | None = None) -> Tensor:
    """Probability that the feedback model prefers option A.

    ``P = exp(l_a) / (exp(l_a) + exp(l_b)) = s(l_a - l_b)``.
    Source: Bai et al. 2022, Constitutional AI (arXiv:2212.08073), section 4.1.

    Args:
        logps_a, logps_b: ``[P]`` log-probs of the two options' whole texts.
        clamp: bounds for labels after chain of thought, which are nearly 0 or 1: (0.4, 0.6) in the paper.

    Returns:
        ``[P]``.
    """
    probability = (logps_a - logps_b).sigmoid()
    return probability if clamp is None else probability.clamp(*clamp)


def debiased_preference(first: tuple[Tensor, Tensor], swapped: tuple[Tensor, Tensor]) -> Tensor:
    """Probability that answer 1 is preferred, averaged over both orders of the answers.

    ``(s(l_a - l_b) + s(l'_b - l'_a)) / 2``; in ``swapped`` answer 1 is option B.

    Args:
        first, swapped: log-probs ``[P]`` of options A and B in either order.

    Returns:
        ``[P]``.
    """
    return torch.stack([preference(*first), preference(swapped[1], swapped[0])]).mean(0)
