"""From scores to rewards: KL charged per token, scores clipped and combined, penalties of length, telling groups."""

from __future__ import annotations

from torch import Tensor

from fastalign.losses.policy import KL_ESTIMATORS
from fastalign.losses.reduce import segment_sum
from fastalign.rl.advantages import add_at_ends


def token_rewards(
    old_logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    *,
    kl_coef: float = 0.1,
    estimator: str = "k1",
) -> Tensor:
    """Reward of each token: its KL from the reference is charged, the answer's score is paid at the last one.

    ``r_t = -kl_coef kl_t + [t last] score``; with ``k1`` the first term is ``kl_coef (ref_logps - old_logps)``.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Ouyang et al. 2022 (arXiv:2203.02155), eq. 2.

    Args:
        old_logps, ref_logps: ``[n]`` under the policy that sampled and under the reference.
        scores: ``[B]``; 0 for an answer that is not scored.
        cu_seqlens: ``[B+1]`` offsets of the answers.
        kl_coef: price of a nat.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.

    Returns:
        ``[n]``, detached.
    """
    return add_at_ends(-kl_coef * KL_ESTIMATORS[estimator](old_logps, ref_logps), scores, cu_seqlens)


def charge_kl(
    scores: Tensor, old_logps: Tensor, ref_logps: Tensor, cu_seqlens: Tensor, *, kl_coef: float = 0.05
) -> Tensor:
    """``[B]`` scores less ``kl_coef`` times each answer's summed log-ratio, as RLOO uses them; detached."""
    return (scores - kl_coef * segment_sum(old_logps - ref_logps, cu_seqlens).to(scores.dtype)).detach()


def shape_scores(scores: Tensor, *, scale: float = 1.0, bias: float = 0.0, clip: float | None = None) -> Tensor:
    """``clip(scale * scores + bias, -clip, clip)``; None for no clip."""
    shaped = scale * scores + bias
    return shaped if clip is None else shaped.clamp(-clip, clip)


def overlong_penalty(answer_lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft punishment of long answers: none up to ``max_length - buffer``, then linear down to -1.

    ``((max_length - buffer) - n) / buffer`` in between.
    Source: Yu et al. 2025 (arXiv:2503.14476), eq. 13.

    Args:
        answer_lengths: ``[B]`` tokens.
        max_length: length from which the penalty is whole.
        buffer: tokens over which it grows.

    Returns:
        ``[B]`` to be added to the rewards.
    """
    return ((max_length - buffer - answer_lengths) / buffer).clamp(-1, 0)


def informative_groups(rewards: Tensor, groups: Tensor) -> Tensor:
    """DAPO's dynamic sampling: which groups, in the order of their ids, have rewards that differ.

    Source: Yu et al. 2025 (arXiv:2503.14476), eq. 11.

    Args:
        rewards: ``[B]``.
        groups: ``[B]`` integers, equal for answers to one prompt.

    Returns:
        ``[G]`` bool.
    """
    ids, place = groups.unique(return_inverse=True)
    start = rewards.new_zeros(len(ids))
    highest = start.scatter_reduce(0, place, rewards, "amax", include_self=False)
    return highest > start.scatter_reduce(0, place, rewards, "amin", include_self=False)


def adapt_kl_coef(
    kl_coef: float, kl: float, *, target: float = 6.0, horizon: int = 10_000, num_samples: int = 1
) -> float:
    """The adaptive controller: raise the price of KL when there is too much of it, by at most a fifth per horizon.

    ``kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon)``.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), section 2.2.

    Args:
        kl_coef: the price so far.
        kl: measured, nats per answer.
        target: wanted.
        horizon: answers over which the correction acts in full.
        num_samples: answers since the last call.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)
