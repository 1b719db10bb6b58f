"""Which of the known shapes a row has, recognised from its columns, and its one normal form.

| format              | columns                                            | standard | conversational  |
|---------------------|----------------------------------------------------|----------|-----------------|
| `text`              | `text`, or `messages`, or ShareGPT `conversations` | a string | a list of turns |
| `prompt_completion` | `prompt`, `completion`                             | strings  | lists of turns  |
| `preference`        | `prompt` (optional), `chosen`, `rejected`          | strings  | lists of turns  |
| `unpaired`          | `prompt`, `completion`, `label`                    | strings  | lists of turns  |
| `ranked`            | `prompt`, `completions`, `scores`                  | strings  | lists of turns  |
| `stepwise`          | `prompt`, `completions`, `labels`                  | strings  | the prompt alone |
| `prompt`            | `prompt`, or one of `QUESTIONS`                    | a string | a list of turns  |

A turn is `{role, content}` or ShareGPT's `{from, value}`, see `messages`; one turn is read as a list of it. A string
prompt beside conversations is a user's turn, a string completion beside a prompt of turns an assistant's. Where the
completions repeat the prompt it is read once, see `prompts`. `messages` or `conversations` beside `chosen` and
`rejected` that are answers alone are their prompt.

For reward models a preference may say more: `margin` (a number, by how much chosen is better); for soft labels it must
say `probability` (that it is). A `label` is true or false, or 1 or 0. `completions` is a list: of candidates with a
score each, larger is better, or of the steps of one answer, each with a label. Of a `prompt`, for which completions are
sampled, all other columns are for reward functions, see `prompt_dataset`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastalign.data import feedback, prompts
from fastalign.data.messages import Text, is_empty, read, read_turns, strip_none
from fastalign.words import kind_of

__all__ = [
    "CONTEXT",
    "FORMATS",
    "QUESTIONS",
    "ROWS",
    "Example",
    "Reading",
    "is_empty",
    "normalise",
    "recognise",
    "said",
]

QUESTIONS = ("question", "problem", "instruction", "query", "input", "context_messages")
"""What datasets of prompts alone call their column; read where there is no `prompt` and only one of them."""
FORMATS: dict[str, tuple[set[str], ...]] = {
    "prompt_completion": ({"prompt", "completion"},),
    "text": ({"messages"}, {"conversations"}, {"text"}),
    "preference": ({"chosen", "rejected"},),
    "unpaired": ({"prompt", "completion", "label"},),
    "ranked": ({"prompt", "completions", "scores"},),
    "stepwise": ({"prompt", "completions", "labels"},),
    "prompt": ({"prompt"}, *({name} for name in QUESTIONS)),
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
        says: the column of a batch that the rows' judgements fill.
    """

    formats: tuple[str, ...]
    unit: Literal["row", "candidate", "completion"] = "row"
    least: int = 1
    imitates: bool = False
    own_rows: bool = False
    says: str = "scores"


ROWS = {
    "sft": Reading(("prompt_completion", "text", "preference"), imitates=True),
    "distill": Reading(("prompt_completion", "text", "preference"), imitates=True),
    "dpo": Reading(("preference",)),
    "reward": Reading(("preference",), own_rows=True),
    "reward:soft_label": Reading(("preference",), own_rows=True),
    "reward:k_wise": Reading(("ranked",), unit="candidate", least=2, own_rows=True),
    "reward:process": Reading(("stepwise",), own_rows=True, says="step_labels"),
    "kto": Reading(("unpaired", "preference"), unit="completion"),
    "rrhf": Reading(("ranked", "preference"), unit="candidate"),
    "prompt": Reading(("prompt",)),
    "select": Reading(("prompt_completion", "text", "preference", "prompt"), imitates=True),
}
"""Kinds of rows, by method, or by method and loss; kto and rrhf read a preference as a good and a bad completion. All
on-policy methods read ``prompt``; ``select`` is for `fastalign select`, which reads texts alone."""

CONTEXT = ("question", "instruction", "query", "input", "messages", "conversations", "system", "context", "history")
"""Columns that hold what the completions answer, or a part of it, unless the data repeat it elsewhere."""
_QUESTIONS = CONTEXT[:4]  # which whole texts repeat word for word


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

    def is_asked(self) -> bool:
        """Whether the completions follow a prompt, or are learnt from as a whole."""
        return self.prompt is None or prompts.is_asked(self.prompt, self.completions)


def recognise(columns: Iterable[str], method: str, wanted: str = "auto") -> str:
    """The format of a dataset with these columns, for this method."""
    present = set(columns)
    if images := present & {"image", "images"}:
        raise ValueError(f"column {min(images)!r}: images are not supported, remove the column to train on text alone")
    if method not in ROWS:
        raise ValueError(f"expected a method among {sorted(ROWS)}, got {method!r}")
    known = ROWS[method].formats
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
    return "an on-policy method" if method == "prompt" else method.replace(":", " --loss.name ")


def normalise(
    row: dict[str, Any], form: str, method: str, raw_dialogue: bool, repeated: bool = False
) -> Example | None:
    """The row's normal form; None when raw dialogues do not share their prompt.

    The completions of a ``raw_dialogue`` are whole hh-rlhf dialogues, ``repeated`` ones begin with their prompt: see
    `columns.layout`.
    """
    if form == "text":
        whole = _whole(row)
        _check_answered(row, whole)
        return _example(row, None, (whole,))
    if form == "stepwise":
        return _stepwise(row, repeated)
    names, sides = completions(row, form)
    if raw_dialogue and all(isinstance(side, str) for side in sides):
        placed = prompts.place_raw_dialogues(read(row.get("prompt"), "prompt"), [str(side) for side in sides], names)
    else:
        placed = _placed(row, form, names, sides, repeated)
    if placed is None:
        return None
    prompt, sides = placed
    if form == "preference" and ROWS[method].imitates:
        return _example(row, prompt, sides[:1])
    return _example(row, prompt, sides, _scores(row, form, method))


def is_null(row: dict[str, Any], form: str, method: str) -> bool:
    """Whether the columns of a row's answers are null, all or, where a whole row is dropped, one that is trained on."""
    nulls = [row.get(name) is None for name in answers(row, form, method)]
    return any(nulls) if ROWS[method].unit == "row" and form != "text" else all(nulls)


def answers(columns: Iterable[str], form: str, method: str) -> list[str]:
    """The columns that hold what a method learns from."""
    names = {"preference": ["chosen"] if ROWS[method].imitates else ["chosen", "rejected"]}
    names |= {"text": [name for name in ("messages", "conversations", "text") if name in columns]}
    return names.get(form, ["completions"] if form in ("ranked", "stepwise") else ["completion"])


def completions(row: dict[str, Any], form: str) -> tuple[tuple[str, ...], tuple[Text, ...]]:
    """The columns of a row's completions, one name for each, and the completions as they are written."""
    if form in ("ranked", "stepwise"):
        listed = feedback.listed(row, "completions")
        return ("completions",) * len(listed), tuple(read(candidate, "completions") for candidate in listed)
    names = ("chosen", "rejected") if form == "preference" else ("completion",)
    return names, tuple(read(row.get(name), name) for name in names)


def prompt_column(row: dict[str, Any], form: str, sides: Sequence[Text]) -> str | None:
    """The column with the row's prompt; `messages` or `conversations` are one beside a pair of answers alone."""
    if form != "preference" or row.get("prompt") is not None:
        return "prompt"
    name = next((name for name in ("messages", "conversations") if row.get(name)), None)
    if name is None or any(prompts.is_whole(side, read(row[name], name)) for side in sides):
        return None
    return name


def _placed(
    row: dict[str, Any], form: str, names: Sequence[str], sides: tuple[Text, ...], repeated: bool
) -> tuple[Text, tuple[Text, ...]]:
    """The prompt and the completions, apart; of a pair without a prompt it is what both sides begin with."""
    column = prompt_column(row, form, sides)
    given = None if column is None else read(row.get(column), column)
    prompt, sides = prompts.place(given, sides, names, repeated)
    if form == "preference" and not given:
        _check_asked(row, prompt, sides)
    return prompt, sides


def _check_answered(row: dict[str, Any], whole: Text) -> None:
    """Refuse a conversation without an answer, where the answer is in a column that is not read."""
    if not isinstance(whole, list) or any(turn["role"] == "assistant" for turn in whole):
        return
    name = next((name for name in ("messages", "conversations") if row.get(name) is not None), "messages")
    if row.get("chosen") and row.get("rejected"):
        raise ValueError(f"{name!r} ends before the answer: set data.format=preference to learn from 'chosen'")
    if row.get("completion"):
        remedy = f"name the prompt with data.columns, {{prompt: {name}}}, to learn from 'completion'"
        raise ValueError(f"{name!r} ends before the answer: {remedy}")


def _check_asked(row: dict[str, Any], prompt: Text, sides: Sequence[Text]) -> None:
    """Refuse a pair whose question is in a column that is not read: its answers would be trained without it."""
    left = {name: row[name] for name in CONTEXT if row.get(name)}
    if isinstance(prompt, str) and prompt.strip():
        asked = {name: text for name, text in left.items() if name in _QUESTIONS and isinstance(text, str)}
        left = {name: text for name, text in asked.items() if text.strip() not in prompt}
    elif prompts.is_asked(prompt, sides):
        return
    if left:
        message = "there is no prompt: the answers would be trained without their question; not read:"
        remedy = f"rename with data.columns, e.g. {{prompt: {next(iter(left))}}}"
        raise ValueError(f"{message} {', '.join(map(repr, left))}: {remedy}")


def _scores(row: dict[str, Any], form: str, method: str) -> tuple[float, ...]:
    """What the row says of each completion."""
    if form == "preference":
        return feedback.PAIR_SCORES[method](row) if method in feedback.PAIR_SCORES else ()
    if form == "ranked":
        return tuple(feedback.number(score, "scores") for score in feedback.matched(row, "completions", "scores")[1])
    return (feedback.label(row.get("label")),) if form == "unpaired" else ()


def _stepwise(row: dict[str, Any], repeated: bool) -> Example:
    steps, labels = feedback.matched(row, "completions", "labels")
    if odd := {kind_of(step) for step in steps if not isinstance(step, str)}:
        raise ValueError(f"column 'completions': expected a list of steps, each a string, got {min(odd)}")
    prompt = read(row.get("prompt"), "prompt")
    if isinstance(prompt, str):
        prompt, first = prompts.place(prompt, steps[:1], ("completions",), repeated)
        steps = [*first, *steps[1:]]
    return _example(row, prompt, tuple(steps), tuple(feedback.label(value, "labels") for value in labels))


def _example(
    row: dict[str, Any], prompt: Text | None, completions: tuple[Text, ...], scores: tuple[float, ...] = ()
) -> Example:
    """An example; conversations are rendered with the row's template arguments."""
    conversation = any(isinstance(text, list) for text in (prompt, *completions))
    return Example(prompt, completions, template_arguments(row) if conversation else {}, scores)


def _whole(row: dict[str, Any]) -> Text:
    for name, expected in (("messages", "{role, content}"), ("conversations", "{from, value}")):
        if row.get(name) is not None:
            value = row[name]
            return read_turns([value] if isinstance(value, dict) else value, name, f"a list of {expected}")
    return read(row.get("text"), "text")


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """What a row gives its chat template: tools, and the arguments in ``chat_template_kwargs``."""
    options, tools = row.get("chat_template_kwargs") or {}, _tools(row.get("tools"))
    if not isinstance(options, dict):
        raise ValueError(f"column 'chat_template_kwargs': expected a mapping, got {kind_of(options)}")
    if tools and options.get("tools"):
        raise ValueError("the columns 'tools' and 'chat_template_kwargs' both give tools: expected them in one")
    return {**strip_none(options), "tools": tools} if tools else strip_none(options)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a conversation, from a list or its JSON."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except json.JSONDecodeError as error:
        raise ValueError(f"column 'tools': expected a list of tools or its JSON, got a text ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"column 'tools': expected a list of tools or its JSON, got {kind_of(tools)}")
    return strip_none(tools)


def _spell(formats: Iterable[str]) -> str:
    return " or ".join("+".join(sorted(need, reverse=True)) for name in formats for need in FORMATS[name])
