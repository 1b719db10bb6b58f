"""Prompts to sample answers to, from any dataset: the tokens, and every other column for reward functions.

A text is continued as it is, messages are written by the chat template with its generation prompt. Completions that a
dataset has beside its prompts, such as a preference's, are columns like all others.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastalign.config import DataConfig
from fastalign.data import cache, chat, formats, messages
from fastalign.data.encode import Encoder, Lookup, Scores, Texts, Tokens, check_settings, spell_counts
from fastalign.data.examples import TokenDataset
from fastalign.data.files import PLACE

logger = logging.getLogger(__name__)

SAMPLED = ("prompts", "completions", "completion_ids")
"""What reward functions get under these names are the samples, never columns of the data."""
_ANSWERS = ("completion", "chosen", "rejected")


class PromptDataset(TokenDataset):
    """Prompts in tokens, each an example of one sequence with all tokens but the first scored.

    Attributes:
        rows: what the prompts were made of; ``table`` has no row for a prompt that was dropped.
        name: the column of the prompts.
        positions: ``[n]`` the row of each prompt.
        tokens: those of each prompt, on disk.
    """

    def __init__(self, table: Dataset, counts: dict[str, int], fingerprint: str, rows: Dataset, name: str) -> None:
        super().__init__(table, counts, fingerprint)
        self.rows, self.name = rows.with_format(None), name
        self.positions, self.tokens = self._column("example_id").to_numpy(), self._column("input_ids")

    def ids(self, index: int) -> np.ndarray:
        """``[P]`` int64 tokens of a prompt."""
        return self.tokens[index].values.to_numpy().astype(np.int64)

    def prompt(self, index: int) -> messages.Text:
        """A prompt as reward functions get it: the text, or the messages as ``{role, content}``."""
        return read_prompt(self._row(index), self.name)

    def columns(self, index: int) -> dict[str, Any]:
        """All other columns of a prompt's row, as they are in the data."""
        return {name: value for name, value in self._row(index).items() if name not in (self.name, PLACE, *SAMPLED)}

    def _row(self, index: int) -> dict[str, Any]:
        return dict(self.rows[int(self.positions[index])])


def encode_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, room: int, named: Sequence[str] = ()
) -> PromptDataset:
    """Tokenises the prompts of rows, once: the result is cached under a hash of rows, tokenizer, options and code.

    The prompt is column ``prompt``, or the only one of `formats.QUESTIONS`. It is dropped when it is empty, or leaves
    fewer than ``room`` tokens of ``data.max_length``.

    Args:
        rows: from `sources.load_rows`.
        room: tokens that a completion may have, ``sampler.max_new_tokens``.
        named: columns that were logged before; the same ones are not again.

    Returns:
        The prompts in the rows' order; ``counts`` says how many were kept and dropped, and why.

    Raises:
        ValueError: a ``max_length`` that leaves nothing for a prompt, no column of prompts or several, a value that is
            neither text nor messages (with its row), or no prompt left.
    """
    check_settings(data)
    if room >= data.max_length:
        got = f"got {data.max_length}, and sampler.max_new_tokens {room}: raise one or lower the other"
        raise ValueError(f"data.max_length: expected more than a completion may have, so that a prompt fits, {got}")
    plain = rows.select_columns([name for name in rows.column_names if name != PLACE])
    formats.recognise(plain.column_names, "prompt", data.format)
    name, template = prompt_column(plain.column_names), chat.read_template(data.chat_template)
    options = ("prompt", name, template, data.max_length, room)
    key = cache.key(cache.rows_content(plain), cache.tokenizer_content(tokenizer), options, cache.code_version())
    encoder = PromptEncoder(tokenizer, data, template, name, room)
    path, counts = cache.tokens(data.cache_dir, key, lambda file: encoder.run(rows, file, key))
    logger.info("prompts: %s (%s)", spell_counts(counts), encoder.limits)
    dataset = PromptDataset(Dataset.from_file(str(path)), counts, key, rows, name)
    if [*named] != rows.column_names:
        report_columns(dataset, tokenizer)
    return dataset


def prompt_column(columns: list[str]) -> str:
    """The column that holds the prompts."""
    asked = ["prompt"] if "prompt" in columns else [name for name in formats.QUESTIONS if name in columns]
    if len(asked) > 1:
        remedy = f"name the one that is with data.columns, e.g. {{prompt: {asked[0]}}}"
        raise ValueError(f"several columns may be the prompt: {', '.join(asked)}: {remedy}, or join them")
    return asked[0]


def read_prompt(row: dict[str, Any], name: str) -> messages.Text:
    """A row's prompt, checked; messages without what they say of training."""
    prompt = messages.read(row.get(name), name)
    if isinstance(prompt, str):
        return prompt
    if prompt and prompt[-1]["role"] == "assistant":
        raise ValueError(f"{name!r} ends with a turn of the assistant, whose answer is to be sampled: remove that turn")
    return messages.bare(prompt)


class PromptEncoder(Encoder):
    """Turns batches of rows into the tokens of their prompts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, template: str | None, name: str, room: int
    ) -> None:
        super().__init__(tokenizer, data, "prompt", "prompt", template, raw_dialogue=False)
        self.name, self.longest = name, data.max_length - room
        self.limits = f"at most {self.longest} tokens: max_length {data.max_length} less {room} for the completion"

    def render(self, row: dict[str, Any]) -> tuple[Texts, Scores] | None:
        """The prompt as text, or None when there is none."""
        prompt = read_prompt(row, self.name)
        if messages.is_empty(prompt):
            return self.drop("empty_prompt")
        if isinstance(prompt, str):
            return [chat.Rendered(prompt, (), standard=True)], ()
        written = chat.Chat(self.tokenizer, self.template, formats.template_arguments(row)).before(prompt)
        return [chat.Rendered(written, (), standard=False)], ()

    def examples(self, texts: Texts, scores: Scores, lookup: Lookup) -> list[tuple[list[Tokens], Scores]]:
        """The prompt in tokens; none when it is dropped."""
        ids = [token for text in texts for key in text.to_tokenise() for token in lookup[key]]
        if not ids or len(ids) > self.longest:
            self.drop("prompt_too_long" if ids else "empty_prompt")
            return []
        return [([(ids, np.arange(len(ids)) > 0)], scores)]


def report_columns(dataset: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which columns are the prompt, which reward functions get, and which are not what they may seem."""
    others = [name for name in dataset.rows.column_names if name not in (dataset.name, PLACE)]
    passed = [name for name in others if name not in ("completion", *SAMPLED)]
    logger.info(
        "prompts are column %r; reward functions get the columns: %s", dataset.name, ", ".join(passed) or "none"
    )
    if answers := [name for name in others if name in (*_ANSWERS, *SAMPLED)]:
        logger.info("completions are sampled, those of the data are not trained on: %s", ", ".join(answers))
    if context := [name for name in passed if name in formats.CONTEXT]:
        what = "columns that may belong to the prompt are not read: %s: join them to the prompt"
        logger.warning(what, ", ".join(context))
    if tokenizer.chat_template and isinstance(dataset.prompt(0), str):
        logger.info("prompts are texts, continued as they are: the chat template is for lists of messages")
