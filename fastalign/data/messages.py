"""Texts and conversations as rows give them: checked, and every turn as ``{role, content}``.

Turns may be written ``{role, content}`` or, as in ShareGPT data, ``{from, value}``; the content may be a list of text
parts. A turn with ``weight: 0``, ``train: false`` or ``training: false`` is read but not learnt from.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastalign.words import kind_of, shown

Message = dict[str, Any]
Turns = list[Message]
Text = str | Turns

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}

FLAGS = ("weight", "train", "training")
"""Keys of a turn that say whether it is learnt from: 0 or false says no, in any of them. No template sees them."""

SPEECH = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a turn that hold what it says."""

_OTHER_TEXTS = ("value", "text", "message", "parts")  # where other notations keep it

_UNTRAINED = {"train": False}  # how a turn that is not learnt from is kept


def read(value: Any, name: str) -> Text:
    """A column's string, or its conversation; one message is a conversation, null is an empty string."""
    if value is None:
        return ""
    return value if isinstance(value, str) else read_turns([value] if isinstance(value, dict) else value, name)


def read_turns(value: Any, name: str, expected: str = "a string or a list of {role, content}") -> Turns:
    """A column's conversation."""
    turns = value if isinstance(value, list) else [None]
    if not all(isinstance(turn, dict) and (turn.get("role") or {"from", "value"} & turn.keys()) for turn in turns):
        remedy = "" if isinstance(value, list | str) else ": put it in quotes, or map another column with data.columns"
        raise ValueError(f"column {name!r}: expected {expected}, got {kind_of(value)}{remedy}")
    turns = [_read_turn(strip_none(turn if turn.get("role") else _from_sharegpt(turn, name)), name) for turn in value]
    for i, turn in enumerate(turns):
        if not any(key in turn for key in SPEECH) and not _is_unanswered(turns, i, value[i]):
            _refuse_silence(value[i], name)
    return turns


def _is_unanswered(turns: Turns, index: int, written: dict[str, Any]) -> bool:
    """Whether a turn is the one answer of its conversation, and written as null: it is dropped and counted."""
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    null = {"content", "value"} & set(written) and not any(written.get(key) for key in _OTHER_TEXTS)
    return answers == [index] == [len(turns) - 1] and bool(null)


def _refuse_silence(written: dict[str, Any], name: str) -> None:
    speaker = written.get("role") or written.get("from")
    keys = sorted(key for key, value in written.items() if value is not None)
    found = f"a turn of {speaker!r} that says nothing, with {keys}"
    raise ValueError(f"{name!r} has {found}: expected {{role, content}}, or tool_calls in place of the content")


def is_trained(turn: Message) -> bool:
    """Whether a turn is learnt from: the assistant's, unless its flags say no."""
    return turn["role"] == "assistant" and turn.get("train", True)


def bare(turns: Iterable[Message]) -> Turns:
    """The turns as a template sees them, without their flags."""
    return [{key: value for key, value in turn.items() if key not in FLAGS} for turn in turns]


def is_empty(text: Text) -> bool:
    """Whether there is nothing to learn from: only white space, no message, or only empty assistant turns."""
    if isinstance(text, str):
        return not text.strip()
    spoken = [turn for turn in text if is_trained(turn)] or [turn for turn in text if turn["role"] == "assistant"]
    return not any(map(_says_something, spoken or text))


def why_nothing(completion: Text) -> str | None:
    """Why a completion is dropped, as the counts name it; None when there is something to learn from."""
    if is_empty(completion):
        return "empty_completion"
    if isinstance(completion, str):
        return None
    if not (roles := {turn["role"] for turn in completion}) & {"assistant"}:
        message = "a conversation without a scored token: expected an assistant turn to learn from"
        raise ValueError(f"{message}, got turns of {sorted(roles)}")
    return None if any(map(is_trained, completion)) else "no_turn_to_train"


def strip_none(value: Any) -> Any:
    """The value without the null fields that arrow adds to make all rows alike."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    return [strip_none(item) for item in value] if isinstance(value, list) else value


def _read_turn(turn: dict[str, Any], name: str) -> Message:
    if not isinstance(turn["role"], str):
        raise ValueError(f"{name!r} has a turn whose role is {kind_of(turn['role'])}: expected a string")
    flags = [_flag(turn[key], key, name) for key in FLAGS if key in turn]
    content = {"content": _content(turn["content"], name)} if "content" in turn else {}
    return {**bare([turn])[0], **content, **({} if all(flags) else _UNTRAINED)}


def _from_sharegpt(turn: dict[str, Any], name: str) -> Message:
    if missing := {"from", "value"} - set(turn):
        found = f"without {min(missing)!r}, with {sorted(turn)}"
        raise ValueError(f"{name!r} has a turn {found}: expected {{from, value}} or {{role, content}}")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{name!r} has a turn from {speaker!r}: expected one of {sorted(SHAREGPT_ROLES)}")
    if not isinstance(value, str | list | None):
        raise ValueError(f"{name!r} has a turn whose 'value' is {kind_of(value)}: expected a string")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value", "role", "content")}
    return {"role": SHAREGPT_ROLES[speaker], "content": value, **rest}


def _content(content: Any, name: str) -> str:
    """A turn's content as one string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(
            f"{name!r} has a turn whose content is {kind_of(content)}: expected a string or a list of text parts"
        )
    return "".join(_part(part, name) for part in content)


def _part(part: dict[str, Any], name: str) -> str:
    if part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    found = f"of type {part['type']!r}" if part.get("type", "text") != "text" else f"with {sorted(part)}"
    raise ValueError(
        f"{name!r} has a content part {found}: expected {{type: text, text: ...}} alone, remove the row or the part"
    )


def _flag(value: Any, key: str, name: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise ValueError(
        f"{name!r} has a turn with {key} {shown(value)}: expected true or false, or 1 or 0: a turn is learnt or not"
    )


def _says_something(turn: Message) -> bool:
    values = [turn.get(key) for key in SPEECH]
    return any(value.strip() if isinstance(value, str) else value for value in values)
