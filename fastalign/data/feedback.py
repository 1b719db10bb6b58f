"""What the data say of completions, read from a row and checked: margins, probabilities, labels, scores.

Every function raises a ValueError that names the column, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

GOOD, BAD = 1.0, 0.0
"""The label of a completion that people liked, or not; and the scores of a pair's two sides."""

PAIR_COLUMNS = ("margin", "probability")
"""What a preference row may say beside which side is better: by how much, or with which probability."""


def meaning(columns: Iterable[str], form: str, method: str) -> str | None:
    """What the scores of a method's examples are: `margin`, `probability`, `label`, `score`, `step`; None without any.

    Raises:
        ValueError: preferences with a margin and a probability.
    """
    if form == "preference" and method == "reward":
        found = [name for name in PAIR_COLUMNS if name in set(columns)]
        if len(found) > 1:
            raise ValueError(
                "columns 'margin' and 'probability': reward models learn from one of them, remove a column"
            )
        return found[0] if found else None
    return {"kto": "label", "rrhf": "score", "reward:k_wise": "score", "reward:process": "step"}.get(method)


def of_pair(row: dict[str, Any], method: str) -> tuple[float, ...]:
    """The scores of chosen and rejected for this method; a reward model's are (margin, 0) or (p, 1 - p)."""
    if method in ("kto", "rrhf"):
        return GOOD, BAD
    if method != "reward":
        return ()
    if "margin" in row:
        return number(row["margin"], "margin"), 0.0
    return _probabilities(row["probability"]) if "probability" in row else ()


def label(value: Any, name: str = "label") -> float:
    """`GOOD` or `BAD` from a bool, or from 1 and 0."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise ValueError(f"column {name!r}: expected true or false, or 1 or 0, got {_spell(value)}")


def number(value: Any, name: str) -> float:
    """A finite number; a bool counts as 1 or 0."""
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    raise ValueError(f"column {name!r}: expected a finite number, got {_spell(value)}")


def listed(row: dict[str, Any], name: str) -> list[Any]:
    """A column's list, empty for null."""
    value = row.get(name)
    if value is None or isinstance(value, list):
        return value or []
    raise ValueError(f"column {name!r}: expected a list, got {_spell(value)}")


def matched(row: dict[str, Any], texts: str, judgements: str) -> tuple[list[Any], list[Any]]:
    """Two columns' lists of the same length: completions, and what is said of each."""
    first, second = listed(row, texts), listed(row, judgements)
    if len(first) != len(second):
        raise ValueError(f"{texts!r} has {len(first)} entries and {judgements!r} {len(second)}: expected one for each")
    return first, second


def _probabilities(value: Any) -> tuple[float, float]:
    chosen = number(value, "probability")
    if not 0 <= chosen <= 1:
        raise ValueError(f"column 'probability': expected a number from 0 to 1 (that chosen is better), got {chosen:g}")
    return chosen, 1 - chosen


def _spell(value: Any) -> str:
    """A short value itself, otherwise its type: texts of the data stay out of messages."""
    return repr(value) if isinstance(value, bool | int | float) or value is None else type(value).__name__
