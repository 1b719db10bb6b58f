"""Where a row's prompt ends and its completions begin: the prompt comes once before each, however both are written.

A completion may be the answer alone, or the whole with the prompt in front. A string beside conversations is a turn: a
prompt the user's, a completion the assistant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastalign.data.messages import SPEECH, Message, Text, Turns

_SYSTEM = ("system", "developer")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""Turn markers of the raw hh-rlhf dialogues."""


def place(
    prompt: Text | None, sides: Sequence[Text], names: Sequence[str], repeated: bool = False
) -> tuple[Text, tuple[Text, ...]]:
    """The prompt and the completions, of one kind, with the prompt in none of the completions.

    Without a prompt it is what all completions begin with: the common messages or, where it is None, the common
    characters up to a word boundary. A string beside conversations that repeat it means all their common messages.

    The ``sides`` are the completions, an empty one of any kind; ``names`` the column of each, for errors. ``repeated``
    strings begin with their prompt, as `repeats` finds in most rows.
    """
    if len({type(side) for side in sides if side}) > 1:
        each = "both be" if len(set(names)) == 2 else "all be"
        raise ValueError(f"{_spell(names)} must {each} strings or {each} lists of {{role, content}}")
    if not isinstance(prompt, list) and all(isinstance(side, str) for side in sides):
        return _place_texts(prompt, [str(side) for side in sides], names, repeated)
    exact = isinstance(prompt, list) and bool(prompt)
    return _place_turns(_turns(prompt or "", "user"), [_turns(side, "assistant") for side in sides], names, exact)


def place_raw_dialogues(
    prompt: Text | None, sides: Sequence[str], names: Sequence[str]
) -> tuple[str, tuple[str, ...]] | None:
    """Raw hh-rlhf dialogues as prompt and answers, see `split_raw_dialogue`."""
    split = split_raw_dialogue(*sides)
    if split is None:
        return None
    if prompt and not _says(split[0], _turns(prompt, "user")):
        raise ValueError(f"'prompt' is not in {names[0]!r}, a whole dialogue: expected it there, or answers alone")
    return split[0], split[1:]


def is_asked(prompt: Text, completions: Sequence[Text]) -> bool:
    """Whether every completion follows something: a prompt, or turns of its own before the assistant's."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return any(turn["role"] == "user" for turn in prompt) or all(
        not side or begins_with_a_question(side) for side in completions
    )


def begins_with_a_question(text: Text) -> bool:
    """Whether a conversation's first turn after the system's is not the assistant's."""
    if isinstance(text, str):
        return False
    return next((turn["role"] for turn in text if turn["role"] not in _SYSTEM), "assistant") != "assistant"


def is_whole(text: Text, prompt: Text) -> bool:
    """Whether a completion holds its question: a conversation has it in front, a string all turns of the prompt."""
    return (
        begins_with_a_question(text) if isinstance(text, list) else bool(text) and _says(text, _turns(prompt, "user"))
    )


def repeats(prompt: str, text: str) -> int | None:
    """Length of the prompt at the beginning of a text, white space around it aside; None if it is not there."""
    if text.startswith(prompt):
        return len(prompt)
    inner, start = prompt.strip(), len(text) - len(text.lstrip())
    return start + len(inner) if text.startswith(inner, start) else None


def _place_texts(
    prompt: str | None, sides: Sequence[str], names: Sequence[str], repeated: bool
) -> tuple[str, tuple[str, ...]]:
    if prompt is None:
        start = common_characters(*sides)
        return sides[0][:start], tuple(side[start:] for side in sides)
    if not repeated or not prompt.strip():
        return prompt, tuple(sides)
    starts = [repeats(prompt, side) if side.strip() else 0 for side in sides]
    for start, name in zip(starts, names, strict=True):
        if start is None:
            message = "does not begin with its prompt, as the completions of most rows do"
            raise ValueError(f"{name!r} {message}: expected the prompt in front of all of them, or of none")
    first = next((side[:start] for side, start in zip(sides, starts, strict=True) if start), prompt)
    return first, tuple(side[start:] for side, start in zip(sides, starts, strict=True))


def _place_turns(
    prompt: Turns, sides: Sequence[Turns], names: Sequence[str], exact: bool
) -> tuple[Turns, tuple[Turns, ...]]:
    full = [side for side in sides if side]
    prompt = _without_answer(prompt, full)
    ends = [_end(prompt, side) for side in full]
    if full and None not in ends and _begin_alike(full, end := ends[0] or 0):
        length = end if exact else max(end, _common(full))
        return full[0][:length], tuple(side[length:] for side in sides)
    if prompt and len(full) > 1:
        _check_greetings(prompt, full, names)
    parts = [_apart(prompt, side, name) if side else (prompt, side) for side, name in zip(sides, names, strict=True)]
    longest = max((before for before, _ in parts), key=len, default=prompt)
    if not all(_agree(before, longest) or _agree(before, prompt) for before, _ in parts):
        raise ValueError(f"{_spell(names)} have different turns before the prompt: expected the same in each")
    return longest, tuple(rest for _, rest in parts)


def _begin_alike(sides: Sequence[Turns], end: int) -> bool:
    return all(_agree(side[:end], sides[0][:end]) for side in sides)


def _common(sides: Sequence[Turns]) -> int:
    """Number of common first turns of two conversations or more; each keeps at least one. Of one, none."""
    limit = min(map(len, sides)) - 1 if len(sides) > 1 else 0
    return next((i for i in range(limit) if not all(_alike(side[i], sides[0][i]) for side in sides)), limit)


def _check_greetings(prompt: Turns, sides: Sequence[Turns], names: Sequence[str]) -> None:
    """Refuse conversations that all begin with one and the same answer, and go on with their prompt."""
    end = _find(prompt, sides[0])
    if end and sides[0][0]["role"] == "assistant" != prompt[0]["role"] and _begin_alike(sides, end):
        raise ValueError(
            f"{_spell(names)} begin with an answer, and 'prompt' follows in them: expected it in front or not at all"
        )


def _without_answer(prompt: Turns, sides: Sequence[Turns]) -> Turns:
    """The prompt without a last turn that is already one of the answers."""
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt
    answered = any(_agree(prompt, side) or _alike(prompt[-1], side[0]) for side in sides)
    return prompt[:-1] if answered else prompt


def _end(prompt: Turns, side: Turns) -> int | None:
    """Where the prompt ends within a conversation; None if it is not in it, or comes after an answer to it."""
    if prompt and side[0]["role"] == "assistant" != prompt[0]["role"]:
        return None
    return _find(prompt, side)


def _find(prompt: Turns, side: Turns) -> int | None:
    starts = range(len(side) - len(prompt) + 1)
    return next((i + len(prompt) for i in starts if _agree(side[i : i + len(prompt)], prompt)), None)


def _apart(prompt: Turns, side: Turns, name: str) -> tuple[Turns, Turns]:
    """What comes before a completion, and the completion: with the prompt, its last turns or none of it in front."""
    if (end := _end(prompt, side)) is not None:
        return side[:end], side[end:]
    asked = (n for n in range(len(prompt) - 1, 0, -1) if prompt[-n]["role"] != "assistant")
    if shared := next((n for n in asked if _agree(prompt[-n:], side[:n])), 0):
        return prompt, side[shared:]
    systems = next((i for i, turn in enumerate(side) if turn["role"] not in _SYSTEM), len(side))
    system, rest = side[:systems], side[systems:]
    mine = [turn for turn in prompt if turn["role"] in _SYSTEM]
    new = [turn for turn in system if not any(_alike(turn, other) for other in mine)]
    if new and mine:
        raise ValueError(f"'prompt' and {name!r} have different system turns: expected one of them")
    if rest and rest[0]["role"] == prompt[-1]["role"] == "user":
        message = f"expected the prompt among the turns of {name!r}, or the answer alone"
        raise ValueError(f"'prompt' and the first user turn of {name!r} say different things: {message}")
    return [*new, *prompt], rest


def _agree(first: Turns, second: Turns) -> bool:
    return len(first) == len(second) and all(map(_alike, first, second))


def _alike(first: Message, second: Message) -> bool:
    """Whether two turns say the same, white space around it aside."""
    return all(_said(first, key) == _said(second, key) for key in ("role", *SPEECH))


def _said(turn: Message, key: str) -> object:
    value = turn.get(key) or ""
    return value.strip() if isinstance(value, str) else value


def _says(text: str, turns: Turns) -> bool:
    """Whether the text of all user turns is in a string."""
    return all(turn.get("content", "").strip() in text for turn in turns if turn["role"] == "user")


def _spell(names: Sequence[str]) -> str:
    return " and ".join(map(repr, dict.fromkeys(names)))


def _turns(text: Text, role: str) -> Turns:
    if isinstance(text, list):
        return text
    return [{"role": role, "content": text}] if text.strip() else []


# Raw dialogues, and what texts begin with


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
