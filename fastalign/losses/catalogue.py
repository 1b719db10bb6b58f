"""What the objectives say of themselves: the page of methods is written from this and checked against it.

The docstring of a loss has a first line "NAME: purpose.", a paragraph with the formula in double backquotes that ends
with "Source: ...", and a line on every argument.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastalign.losses import distillation, policy, preference, ranking, reward, supervised, unpaired
from fastalign.losses.mixture import keywords

FAMILIES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "supervised": supervised.LOSSES,
    "preference": preference.LOSSES,
    "unpaired": unpaired.LOSSES,
    "ranking": ranking.LOSSES,
    "reward": reward.LOSSES,
    "distillation": distillation.LOSSES,
    "policy": policy.LOSSES,
}
"""The dict at the foot of each file: an entry added there is known here, to the command line and to the tests."""


@dataclass(frozen=True)
class Description:
    """A loss in words.

    Attributes:
        title, purpose: the two halves of the first line.
        formula: the paragraph after it, with what its symbols mean.
        source: where it was published.
        defaults: its keyword arguments.
        arguments: what each argument means.
    """

    title: str
    purpose: str
    formula: str
    source: str
    defaults: dict[str, Any]
    arguments: dict[str, str]


def describe(loss: Callable[..., Any]) -> Description:
    """Read a loss's docstring.

    Raises:
        ValueError: it says nothing of the purpose, the formula, the source or an argument.
    """
    text = inspect.getdoc(loss) or ""
    match = re.match(
        r"(?P<title>[^\n:]+): (?P<purpose>[^\n]+)\n\n(?P<formula>.*?)\bSource: (?P<source>.*?)(\n\n|\Z)", text, re.S
    )
    if match is None or "``" not in match["formula"]:
        raise ValueError(f'{loss.__name__}: expected "NAME: purpose.", a formula in backquotes and "Source: ..."')
    found = {name: " ".join(words.split()) for name, words in match.groupdict().items()}
    return Description(**found, defaults=keywords(loss), arguments=arguments(loss, text))


def arguments(loss: Callable[..., Any], text: str) -> dict[str, str]:
    """What the docstring says of each argument of ``loss``."""
    section = re.search(r"\nArgs:\n(.*?)(\n\n|\Z)", text, re.S)
    entries = re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", section[1] + "\n" if section else "", re.S | re.M)
    said = {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}
    silent = [name for name in inspect.signature(loss).parameters if name not in said]
    if silent:
        raise ValueError(f"{loss.__name__}: the docstring is silent on {', '.join(silent)}")
    return said


def catalogue() -> Iterator[tuple[str, str, Description]]:
    """(family, name, description) of every loss."""
    for family, losses in FAMILIES.items():
        for name, loss in losses.items():
            yield family, name, describe(loss)


def missing_from(page: str) -> list[str]:
    """The losses that a page does not name in backquotes."""
    return [name for _, name, _ in catalogue() if f"`{name}`" not in page]
