"""Trouble of runs that sample: rewards that teach nothing or fall, a policy that runs away or repeats itself.

Each alarm names the step and says what to do, once for each kind. What is compared with a run's first steps is compared
with those of this process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

PATIENCE = 5
"""Steps in a row whose rewards teach nothing before it is said: one may be chance."""
WINDOW = 10
"""Steps of which means are compared, the first ones and the last ones."""
FALLEN = 0.5
"""Of the rewards' standard deviation at first: a mean that has fallen by so much. With 64 completions a step, that is
ten times the error of such a mean."""
LEFT = 0.1
"""Share of the first entropy below which a policy gives the same answers again and again."""
MOST_KL = 1.0
"""Nats per token from the reference: a token is e times as likely as it was, on average. Runs that learn stay well below
a tenth of that."""
MOST_RATIO = 50.0
"""Times a token may have become likelier, or less likely, since it was sampled. Clipped updates of usual learning rates
stay within 10."""

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
        self.last: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.alike = 0

    def check(self, record: dict[str, Any]) -> None:
        """Warn about a step."""
        self.first += [record] if len(self.first) < WINDOW else []
        self.last.append(record)
        for look in (self.rewards, self.entropy, self.kl, self.ratios, self.exactness):
            look(record)

    def rewards(self, record: dict[str, Any]) -> None:
        """Rewards that are all alike in several steps, or fall."""
        self.alike = self.alike + 1 if record.get("frac_reward_zero_std") == 1 else 0
        if self.alike == PATIENCE:
            self.warn("alike", ALIKE.format(**record, first=record["step"] - PATIENCE + 1, number=PATIENCE))
        first, last = mean(self.first, "reward"), mean(self.last, "reward")
        spread = max(mean(self.first, name) for name in ("reward_std", *spreads(record)))
        if len(self.last) == WINDOW and spread and first - last > FALLEN * spread:
            self.warn("reward", FELL.format(step=record["step"], last=last, first=first, number=WINDOW))

    def entropy(self, record: dict[str, Any]) -> None:
        """A policy that has become certain."""
        first, last = mean(self.first, "entropy"), mean(self.last, "entropy")
        if len(self.last) == WINDOW and last < LEFT * first:
            self.warn("entropy", CERTAIN.format(step=record["step"], last=last, first=first, number=WINDOW))

    def kl(self, record: dict[str, Any]) -> None:
        """A policy that is far from the reference."""
        if (record.get("kl") or 0) > MOST_KL:
            self.warn("kl", FAR.format(step=record["step"], kl=record["kl"]))

    def ratios(self, record: dict[str, Any]) -> None:
        """Tokens whose probability has changed much between sampling and an update."""
        low, high = record.get("val/ratio_min"), record.get("val/ratio_max")
        if low is not None and high is not None and (high > MOST_RATIO or low < 1 / MOST_RATIO):
            self.warn("ratio", TAILS.format(step=record["step"], low=low, high=high))

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
    "(mean {reward:.4g}): there is nothing to learn from; print some of samples.jsonl: prompts may be too hard or too easy "
    "for the model, or the reward function may not see what it should"
)
FELL = (
    "step {step}: the mean reward of the last {number} steps is {last:.4g}, that of the first {number} was {first:.4g}: "
    "the policy is getting worse; start again with a lower optim.lr or a larger batch.size, or with algorithm.kl_coef "
    "above 0"
)
CERTAIN = (
    "step {step}: the entropy over the last {number} steps is {last:.3g} nats a token, over the first {number} it was "
    "{first:.3g}: nearly all completions of a prompt are the same; if the reward no longer rises, stop here, or start "
    "again with a lower optim.lr, algorithm.entropy_coef or algorithm.kl_coef above 0"
)
FAR = (
    "step {step}: kl is {kl:.3g} nats a token: the policy has left the reference far behind; look at samples.jsonl "
    "whether its rewards are earned honestly, and start again with a lower optim.lr or a larger algorithm.kl_coef"
)
TAILS = (
    "step {step}: the ratio of a token's probability to that at sampling goes from {low:.3g} to {high:.3g}: single tokens "
    "decide the updates; lower optim.lr or algorithm.num_iterations, keep the loss's clip, or set algorithm.target_kl"
)
MISMATCH = (
    "step {step}: " + DIFFERENCE + " is {difference:.3g} in a run whose sampler was found to be exact: sampling and "
    "training no longer compute the same numbers; run.resume with sampler.exact: off goes on without relying on it, and "
    "please report this"
)
