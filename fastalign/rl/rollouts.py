"""Rollouts as the source of a run: prompts are drawn, completed by the policy as it is, scored and handed out.

prompts of the step      drawn as rows of a dataset are, dealt to the ranks
    |  sampler           each prompt's completions; scored by the reward functions while others are still sampled
groups                   exchanged in tokens: every rank has the whole step
    |  algorithm         all of them, the best of each prompt, or the best against the worst
examples                 packed, dealt and trained on like any other
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from fastalign.data.examples import TokenExample
from fastalign.data.loader import Rows
from fastalign.parallel.mesh import World
from fastalign.parallel.whereabouts import doing
from fastalign.rl import credit
from fastalign.rl.algorithms import OnPolicy
from fastalign.rl.answers import total
from fastalign.rl.groups import Group, combine, differs, length_metrics, pay_tokens, reward_metrics
from fastalign.rl.rewards import shape_scores
from fastalign.rl.sampler import Sampler
from fastalign.rl.selection import select
from fastalign.types import Prompt, Rollout

log = logging.getLogger(__name__)


class Prompts(Protocol):
    """A dataset of prompts."""

    def __len__(self) -> int: ...

    def ids(self, index: int) -> np.ndarray:
        """``[P]`` tokens of a prompt."""
        ...

    def columns(self, index: int) -> dict[str, Any]:
        """The other columns of its row, which reward functions read."""
        ...

    def prompt(self, index: int) -> Any:
        """Its text or messages."""
        ...


class Scores(Protocol):
    """Rewards of the completions of one prompt.

    Attributes:
        table: ``[G, F]`` by completion and reward function; nan where a function gave none.
        tokens: per completion ``[R, F]`` rewards of its tokens; None where no function rewards tokens.
    """

    table: np.ndarray
    tokens: Sequence[np.ndarray | None] | None


class Scorer(Protocol):
    """Scores the completions of a prompt, beside whatever else happens."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def submit(self, rollouts: Sequence[Rollout], columns: Mapping[str, Any]) -> Future[Any]:
        """Begin; the future gives `Scores`."""
        ...

    def take_counts(self) -> dict[str, int]:
        """Completions since the last call by what became of them, such as ``code/compile_error``."""
        ...

    def close(self) -> None:
        """End what still scores."""
        ...


class NoScorer:
    """The scorer of a run whose rewards an environment pays alone."""

    names, weights = (), ()

    def submit(self, rollouts: Sequence[Rollout], columns: Mapping[str, Any]) -> Future[Any]:
        """No reward for any."""
        known: Future[Any] = Future()
        known.set_result(SimpleNamespace(table=np.zeros((len(rollouts), 0)), tokens=None))
        return known

    def take_counts(self) -> dict[str, int]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


Stage = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


class Rollouts(Rows):
    """The source of an on-policy run.

    Args:
        prompts: the dataset.
        size: prompts of a step over all ranks.
        seed: of the order of the prompts and of the sampler's draws.
        rows: prompts drawn in all; None: without end.
        plan: the algorithm.
        sampler: completes prompts with the weights that train.
        scorer: of the completions.
        world: the ranks; each completes and scores its share.
        stage: shows how far a part of a step is: from its name and size to a context with a function of what is done.
        layout: the ranks as they sample: those of a tensor axis complete the same prompts together, and the first of
            them has these scored. None: each has whole layers to sample with.
    """

    reads_ahead = False

    def __init__(
        self,
        prompts: Prompts,
        size: int,
        seed: int,
        rows: int | None,
        plan: OnPolicy,
        sampler: Sampler,
        scorer: Scorer,
        world: World,
        stage: Stage = lambda name, total: nullcontext(lambda done: None),
        layout: World | None = None,
    ) -> None:
        super().__init__(prompts, size, seed, None if plan.settings.filter_zero_std else rows)  # pyright: ignore
        self.prompts, self.plan, self.sampler, self.scorer, self.world = prompts, plan, sampler, scorer, world
        self.stage = stage
        self.place = world.everyone if layout is None else layout.data
        self.leads = layout is None or layout.tensor is None or layout.tensor.rank == 0
        self.groups: list[Group] = []
        self.seconds: dict[str, float] = {}
        self.resampled = self.num_tokens = 0
        self.counts: Counter[str] = Counter()

    def next(self) -> list[TokenExample]:
        """Sample, score and select a step; equal on all ranks."""
        self.seconds, self.resampled, self.counts = {"generate": 0.0, "reward": 0.0}, 0, Counter()
        settings, wanted, groups = self.plan.settings, self.size, list[Group]()
        for batch in range(settings.max_resample_batches if settings.filter_zero_std else 1):
            drawn, place = self.draw(), (self.seed << 32) + self.drawn
            found = self.roll_out(drawn, settings.num_generations or 1, place, greedy=self.plan.algorithm.greedy)
            wanted = min(wanted, len(drawn)) if batch == 0 else wanted
            groups += [group for group in found if not settings.filter_zero_std or differs(group)]
            self.resampled = batch
            if len(groups) >= wanted:
                break
        else:
            if settings.filter_zero_std:
                text = "only %d of %d prompts have completions with different rewards after %d batches"
                log.warning(
                    f"{text} (algorithm.max_resample_batches): the step trains on these", len(groups), wanted, batch + 1
                )
                groups = groups or found  # a step of equal rewards, which moves nothing
        self.groups = groups[:wanted]
        self.num_tokens += sum(len(one.prompt) + len(one.tokens) for group in self.groups for one in group.rollouts)
        return select(self.plan, self.groups)

    def roll_out(
        self, indices: Sequence[int], n: int, seed: int, *, greedy: bool = False, shown_as: str = "sampling"
    ) -> list[Group]:
        """The groups of prompts, in their order; every rank makes a share and all get all."""
        mine = indices[self.place.rank :: self.place.size]
        start = sampled = time.perf_counter()
        found, failure = [], None
        try:
            with doing("generate"), self.stage(shown_as, len(mine) * (n + greedy)) as tell:
                pending = self._sample(mine, n, seed, greedy, tell)
            sampled = time.perf_counter()
            with doing("reward"):
                found = [self._finish(*each) for each in pending if self.leads]
        except (ValueError, OSError) as error:  # all ranks learn of it, or the others would wait
            failure = str(error)
        self.seconds["generate"] = self.seconds.get("generate", 0.0) + sampled - start
        self.seconds["reward"] = self.seconds.get("reward", 0.0) + time.perf_counter() - sampled
        everyone = self.world.gather_objects((found, failure, self.scorer.take_counts()))
        if failures := [text for _, text, _ in everyone if text]:
            raise ValueError(failures[0])
        for _, _, counts in everyone:
            self.counts.update(counts)
        groups = {group.row: group for part, _, _ in everyone for group in part}
        return [replace(groups[index], seed=seed) for index in indices]

    def _sample(
        self, indices: Sequence[int], n: int, seed: int, greedy: bool, tell: Callable[[int], None]
    ) -> list[tuple[list[Rollout], Future[Any], tuple[Rollout, Future[Any]] | None]]:
        """The rollouts of this rank's prompts, whose scoring began as soon as a prompt's were all there."""
        columns = self.prompts.columns if self.plan.sampler.environment else lambda i: None
        prompts = [Prompt(self.prompts.ids(i), i, columns(i)) for i in indices]
        greedy_ones = {}
        if greedy:
            for one in self.sampler.generate(prompts, 1, seed, greedy=True):
                greedy_ones[one.row] = one, self._score([one])
                tell(len(greedy_ones))
        open_groups: dict[int, list[Rollout]] = {i: [] for i in indices}
        done = {}
        for number, one in enumerate(self.sampler.generate(prompts, n, seed), len(greedy_ones) + 1):
            tell(number)
            group = open_groups[one.row]
            group.append(one)
            if len(group) == n:
                group.sort(key=lambda rollout: rollout.sample)
                done[one.row] = group, self._score(group), greedy_ones.get(one.row)
        return [done[i] for i in indices]

    def _score(self, rollouts: Sequence[Rollout]) -> Future[Any]:
        if not self.leads:
            return Future()  # another rank has them scored
        row = rollouts[0].row
        return self.scorer.submit(rollouts, {**self.prompts.columns(row), "prompt": self.prompts.prompt(row)})

    def _finish(
        self, rollouts: list[Rollout], future: Future[Any], greedy: tuple[Rollout, Future[Any]] | None
    ) -> Group:
        """Wait for the rewards of a group."""
        scores, weights = future.result(), self.weights
        table = with_paid(scores.table, rollouts)
        baseline = None
        if greedy is not None:
            known = with_paid(greedy[1].result().table, [greedy[0]])
            baseline = float(np.nan_to_num(combine(known, weights)[0]))
            baseline = self.shaped(baseline, greedy[0])
        if scores.tokens is not None:
            if self.plan.charges_kl and self.plan.algorithm.credit is credit.grpo:
                raise ValueError(
                    "algorithm.kl_where reward: beside rewards of steps the KL goes into the loss: set loss"
                )
            tokens = pay_tokens(table, scores.tokens, rollouts, weights, self.plan.settings, self.shaped)
            return Group(rollouts, table, np.array([total(each) for each in tokens]), tokens, baseline)
        rewards = combine(table, weights)
        shaped = np.array([self.shaped(r, one) for r, one in zip(rewards, rollouts, strict=True)])
        return Group(rollouts, table, shaped, None, baseline)

    @property
    def names(self) -> tuple[str, ...]:
        """Of what pays rewards: the functions, and the environment of completions of several turns."""
        return (*self.scorer.names, *["environment"] * (self.plan.sampler.environment is not None))

    @property
    def weights(self) -> tuple[float, ...]:
        """One for each; an environment's is 1."""
        return (*self.scorer.weights, *[1.0] * (len(self.names) - len(self.scorer.names)))

    def shaped(self, reward: float, rollout: Rollout) -> float:
        """A weighted sum of rewards as the algorithm's settings scale, clip and fine it."""
        s = self.plan.settings
        shaped = shape_scores(torch.tensor(float(reward)), scale=s.reward_scale, bias=s.reward_bias, clip=s.reward_clip)
        fined = s.truncation == "penalty" and rollout.finish == "length"
        return shaped.item() - (s.truncation_penalty if fined else 0.0)

    def after(self, policy: Any, step: int) -> None:
        """The next step is sampled from the weights as they are now."""
        self.sampler.sync(policy, step)

    def close(self) -> None:
        """End the reward functions that still score."""
        self.scorer.close()

    def state_dict(self) -> dict[str, Any]:
        """The position, and the tokens of all steps so far."""
        return {**super().state_dict(), "num_tokens": self.num_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to them."""
        super().load_state_dict(state)
        self.num_tokens = state.get("num_tokens", 0)

    def describe(self) -> str:
        """How much a step holds."""
        n, size = self.plan.settings.num_generations, min(self.size, len(self.prompts))
        each = f"{n} completions" if n != 1 else "a completion"
        return f"{size} prompts with {each} each, of {len(self.prompts):,} prompts"

    def metrics(self) -> dict[str, float]:
        """What TRL's trainers log of the completions and rewards of the step, over all ranks."""
        return {
            **reward_metrics(self.groups, self.names),
            **{f"rewards/{name}": count for name, count in self.counts.items()},
            **length_metrics(self.groups),
            "resampled_batches": self.resampled,
            "num_tokens": self.num_tokens,
        }

    def take_seconds(self) -> dict[str, float]:
        """How long the parts of a step took, once: a step may be asked for again before it is taken."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def evaluate(
        self, prompts: Prompts, batch: int = 64, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Rewards and lengths of one completion of each of other prompts, sampled with the weights as they are.

        ``between`` is called on all ranks before every ``batch`` of prompts; what it raises ends the evaluation.
        """
        training, self.prompts = self.prompts, prompts
        try:
            groups = []
            for start in range(0, len(prompts), batch):
                between()
                some = range(len(prompts))[start : start + batch]
                groups += self.roll_out(some, 1, EVALUATION_SEED, shown_as=f"evaluating from prompt {start + 1}")
        finally:
            self.prompts = training
        found = {**reward_metrics(groups, self.names), **length_metrics(groups)}
        return {name: value for name, value in found.items() if "std" not in name}


EVALUATION_SEED = 0
"""Of the draws of evaluations, which can be compared that way."""


def with_paid(table: np.ndarray, rollouts: Sequence[Rollout]) -> np.ndarray:
    """``[G, F]`` rewards by function, and behind them what the environment has paid, where there is one."""
    paid = [[one.reward] for one in rollouts if one.reward is not None]
    return np.hstack([table, np.array(paid)]) if paid else table
