"""What the data say of completions, read from a row and checked: margins, probabilities, labels, scores.

Every function raises a ValueError that names the column, what was expected and what came.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from fastalign.words import shown

logger = logging.getLogger(__name__)

GOOD, BAD = 1.0, 0.0
"""The label of a completion that people liked, or not; and the scores of a pair's two sides."""


def check_columns(columns: Iterable[str], method: str) -> None:
    """Refuses preferences without the column that a soft-label reward model reads; warns of one that is not read."""
    stated = "probability" in set(columns)
    if method == "reward:soft_label" and not stated:
        raise ValueError(
            "loss.name=soft_label reads how likely the chosen side is the better: expected a column 'probability' "
            f"beside chosen and rejected, found {sorted(columns)}: rename with data.columns"
        )
    if method == "reward" and stated:
        logger.info("column 'probability' is not read: loss.name=soft_label learns from it")


def label(value: Any, name: str = "label") -> float:
    """`GOOD` or `BAD` from a bool, or from 1 and 0."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise ValueError(f"column {name!r}: expected true or false, or 1 or 0, got {shown(value)}")


def number(value: Any, name: str) -> float:
    """A finite number; a bool counts as 1 or 0."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(f"column {name!r}: expected a finite number, got {shown(value)}")


def listed(row: dict[str, Any], name: str) -> list[Any]:
    """A column's list, empty for null."""
    value = row.get(name)
    if value is None or isinstance(value, list):
        return value or []
    raise ValueError(f"column {name!r}: expected a list, got {shown(value)}")


def matched(row: dict[str, Any], texts: str, judgements: str) -> tuple[list[Any], list[Any]]:
    """Two columns' lists of the same length: completions, and what is said of each."""
    first, second = listed(row, texts), listed(row, judgements)
    if len(first) != len(second):
        raise ValueError(f"{texts!r} has {len(first)} entries and {judgements!r} {len(second)}: expected one for each")
    return first, second


def _probability(row: dict[str, Any]) -> tuple[float, ...]:
    chosen = number(row["probability"], "probability")
    if not 0 <= chosen <= 1:
        raise ValueError(f"column 'probability': expected a number from 0 to 1 (that chosen is better), got {chosen:g}")
    return chosen, 1 - chosen


PAIR_SCORES: dict[str, Callable[[dict[str, Any]], tuple[float, ...]]] = {
    "reward": lambda row: (number(row["margin"], "margin"), 0.0) if "margin" in row else (),
    "reward:soft_label": _probability,
    "kto": lambda row: (GOOD, BAD),
    "rrhf": lambda row: (GOOD, BAD),
}
"""The scores of chosen and rejected, by method; a reward model's are (margin, 0) or (p, 1 - p)."""
