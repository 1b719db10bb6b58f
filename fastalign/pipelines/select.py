"""Choosing the rows worth training on: filters by length, language and likeness, and a core set: `fastalign select`.

Few good and different examples teach as much as many: Zhou et al. 2023, LIMA (arXiv:2305.11206). The core set is that
of Chen et al. 2023 (arXiv:2305.09246), see `fastalign.data.coreset`. The same rows and settings give the same choice.
"""

from __future__ import annotations

import html
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from fastalign.commands import SelectConfig
from fastalign.config import DataConfig, ModelConfig
from fastalign.data import columns, coreset, formats
from fastalign.data.encode import spell_counts
from fastalign.data.examples import TokenExample
from fastalign.data.messages import Text
from fastalign.data.pack import build_batch, pack
from fastalign.data.prompt_dataset import prompt_column, read_prompt
from fastalign.data.sources import load_rows, training_path
from fastalign.disk import write_whole
from fastalign.engine.forward import Models, wants_autocast
from fastalign.engine.output.progress import stage
from fastalign.engine.output.report import STYLE
from fastalign.engine.setup import builtin_tokenizer
from fastalign.models.load import check_named, load_policy, load_tokenizer
from fastalign.models.policy import Policy
from fastalign.models.verify import verify_packed
from fastalign.parallel.mesh import local_device
from fastalign.types import PackedBatch
from fastalign.words import as_yaml

log = logging.getLogger(__name__)

Texts = tuple[str, str]
"""What is said in a row, and the answer alone."""

SHINGLE = 3
"""Words that are compared together: short answers have few longer runs in common."""
PERMUTATIONS, MARGIN = 128, 0.2
"""Of MinHash. So many of them tell a likeness of 0.8 to 0.035 (one deviation), and rows that seem this much less alike
than is asked for are compared too: next to none is overlooked."""
TOKENS, TOGETHER = 4096, 512
"""Tokens of a forward pass, and rows that are packed, or compared, at a time."""
SHOWN = 3
"""Dropped rows of each reason that the report shows, and the characters of each."""
SHOWN_CHARS = 300


@dataclass
class Choice:
    """Which rows are left.

    Attributes:
        texts: of each row what is said in it, and the answer alone.
        reasons: why a row was dropped; None for those that are left.
        counts: how many were dropped for each reason.
        clusters: size of each cluster of the core set, and how many rows were taken from it.
        radius: largest distance of a row to the nearest one of the core set, between embeddings of length 1.
    """

    texts: list[Texts]
    reasons: list[str | None]
    counts: dict[str, int] = field(default_factory=dict)
    clusters: list[tuple[int, int]] = field(default_factory=list)
    radius: float | None = None

    @property
    def left(self) -> list[int]:
        """The rows that are."""
        return [i for i, reason in enumerate(self.reasons) if reason is None]

    def drop(self, reason: str, keep: Iterable[bool]) -> None:
        """Give the rows that are left and not kept their reason; ``keep`` has a value for each that is left."""
        for row, kept in zip(left := self.left, keep, strict=True):
            self.reasons[row] = None if kept else reason
        self.counts[reason] = len(left) - len(self.left)

    def __str__(self) -> str:
        return spell_counts({"rows": len(self.reasons), **self.counts, "kept": len(self.left)})


def select(settings: SelectConfig, data: DataConfig, model: ModelConfig) -> str:
    """Write the rows that pass every filter, and a report; returns what was done, in words.

    Raises:
        ValueError: settings or rows that cannot be used, or no row left.
        ImportError: a library that a filter needs is missing.
    """
    check(settings, model)
    options = {"name": data.name, "revision": data.revision, "cache_dir": data.cache_dir}
    rows = load_rows(training_path(data), data.split, None, data.limit, **options)
    named = load_rows(training_path(data), data.split, data.columns, data.limit, **options) if data.columns else rows
    choice = choose(read_texts(named, data.format), settings, data, model)
    chosen = rows.select(choice.left)
    write_whole(Path(settings.out), "".join(map(as_line, chosen)), "the selected rows")
    if settings.report:
        sections = {"select": asdict(settings), "data": asdict(data), "model": asdict(model)}
        write_whole(Path(settings.report), page(choice, as_yaml(sections)), "the report")
    log.info("select: %s", choice)
    return f"done: {settings.out} holds {len(chosen)} of {len(rows)} rows"


def check(settings: SelectConfig, model: ModelConfig) -> None:
    """Refuse settings that choose nothing or would replace a file, before anything is read."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("fastalign select runs in one process: start it without torchrun")
    for name in ("out", "report"):
        if (path := getattr(settings, name)) is None:
            continue
        if Path(path).is_dir() or not Path(path).parent.is_dir():
            raise ValueError(f"{name}: expected the path of a file in a directory that exists, got {path!r}")
        if Path(path).exists() and not settings.overwrite:
            raise ValueError(f"{name}: {path!r} exists: choose another file, or replace it with --overwrite")
    if settings.max_chars is not None and settings.max_chars < max(settings.min_chars, 1):
        raise ValueError(f"max_chars: expected at least min_chars, {settings.min_chars}, got {settings.max_chars}")
    for name in ("near_duplicates", "max_similarity"):
        if (share := getattr(settings, name)) is not None and not 0 < share <= 1:
            raise ValueError(f"{name}: expected a number above 0 and up to 1, got {share:g}")
    if settings.budget is not None and settings.budget <= 0:
        raise ValueError(f"budget: expected a share below 1 or a number of rows, got {settings.budget:g}")
    if settings.clusters is not None and (settings.budget is None or settings.clusters < 1):
        raise ValueError(f"clusters: expected 1 or more, beside a budget, got {settings.clusters}")
    if settings.max_similarity is not None or settings.budget is not None:
        check_named(model)  # which embeds


# What a row says


def read_texts(rows: Dataset, wanted: str) -> list[Texts]:
    """Of each row what is said in it, and the answer alone: of a prompt, itself. Both are empty where it has none."""
    form = formats.recognise(rows.column_names, "select", wanted)
    if form == "prompt":
        name = prompt_column(rows.column_names)
        return [
            (text, text) for text in (at_row(i, lambda row=row: said(read_prompt(row, name))) for i, row in of(rows))
        ]
    layout = columns.layout(rows, form)
    return [at_row(i, lambda row=row: read_text(row, form, *layout)) for i, row in of(rows)]


def read_text(row: dict[str, Any], form: str, raw_dialogue: bool, repeated: bool) -> Texts:
    """What is said in a row, and its answer alone."""
    if formats.is_null(row, form, "select"):
        return "", ""
    example = formats.normalise(row, form, "select", raw_dialogue, repeated)
    if example is None or formats.is_empty(answer := example.completions[0]):
        return "", ""
    prompt = said(example.prompt or "")
    if isinstance(answer, str):
        return prompt + answer, answer
    spoken = [turn for turn in answer if turn["role"] == "assistant"]
    return "\n".join(filter(None, [prompt, said(answer)])), said(spoken)


def of(rows: Dataset) -> Iterable[tuple[int, dict[str, Any]]]:
    """The rows with their numbers."""
    return enumerate(dict(row) for row in rows)


def at_row(number: int, read: Callable[[], Any]) -> Any:
    """What is read of a row; an error names it."""
    try:
        return read()
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error


def said(text: Text) -> str:
    """A text, or what is said in the turns of a conversation, a line or more each."""
    return text if isinstance(text, str) else "\n".join(str(turn.get("content") or "") for turn in text)


def as_line(row: Any) -> str:
    """A row as a line of JSON."""
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise ValueError(f"out: a row cannot be written as JSON ({error}): drop the column from the data") from error


# Filters


def choose(texts: list[Texts], settings: SelectConfig, data: DataConfig, model: ModelConfig) -> Choice:
    """Pass the rows through every filter that is set.

    Raises:
        ValueError: no row is left.
    """
    choice = Choice(texts, [None] * len(texts))
    for reason, keep in filters(settings):
        choice.drop(reason, keep([texts[i] for i in choice.left]))
        if not choice.left:
            raise ValueError(f"no row is left to select: {choice}")
    if settings.max_similarity is not None or settings.budget is not None:
        left = [texts[i][0] for i in choice.left]
        narrow(choice, embed(left, model, data.max_length), settings)
    return choice


def filters(settings: SelectConfig) -> Iterator[tuple[str, Callable[[list[Texts]], Iterable[bool]]]]:
    """The filters that read texts, each as the reason for which rows go and a function that says which of them stay."""
    yield "empty", lambda texts: [bool(answer.strip()) for _, answer in texts]
    if (least := settings.min_chars) > 0:
        yield "too_short", lambda texts: [len(answer) >= least for _, answer in texts]
    if (most := settings.max_chars) is not None:
        yield "too_long", lambda texts: [len(answer) <= most for _, answer in texts]
    if languages := settings.languages:
        yield "other_language", lambda texts: are_in(texts, languages)
    if not settings.keep_duplicates:
        yield "duplicate", are_new
    if (likeness := settings.near_duplicates) is not None:
        yield "near_duplicate", lambda texts: are_unlike(texts, likeness)


def are_in(texts: Sequence[Texts], languages: Sequence[str]) -> list[bool]:
    """Whether a row is in one of these languages, as py3langid finds."""
    library = optional("py3langid", "languages")
    known = {code for code, _ in library.rank("")}
    if unknown := [code for code in languages if code not in known]:
        raise ValueError(f"languages: expected codes among {', '.join(sorted(known))}, got {unknown[0]!r}")
    return [library.classify(whole)[0] in languages for whole, _ in texts]


def are_new(texts: Sequence[Texts]) -> list[bool]:
    """Whether no earlier row says the same but for case and white space."""
    plain = ["".join(whole.casefold().split()) for whole, _ in texts]
    first = {text: i for i, text in reversed([*enumerate(plain)])}
    return [first[text] == i for i, text in enumerate(plain)]


def are_unlike(texts: Sequence[Texts], likeness: float) -> list[bool]:
    """Whether no earlier row that stays shares this part of all word triples that either of the two has.

    MinHash finds candidates, whose triples are then compared themselves.
    """
    library = optional("datasketch", "near_duplicates")
    index, stay = library.MinHashLSH(threshold=max(likeness - MARGIN, MARGIN / 2), num_perm=PERMUTATIONS), []
    for row, (whole, _) in enumerate(texts):
        mine, sketch = shingles(whole), library.MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in mine])
        others = (shingles(texts[other][0]) for other in index.query(sketch))
        stay.append(not any(len(mine & other) >= likeness * len(mine | other) for other in others))
        if stay[-1]:
            index.insert(row, sketch)
    return stay


def shingles(text: str) -> set[str]:
    """All runs of `SHINGLE` words in a text; of a shorter one the whole."""
    words = text.casefold().split()
    return {" ".join(words[i : i + SHINGLE]) for i in range(max(len(words) - SHINGLE, 0) + 1)}


def optional(library: str, setting: str) -> Any:
    """A library that only one filter needs."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{setting}: {library} is not installed: pip install 'fastalign[select]'") from error


# Embeddings


def narrow(choice: Choice, embeddings: Tensor, settings: SelectConfig) -> None:
    """Drop rows by their embeddings ``[S, D]``: those like an earlier one, then those outside of the core set."""
    if settings.max_similarity is not None:
        keep = are_diverse(embeddings, settings.max_similarity)
        choice.drop("too_similar", keep.tolist())
        embeddings = embeddings[keep]
    if settings.budget is None:
        return
    budget = round(settings.budget if settings.budget >= 1 else settings.budget * len(embeddings)) or 1
    clusters = settings.clusters or round(budget**0.5)
    if not clusters <= budget <= len(embeddings):
        got = f"{budget} rows in {clusters} clusters, of {len(embeddings)} that are left"
        raise ValueError(f"budget: expected at least one row of each cluster and at most all that are left, got {got}")
    core = coreset.select(embeddings, num_clusters=clusters, budget=budget)
    choice.drop("outside_core_set", torch.zeros(len(embeddings)).index_fill(0, core.selected, 1).bool().tolist())
    sizes = torch.bincount(core.clusters, minlength=clusters)
    choice.clusters, choice.radius = list(zip(sizes.tolist(), core.quotas.tolist(), strict=True)), core.radius


def are_diverse(x: Tensor, limit: float) -> Tensor:
    """``[S]`` bool: whether a row of ``[S, D]`` has a cosine below the limit with all earlier ones that stay."""
    stay = torch.zeros(len(x), dtype=torch.bool)
    limit -= coreset.ROUNDING * torch.finfo(x.dtype).eps  # a row is like itself
    for start in range(0, len(x), TOGETHER):
        block, mine = x[start : start + TOGETHER], stay[start : start + TOGETHER]
        free, close = ~(block @ x[stay].T >= limit).any(1), block @ block.T >= limit
        for j in free.nonzero().flatten().tolist():
            mine[j] = not (close[j] & mine).any()
    return stay


@torch.no_grad()
def embed(texts: Sequence[str], model: ModelConfig, max_length: int) -> Tensor:
    """``[S, D]`` mean of a model's last hidden states over the tokens of each text, scaled to length 1."""
    tokenizer, device = load_tokenizer(model, fallback=builtin_tokenizer), local_device()
    policy = load_policy(model, tokenizer=tokenizer).to(device).eval()
    ids = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    found: dict[int, Tensor] = {}
    with Models(policy, None, wants_autocast(model, device)).precision(device):
        verify_packed(policy, build_batch([as_example(0, ids[0], predicted=True)], False).to(device))
        with stage("embedding", len(texts), shown=True) as show:
            for start in range(0, len(texts), TOGETHER):
                examples = [as_example(start + i, row) for i, row in enumerate(ids[start : start + TOGETHER])]
                for batch in pack(examples, TOKENS, share_prefix=False):
                    found |= zip(batch.example_ids, means(policy, batch.to(device)), strict=True)
                show(len(found))
    return torch.stack([found[i] for i in range(len(texts))])


def means(policy: Policy, batch: PackedBatch) -> list[Tensor]:
    """``[D]`` of each sequence of a batch, see `coreset.embed`."""
    hidden = policy(batch, lambda hidden, *_, **__: hidden).float().cpu()
    parts = hidden.split(batch.cu_seqlens.diff().tolist())
    return [coreset.embed(part[None], torch.ones(1, len(part)))[0] for part in parts]


def as_example(number: int, ids: Sequence[int], predicted: bool = False) -> TokenExample:
    """A text in tokens, whose own hidden states are read, or those of the tokens before, which predict them."""
    return TokenExample(((np.array(ids), np.arange(len(ids)) >= predicted),), number, own_rows=not predicted)


# The report


def page(choice: Choice, settings: str) -> str:
    """The report: what was dropped and why, lengths before and after, and what the core set covers."""
    counts = {"selected": len(choice.left), **choice.counts}
    answers = [len(answer) for _, answer in choice.texts]
    lengths = {"all": answers, "selected": [answers[i] for i in choice.left]}
    spans = [(name, *np.percentile(found, [0, 10, 50, 90, 100]).astype(int)) for name, found in lengths.items()]
    parts = [
        "<h2>Rows</h2>"
        + table(("rows", "number", "share"), [(r, n, f"{n / len(answers):.1%}") for r, n in counts.items()]),
        "<h2>Characters of the answers</h2>" + table(("rows", "least", "10 %", "median", "90 %", "most"), spans),
        clusters_part(choice),
        *(examples_part(choice, reason) for reason, number in choice.counts.items() if number),
        f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>",
    ]
    title = f"select: {len(choice.left)} of {len(answers)} rows"
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"{head}<h1>{title}</h1>{''.join(parts)}</html>\n"


def clusters_part(choice: Choice) -> str:
    """What the core set takes of each cluster; empty without one."""
    if choice.radius is None:
        return ""
    told = f"<p>No row is farther than {choice.radius:.3f} from the nearest selected one, of at most 2.</p>"
    rows = [(str(i), size, taken) for i, (size, taken) in enumerate(choice.clusters)]
    return f"<h2>Core set</h2>{told}" + table(("cluster", "rows", "selected"), rows)


def examples_part(choice: Choice, reason: str) -> str:
    """The first rows that were dropped for a reason."""
    dropped = [i for i, found in enumerate(choice.reasons) if found == reason][:SHOWN]
    texts = "".join(f"<pre>row {i}: {html.escape(choice.texts[i][0][:SHOWN_CHARS])}</pre>" for i in dropped)
    return f"<h2>Dropped: {reason.replace('_', ' ')}</h2>{texts}"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of texts and numbers."""
    head = "".join(f"<th>{name}" for name in heads)
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell).replace('_', ' '))}" for cell in row) for row in rows)
    return f"<table><tr>{head}{cells}</table>"
