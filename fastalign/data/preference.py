"""Preference rows as (prompt, chosen, rejected), whichever way the prompt is written down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""Turn markers of the raw hh-rlhf dialogues."""


def is_raw_dialogue(text: Any) -> bool:
    """Whether a string is a whole dialogue in hh-rlhf's raw form."""
    return isinstance(text, str) and text.lstrip().startswith(HUMAN.lstrip()) and ASSISTANT in text


def are_raw_dialogues(rows: Iterable[dict[str, Any]]) -> bool:
    """Whether these rows (the first ones of a dataset without a prompt column) are raw hh-rlhf pairs."""
    return all(is_raw_dialogue(row["chosen"]) and is_raw_dialogue(row["rejected"]) for row in rows)


def split_pair(prompt: Any, chosen: Any, rejected: Any, raw_dialogue: bool) -> tuple[Any, Any, Any] | None:
    """A pair as (prompt, chosen, rejected), all strings or all lists of messages.

    An explicit prompt of the same kind is kept. Otherwise the prompt is what both sides begin with: in raw dialogues
    everything up to and including the last ``\\n\\nAssistant:`` of ``chosen`` (the answers may begin alike, so their
    own common words stay out of the prompt), in conversations the common messages, in plain strings the common
    characters up to a word boundary. A string ``prompt`` beside conversations repeats what these begin with.

    Returns:
        The triple, or None when a raw dialogue's rejected side has another prompt.

    Raises:
        ValueError: one side a string, the other a list.
    """
    if type(chosen) is not type(rejected):
        raise ValueError("'chosen' and 'rejected' must both be strings or both be lists of {role, content}")
    if raw_dialogue:
        return split_raw_dialogue(chosen, rejected)
    if prompt is not None and type(prompt) is type(chosen):
        return prompt, chosen, rejected
    if isinstance(prompt, list):
        raise ValueError("'prompt' is a list of messages, 'chosen' and 'rejected' are strings: expected lists too")
    length = _common_characters(chosen, rejected) if isinstance(chosen, str) else _common_messages(chosen, rejected)
    return chosen[:length], chosen[length:], rejected[length:]


def split_raw_dialogue(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """Splits a raw hh-rlhf pair as `split_pair` says; None when ``rejected`` has another prompt.

    Example:
        >>> split_raw_dialogue("\\n\\nHuman: Two?\\n\\nAssistant: Yes.", "\\n\\nHuman: Two?\\n\\nAssistant: No.")
        ('\\n\\nHuman: Two?\\n\\nAssistant:', ' Yes.', ' No.')
    """
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if ASSISTANT not in chosen or not rejected.startswith(chosen[:end]):
        return None
    return chosen[:end], chosen[end:], rejected[end:]


def _common_characters(first: str, second: str) -> int:
    """Length of the common beginning, back to where a word begins: a half word must not count as prompt."""
    limit = min(len(first), len(second))
    length = next((i for i in range(limit) if first[i] != second[i]), limit)
    while length and not first[length - 1].isspace():
        length -= 1
    return length


def _common_messages(first: list[Any], second: list[Any]) -> int:
    """Number of common first messages; both sides keep at least one."""
    limit = max(0, min(len(first), len(second)) - 1)
    return next((i for i in range(limit) if first[i] != second[i]), limit)
