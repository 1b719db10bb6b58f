"""Which of the known shapes a row has, recognised from its columns, and its one normal form.

| format              | columns                                            | standard | conversational              |
|---------------------|----------------------------------------------------|----------|-----------------------------|
| `text`              | `text`, or `messages`, or ShareGPT `conversations` | a string | a list of `{role, content}` |
| `prompt_completion` | `prompt`, `completion`                             | strings  | lists of `{role, content}`  |
| `preference`        | `prompt` (optional), `chosen`, `rejected`          | strings  | lists of `{role, content}`  |
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastalign.data import preference

Message = dict[str, Any]
Turns = list[Message]
Text = str | Turns

FORMATS: dict[str, tuple[set[str], ...]] = {
    "prompt_completion": ({"prompt", "completion"},),
    "text": ({"messages"}, {"conversations"}, {"text"}),
    "preference": ({"chosen", "rejected"},),
}
"""The column sets that make a row of each format, in the order in which `auto` tries them."""

METHODS = {"sft": ("prompt_completion", "text", "preference"), "dpo": ("preference",)}
"""The formats a method trains on; sft takes the chosen side of a preference."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Example:
    """The normal form of a row: what is given, and the one or two completions to learn from.

    Attributes:
        prompt: a string, a list of messages, or None when the whole text or conversation is learnt from.
        completions: one for sft; chosen and rejected for a pair.
        template: arguments for the chat template: ``tools`` and the row's ``chat_template_kwargs``.
    """

    prompt: Text | None
    completions: tuple[Text, ...]
    template: dict[str, Any]


def recognise(columns: Iterable[str], method: str, wanted: str = "auto") -> str:
    """The format of a dataset with these columns, for this method.

    Args:
        columns: the dataset's column names.
        method: a key of `METHODS`.
        wanted: `auto`, or the format that the user asked for.

    Raises:
        ValueError: columns of images, an unknown method or format, or no accepted format in the columns.
    """
    present = set(columns)
    if images := present & {"image", "images"}:
        raise ValueError(f"column {min(images)!r}: images are not supported, remove the column to train on text alone")
    if method not in METHODS:
        raise ValueError(f"expected a method among {sorted(METHODS)}, got {method!r}")
    if wanted != "auto" and wanted not in METHODS[method]:
        raise ValueError(f"{method} trains on {' or '.join(METHODS[method])}, got data.format={wanted!r}")
    accepted = METHODS[method] if wanted == "auto" else (wanted,)
    for name in accepted:
        if any(need <= present for need in FORMATS[name]):
            return name
    raise ValueError(
        f"{method} expects the columns {_spell(accepted)}; found {sorted(present)}: rename with data.columns, "
        "e.g. {prompt: question, completion: answer}"
    )


def normalise(row: dict[str, Any], form: str, method: str, raw_dialogue: bool) -> Example | None:
    """The row's normal form; None when a raw dialogue's two sides do not share their prompt.

    Args:
        row: one row of a dataset of format ``form``.
        form: what `recognise` answered.
        method: `dpo` keeps both completions, `sft` the chosen one.
        raw_dialogue: whether the strings are whole hh-rlhf dialogues, see `preference.is_raw_dialogue`.

    Raises:
        ValueError: a value of the wrong type.
    """
    if form == "text":
        return _example(row, None, _whole(row))
    if form == "prompt_completion":
        return _example(row, *_same_kind(_text(row, "prompt"), _text(row, "completion")))
    given = None if row.get("prompt") is None else _text(row, "prompt")
    pair = preference.split_pair(given, _text(row, "chosen"), _text(row, "rejected"), raw_dialogue)
    if pair is None:
        return None
    prompt, chosen, rejected = pair
    return _example(row, prompt, chosen, rejected) if method == "dpo" else _example(row, prompt, chosen)


def is_empty(text: Text) -> bool:
    """Whether there is nothing to learn from: only white space, no message, or only empty assistant turns."""
    if isinstance(text, str):
        return not text.strip()
    return not any(map(_says_something, [turn for turn in text if turn["role"] == "assistant"] or text))


def _says_something(turn: Message) -> bool:
    values = [value for key, value in turn.items() if key not in ("role", "name")]
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _example(row: dict[str, Any], prompt: Text | None, *completions: Text) -> Example:
    """An example; only a conversation is rendered with the row's template arguments."""
    conversation = any(isinstance(text, list) for text in (prompt, *completions))
    return Example(prompt, completions, _template_arguments(row) if conversation else {})


def _whole(row: dict[str, Any]) -> Text:
    if row.get("messages") is not None:
        return _text(row, "messages")
    return _from_sharegpt(row["conversations"]) if row.get("conversations") is not None else _text(row, "text")


def _from_sharegpt(turns: Any) -> Turns:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"column 'conversations': expected a list of {{from, value}}, got {_kind(turns)}")
    return _messages(turns, "conversations") if turns and "role" in turns[0] else [_from_turn(turn) for turn in turns]


def _from_turn(turn: dict[str, Any]) -> Message:
    if missing := {"from", "value"} - set(turn):
        found = f"without {min(missing)!r}, with {sorted(turn)}"
        raise ValueError(f"'conversations' has a turn {found}: expected {{from, value}} or {{role, content}}")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise ValueError(f"'conversations' has a turn from {speaker!r}: expected one of {sorted(SHAREGPT_ROLES)}")
    if not isinstance(value, str | None):
        raise ValueError(f"'conversations' has a turn whose 'value' is {_kind(value)}: expected a string")
    return {"role": SHAREGPT_ROLES[speaker], "content": value or ""}


def _text(row: dict[str, Any], name: str) -> Text:
    value = row.get(name)
    if value is None:
        return ""
    return value if isinstance(value, str) else _messages([value] if isinstance(value, dict) else value, name)


def _messages(value: Any, name: str) -> Turns:
    if not isinstance(value, list) or not all(isinstance(turn, dict) and turn.get("role") for turn in value):
        raise ValueError(f"column {name!r}: expected a string or a list of {{role, content}}, got {_kind(value)}")
    return strip_none(value)


def _kind(value: Any) -> str:
    """The type of a value, and of what a list holds."""
    inner = {type(item).__name__ for item in value} if isinstance(value, list) else set()
    return type(value).__name__ + (f" of {' and '.join(sorted(inner))}" if inner else "")


def _same_kind(prompt: Text, completion: Text) -> tuple[Text, Text]:
    if prompt and completion and type(prompt) is not type(completion):
        raise ValueError("'prompt' and 'completion' must both be strings or both be lists of {role, content}")
    return prompt, completion


def _template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    options, tools = row.get("chat_template_kwargs") or {}, _tools(row.get("tools"))
    if not isinstance(options, dict):
        raise ValueError(f"column 'chat_template_kwargs': expected a mapping of names to values, got {_kind(options)}")
    return {"tools": tools, **strip_none(options)} if tools else strip_none(options)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a conversation, from a list or its JSON."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except json.JSONDecodeError as error:
        raise ValueError(f"column 'tools': expected a list of tools or its JSON, got a text ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"column 'tools': expected a list of tools or its JSON, got {_kind(tools)}")
    return strip_none(tools)


def strip_none(value: Any) -> Any:
    """The value without the null fields that arrow adds to make all rows alike."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    return [strip_none(item) for item in value] if isinstance(value, list) else value


def _spell(formats: Iterable[str]) -> str:
    return " or ".join("+".join(sorted(need, reverse=True)) for name in formats for need in FORMATS[name])
