"""What the first rows of a dataset say of all, and which columns are not read."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from typing import Any

from datasets import Dataset

from fastalign.data import formats, preference, prompts

logger = logging.getLogger(__name__)

_FIRST_ROWS = 1000  # enough to tell a habit from a coincidence
_RAW_ROWS = 8
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

    Dialogues are told by the completions of the first rows. Completions begin with their prompt where those of more
    than half the first rows do: an answer may repeat a short question by chance.
    """
    columns = rows.select_columns([name for name in _TEXTS[form] if name in rows.column_names])
    begin: Any = columns.select(range(min(_FIRST_ROWS, len(rows))))
    first = [*begin]  # as they are read: `to_list` gives what is on disk
    _report_written_out(first[:_RAW_ROWS])
    if form == "text":
        return False, False
    read = [_strings(row, form) for row in first]
    raw = form != "stepwise" and all(
        sides and all(map(preference.is_raw_dialogue, sides)) for _, sides in read[:_RAW_ROWS]
    )
    return raw, not raw and _are_repeated([(prompt, sides) for prompt, sides in read if prompt and sides])


def _report_written_out(first: list[dict[str, Any]]) -> None:
    """Tells of conversations that a file, a .csv for one, holds as text."""
    for name in first[0]:
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
    texts = set(_texts(rows, form))
    used = {"kind", _JUDGEMENTS.get(form), _PAIR_JUDGEMENTS.get(method), *texts}
    if any(_holds_turns(rows[0].get(name)) for name in texts):
        used |= {"tools", "chat_template_kwargs"}
    return [name for name in rows.column_names if name not in used]


def _holds_turns(value: Any) -> bool:
    return any(isinstance(item, dict | list) for item in (value if isinstance(value, list) else [value]))


def _texts(rows: Dataset, form: str) -> Iterator[str]:
    """The columns of texts and conversations that are read."""
    if form == "text":  # a later column is read where the earlier ones are null
        for name in (name for name in _TEXTS[form] if name in rows.column_names):
            yield name
            if not rows.data.column(name).null_count:
                return
        return
    yield from _TEXTS[form]
    _, sides = formats.completions(rows[0], form)
    if name := formats.prompt_column(rows[0], form, sides):
        yield name


def report_unread(rows: Dataset, form: str, method: str, named: Collection[str] = ()) -> None:
    """Names every column that decides nothing once, those that may belong to the prompt with what to do."""
    left = [name for name in unread(rows, form, method) if name not in named]
    if method == "reward" and "probability" in left:
        left.remove("probability")  # said by `feedback.check_columns`
    context = [name for name in left if name in formats.CONTEXT]
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
