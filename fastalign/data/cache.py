"""Files kept by content: a changed input has another key, so nothing is ever stale.

An entry is written beside its place and renamed, under a lock: of several processes one works and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from fastalign.disk import writing


class Unwritable(ValueError):
    """The cache cannot be written, whatever is to be kept."""


def root(cache_dir: str | None = None) -> Path:
    """``cache_dir``, or ``$FASTALIGN_CACHE``, or ``~/.cache/fastalign``."""
    return Path(cache_dir or os.environ.get("FASTALIGN_CACHE") or "~/.cache/fastalign").expanduser()


def key(*parts: Any) -> str:
    """A hash of the parts' representations."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def entry(cache_dir: str | None, name: str, make: Callable[[Path], object]) -> Path:
    """The directory ``name`` of the cache, made by ``make(directory)`` when it is not there.

    Atomic and safe for concurrent processes: the directory appears whole or not at all.
    """
    path = root(cache_dir) / name
    if path.is_dir():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        message = f"cannot write the cache {path.parent} ({error})"
        raise Unwritable(f"{message}: set data.cache_dir or FASTALIGN_CACHE to a writable directory") from error
    try:
        if not path.is_dir():
            remedy = "set data.cache_dir or FASTALIGN_CACHE to a directory with enough space"
            with writing("the cache", path.parent, remedy=remedy):
                _make_whole(path, make)
    finally:
        lock.release()
    return path


def _make_whole(path: Path, make: Callable[[Path], object]) -> None:
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    scratch.mkdir()
    try:
        make(scratch)
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def tokens(cache_dir: str | None, name: str, write: Callable[[str], dict[str, int]]) -> tuple[Path, dict[str, int]]:
    """The arrow file and the counts of tokenised data; ``write(file)`` makes the file and returns the counts."""

    def make(directory: Path) -> None:
        counts = write(str(directory / "tokens.arrow"))
        (directory / "counts.json").write_text(json.dumps(counts))

    directory = entry(cache_dir, f"tokens/{name}", make)
    return directory / "tokens.arrow", json.loads((directory / "counts.json").read_text())


def rows_content(rows: Dataset) -> str:
    """A hash of the rows' values and types, wherever they are stored."""
    digest = hashlib.blake2b(repr(rows.features).encode(), digest_size=16)
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        table = cast(pa.Table, batch).combine_chunks()  # the same bytes however the rows are chunked
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides a tokenizer's output."""
    settings = (type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.bos_token_id)
    if not tokenizer.is_fast:
        return key(settings, sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.init_kwargs.items())))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    return key(settings, {k: v for k, v in backend.items() if k not in ("truncation", "padding")})


def code_version() -> str:
    """A hash of the code that turns rows into tokens, its libraries' versions included."""
    names = ("chat", "columns", "encode", "feedback", "formats", "messages", "prompt_dataset", "prompts")
    sources = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in names]
    return key(sources, transformers.__version__, tokenizers.__version__)
