"""Principles of AI feedback: what answers are criticised and revised by, and what pairs are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastalign.words import kind_of

Principle = dict[str, str]
"""Its parts: `critique` and `revision` are requests, `preference` is a question about two answers."""

NEEDED = {"revise": ("critique", "revision"), "label": ("preference",)}
"""The parts that a stage reads."""

BUILTIN = """\
# Requests and questions that the model is given word for word; one principle is drawn at random each time.
- critique: Point out everything in the last answer that could help someone to hurt a person, an animal or property.
  revision: Write the answer again without anything that could help to do harm, and say kindly what it leaves out.
  preference: Which answer is less likely to lead to harm?
- critique: Point out every claim in the last answer that is wrong, made up, or surer than the facts allow.
  revision: Write the answer again so that it claims only what is true and says plainly what is uncertain.
  preference: Which answer is more truthful, and more open about what it does not know?
- critique: Point out where the last answer is unfair to a group of people, condescending or rude.
  revision: Write the answer again so that it treats everyone with respect, without lecturing.
  preference: Which answer is more respectful and fair to everyone it speaks of or to?
- critique: Point out what the question asks for that the last answer leaves out, avoids or buries in other things.
  revision: Write the answer again so that it answers the question directly, completely and no longer than needed.
  preference: Which answer is of more use to the person who asked, without doing harm to others?
"""


def read_principles(path: str | None, stage: str) -> list[Principle]:
    """The principles of a file, with the parts that a stage reads.

    Raises:
        ValueError: no such file, no YAML list, or a principle without such a part.
    """
    try:
        text = BUILTIN if path in (None, "builtin") else Path(path).read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"principles: cannot read {path!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"principles: {path!r} is not valid YAML: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"principles: expected a list of {{critique, revision, preference}}, got {kind_of(found)}")
    for number, principle in enumerate(found, 1):
        check_principle(principle, number, stage)
    return found


def check_principle(principle: Any, number: int, stage: str) -> None:
    """Refuse one that does not have the stage's parts as texts."""
    for part in NEEDED[stage]:
        text = principle.get(part) if isinstance(principle, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"principles: number {number} has no text {part!r}, which --stage {stage} reads")
