"""What the objectives say of themselves: the page of methods is written from this and checked against it.

The docstring of a loss has a first line "NAME: purpose.", a paragraph with the formula in double backquotes that ends
with "Source: ...", and a line on every argument.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastalign.losses.traits import Family, function_of, keywords


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
    loss = function_of(loss)
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


def page(families: Mapping[str, Family]) -> str:
    """The page of methods in Markdown: what ``fastalign methods`` prints and ``docs/methods.md`` holds.

    Args:
        families: by the method that trains with their losses.
    """
    return "\n".join([PREFACE, *(section(method, family) for method, family in families.items())])


def section(method: str, family: Family) -> str:
    """A family with its losses."""
    entries = [entry(name, method, family) for name in family.losses]
    return "\n".join([f"## {family.title}\n\n{family.about}\n\nWatch: {family.watch}\n", *entries])


def entry(name: str, method: str, family: Family) -> str:
    """One loss: what it is for, formula, source, settings and command."""
    loss = describe(family.losses[name])
    settings = [f"- `{key}` ({value!r}): {loss.arguments[key]}" for key, value in loss.defaults.items()]
    lines = [f"### `{name}`\n", f"**{loss.title}**: {loss.purpose}", loss.formula, f"Source: {loss.source}\n"]
    text = "\n".join([*lines, *settings, *([""] if settings else [])]).replace("``", "`")
    return f"{text}\n```\n{command(name, method, family)}\n```\n"


def command(name: str, method: str, family: Family) -> str:
    """How a loss is trained with on the example's data."""
    chosen = f" --loss.name {name}" if len(family.losses) > 1 else ""
    example = family.example or f"examples/{method}.yaml"
    return f"fastalign {method} --config {example}{chosen}{family.losses[name].flags}"


PREFACE = """# Methods

Every objective: its formula, where it comes from, its settings with their defaults, a command, and what to watch.
`fastalign methods` prints this page from the docstrings, which is where it is edited.
"""
