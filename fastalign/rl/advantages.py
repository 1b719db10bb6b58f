"""Advantages: which sampled answer or token did better than expected. Credit only; objectives are in ``losses.policy``.

B answers, in groups that share a prompt; their n scored tokens are packed. All functions name their arguments alike:

    rewards [B]      groups [B] integers, equal for answers to one prompt, in any order
    cu_seqlens [B+1] offsets of the answers      token_rewards, kl_rewards [n]      process_group: None for one rank

Results are detached, statistics fp64. ``fastalign.ops.gae`` gives the advantages of PPO, ``fastalign.ops.whiten``
normalises.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.losses.reduce import repeat_segments, sum_and_count
from fastalign.ops.scan import segment_scan
from fastalign.ops.whiten import whiten


def grpo(rewards: Tensor, groups: Tensor, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """GRPO: each answer's reward standardised within its group.

    ``A_i = (R_i - mean_g) / (std_g + eps)``; exactly 0 where all rewards of a group are equal.
    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.

    Args:
        ddof: 1 divides the sum of squares by G - 1 (TRL, verl), 0 by G.
        eps: added to the deviation.

    Returns:
        ``[B]``.

    Raises:
        ValueError: a group of a single answer, whose advantage is undefined.
    """
    centred, counts, place = centre(rewards, groups)
    moments = torch.zeros_like(counts).index_add(0, place, centred.square())
    return (centred / ((moments / (counts - ddof)).sqrt() + eps)[place]).to(rewards.dtype)


def dr_grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """Dr.GRPO: each answer's reward less its group's mean, not divided by the deviation.

    ``A_i = R_i - mean_g``.
    Source: Liu et al. 2025 (arXiv:2503.20783), section 3.2.

    Returns ``[B]``.
    """
    return centre(rewards, groups)[0].to(rewards.dtype)


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """RLOO: each answer's reward less the mean of the other answers to its prompt.

    ``A_i = R_i - mean_{j != i} R_j = (R_i - mean_g) G / (G - 1)``.
    Source: Ahmadian et al. 2024 (arXiv:2402.14740), section 2.2.

    Returns ``[B]``. In TRL's convention ``kl_coef`` times the sequence's KL is subtracted from the rewards before.
    """
    centred, counts, place = centre(rewards, groups)
    return (centred * (counts / (counts - 1))[place]).to(rewards.dtype)


def centre(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards less their group's mean ``[B]``, answers per group ``[G]``, and the group of each answer ``[B]``."""
    _, place, counts = groups.unique(return_inverse=True, return_counts=True)
    if len(counts) and counts.min() < 2:
        raise ValueError("a group of one answer has nothing to be compared with: sample at least 2 answers per prompt")
    values = rewards.detach().double()
    means = torch.zeros(len(counts), dtype=torch.float64, device=rewards.device).index_add(0, place, values) / counts
    centred = values - means[place]
    lowest = values.new_full((len(counts),), torch.inf).scatter_reduce(0, place, values, "amin")
    highest = values.new_full((len(counts),), -torch.inf).scatter_reduce(0, place, values, "amax")
    return torch.where((lowest == highest)[place], 0.0, centred), counts.double(), place  # 0 for a tie, to the last bit


def grpo_process(
    step_rewards: Tensor,
    step_ends: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """GRPO with process rewards: all step rewards of a group are standardised together, a token gets what follows it.

    ``A_it = sum of (r - mean_g) / (std_g + eps)`` over the steps of answer i that end at or after t.
    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.3.

    Args:
        step_rewards: ``[S]``, steps of all answers.
        step_ends: ``[S]`` int64, the position of each step's last token among the n packed ones.
        ddof, eps: as in `grpo`.

    Returns:
        ``[n]``; 0 after an answer's last step.
    """
    answers = torch.searchsorted(cu_seqlens[1:].long().contiguous(), step_ends, right=True)
    steps = grpo(step_rewards, groups[answers], ddof=ddof, eps=eps)
    return segment_scan(steps.new_zeros(int(cu_seqlens[-1])).index_add(0, step_ends, steps), cu_seqlens)


def batch_mean(rewards: Tensor, *, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """REINFORCE with the mean reward as its baseline, over all ranks.

    ``A_i = R_i - mean R``.
    Source: Williams 1992.

    Returns ``[B]``.
    """
    total = sum_and_count(rewards)
    if process_group is not None:
        dist.all_reduce(total, group=process_group)
    return (rewards.detach().double() - total[0] / total[1].clamp(min=1)).to(rewards.dtype)


def reinforce_pp(
    token_rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """REINFORCE++: rewards to go with the KL in them, whitened over all tokens of the batch.

    ``R_t = sum_{s >= t} gamma^(s - t) r_s``, ``A = (R - mean) / sqrt(variance + eps)`` with Bessel's variance.
    Source: Hu et al. 2025 (arXiv:2501.03262).

    Args:
        token_rewards: see ``rewards.token_rewards``.
        gamma: discount per token.
        eps: added to the variance.

    Returns:
        advantages and returns, ``[n]`` each.
    """
    returns = segment_scan(token_rewards.detach(), cu_seqlens, gamma)
    return whiten(returns, eps=eps, eps_in="variance", unbiased=True, process_group=process_group), returns


def reinforce_pp_baseline(
    rewards: Tensor,
    groups: Tensor,
    cu_seqlens: Tensor,
    *,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """REINFORCE++ with a baseline: reward less the group's mean, whitened over all tokens of the batch.

    ``A = (x - mean) / sqrt(variance + eps)`` over tokens, of ``x_it = R_i - mean_g``.
    Source: Hu et al. 2025 (arXiv:2501.03262).

    Returns ``[n]``.
    """
    tokens = repeat_segments(dr_grpo(rewards, groups), cu_seqlens)
    return whiten(tokens, eps=eps, eps_in="variance", unbiased=True, process_group=process_group)


def remax(
    rewards: Tensor, greedy_rewards: Tensor, kl_rewards: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """ReMax: the greedy answer's reward is the baseline, the KL to go is charged.

    ``A_t = sum_{s >= t} gamma^(s - t) k_s + gamma^(n - 1 - t) (R - R_greedy)``.
    Source: Li et al. 2023 (arXiv:2310.10505), with the KL to go of verl.

    Args:
        rewards, greedy_rewards: ``[B]`` of the sampled and of the greedy answer to each prompt.
        kl_rewards: ``kl_coef (ref_logps - old_logps)``.
        gamma: discount per token.

    Returns:
        ``[n]``.
    """
    return segment_scan(add_at_ends(kl_rewards, rewards - greedy_rewards, cu_seqlens), cu_seqlens, gamma)


def remax_local(
    rewards: Tensor,
    greedy_rewards: Tensor,
    kl_rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 0.99,
    reward_clip: float = 5.0,
) -> Tensor:
    """ReMax as its official code has it: only the token's own KL, the clipped gap discounted from the last token on.

    ``A_t = k_t + gamma^(n - t) clip(R - R_greedy, -reward_clip, reward_clip)`` with t from 0.
    Source: Li et al. 2023 (arXiv:2310.10505), official implementation.

    Args:
        rewards, greedy_rewards: ``[B]`` of the sampled and of the greedy answer to each prompt.
        kl_rewards: ``kl_coef (ref_logps - old_logps)``.
        gamma: discount per token; the last token's reward already has it once.
        reward_clip: bound of the gap.

    Returns:
        ``[n]``.
    """
    gap = (rewards - greedy_rewards).clamp(-reward_clip, reward_clip) * gamma
    return kl_rewards.detach() + segment_scan(
        add_at_ends(torch.zeros_like(kl_rewards), gap, cu_seqlens), cu_seqlens, gamma
    )


def add_at_ends(tokens: Tensor, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[n]`` token numbers with ``[B]`` numbers of answers added at each answer's last token; detached."""
    some = (cu_seqlens.diff() > 0).nonzero().squeeze(1)
    return tokens.detach().index_add(0, cu_seqlens[1:].long()[some] - 1, values.detach().to(tokens.dtype)[some])
