"""Real English without a download: the docstrings of the running interpreter's standard library.

Read with `ast` (nothing is imported or run), split by module so that near-duplicates do not leak, and turned into
preference pairs whose better side is the true docstring. Their words are also a task that a small model learns in
seconds and whose answers can be checked: to sort the letters of one. Counts vary a little with the interpreter's
version.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import random
import re
import string
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from pydoc_data import topics
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastalign.data import cache

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<|pad|>", "<|eos|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
"""Of the built-in tokenizer, in the order of their ids from 0."""

UNKNOWN = "<|unknown|>"
"""What is not in the vocabulary of the letter tokenizer."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Of the built-in tokenizer: a role token and a line per message, assistant turns marked and ended by EOS."""

CONFIDENCE = {"other": 0.95, "truncated": 0.9, "shuffled": 0.8}
"""The probability, by the kind of the rejected side, that the true docstring is found the better."""

SPLITS = ("train", "test")
TEST_SHARE = 10  # one module in so many is held out
MIN_WORDS = 3  # shorter docstrings say nothing
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "_bundled"}
_CANDIDATES = 16  # docstrings of other objects among which the one nearest in length becomes the rejected side
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ARROW = " -> "
"""Between a word and its sorted letters."""
HELD_OUT_WORDS = 400
_WORD = re.compile(r"\b[a-z]{4,7}\b")
_COMMON = 2  # times that a word is found, at least
_OWN = 0.5  # of the steps, the share that stays
_SENTENCE_END = re.compile(r"(?<=[.!?:])(\s+)")


@dataclass(frozen=True)
class Docstring:
    """A documented object: its module, its heading (kind, qualified name, signature) and its text."""

    module: str
    heading: str
    text: str


def load(name: str, split: str = "train", seed: int = 0) -> Dataset:
    """The rows of ``builtin:NAME``."""
    if split not in SPLITS:
        raise ValueError(f"data.split: 'builtin:{name}' has the splits train and test, got {split!r}")
    return SOURCES[known(name)](split, seed)


def known(name: str, setting: str = "data.path") -> str:
    """Return the name of a built-in dataset, or refuse it."""
    if name not in SOURCES:
        names = ", ".join(f"builtin:{n}" for n in SOURCES)
        raise ValueError(f"{setting}: expected one of {names}, got 'builtin:{name}'")
    return name


def docstring_pairs(split: str = "train", seed: int = 0) -> Dataset:
    """One row per docstring, for every method that reads completions or preferences, or ranks candidates.

    Columns: ``prompt`` (heading and a line break), ``completion`` and ``chosen`` (the docstring), ``text`` (both),
    ``rejected`` and its ``kind``: ``other`` (another object's docstring of like length), ``shuffled`` (sentences in
    another order, a different one first) or ``truncated`` (ends in mid sentence), drawn evenly among those possible;
    ``probability``: how sure a reader is of the true one (`CONFIDENCE`); ``completions`` and their ``scores``: the
    docstring (1), truncated where possible (0.5) and another's (0).

    The split does not depend on the seed.
    """
    documents = [d for d in corpus() if is_held_out(d.module) == (split == "test")]
    return Dataset.from_list([_pair(d, documents, random.Random(f"{seed}:{d.heading}")) for d in documents])


def docstring_steps(split: str = "train", seed: int = 0) -> Dataset:
    """One row per docstring of several sentences, for process rewards: are these sentences its own?

    Columns: ``prompt`` (heading and a line break), ``completions`` (the sentences, of which each was exchanged by the
    toss of a coin for one of another docstring) and ``labels`` (true for its own).
    """
    chosen = [d for d in corpus() if is_held_out(d.module) == (split == "test")]
    documents = [(d, [text for text in _SENTENCE_END.split(d.text)[::2] if text.strip()]) for d in chosen]
    pool = [sentence for _, own in documents for sentence in own]
    long = [(d, own, random.Random(f"{seed}:{d.heading}")) for d, own in documents if len(own) > 1]
    return Dataset.from_list([_steps(d, own, pool, draw) for d, own, draw in long])


def sort_letters(split: str = "train", seed: int = 0) -> Dataset:
    """One row per common word of 4 to 7 letters, whose letters are to be sorted: ``listen -> eilnst``.

    Columns: ``prompt`` (the word and `ARROW`), ``completion``, ``chosen`` and ``answer`` (its letters in order), and
    ``rejected``: the same with one mistake. The words held out are the same for every seed.
    """
    found = Counter(word for document in corpus() for word in _WORD.findall(document.text.lower()))
    common = sorted(word for word, times in found.items() if times >= _COMMON)
    held_out = {*sorted(common, key=lambda word: blake2b(word.encode()).digest())[:HELD_OUT_WORDS]}
    words = [word for word in common if (word in held_out) == (split == "test")]
    random.Random(seed).shuffle(words)
    answers = ["".join(sorted(word)) for word in words]
    columns = dict.fromkeys(("completion", "chosen", "answer"), answers)
    rejected = [_mistaken(answer, random.Random(f"{seed}:{answer}")) for answer in answers]
    return Dataset.from_dict({"prompt": [word + ARROW for word in words], **columns, "rejected": rejected})


def _mistaken(answer: str, draw: random.Random) -> str:
    """An answer with a letter too many, too few, another one, or two that changed places."""
    at, other = draw.randrange(len(answer) - 1), draw.choice(string.ascii_lowercase)
    head, pair, rest = answer[:at], answer[at : at + 2], answer[at + 2 :]
    tries = [
        head + pair[::-1] + rest,
        head + pair[0] * 2 + pair[1] + rest,
        head + pair[1] + rest,
        head + other + pair[1] + rest,
    ]
    return draw.choice([text for text in tries if text != answer])


SOURCES = {"docstrings": docstring_pairs, "docstring-steps": docstring_steps, "sort_letters": sort_letters}
"""The built-in datasets by name: f(split, seed) -> rows."""


def corpus() -> list[Docstring]:
    """All distinct docstrings and the interpreter's help topics, in a fixed order; cached."""
    name = f"builtin/corpus-{cache.key(sys.version, Path(__file__).read_bytes())}"

    def make(directory: Path) -> None:
        log.info("reading the docstrings of Python's standard library, once: some seconds")
        (directory / "corpus.json").write_text(json.dumps([asdict(d) for d in _distinct()]))

    return [Docstring(**d) for d in json.loads((cache.entry(None, name, make) / "corpus.json").read_text())]


def is_held_out(module: str) -> bool:
    """Whether a module belongs to the test split; ``_pyio`` goes with ``io``, a package's modules stay together."""
    family = module.partition(".")[0].lstrip("_").removeprefix("py")
    return blake2b(family.encode()).digest()[0] % TEST_SHARE == 0


def train_tokenizer(vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training split's text, cached by that text.

    Special ids are fixed (`SPECIAL_TOKENS`): padding 0, EOS 1, BOS 2, then the roles of its chat template. It adds no
    special token by itself.

    Raises:
        ValueError: a vocabulary too small for the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"a byte-level vocabulary needs at least {smallest} entries, got {vocab_size}")
    texts = [f"{d.heading}\n{d.text}" for d in corpus() if not is_held_out(d.module)]
    name = f"builtin/bpe-{cache.key(texts, vocab_size, SPECIAL_TOKENS, CHAT_TEMPLATE)}"
    directory = cache.entry(None, name, lambda path: _train_bpe(texts, vocab_size).save_pretrained(path))
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _train_bpe(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    pad, eos, bos = SPECIAL_TOKENS[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 32 tokens for `sort_letters`: the letters, the arrow, a space and four special tokens."""
    name = f"builtin/letters-{cache.key(SPECIAL_TOKENS[:3], ARROW, UNKNOWN)}"
    directory = cache.entry(None, name, lambda path: _make_letters().save_pretrained(path))
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _make_letters() -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL_TOKENS[:3], UNKNOWN, ARROW, " ", *string.ascii_lowercase]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{ARROW}|."), "isolated")
    backend.decoder = decoders.Fuse()
    pad, eos, bos = SPECIAL_TOKENS[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "builtin:bpe": train_tokenizer,
    "builtin:letters": letter_tokenizer,
}
"""The built-in tokenizers by what `model.tokenizer` calls them."""


def _distinct() -> Iterator[Docstring]:
    """The corpus without repeated texts (the first by module name stays) and without the very short."""
    seen: set[str] = set()
    help_pages = sorted(topics.topics.items())
    pages = [Docstring(f"{name}.topic", f"topic {name}", inspect.cleandoc(text).strip()) for name, text in help_pages]
    for document in [*_standard_library(), *pages]:
        if document.text not in seen and len(document.text.split()) >= MIN_WORDS:
            seen.add(document.text)
            yield document


def _standard_library() -> Iterator[Docstring]:
    home = Path(sysconfig.get_path("stdlib"))
    for file in sorted(home.rglob("*.py")):
        parts = file.relative_to(home).with_suffix("").parts
        if not _SKIPPED.intersection(parts):
            module = ".".join(parts).removesuffix(".__init__")
            yield from _documented(ast.parse(file.read_bytes()), module)


def _documented(tree: ast.Module, module: str) -> Iterator[Docstring]:
    """The module and the classes and functions in it, in source order, that have a docstring."""
    pending: list[tuple[ast.AST, str]] = [(tree, module)]
    while pending:
        node, name = pending.pop()
        if isinstance(node, _DOCUMENTED) and (text := (ast.get_docstring(node) or "").strip()):
            yield Docstring(module, _heading(node, name), text)
        for child in reversed(list(ast.iter_child_nodes(node))):
            if isinstance(child, ast.stmt):
                own = getattr(child, "name", None)
                pending.append((child, f"{name}.{own}" if own else name))


def _heading(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {name}({', '.join(map(ast.unparse, node.bases))})"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"def {name}({ast.unparse(node.args)})"
    return f"module {name}"


def _pair(document: Docstring, documents: list[Docstring], draw: random.Random) -> dict[str, Any]:
    worse = {"other": _other(document, documents, draw), "shuffled": _shuffled(document.text, draw)}
    worse["truncated"] = _truncated(document.text, draw)
    kind = draw.choice([name for name, text in worse.items() if text])
    ranked = {1.0: document.text, 0.5: worse["truncated"], 0.0: worse["other"]}
    ranked = {score: text for score, text in ranked.items() if text}
    prompt = f"{document.heading}\n"
    return {
        "prompt": prompt,
        "completion": document.text,
        "chosen": document.text,
        "rejected": worse[kind],
        "kind": kind,
        "probability": CONFIDENCE[kind],
        "text": prompt + document.text,
        "completions": list(ranked.values()),
        "scores": list(ranked),
    }


def _steps(document: Docstring, sentences: list[str], pool: list[str], draw: random.Random) -> dict[str, Any]:
    """The sentences, some exchanged; a sentence drawn that is the document's own stays right."""
    steps = [sentence if draw.random() < _OWN else draw.choice(pool) for sentence in sentences]
    labels = [step in sentences for step in steps]
    return {"prompt": f"{document.heading}\n", "completions": steps, "labels": labels}


def _other(document: Docstring, documents: list[Docstring], draw: random.Random) -> str:
    others = [d.text for d in draw.sample(documents, _CANDIDATES) if d.text != document.text]
    return min(others, key=lambda text: abs(len(text) - len(document.text)))


def _shuffled(text: str, draw: random.Random) -> str:
    """The sentences in another order between the same white space, not beginning as before; empty with only one."""
    pieces = _SENTENCE_END.split(text)
    sentences = pieces[::2]
    if len(set(sentences)) < 2:
        return ""
    order = list(sentences)
    while order[0] == sentences[0]:
        draw.shuffle(order)
    pieces[::2] = order
    return "".join(pieces)


def _truncated(text: str, draw: random.Random) -> str:
    """The text up to a word in its middle that ends no sentence; empty when there is none."""
    words = list(re.finditer(r"\S+", text))
    middle = words[max(1, len(words) // 5) : max(2, len(words) * 7 // 10)]
    ends = [word.end() for word in middle if word.group()[-1] not in ".!?:"]
    return text[: draw.choice(ends)] if ends else ""
