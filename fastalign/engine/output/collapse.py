"""Trouble of runs that sample: rewards that teach nothing or fall, a policy that runs away or repeats itself.

Each alarm names the step and says what to do, once for each kind. What is compared with a run's first steps is compared
with those of this process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

PATIENCE = 5
"""Steps in a row whose rewards teach nothing before it is said: one may be chance."""
FIRST, LAST = 3, 5
"""Steps of which means are compared: the first ones, few because a collapse may be quick, and the last ones."""
FALLEN, SURE = 0.5, 3.0
"""A mean reward has fallen: by half of a standard deviation of rewards, and by three times what chance does to it, were
the completions of a prompt all alike."""
LEFT = 0.1
"""Share of the first entropy below which a policy gives the same answers again and again."""
MOST_KL = 1.0
"""Nats per token from the reference: a token is e times as likely as it was, on average. Runs that learn stay far below
that."""
MOST_RATIO = 20.0
"""Times that a token may have become likelier since it was sampled. Clipped updates of usual learning rates stay near
10; how much less likely one became says little, since that is what a bad token is to become."""
TIMES = 2
"""Of the last steps that have such a token before it is said: of 120 steps of a run that learns one had, of ten with
updates that are too large three."""
BLIND, BLIND_STEPS = -0.1, 20
"""Explained variance of a critic that is worse than the mean of the returns, and for how many steps in a row before it
is said: one that has just begun is often there for a while."""

DIFFERENCE = "sampling/sampling_logp_difference/max"
Warn = Callable[[str, str], None]
"""From the kind of an alarm and its text."""


class Collapse:
    """Looks at the records of a run that samples, in their order.

    Args:
        warn: says each kind of alarm once.
    """

    def __init__(self, warn: Warn) -> None:
        self.warn = warn
        self.first: list[dict[str, Any]] = []
        self.last: deque[dict[str, Any]] = deque(maxlen=LAST)
        self.alike = self.blind = 0

    def check(self, record: dict[str, Any]) -> None:
        """Warn about a step."""
        self.first += [record] if len(self.first) < FIRST else []
        self.last.append(record)
        for look in (self.rewards, self.entropy, self.kl, self.ratios, self.critic, self.exactness):
            look(record)

    def rewards(self, record: dict[str, Any]) -> None:
        """Rewards that are all alike in several steps, or fall."""
        self.alike = self.alike + 1 if record.get("frac_reward_zero_std") == 1 else 0
        if self.alike == PATIENCE:
            self.warn("alike", ALIKE.format(**record, first=record["step"] - PATIENCE + 1, number=PATIENCE))
        first, last = mean(self.first, "reward"), mean(self.last, "reward")
        prompts = [max(mean(some, "examples"), 1) * len(some) for some in (self.first, self.last)]
        chance = SURE * math.sqrt(sum(1 / number for number in prompts))
        spread = max(mean(self.first, name) for name in ("reward_std", *spreads(record)))
        if spread and first - last > max(FALLEN, chance) * spread:
            self.warn("reward", FELL.format(step=record["step"], last=last, first=first, many=LAST, few=FIRST))

    def entropy(self, record: dict[str, Any]) -> None:
        """A policy that has become certain."""
        first, last = mean(self.first, "entropy"), mean(self.last, "entropy")
        if last < LEFT * first:
            self.warn("entropy", CERTAIN.format(step=record["step"], last=last, first=first, many=LAST, few=FIRST))

    def kl(self, record: dict[str, Any]) -> None:
        """A policy that is far from the reference."""
        if (record.get("kl") or 0) > MOST_KL:
            self.warn("kl", FAR.format(step=record["step"], kl=record["kl"]))

    def ratios(self, record: dict[str, Any]) -> None:
        """Tokens whose probability has changed much between sampling and an update."""
        if sum((one.get("val/ratio_max") or 0) > MOST_RATIO for one in self.last) == TIMES:
            high = max(one.get("val/ratio_max") or 0 for one in self.last)
            self.warn("ratio", TAILS.format(step=record["step"], high=high, many=LAST))

    def critic(self, record: dict[str, Any]) -> None:
        """A critic whose values are further from the returns than these are from their mean."""
        self.blind = self.blind + 1 if (record.get("critic/vf_explained_var") or 0) < BLIND else 0
        if self.blind == BLIND_STEPS:
            explained = mean(self.last, "critic/vf_explained_var")
            self.warn("critic", WORSE.format(step=record["step"], explained=explained, many=LAST, number=BLIND_STEPS))

    def exactness(self, record: dict[str, Any]) -> None:
        """A sampler that was found to be exact and is not."""
        if record.get("sampling/exact") and record.get(DIFFERENCE):
            self.warn("exact", MISMATCH.format(step=record["step"], difference=record[DIFFERENCE]))


def mean(records: Iterable[dict[str, Any]], name: str) -> float:
    """Of a metric where it is known; 0 where it never is."""
    known = [value for one in records if (value := one.get(name)) is not None and value == value]
    return sum(known) / len(known) if known else 0.0


def spreads(record: dict[str, Any]) -> list[str]:
    """The metrics that say how the rewards of single functions spread over a step."""
    return [name for name in record if name.startswith("rewards/") and name.endswith("/std")]


ALIKE = (
    "step {step}: since step {first}, {number} steps in a row, all completions that are compared have the same reward "
    "(mean {reward:.4g}): there is nothing to learn from; look at samples.jsonl: the prompts may be too hard or too "
    "easy for the model, or the reward function may not see what it should"
)
FELL = (
    "step {step}: the mean reward of the last {many} steps is {last:.4g}, that of the first {few} was {first:.4g}: "
    "the policy is getting worse; start again with a lower optim.lr or a larger batch.size, or with algorithm.kl_coef "
    "above 0"
)
CERTAIN = (
    "step {step}: the entropy over the last {many} steps is {last:.3g} nats a token, over the first {few} it was "
    "{first:.3g}: nearly all completions of a prompt are the same; if the reward no longer rises, stop here, or start "
    "again with a lower optim.lr, algorithm.entropy_coef or algorithm.kl_coef above 0"
)
FAR = (
    "step {step}: kl is {kl:.3g} nats a token: the policy has left the reference far behind; look at samples.jsonl "
    "whether its rewards are earned honestly, and start again with a lower optim.lr or a larger algorithm.kl_coef"
)
TAILS = (
    "step {step}: val/ratio_max is up to {high:.3g} in the last {many} steps: tokens became so many times likelier "
    "within a step, and such tokens decide its updates; lower optim.lr or algorithm.num_iterations, keep the loss's "
    "clip, or set algorithm.target_kl"
)
WORSE = (
    "step {step}: critic/vf_explained_var is {explained:.2g} over the last {many} steps: for {number} steps the "
    "critic's values have been worse than the mean of the returns would be, which adds noise to the advantages; set "
    "algorithm.normalize_values true, so that a new critic starts at that mean, or use grpo or rloo, which have none"
)
MISMATCH = (
    "step {step}: " + DIFFERENCE + " is {difference:.3g} in a run whose sampler was found to be exact: sampling and "
    "training no longer compute the same numbers; run.resume with sampler.exact off goes on without relying on it; "
    "please report this"
)
