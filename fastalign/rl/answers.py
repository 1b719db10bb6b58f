"""What reward functions are given and what they may return: one number per sample, None, or one number per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastalign.types import Rollout
from fastalign.words import kind_of

SHOWN = 60
"""Characters of a prompt in an error."""


class RewardError(ValueError):
    """A reward function failed, or returned what is no reward: one line with function, prompt, sample and cause."""


@dataclass(frozen=True)
class Group:
    """Samples of one prompt, all of them or one.

    Attributes:
        rollouts: the samples.
        arguments: what functions may ask for, lists with one entry per sample: `prompts`, `completions`,
            `completion_ids` and the columns of the data.
    """

    rollouts: tuple[Rollout, ...]
    arguments: dict[str, list[Any]]

    def singles(self) -> list[Group]:
        """Each sample as a group of its own."""
        return [
            Group((one,), {name: values[i : i + 1] for name, values in self.arguments.items()})
            for i, one in enumerate(self.rollouts)
        ]


@dataclass(frozen=True)
class Scores:
    """Rewards of the G samples of a prompt by F functions, before weights.

    Attributes:
        table: ``[G, F]`` float64, nan where a function gave a sample none. Of a function that rewards tokens it is
            their sum.
        tokens: for each sample ``[R, F]`` float64, what each of its R tokens was given; nan where a token got no
            reward, so all over the columns of functions that reward whole samples. None where all functions do.
    """

    table: np.ndarray
    tokens: list[np.ndarray] | None
    lengths: list[int]

    def all_tokens(self) -> list[np.ndarray]:
        """`tokens`, also where there are none."""
        return self.tokens or [np.full((n, self.table.shape[1]), np.nan) for n in self.lengths]


def make_scores(given: Sequence[Sequence[Any]], lengths: list[int]) -> Scores:
    """The scores of a group: what each of F functions gives its samples, a number or an array ``[R]`` each."""
    table = np.array([[total(value) for value in values] for values in given], dtype=np.float64).T
    if not any(isinstance(value, np.ndarray) for values in given for value in values):
        return Scores(table, None, lengths)
    samples = zip(*given, strict=True)
    return Scores(
        table,
        [
            np.stack([value if isinstance(value, np.ndarray) else np.full(n, np.nan) for value in values], 1)
            for n, values in zip(lengths, samples, strict=True)
        ],
        lengths,
    )


def total(value: float | np.ndarray) -> float:
    """A sample's reward; of rewarded tokens their sum, nan where none is."""
    if not isinstance(value, np.ndarray):
        return value
    return float(np.nansum(value)) if not np.isnan(value).all() else math.nan


def read_answer(name: str, group: Group, answer: Any) -> list[float | np.ndarray]:
    """The reward of each sample out of what a function returned; None becomes nan.

    Raises:
        RewardError: it is no list of as many rewards as there are samples, or one of them is not usable.
    """
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, list | tuple):
        raise RewardError(f"reward {name} returned {kind_of(answer)} for {sample_words(group)}: expected a list")
    if len(answer) != len(group.rollouts):
        expected = f"expected {len(group.rollouts)}, one per completion"
        raise RewardError(f"reward {name} returned {len(answer)} rewards for {sample_words(group)}: {expected}")
    return [read_reward(name, one, value) for one, value in zip(group.singles(), answer, strict=True)]


def read_reward(name: str, one: Group, value: Any) -> float | np.ndarray:
    """The reward of one sample, or those of its tokens."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple):
        return read_number(name, one, value)
    if len(value) != (count := len(one.rollouts[0].tokens)):
        expected = f"expected one number for each of its {count} tokens, with None for those without a reward"
        raise RewardError(f"reward {name} returned a list of {len(value)} for {sample_words(one)}: {expected}")
    return np.array([read_number(name, one, item) for item in value], dtype=np.float64)


def read_number(name: str, one: Group, value: Any) -> float:
    """A finite number as it is, None as nan."""
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return math.nan
    number = float(value) if hasattr(type(value), "__float__") else math.nan
    if math.isfinite(number):
        return number
    what = value if isinstance(value, float) else kind_of(value)
    raise RewardError(f"reward {name} returned {what} for {sample_words(one)}: expected a finite number or None")


def sample_words(group: Group) -> str:
    """Which samples of which prompt."""
    numbers = [one.sample for one in group.rollouts]
    which = f"sample {numbers[0]}" if len(numbers) == 1 else f"samples {numbers[0]} to {numbers[-1]}"
    return f"{which} of the prompt {short(group.arguments['prompts'][0])} (row {group.rollouts[0].row})"


def short(prompt: Any) -> str:
    """The beginning of a prompt, or of the last message of one, in quotes."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")


def one_line(text: str) -> str:
    """A text of many lines as one."""
    return " ".join(text.split())
