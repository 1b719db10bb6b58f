"""Rows to tokens: rendered, tokenised in batches, cut to length, and kept on disk by content."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from fastalign.config import DataConfig
from fastalign.data import cache, chat, columns, feedback, formats, messages, spread
from fastalign.data.examples import TokenDataset
from fastalign.data.files import PLACE

logger = logging.getLogger(__name__)

Tokens = tuple[list[int], np.ndarray]
"""A sequence: ids, and a bool per token that says whether it is scored."""
Scores = tuple[float, ...]
"""What the row says of each sequence of an example, of each step of an answer, or nothing."""
Texts = list[chat.Rendered | chat.Marked | chat.Steps]
Lookup = dict[tuple[str, bool], list[int]]

FEATURES = Features(
    {
        "input_ids": ListOf(Value("int32")),
        "scored": ListOf(Value("uint8")),
        "lengths": ListOf(Value("int32")),
        "scores": ListOf(Value("float32")),
        "example_id": Value("int64"),
        "kind": Value("string"),
    }
)

_NOT_TRAINED = "all their assistant turns have weight 0, train false or training false"

_LINE_SECONDS = 10.0  # between lines of progress
_BATCH_ROWS = 1000  # enough to keep a fast tokenizer's threads busy, little enough for memory


def encode_dataset(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, method: str, named: Collection[str] = ()
) -> TokenDataset:
    """Tokenises rows for a method, once: the result is cached under a hash of rows, tokenizer, options and code.

    Scored tokens are the completion's, its EOS included; for `text` all but the first; of conversations, in `messages`
    as in completions, the assistant turns', but for those with ``weight: 0``, ``train: false`` or ``training: false``.
    A reward model scores the last token of each sequence alone, a process reward model that of each step.

    A sequence longer than ``data.max_length`` loses the end of its completion or is dropped (``data.truncation``), with
    the labels of the steps that ended there; a row is dropped when its prompt fills ``max_length`` or a completion is
    empty. Of ranked rows only the candidate is, as long as another is left (two for "reward:k_wise"), and kto's
    completions are examples of their own, a preference two.

    Args:
        rows: from `sources.load_rows`.
        method: a key of `formats.ROWS`.
        named: columns that another dataset has, whose unread ones were logged.

    Returns:
        The examples in the rows' order; ``counts`` says how many were kept, cut and dropped, and why.

    Raises:
        ValueError: a ``max_length`` below 2, columns that do not fit the method, a value of the wrong type (with its
            row), a conversation without a scored token, or no row left.
    """
    check_settings(data)
    plain = rows.select_columns([name for name in rows.column_names if name != PLACE])
    form = formats.recognise(plain.column_names, method, data.format)
    feedback.check_columns(plain.column_names, method)
    template = chat.read_template(data.chat_template)
    options = (form, method, template, data.max_length, data.truncation, data.step_separator)
    key = cache.key(cache.rows_content(plain), cache.tokenizer_content(tokenizer), options, cache.code_version())
    encoder = Encoder(tokenizer, data, form, method, template, *columns.layout(plain, form))
    path, counts = cache.tokens(data.cache_dir, key, lambda file: encoder.run(rows, file, key))
    columns.report_unread(plain, form, method, named)
    columns.report_null(plain, form, method, counts)
    _report(counts, encoder.limits)
    reading = formats.ROWS[method]
    return TokenDataset(Dataset.from_file(str(path)), counts, key, reading.own_rows, reading.says)


def check_settings(data: DataConfig) -> None:
    """Refuse settings with which nothing can be tokenised."""
    if data.num_proc is not None and data.num_proc < 1:
        raise ValueError(f"data.num_proc: expected at least 1 process, got {data.num_proc}")
    if data.max_length < 2:
        raise ValueError(f"data.max_length: expected at least 2, one token given and one scored, got {data.max_length}")


class Encoder:
    """Turns batches of rows into token columns and counts what happens to them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        form: str,
        method: str,
        template: str | None,
        raw_dialogue: bool,
        repeated: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token: set its eos_token, completions must be able to end")
        self.tokenizer, self.data, self.template = tokenizer, data, template
        self.form, self.method, self.raw_dialogue, self.repeated = form, method, raw_dialogue, repeated
        self.reading, self.limits = formats.ROWS[method], f"max_length {data.max_length}"
        self.prepended, self.appended = added_tokens(tokenizer)
        self.counts: Counter[str] = Counter()
        self.total = 0
        self.reported = time.monotonic()

    def run(self, rows: Dataset, file: str, fingerprint: str) -> dict[str, int]:
        """Writes the encoded rows to an arrow file and returns the counts."""
        self.counts, self.total = Counter(), len(rows)
        options = {"batched": True, "batch_size": _BATCH_ROWS, "remove_columns": rows.column_names}
        options |= {"features": FEATURES, "load_from_cache_file": False, "new_fingerprint": fingerprint}
        options |= {"with_indices": True, "desc": "Tokenising", "cache_file_name": file}
        rows = rows.with_format(None)
        if (processes := min(self.data.num_proc or 1, len(rows))) > 1:
            kept = spread.encode(rows, self, file, processes, options)
        else:
            kept = len(rows.map(self.batch, **options))
        self.counts = Counter({"rows": len(rows), **self.counts, "kept": kept})
        if kept == 0:
            why = f"; no turn to train: {_NOT_TRAINED}" if any("no_turn" in reason for reason in self.counts) else ""
            left = f"{spell_counts(self.counts)} ({self.limits})"
            raise ValueError(f"no row is left to train on: {left}{why}")
        return dict(self.counts)

    def batch(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """The token columns of a batch of rows; dropped rows are missing."""
        rendered: dict[int, tuple[Texts, Scores]] = {}
        places = columns.pop(PLACE, None) or [f"row {index}" for index in indices]
        for position in range(len(indices)):
            row = {name: values[position] for name, values in columns.items()}
            if (known := _at_row(places[position], lambda row=row: self.render(row))) is not None:
                rendered[position] = known
        lookup = self.tokenise([key for texts, _ in rendered.values() for text in texts for key in text.to_tokenise()])
        out: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for position, known in rendered.items():
            index = indices[position]
            kind = columns["kind"][position] if "kind" in columns else None
            for sequences, scores in _at_row(places[position], lambda known=known: self.examples(*known, lookup)):
                _append(out, sequences, scores, index, None if kind is None else str(kind))
        self.report_progress(indices[-1] + 1)
        return out

    def report_progress(self, done: int) -> None:
        """Log a line now and then where there is no bar."""
        if datasets.are_progress_bars_disabled() and time.monotonic() - self.reported > _LINE_SECONDS:
            self.reported = time.monotonic()
            logger.info("tokenising: %d of %d rows", done, self.total)

    def render(self, row: dict[str, Any]) -> tuple[Texts, Scores] | None:
        """The row's texts and what it says of them, or None when it is dropped."""
        if formats.is_null(row, self.form, self.method):
            return self.drop("null_completion", 2 if self.is_pair_of_examples() else 1)
        example = formats.normalise(row, self.form, self.method, self.raw_dialogue, self.repeated)
        if example is None:
            return self.drop("prompt_mismatch", 2 if self.is_pair_of_examples() else 1)
        if (example := self.without_empty(example)) is None:
            return None
        if not example.is_asked():
            self.counts["without_prompt"] += 1
        if self.form == "stepwise":
            texts = chat.render_steps(example, self.tokenizer, self.template, self.data.step_separator)
        else:
            texts = chat.render(example, self.tokenizer, self.template, judged=self.reading.own_rows)
        return texts, example.scores

    def is_pair_of_examples(self) -> bool:
        """Whether a row gives two examples."""
        return self.reading.unit == "completion" and self.form == "preference"

    def without_empty(self, example: formats.Example) -> formats.Example | None:
        """The example without the completions that have nothing to learn from, or None when it is dropped."""
        reasons = [messages.why_nothing(completion) for completion in example.completions]
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        if self.reading.unit == "row":
            whole = kept and len(kept) == len(reasons)
            return example if whole else self.drop(next(filter(None, reasons), "empty_completion"))
        for reason in filter(None, reasons):
            self.drop(reason, unit=self.reading.unit)
        if not self.are_enough(len(kept)):
            return None
        completions, scores = (tuple(values[i] for i in kept) for values in (example.completions, example.scores))
        return replace(example, completions=completions, scores=scores)

    def examples(self, texts: Texts, scores: Scores, lookup: Lookup) -> list[tuple[list[Tokens], Scores]]:
        """The examples of a row: none when it is dropped, one per completion where each is its own example."""
        sequences = [self.tokens(text, lookup) for text in texts]
        if self.reading.unit == "row":
            return [] if (fitted := self.fit(sequences)) is None else [self.judged(self.compared(fitted), scores)]
        kept = [(s, score) for whole, score in zip(sequences, scores, strict=True) for s in self.fit([whole]) or []]
        self.compared([s for s, _ in kept])
        if self.reading.unit == "completion":
            return [self.judged([sequence], (score,)) for sequence, score in kept]
        return [self.judged([s for s, _ in kept], tuple(r for _, r in kept))] if self.are_enough(len(kept)) else []

    def compared(self, sequences: list[Tokens]) -> list[Tokens]:
        """The completions of a row; counts the examples that it gives if they are all the same tokens."""
        if len(sequences) > 1 and all(ids == sequences[0][0] for ids, _ in sequences):
            self.counts["identical_completions"] += len(sequences) if self.reading.unit == "completion" else 1
        return sequences

    def judged(self, sequences: list[Tokens], scores: Scores) -> tuple[list[Tokens], Scores]:
        """The sequences that fit, scored where the method reads them, and the scores that are left."""
        if self.form == "stepwise":
            ((ids, scored),) = sequences
            ends = np.flatnonzero(scored)
            self.counts["steps_cut"] += len(scores) - len(ends)
            return [(ids[: ends[-1] + 1], scored[: ends[-1] + 1])], scores[: len(ends)]
        if self.reading.own_rows:
            sequences = [(ids, np.arange(len(ids)) == len(ids) - 1) for ids, _ in sequences]
        return sequences, scores

    def tokenise(self, keys: Iterable[tuple[str, bool]]) -> Lookup:
        """The ids of every distinct (text, standard), in at most two calls of the tokenizer."""
        lookup = {}
        for standard in (False, True):
            texts = list(dict.fromkeys(text for text, kind in keys if kind == standard))
            if texts:
                encoded = self.tokenizer(texts, add_special_tokens=standard, verbose=False)["input_ids"]
                pairs = zip(texts, encoded, strict=True)
                lookup |= {(text, standard): self.written(ids, standard) for text, ids in pairs}
        return lookup

    def written(self, ids: list[int], standard: bool) -> list[int]:
        """The ids without what the tokenizer appends by itself, nor its BOS before one written in the text."""
        if not standard:
            return ids
        bos, ids = self.tokenizer.bos_token_id, ids[: len(ids) - len(self.appended)]
        return ids[1:] if self.prepended == ids[:1] == ids[1:2] == [bos] else ids

    def tokens(self, rendered: chat.Rendered | chat.Marked | chat.Steps, lookup: Lookup) -> Tokens:
        """Ids and scored mask of a sequence, before it is cut."""
        if isinstance(rendered, chat.Steps):
            return step_tokens(rendered, lookup)
        if isinstance(rendered, chat.Marked):
            ids, scored = rendered.input_ids, np.array(rendered.scored, dtype=bool)
        else:
            ids, scored = self.boundaries(rendered, lookup)
        scored[:1] = False  # nothing predicts the first token
        if not scored.any():
            raise ValueError("a conversation without a scored token: expected an assistant turn to learn from")
        return ids, scored

    def boundaries(self, rendered: chat.Rendered, lookup: Lookup) -> Tokens:
        """Finds the scored stretches by comparing token sequences, never texts."""
        eos, standard = self.tokenizer.eos_token_id, rendered.standard
        ids = lookup[rendered.whole, standard]
        ids = [*ids, eos] if standard and ids[-1:] != [eos] else ids
        scored = np.zeros(len(ids), dtype=bool)
        for before, through in rendered.spans:
            given = lookup[before, standard]
            start = common_prefix(given, ids)
            self.counts["prompt_not_a_prefix"] += start < len(given)
            end = len(ids) if through is None else start + turn_length(given, lookup[through, standard], ids[start:])
            scored[start:end] = True
        return ids, scored

    def fit(self, sequences: list[Tokens]) -> list[Tokens] | None:
        """The sequences cut to ``max_length``, or None when the row is dropped."""
        limit = self.data.max_length
        if all(len(ids) <= limit for ids, _ in sequences):
            return sequences
        if any(not scored[:limit].any() for _, scored in sequences):
            return self.drop("no_step_fits" if self.form == "stepwise" else "prompt_too_long", unit=self.reading.unit)
        if self.data.truncation == "drop":
            return self.drop("too_long", unit=self.reading.unit)
        self.counts["candidates_truncated" if self.reading.unit == "candidate" else "truncated"] += 1
        return [(ids[:limit], scored[:limit]) for ids, scored in sequences]

    def are_enough(self, completions: int) -> bool:
        """Whether so many completions of a row teach something; says so when they would be candidates."""
        if completions < self.reading.least and self.reading.unit == "candidate":
            self.drop("too_few_candidates")
        return completions >= self.reading.least

    def drop(self, reason: str, number: int = 1, unit: str = "row") -> None:
        """Counts what is left out, and why: ``dropped_REASON`` examples, or ``candidates_REASON`` of rows that stay."""
        self.counts[f"{'candidates' if unit == 'candidate' else 'dropped'}_{reason}"] += number


def step_tokens(rendered: chat.Steps, lookup: Lookup) -> Tokens:
    """An answer in steps, with the last token of each scored."""
    separator = lookup[rendered.separator, False]
    pieces = [lookup[rendered.prompt], *(lookup[step, False] + separator for step in rendered.steps)]
    if not all(pieces[1:]):
        raise ValueError("a step without tokens: set data.step_separator, or remove it")
    scored = np.zeros(sum(map(len, pieces)), dtype=bool)
    scored[np.cumsum([len(piece) for piece in pieces])[1:] - 1] = True
    return [token for piece in pieces for token in piece], scored


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer puts before and after a text by itself, e.g. ([BOS], []).

    Found by tokenising a text with and without them: if BOS and EOS are one token, only its place tells them apart.
    """
    special = set(tokenizer.all_special_ids)
    for probe in ("a", *tokenizer.get_vocab()):
        bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if not bare or special.intersection(bare):
            continue
        ids = tokenizer(probe, add_special_tokens=True)["input_ids"]
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[:start], ids[start + len(bare) :]
    raise ValueError("the tokenizer gives no ids for any text: expected one that adds its special tokens around a text")


def common_prefix(first: list[int], second: list[int]) -> int:
    """The number of tokens with which both begin.

    Example:
        >>> common_prefix([3, 1, 4], [3, 1, 5, 9])
        2
    """
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    return next(i for i in range(limit) if first[i] != second[i])


def turn_length(before: list[int], through: list[int], rest: list[int]) -> int:
    """How many tokens of ``rest`` are the assistant turn that ``through`` ends with.

    ``through`` renders the conversation up to and including the turn, ``before`` up to it. Within a longer conversation
    a template may leave out the front of a turn (an old reasoning block), and the turn's last token may merge with what
    follows: the longest ending or beginning of the turn with which ``rest`` begins counts.
    """
    turn = through[common_prefix(before, through) :]
    ending = next((len(turn) - i for i in range(len(turn)) if turn[i:] == rest[: len(turn) - i]), 0)
    if length := max(ending, common_prefix(turn, rest)):
        return length
    message = "the chat template renders an assistant turn differently within its conversation"
    raise ValueError(f"{message}: give a template with {{% generation %}} markers in data.chat_template")


def _append(out: dict[str, list[Any]], sequences: list[Tokens], scores: Scores, index: int, kind: str | None) -> None:
    out["input_ids"].append([token for ids, _ in sequences for token in ids])
    out["scored"].append(np.concatenate([scored for _, scored in sequences]).astype(np.uint8))
    out["lengths"].append([len(ids) for ids, _ in sequences])
    out["scores"].append(scores)
    out["example_id"].append(index)
    out["kind"].append(kind)


def _at_row(place: str, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _report(counts: dict[str, int], limits: str) -> None:
    logger.info("tokenised: %s (%s)", spell_counts(counts), limits)
    if moved := counts.get("prompt_not_a_prefix"):
        logger.warning(
            "%d prompts are not a token prefix of prompt and completion together: "
            "scoring begins where the tokens part, the completion's first text may be in a prompt token or the reverse",
            moved,
        )
    if untrained := sum(counts.get(f"{unit}_no_turn_to_train", 0) for unit in ("dropped", "candidates")):
        logger.warning("%d completions have no turn to train: %s", untrained, _NOT_TRAINED)
    if unasked := counts.get("without_prompt"):
        logger.warning(
            "%d of %d rows have no prompt, their completions are trained without a question: "
            "name the prompt's column with data.columns, e.g. {prompt: question}",
            unasked,
            counts["rows"],
        )


def spell_counts(counts: dict[str, int]) -> str:
    """What happened to the rows, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count)
