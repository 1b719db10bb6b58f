"""Answers that are written down together with their prompt: what they all begin with."""

from __future__ import annotations

from typing import Any

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""Turn markers of the raw hh-rlhf dialogues."""


def is_raw_dialogue(text: Any) -> bool:
    """Whether a string is a whole dialogue in hh-rlhf's raw form."""
    return isinstance(text, str) and text.lstrip().startswith(HUMAN.lstrip()) and ASSISTANT in text


def split_raw_dialogue(chosen: str, *others: str) -> tuple[str, ...] | None:
    """Raw hh-rlhf dialogues as (prompt, answers): the prompt ends with the last ``\\n\\nAssistant:`` of ``chosen``.

    The answers may begin alike, so their own common words stay out of the prompt.

    Returns:
        The prompt and the answers, or None when another dialogue does not begin with this prompt.

    Example:
        >>> split_raw_dialogue("\\n\\nHuman: Two?\\n\\nAssistant: Yes.", "\\n\\nHuman: Two?\\n\\nAssistant: No.")
        ('\\n\\nHuman: Two?\\n\\nAssistant:', ' Yes.', ' No.')
    """
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    if ASSISTANT not in chosen or not all(other.startswith(chosen[:end]) for other in others):
        return None
    return chosen[:end], *(side[end:] for side in (chosen, *others))


def common_characters(first: str, second: str) -> int:
    """Length of the common beginning, back to where a word begins: a half word must not count as prompt."""
    limit = min(len(first), len(second))
    length = next((i for i in range(limit) if first[i] != second[i]), limit)
    while length and not first[length - 1].isspace():
        length -= 1
    return length
