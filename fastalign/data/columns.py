"""What the first rows of a dataset say of all, and which columns are not read."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from datasets import Dataset

from fastalign.data import formats, prompts

logger = logging.getLogger(__name__)

_FIRST_ROWS = 1000  # enough to tell a habit from a coincidence
_RAW_ROWS = 8
_HABIT_ROWS = 100  # read whole, with the columns that are not used
_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")  # JSON or Python's repr

_TEXTS = {
    "prompt_completion": ("completion", "prompt"),
    "text": ("messages", "conversations", "text"),
    "preference": ("chosen", "rejected", "prompt"),
    "unpaired": ("completion", "prompt"),
    "ranked": ("completions", "prompt"),
    "stepwise": ("completions", "prompt"),
}
"""The columns of texts and conversations, by format."""
_ANSWERS = ("completion", "completions", "chosen", "rejected")
_JUDGEMENTS = {"unpaired": "label", "ranked": "scores", "stepwise": "labels"}
_PAIR_JUDGEMENTS = {"reward": "margin", "reward:soft_label": "probability"}


def layout(rows: Dataset, form: str) -> tuple[bool, bool]:
    """How strings are to be read: as whole hh-rlhf dialogues, and as beginning with their prompt.

    Dialogues are recognised by the completions of the first rows. Completions begin with their prompt where more than
    half of the first rows' do: an answer may repeat a short question by chance.
    """
    columns = rows.select_columns([name for name in _TEXTS[form] if name in rows.column_names])
    begin: Any = columns.select(range(min(_FIRST_ROWS, len(rows))))
    first = [*begin]  # as they are read: `to_list` gives what is on disk
    if form == "text":
        return False, False
    read = [_strings(row, form) for row in first]
    raw = form != "stepwise" and all(
        sides and all(map(prompts.is_raw_dialogue, sides)) for _, sides in read[:_RAW_ROWS]
    )
    return raw, not raw and _are_repeated([(prompt, sides) for prompt, sides in read if prompt and sides])


def report_null(rows: Dataset, form: str, method: str, counts: Mapping[str, int]) -> None:
    """Warn of rows whose answers are null, as when files of two shapes are read together, with what such a row has."""
    if not (number := counts.get("dropped_null_completion", 0)):
        return
    answers = formats.answers(rows.column_names, form, method)
    first = next(i for i, row in enumerate(rows.select_columns(answers)) if formats.is_null(dict(row), form, method))
    filled = [name for name in unread(rows, form, method) if rows[first][name] is not None]
    other = f"; one has {', '.join(map(repr, filled))}: rename the column in its file" if filled else ""
    logger.warning("%d examples are dropped, %s is null%s", number, " or ".join(map(repr, answers)), other)


def _report_written_out(rows: Dataset, form: str) -> None:
    """Warn of conversations that a file, such as a .csv, holds as text."""
    first = [rows[i] for i in range(min(_RAW_ROWS, len(rows)))]
    for name in (name for name in _TEXTS[form] if name in rows.column_names):
        if all(isinstance(row[name], str) and _WRITTEN_OUT.match(row[name]) for row in first):
            message = (
                "is trained as text, but looks like conversations written out: load it as lists of {role, content}"
            )
            logger.warning("column %r %s", name, message)


def _are_repeated(read: list[tuple[str, list[str]]]) -> bool:
    """Whether most completions begin with their prompt and go on; says so, and where only some do."""
    found = sum(any(map(goes_on, [prompt] * len(sides), sides)) for prompt, sides in read)
    if not found:
        return False
    repeated = found > len(read) / 2
    habit = "the prompt is read once" if repeated else "they are answers that begin alike, the prompt is kept in them"
    logger.warning("completions begin with their prompt in %d of the first %d rows: %s", found, len(read), habit)
    return repeated


def goes_on(prompt: str, text: str) -> bool:
    """Whether a text begins with its prompt and says more."""
    end = prompts.repeats(prompt, text)
    return end is not None and bool(text[end:].strip())


def _strings(row: dict[str, Any], form: str) -> tuple[str, list[str]]:
    """A row's prompt, if it is a string, and those of its completions that are; of steps the first."""
    sides = row.get("completions") if "completions" in row else [row.get(name) for name in _TEXTS[form][:-1]]
    texts = [side for side in sides if isinstance(side, str)] if isinstance(sides, list) else []
    prompt = row.get("prompt")
    prompt = prompt if isinstance(prompt, str) and prompt.strip() else ""
    return prompt, texts[:1] if form == "stepwise" else texts


def unread(rows: Dataset, form: str, method: str) -> list[str]:
    """The columns that decide nothing."""
    begin = (rows[i] for i in range(min(_HABIT_ROWS, len(rows))))
    first = [row for row in begin if not formats.is_null(row, form, method)] or [{}]  # others were not checked
    texts = {name for row in first for name in _texts(rows, form, row)}
    used = {"kind", _JUDGEMENTS.get(form), _PAIR_JUDGEMENTS.get(method), *texts}
    if any(_holds_turns(row.get(name)) for row in first for name in texts):
        used |= {"tools", "chat_template_kwargs"}
    return [name for name in rows.column_names if name not in used]


def _holds_turns(value: Any) -> bool:
    return any(isinstance(item, dict | list) for item in (value if isinstance(value, list) else [value]))


def _texts(rows: Dataset, form: str, row: dict[str, Any]) -> Iterator[str]:
    """The columns of texts and conversations that are read in a row."""
    if form == "text":  # a later column is read where the earlier ones are null
        for name in (name for name in _TEXTS[form] if name in rows.column_names):
            yield name
            if not rows.data.column(name).null_count:
                return
        return
    yield from _TEXTS[form]
    _, sides = formats.completions(row, form)
    if name := formats.prompt_column(row, form, sides):
        yield name


def _is_repeated(rows: Dataset, form: str, name: str) -> bool:
    """Whether a column of turns says nothing but what the prompt and the answers of its row say."""
    if name not in ("messages", "conversations") or "prompt" not in rows.column_names:
        return False
    first = [rows[i] for i in range(min(_RAW_ROWS, len(rows)))]
    return all(_contents(row[name]) <= _contents([row[text] for text in _TEXTS[form] if text in row]) for row in first)


def _contents(value: Any) -> set[str]:
    """The texts of a column, or of its turns."""
    if isinstance(value, dict):
        value = [value.get(key) for key in ("content", "value", "text")]
    if isinstance(value, list):
        return {text for item in value for text in _contents(item)}
    return set() if value is None else {str(value).strip()}


def report_unread(rows: Dataset, form: str, method: str, named: Collection[str] = ()) -> None:
    """Names every column that decides nothing once, those that may belong to the prompt with what to do."""
    _report_written_out(rows, form)
    left = [name for name in unread(rows, form, method) if name not in named]
    if method == "reward" and "probability" in left:
        left.remove("probability")  # said by `feedback.check_columns`
    context = [name for name in left if name in formats.CONTEXT and not _is_repeated(rows, form, name)]
    answers = [name for name in left if form == "text" and name in _ANSWERS]
    if context:
        logger.warning(
            "columns that may belong to the prompt are not read: %s: join them to the prompt, or name its column with "
            "data.columns, e.g. {prompt: question}",
            ", ".join(context),
        )
    if answers:
        logger.warning(
            "columns of answers are not read: %s: %s trains on whole texts here, set data.format to train on them",
            ", ".join(answers),
            formats.said(method),
        )
    if others := [name for name in left if name not in context + answers]:
        logger.info("columns not read: %s", ", ".join(others))
