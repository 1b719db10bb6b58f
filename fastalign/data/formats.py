"""Which of the known shapes a row has, recognised from its columns, and its one normal form.

| format              | columns                                            | standard | conversational              |
|---------------------|----------------------------------------------------|----------|-----------------------------|
| `text`              | `text`, or `messages`, or ShareGPT `conversations` | a string | a list of `{role, content}` |
| `prompt_completion` | `prompt`, `completion`                             | strings  | lists of `{role, content}`  |
| `preference`        | `prompt` (optional), `chosen`, `rejected`          | strings  | lists of `{role, content}`  |
| `unpaired`          | `prompt`, `completion`, `label`                    | strings  | lists of `{role, content}`  |
| `ranked`            | `prompt`, `completions`, `scores`                  | strings  | lists of `{role, content}`  |
| `stepwise`          | `prompt`, `completions`, `labels`                  | strings  | the prompt alone            |

For reward models a preference may say more: `margin` (a number, by how much chosen is better); for soft labels it must
say `probability` (that it is). A `label` is true or false, or 1 or 0. `completions` is a list: of candidates with a
score each, larger is better, or of the steps of one answer, each with a label.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastalign.data import feedback, preference

Message = dict[str, Any]
Turns = list[Message]
Text = str | Turns

FORMATS: dict[str, tuple[set[str], ...]] = {
    "prompt_completion": ({"prompt", "completion"},),
    "text": ({"messages"}, {"conversations"}, {"text"}),
    "preference": ({"chosen", "rejected"},),
    "unpaired": ({"prompt", "completion", "label"},),
    "ranked": ({"prompt", "completions", "scores"},),
    "stepwise": ({"prompt", "completions", "labels"},),
}
"""The column sets that make a row of each format."""


@dataclass(frozen=True)
class Reading:
    """How a method reads rows.

    Attributes:
        formats: those it trains on, in the order in which `auto` tries them.
        unit: what is dropped by itself: a whole `row`; a `candidate`, whose row stays while ``least`` others do; or a
            `completion`, each of which is an example.
        least: candidates without which a row teaches nothing.
        imitates: of a preference only the chosen side counts.
        own_rows: the last token of a sequence is scored, or of a step, by its own hidden state.
    """

    formats: tuple[str, ...]
    unit: Literal["row", "candidate", "completion"] = "row"
    least: int = 1
    imitates: bool = False
    own_rows: bool = False


METHODS = {
    "sft": Reading(("prompt_completion", "text", "preference"), imitates=True),
    "distill": Reading(("prompt_completion", "text", "preference"), imitates=True),
    "dpo": Reading(("preference",)),
    "reward": Reading(("preference",), own_rows=True),
    "reward:soft_label": Reading(("preference",), own_rows=True),
    "reward:k_wise": Reading(("ranked",), unit="candidate", least=2, own_rows=True),
    "reward:process": Reading(("stepwise",), own_rows=True),
    "kto": Reading(("unpaired", "preference"), unit="completion"),
    "rrhf": Reading(("ranked", "preference"), unit="candidate"),
}
"""The methods that train on rows; kto and rrhf read a preference as a good and a bad completion."""

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
    """The normal form of a row: what is given, and the completions to learn from.

    Attributes:
        prompt: a string, a list of messages, or None when the whole text or conversation is learnt from.
        completions: one for sft; chosen and rejected for a pair; the candidates; the steps of one answer.
        template: arguments for the chat template: ``tools`` and the row's ``chat_template_kwargs``.
        scores: what the row says of each completion, if anything.
    """

    prompt: Text | None
    completions: tuple[Text, ...]
    template: dict[str, Any]
    scores: tuple[float, ...] = ()


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
    known = METHODS[method].formats
    if wanted != "auto" and wanted not in known:
        raise ValueError(f"{said(method)} trains on {' or '.join(known)}, got data.format={wanted!r}")
    accepted = known if wanted == "auto" else (wanted,)
    for name in accepted:
        if any(need <= present for need in FORMATS[name]):
            return name
    raise ValueError(
        f"{said(method)} expects the columns {_spell(accepted)}; found {sorted(present)}: rename with data.columns, "
        "e.g. {prompt: question, completion: answer}"
    )


def said(method: str) -> str:
    """A method as it is asked for: ``reward:k_wise`` is ``reward --loss.name k_wise``."""
    return method.replace(":", " --loss.name ")


def normalise(row: dict[str, Any], form: str, method: str, raw_dialogue: bool) -> Example | None:
    """The row's normal form; None when a raw dialogue's two sides do not share their prompt.

    Args:
        row: one row of a dataset of format ``form``.
        form: what `recognise` answered.
        method: decides which completions of a preference count, and what its scores are.
        raw_dialogue: whether the strings are whole hh-rlhf dialogues, see `preference.is_raw_dialogue`.

    Raises:
        ValueError: a value of the wrong type, or lists that do not fit together.
    """
    return _preference(row, method, raw_dialogue) if form == "preference" else _NORMAL_FORMS[form](row)


def _preference(row: dict[str, Any], method: str, raw_dialogue: bool) -> Example | None:
    given = None if row.get("prompt") is None else _text(row, "prompt")
    pair = preference.split_pair(given, _text(row, "chosen"), _text(row, "rejected"), raw_dialogue)
    if pair is None:
        return None
    prompt, chosen, rejected = pair
    if METHODS[method].imitates:
        return _example(row, prompt, (chosen,))
    return _example(row, prompt, (chosen, rejected), feedback.of_pair(row, method))


def _prompt_completion(row: dict[str, Any]) -> Example:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    _check_kinds("completion", prompt, completion)
    return _example(row, prompt, (completion,))


def _unpaired(row: dict[str, Any]) -> Example:
    return replace(_prompt_completion(row), scores=(feedback.label(row.get("label")),))


def _ranked(row: dict[str, Any]) -> Example:
    candidates, scores = feedback.matched(row, "completions", "scores")
    prompt, texts = _text(row, "prompt"), tuple(_as_text(candidate, "completions") for candidate in candidates)
    _check_kinds("completions", prompt, *texts)
    return _example(row, prompt, texts, tuple(feedback.number(score, "scores") for score in scores))


def _stepwise(row: dict[str, Any]) -> Example:
    steps, labels = feedback.matched(row, "completions", "labels")
    if odd := {type(step).__name__ for step in steps} - {"str"}:
        raise ValueError(f"column 'completions': expected a list of steps, each a string, got {min(odd)}")
    return _example(row, _text(row, "prompt"), tuple(steps), tuple(feedback.label(value, "labels") for value in labels))


_NORMAL_FORMS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "text": lambda row: _example(row, None, (_whole(row),)),
    "prompt_completion": _prompt_completion,
    "unpaired": _unpaired,
    "ranked": _ranked,
    "stepwise": _stepwise,
}


def is_empty(text: Text) -> bool:
    """Whether there is nothing to learn from: only white space, no message, or only empty assistant turns."""
    if isinstance(text, str):
        return not text.strip()
    return not any(map(_says_something, [turn for turn in text if turn["role"] == "assistant"] or text))


def _says_something(turn: Message) -> bool:
    values = [value for key, value in turn.items() if key not in ("role", "name")]
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _example(
    row: dict[str, Any], prompt: Text | None, completions: tuple[Text, ...], scores: tuple[float, ...] = ()
) -> Example:
    """An example; only a conversation is rendered with the row's template arguments."""
    conversation = any(isinstance(text, list) for text in (prompt, *completions))
    return Example(prompt, completions, _template_arguments(row) if conversation else {}, scores)


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
    return _as_text(row.get(name), name)


def _as_text(value: Any, name: str) -> Text:
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


def _check_kinds(name: str, prompt: Text, *completions: Text) -> None:
    """Refuses strings beside lists; what is empty is neither."""
    if len({type(text) for text in (prompt, *completions) if text}) > 1:
        raise ValueError(f"'prompt' and {name!r} must all be strings or all be lists of {{role, content}}")


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
