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
    template = _template_arguments(row)
    if form == "text":
        return Example(None, (_whole(row),), template)
    if form == "prompt_completion":
        return Example(*_same_kind(_text(row, "prompt"), _text(row, "completion")), template)
    pair = preference.split_pair(row.get("prompt"), _text(row, "chosen"), _text(row, "rejected"), raw_dialogue)
    if pair is None:
        return None
    prompt, chosen, rejected = pair
    return Example(prompt, (chosen, rejected) if method == "dpo" else (chosen,), template)


def is_empty(text: Text) -> bool:
    """Whether there is nothing to learn from: only white space, or no message."""
    return not (text.strip() if isinstance(text, str) else text)


def _whole(row: dict[str, Any]) -> Text:
    if row.get("messages") is not None:
        return _text(row, "messages")
    return _from_sharegpt(row["conversations"]) if row.get("conversations") is not None else _text(row, "text")


def _from_sharegpt(turns: list[dict[str, str]]) -> Turns:
    if turns and "role" in turns[0]:
        return strip_none(turns)
    unknown = {turn["from"] for turn in turns} - set(SHAREGPT_ROLES)
    if unknown:
        raise ValueError(f"'conversations' has a turn from {min(unknown)!r}: expected one of {sorted(SHAREGPT_ROLES)}")
    return [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def _text(row: dict[str, Any], name: str) -> Text:
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return [strip_none(value)]
    if isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return strip_none(value)
    raise ValueError(f"column {name!r}: expected a string or a list of {{role, content}}, got {type(value).__name__}")


def _same_kind(prompt: Text, completion: Text) -> tuple[Text, tuple[Text]]:
    if prompt and completion and type(prompt) is not type(completion):
        raise ValueError("'prompt' and 'completion' must both be strings or both be lists of {role, content}")
    return prompt, (completion,)


def _template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    options = strip_none(row.get("chat_template_kwargs") or {})
    return {"tools": strip_none(tools), **options} if tools else options


def strip_none(value: Any) -> Any:
    """The value without the null fields that arrow adds to make all rows alike."""
    if isinstance(value, dict):
        return {key: strip_none(item) for key, item in value.items() if item is not None}
    return [strip_none(item) for item in value] if isinstance(value, list) else value


def _spell(formats: Iterable[str]) -> str:
    return " or ".join("+".join(sorted(need, reverse=True)) for name in formats for need in FORMATS[name])
