"""Losses of policy gradients: one loss per scored token, of its log-prob now and when sampled, and its advantage.

``l`` and ``l_old`` are the log-probs under the policy and under the one that sampled, ``r = exp(l - l_old)`` the ratio,
``A`` the advantage, ``sg`` stops the gradient. Log-ratios are clamped to +-20 before ``exp``, with no gradient outside.
A clip acts beyond its bound, not on it. Reductions are in ``reduce``; ``fastalign.rl.algorithms`` pairs all of them.

``fastalign.ops.policy_loss`` computes ``pg``, ``ppo``, ``cispo`` and ``sapo`` straight from logits: their values and
clips are defined once, in ``fastalign.ops.functors``, for it and for what is here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.losses.reduce import lengths, repeat_segments, segment_sum, sum_and_count
from fastalign.losses.traits import Family, Loss, Sums
from fastalign.ops import functors
from fastalign.ops.functors import FUNCTORS, LARGEST_LOG_RATIO, Knobs, clip, clip_bounds, ratio_of

LARGEST_MEAN_LOG_RATIO = 10.0
"""Of a sequence's mean log-ratio, from above."""


def pg(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """Policy gradient: REINFORCE and ReMax, for one step per rollout.

    ``l_t = -A l``.
    Source: Williams 1992, REINFORCE; Li et al. 2023, ReMax (arXiv:2310.10505).

    Args:
        logps: ``[n]`` log-probs of the sampled tokens.
        old_logps: not read.
        advantages: ``[n]``.

    Returns:
        ``[n]`` losses.
    """
    return -advantages * logps


def ppo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO: the clipped surrogate; GRPO, Dr.GRPO and DAPO are this with other advantages and reductions.

    ``l_t = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``, and for ``A < 0`` at most ``-A dual_clip``.
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv:1912.09729).

    Args:
        logps: ``[n]`` log-probs of the sampled tokens.
        old_logps: ``[n]`` log-probs under the policy that sampled.
        advantages: ``[n]``.
        clip_low, clip_high: distances of the ratio's bounds from 1.
        dual_clip: bound of the ratio where the advantage is negative, above 1; None for none.

    Returns:
        ``[n]`` losses.
    """
    return surrogate(token_ratio(logps, old_logps), advantages, clip_low, clip_high, dual_clip)


def cispo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    ratio_min: float | None = None,
    ratio_max: float | None = 1.28,
) -> Tensor:
    """CISPO: the importance weight is clipped and held constant, so that no token loses its gradient.

    ``l_t = -sg(clip(r, ratio_min, ratio_max)) A l``.
    Source: MiniMax 2025, MiniMax-M1 (arXiv:2506.13585), eq. 4 and 5.

    Args:
        logps: ``[n]`` log-probs of the sampled tokens.
        old_logps: ``[n]`` log-probs under the policy that sampled.
        advantages: ``[n]``.
        ratio_min, ratio_max: bounds of the ratio itself, not distances from 1; None for none.

    Returns:
        ``[n]`` losses.
    """
    bounds = Knobs(0.0 if ratio_min is None else ratio_min, math.inf if ratio_max is None else ratio_max)
    return _token_loss("cispo", logps, old_logps, advantages, bounds)


def sapo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05
) -> Tensor:
    """SAPO: a smooth gate in place of the clip.

    ``l_t = -A (4 / tau) s(tau (r - 1))``, ``s`` the logistic function, tau ``tau_pos`` if ``A > 0`` else ``tau_neg``.
    Source: Gao et al. 2025, Soft Adaptive Policy Optimization (arXiv:2511.20347).

    Args:
        logps: ``[n]`` log-probs of the sampled tokens.
        old_logps: ``[n]`` log-probs under the policy that sampled.
        advantages: ``[n]``.
        tau_pos, tau_neg: steepness of the gate.

    Returns:
        ``[n]`` losses.
    """
    return _token_loss("sapo", logps, old_logps, advantages, Knobs(tau_pos=tau_pos, tau_neg=tau_neg))


def gspo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """GSPO: the clipped surrogate of the sequence's ratio, the geometric mean of its tokens'.

    ``l_t = max(-A q, -A clip(q, 1 - clip_low, 1 + clip_high))`` with ``q = exp(mean_t (l - l_old))``.
    Source: Zheng et al. 2025 (arXiv:2507.18071), eq. 5 to 7.

    Args:
        logps: ``[n]`` log-probs of the sampled tokens.
        old_logps: ``[n]`` log-probs under the policy that sampled.
        advantages: ``[n]``, one number per sequence.
        cu_seqlens: ``[b+1]`` offsets of the sequences, whole ones.
        clip_low, clip_high: distances of the ratio's bounds from 1.

    Returns:
        ``[n]`` losses, equal within a sequence.
    """
    return surrogate(mean_ratio(logps, old_logps, cu_seqlens), advantages, clip_low, clip_high, None)


def rloo(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Tensor:
    """RLOO: the clipped surrogate of the sequence's ratio, the product of its tokens'.

    ``sum_t l_t = max(-A q, -A clip(q, 1 - clip_low, 1 + clip_high))`` with ``q = exp(sum_t (l - l_old))``.
    Source: Ahmadian et al. 2024 (arXiv:2402.14740), with the clip of TRL; ``pg`` is its REINFORCE form.

    Args:
        logps: ``[n]`` log-probs of the sampled tokens.
        old_logps: ``[n]`` log-probs under the policy that sampled.
        advantages: ``[n]``, one number per sequence.
        cu_seqlens: ``[b+1]`` offsets of the sequences, whole ones.
        clip_low, clip_high: distances of the ratio's bounds from 1.

    Returns:
        ``[n]`` losses: each token has an equal share of its sequence's.
    """
    ratio = product_ratio(logps, old_logps, cu_seqlens)
    share = repeat_segments(lengths(cu_seqlens).long(), cu_seqlens, len(logps))
    return surrogate(ratio, advantages, clip_low, clip_high, None) / share


def token_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """``r``, ``[n]``."""
    return ratio_of(logps - old_logps)


def mean_ratio(logps: Tensor, old_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[n]`` the geometric mean of each sequence's ratios, at each of its tokens."""
    counts = lengths(cu_seqlens).long()
    mean = segment_sum(logps - old_logps, cu_seqlens) / counts.clamp(min=1)
    return repeat_segments(mean.clamp(-LARGEST_LOG_RATIO, LARGEST_MEAN_LOG_RATIO).exp(), cu_seqlens, len(logps))


def product_ratio(logps: Tensor, old_logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[n]`` the product of each sequence's ratios, at each of its tokens."""
    total = segment_sum(logps - old_logps, cu_seqlens)
    return repeat_segments(total.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp(), cu_seqlens, len(logps))


SEQUENCE_RATIOS = {"gspo": mean_ratio, "rloo": product_ratio}
"""The ratios that losses of whole sequences clip, by their names; the others clip those of tokens."""


def _token_loss(name: str, logps: Tensor, old_logps: Tensor, advantages: Tensor, knobs: Knobs) -> Tensor:
    """``-A value``, with the value that the fused op computes too."""
    ratio = token_ratio(logps, old_logps)
    value, *_ = FUNCTORS[name](logps, ratio, ratio > 0, advantages, knobs)
    return -advantages * value


def surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None) -> Tensor:
    """The clipped surrogate of any ratio, see `ppo`."""
    cap = math.inf if dual_clip is None else dual_clip
    return -advantages * clip(ratio, advantages, 1 - clip_low, 1 + clip_high, cap)[0]


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(policy || reference) by ``l - l_ref``: unbiased and signed; for rewards, its gradient is noise.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(policy || reference) by ``(l - l_ref)^2 / 2``: biased, but its expected gradient is the true one on policy.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    return functors.k2(ref_logps - logps)[0]


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(policy || reference) by ``exp(y) - y - 1`` with ``y = l_ref - l``: unbiased and never negative.

    Its expected gradient on policy is that of KL(reference || policy).
    Source: Schulman 2020, "Approximating KL divergence"; Shao et al. 2024, GRPO (arXiv:2402.03300), eq. 4.
    """
    return functors.k3(ref_logps - logps)[0]


def k3_plus(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(policy || reference) with the value of ``k3`` and the gradient of ``k2``, as verl's ``k3+``."""
    straight = k2(logps, ref_logps)
    return straight + (k3(logps, ref_logps) - straight).detach()


def entropy_bonus(entropy: Tensor, *, entropy_coef: float = 0.0) -> Tensor:
    """Entropy bonus: keeps the policy from collapsing.

    ``l_t = -entropy_coef H``.
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 9.

    Args:
        entropy: ``[n]`` entropy in nats.
        entropy_coef: weight; 0.001 to 0.01 when used.

    Returns:
        ``[n]`` losses.
    """
    return -entropy_coef * entropy


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float | None = 0.2) -> Tensor:
    """Critic of PPO: half the squared error of the value, pessimistic about moves away from its old value.

    ``l_t = max((v - R)^2, (v_old + clip(v - v_old, -e, e) - R)^2) / 2`` with ``e = value_clip``.
    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 9; the clip is that of its authors' code.

    Args:
        values: ``[n]`` of the critic.
        old_values: ``[n]`` when the responses were sampled.
        returns: ``[n]``.
        value_clip: None for no clip.

    Returns:
        ``[n]`` losses.
    """
    plain = (values - returns).square() / 2
    if value_clip is None:
        return plain
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    clipped = (near - returns).square() / 2
    return torch.where(clipped > plain, clipped, plain)


def sampler_correction(old_logps: Tensor, sampler_logps: Tensor, *, cap: float = 2.0) -> Tensor:
    """Weight ``min(exp(l_old - l_sampler), cap)`` of each token for a sampler that computes other numbers; detached."""
    return (old_logps - sampler_logps).detach().clamp(max=math.log(cap)).exp()


def metrics(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = math.inf,
    clip_high: float = math.inf,
    clipped: Tensor | None = None,
) -> dict[str, Tensor]:
    """``[2]`` (sum, count) over tokens under TRL's names: the ratio, the KL from the sampler (k2), what is clipped.

    ``clipped [n]`` are the ratios that the loss clips, where they are not those of tokens.
    """
    ratio = token_ratio(logps, old_logps)
    low, high = clip_bounds(ratio if clipped is None else clipped, advantages, 1 - clip_low, 1 + clip_high)
    values = {
        "val/ratio": ratio,
        RATIO_SQUARED: ratio.square(),
        "policy/approxkl_avg": k2(logps, old_logps),
        "policy/clipfrac_avg": low | high,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }
    return {name: sum_and_count(value) for name, value in values.items()}


def value_metrics(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float | None
) -> dict[str, Tensor]:
    """``[2]`` (sum, count) over tokens under TRL's names: the critic's loss, and what of it is clipped."""
    losses = value_loss(values, old_values, returns, value_clip=value_clip)
    plain = (values - returns).square() / 2
    return {"loss/value_avg": sum_and_count(losses), "val/clipfrac_avg": sum_and_count(losses > plain)}


RATIO_SQUARED = "val/ratio_squared"


def derive(sums: Sums) -> dict[str, float | None]:
    """``val/ratio_var`` in place of the mean of squares."""
    if RATIO_SQUARED not in sums:
        return {}
    (total, count), (squares, _) = sums["val/ratio"], sums[RATIO_SQUARED]
    variance = max(squares / count - (total / count) ** 2, 0.0) if count else math.nan
    return {"val/ratio_var": variance, RATIO_SQUARED: None}


LOSSES = {
    "pg": Loss(pg, reference=False),
    "ppo": Loss(ppo, reference=False),
    "cispo": Loss(cispo, reference=False),
    "sapo": Loss(sapo, reference=False),
    "gspo": Loss(gspo, reference=False, sequences=True),
    "rloo": Loss(rloo, reference=False, sequences=True),
}
FAMILY = Family(
    "Policy gradients",
    "Completions of the policy itself and their `rewards`; which algorithm pairs which advantage, loss and reduction "
    "is in `fastalign.rl.algorithms`. In a loop of your own they are functions for `linear_loss`, or straight from "
    "logits the op `policy_loss`. `r` is the ratio to the sampling policy, `A` the advantage, `sg` stops the gradient.",
    "`reward` rises; `val/ratio`, `clip_ratio/*`, `entropy` and `kl`: a collapse shows there first.",
    LOSSES,
    derive=derive,
    example="examples/sort_letters/grpo.yaml",
)
KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus}
