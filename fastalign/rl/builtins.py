"""Reward functions that come with fastalign: ``rewards: [{builtin: gsm8k}, {builtin: length, target: 200}]``.

Each has TRL's signature: positional arguments are what is scored and columns of the data, one entry per sample;
keyword-only ones are settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from fastalign.rl.rewards import overlong_penalty

NUMBER = re.compile(
    r"(?<![\w.^])(?P<sign>-?)(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?P<decimals>\.\d+)?"
    r"(?:\s?/\s?(?P<divisor>\d+(?:\.\d+)?))?"
)
"""A number as people write it; one that is glued to a letter in front, as in x2, or an exponent is none. A minus behind
a digit is a minus between two numbers."""
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{\s*(-?[\d.,]+)\s*\}\{\s*([\d.,]+)\s*\}")
LONGEST = 100
"""Characters of a number; Python refuses to read one of thousands of digits."""
MARK = "####"
"""What GSM8K's answers have in front of their last line."""


def gsm8k(completions: Sequence[Any], answer: Sequence[Any]) -> list[float | None]:
    """1 where a completion ends with the number of the gold answer, else 0; None where the gold answer has no number.

    The number of a text is the last one on the line behind ``####``, or without that mark the last one of all. Numbers
    are compared exactly, as fractions: 1,000 equals 1000.00, 1/2 equals 0.5; currency signs and units are passed over.
    Source: Cobbe et al. 2021 (arXiv:2110.14168).

    Args:
        completions: sampled texts or messages.
        answer: column of the data, the gold solution with ``#### 18`` at its end, or just the number.

    Example:
        >>> gsm8k(["16 - 7 = 9, so $18.00 a day", "17"], ["... #### 18", "... #### 18"])
        [1.0, 0.0]
    """
    pairs = [
        (last_number(text_of(text)), last_number(str(gold))) for text, gold in zip(completions, answer, strict=True)
    ]
    return [None if gold is None else float(found == gold) for found, gold in pairs]


def last_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, see `gsm8k`; None where it gives none.

    Example:
        >>> last_number("It costs $1,234.50 in all."), last_number("x^2 is three quarters, or 3/4")
        (Fraction(2469, 2), Fraction(3, 4))
    """
    if MARK in text:
        text = next(iter(text.rpartition(MARK)[2].strip().splitlines()), "")
    text = re.sub("[$€£]", " ", re.sub("-[$€£]", "-", LATEX_FRACTION.sub(r" \1/\2 ", text)))
    found = [number for match in NUMBER.finditer(text) if (number := read_number(match)) is not None]
    return found[-1] if found else None


def read_number(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `NUMBER`; None for a division by zero, and for babble of digits."""
    if len(match[0]) > LONGEST:
        return None
    divisor = Fraction(match["divisor"] or 1)
    digits = f"{match['whole'].replace(',', '') or 0}{match['decimals'] or ''}"
    return Fraction(f"{match['sign']}{digits}") / divisor if divisor else None


def exact_match(
    completions: Sequence[Any], answer: Sequence[Any] | None = None, target: Sequence[Any] | None = None
) -> list[float]:
    """1 where a completion is the answer, white space around both aside, else 0.

    Args:
        completions: sampled texts or messages.
        answer, target: columns of the data, of which it needs one; ``target`` counts where both are there.
    """
    gold = answer if target is None else target
    if gold is None:
        raise ValueError("exact_match needs a column `answer` or `target`: name one with data.columns")
    return [float(text_of(text).strip() == str(right).strip()) for text, right in zip(completions, gold, strict=True)]


def format(  # named as it is in a configuration
    completions: Sequence[Any], *, pattern: str = r"<think>.*?</think>\s*<answer>.*?</answer>"
) -> list[float]:
    """1 where a regular expression describes the whole completion, white space around it aside, else 0.

    Source: the format reward of DeepSeek-R1 (arXiv:2501.12948), section 2.2.2.

    Args:
        completions: sampled texts or messages.
        pattern: Python's syntax; a dot matches line breaks too.

    Example:
        >>> format(["<think>2 + 2</think> <answer>4</answer>", "4"])
        [1.0, 0.0]
    """
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(text_of(text).strip()) is not None) for text in completions]


def length(completion_ids: Sequence[Sequence[int]], *, target: int, scale: int | None = None) -> list[float]:
    """Linear penalty of another length than ``target`` tokens: ``-|n - target| / scale``.

    Args:
        completion_ids: sampled tokens.
        target: length wanted; with 0 every token costs ``1 / scale``.
        scale: tokens that cost 1; default: ``target``.

    Example:
        >>> length([[5] * 100, [5] * 150], target=100)
        [0.0, -0.5]
    """
    per = target if scale is None else scale
    if per < 1 or target < 0:
        raise ValueError(f"length: expected target >= 0 and scale >= 1, got target {target} and scale {scale}")
    return [-abs(len(ids) - target) / per for ids in completion_ids]


def repetition(completion_ids: Sequence[Sequence[int]], *, n: int = 3) -> list[float]:
    """Penalty of repeated n-grams of tokens, from 0 without any down towards -1: ``distinct / all - 1``.

    Source: the repetition penalty of Yeo et al. 2025 (arXiv:2502.03373), appendix; there on words.

    Args:
        completion_ids: sampled tokens; a completion with fewer than n gets 0.
        n: tokens of an n-gram.

    Example:
        >>> repetition([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4]], n=2)
        [-0.6, 0.0]
    """
    if n < 1:
        raise ValueError(f"repetition: expected n of at least 1, got {n}")
    grams = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in completion_ids]
    return [(len(set(mine)) - len(mine)) / len(mine) if mine else 0.0 for mine in grams]


def overlong(completion_ids: Sequence[Sequence[int]], *, max_length: int, buffer: int) -> list[float]:
    """DAPO's soft penalty of long completions: 0 up to ``max_length - buffer`` tokens, then linear down to -1.

    Source: Yu et al. 2025 (arXiv:2503.14476), eq. 13; see `fastalign.rl.rewards.overlong_penalty`.

    Args:
        completion_ids: sampled tokens.
        max_length: tokens from which the penalty is -1, usually `sampler.max_new_tokens`.
        buffer: tokens over which it grows.

    Example:
        >>> overlong([[5] * 8, [5] * 9, [5] * 12], max_length=12, buffer=4)
        [0.0, -0.25, -1.0]
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"overlong: expected 1 <= buffer <= max_length, got buffer {buffer}, max_length {max_length}")
    lengths = torch.tensor([float(len(ids)) for ids in completion_ids])
    return overlong_penalty(lengths, max_length=max_length, buffer=buffer).tolist()


def text_of(completion: Any) -> str:
    """A completion as text: of messages the content of the last one."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


BUILTINS = {f.__name__: f for f in (gsm8k, exact_match, format, length, repetition, overlong)}
"""The built-in reward functions by name."""
