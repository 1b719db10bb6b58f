"""Credit: from the rewards of a step's completions to the advantage of every token. One signature serves all.

A credit function takes the `Experience` of this rank, whole groups of completions, and gives the columns that it fills.
What depends on the completions of all ranks is exchanged in its process group. The formulas are in `rl.advantages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from fastalign.losses.reduce import repeat_segments, segment_sum
from fastalign.ops.scan import gae as estimate
from fastalign.ops.scan import segment_scan
from fastalign.rl import advantages
from fastalign.rl.advantages import add_at_ends
from fastalign.types import Columns


@dataclass(frozen=True)
class Experience:
    """This rank's completions of a step: B of them, in groups that share a prompt, with n scored tokens in all.

    Attributes:
        scores: ``[B]`` reward of each completion; of one that is not paid 0.
        groups: ``[B]`` int64, equal for completions of one prompt.
        cu_seqlens: ``[B+1]`` int64 offsets of the completions in the n tokens.
        kl_rewards: ``[n]`` minus what the KL of each token costs; 0 where the KL is no part of the reward.
        values: ``[n]`` of the critic when the tokens were sampled; None without one.
        last_values: ``[B]`` of the state behind the last token, for completions that were cut off; None for 0.
        greedy_scores: ``[B]`` reward of the greedy answer to the same prompt.
        token_rewards: ``[n]`` rewards of single tokens, or of steps at their last token, nan where there is none; the
            scores are their sums.
        gamma, lam: discount per token, and lambda of `gae`.
        process_group: of the ranks that share the step.
    """

    scores: Tensor
    groups: Tensor
    cu_seqlens: Tensor
    kl_rewards: Tensor
    values: Tensor | None = None
    last_values: Tensor | None = None
    greedy_scores: Tensor | None = None
    token_rewards: Tensor | None = None
    gamma: float = 1.0
    lam: float = 1.0
    process_group: dist.ProcessGroup | None = None

    @property
    def charged(self) -> Tensor:
        """``[B]`` scores less what the KL of the whole completion costs."""
        return self.scores + segment_sum(self.kl_rewards, self.cu_seqlens).to(self.scores.dtype)

    @property
    def paid(self) -> Tensor:
        """``[n]`` reward of each token: its KL, and its own reward or at the last one the score of the completion."""
        if self.token_rewards is None:
            return add_at_ends(self.kl_rewards, self.scores, self.cu_seqlens)
        return self.kl_rewards + self.token_rewards.nan_to_num(0.0)

    def per_token(self, values: Tensor) -> Columns:
        """``[B]`` advantages of completions, given to each of their tokens."""
        return Columns(advantages=repeat_segments(values, self.cu_seqlens, len(self.kl_rewards)))


Credit = Callable[[Experience], Columns]


def grpo(e: Experience) -> Columns:
    """Standardised within the group; with rewards of steps, each token gets those of the steps from it on."""
    if e.token_rewards is None:
        return e.per_token(advantages.grpo(e.charged, e.groups))
    ends = e.token_rewards.isfinite().nonzero().squeeze(1)
    return Columns(advantages=advantages.grpo_process(e.token_rewards[ends], ends, e.groups, e.cu_seqlens))


def dr_grpo(e: Experience) -> Columns:
    """Less the group's mean."""
    return e.per_token(advantages.dr_grpo(e.charged, e.groups))


def rloo(e: Experience) -> Columns:
    """Less the mean of the group's others."""
    return e.per_token(advantages.rloo(e.charged, e.groups))


def reinforce(e: Experience) -> Columns:
    """Less the mean of the step, and the KL to go."""
    centred = advantages.batch_mean(e.scores, process_group=e.process_group)
    return Columns(advantages=segment_scan(add_at_ends(e.kl_rewards, centred, e.cu_seqlens), e.cu_seqlens, e.gamma))


def reinforce_pp(e: Experience) -> Columns:
    """Rewards to go, whitened over all tokens of the step."""
    found, returns = advantages.reinforce_pp(e.paid, e.cu_seqlens, gamma=e.gamma, process_group=e.process_group)
    return Columns(advantages=found, returns=returns)


def reinforce_pp_baseline(e: Experience) -> Columns:
    """Less the group's mean, whitened over all tokens of the step."""
    found = advantages.reinforce_pp_baseline(e.charged, e.groups, e.cu_seqlens, process_group=e.process_group)
    return Columns(advantages=found)


def remax(e: Experience) -> Columns:
    """Less the reward of the greedy answer, and the KL to go."""
    assert e.greedy_scores is not None
    found = advantages.remax(e.scores, e.greedy_scores, e.kl_rewards, e.cu_seqlens, gamma=e.gamma)
    return Columns(advantages=found)


def gae(e: Experience) -> Columns:
    """Generalised advantage estimation with the critic's values; its targets are the returns."""
    assert e.values is not None
    found, returns = estimate(e.paid, e.values, e.cu_seqlens, e.gamma, e.lam, last_values=e.last_values)
    return Columns(advantages=found, returns=returns)
