"""The measured cases, a module for each family: inputs, the float64 oracle, fastalign and its rivals.

Letters: N rows, V vocabulary, D hidden, P pairs, B sequences, L tokens per sequence, T packed tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch

from bench.cases import decode, divergences, head, log_probs, logits, packed, policy, sampling
from bench.field import Setting
from bench.measure import Case

FAMILIES = (logits, policy, head, log_probs, divergences, packed, decode, sampling)


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Every case of a setting by name, to be built when its turn comes."""
    return {name: build for family in FAMILIES for name, build in family.cases(setting).items()}


def matching(names: list[str], pattern: str | None) -> list[str]:
    """The names that hold ``pattern``, which may have wildcards; several patterns are separated by commas.

    Raises:
        ValueError: none does.
    """
    wanted = (pattern or "*").split(",")
    found = [name for name in names if any(fnmatch(name, f"*{part}*") for part in wanted)]
    if not found:
        raise ValueError(f"no case matches {pattern!r}; there are: {', '.join(names)}")
    return found
