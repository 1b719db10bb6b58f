"""Encoding in several processes: the same file and the same counts as in one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from datasets import Dataset


@dataclass
class Counted:
    """An encoder in a process of its own, which leaves its counts so far in a file."""

    encoder: Any
    folder: str

    def __call__(self, columns: dict[str, list[Any]], indices: list[int], rank: int) -> dict[str, list[Any]]:
        """The columns of a batch of the rows that are this rank's."""
        out = self.encoder.batch(columns, indices)
        (Path(self.folder) / f"{rank}.json").write_text(json.dumps(self.encoder.counts))
        return out


def encode(rows: Dataset, encoder: Any, file: str, processes: int, options: dict[str, Any]) -> int:
    """Encodes a stretch of the rows in each process, all into ``file``; returns the number of encoded rows.

    The encoder's counts become those of all processes; ``options`` are those of `Dataset.map`.
    """
    folder = Path(f"{file}.parts")
    folder.mkdir()
    options = {**options, "cache_file_name": str(folder / "part.arrow")}
    with _one_thread(), _stopped():
        encoded = rows.map(Counted(encoder, str(folder)), with_rank=True, num_proc=processes, **options)
    for rank in range(processes):
        encoder.counts.update(json.loads((folder / f"{rank}.json").read_text()))
    _join(encoded, file)
    number = len(encoded)
    shutil.rmtree(folder)
    return number


@contextmanager
def _stopped() -> Iterator[None]:
    """A stop is raised as that: `datasets` asks its workers for results meanwhile and raises that there are none."""
    try:
        yield
    except Exception as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tokenizers keep to one thread: a forked process cannot use those of its parent, and there would be too many."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _join(parts: Dataset, file: str) -> None:
    """Writes what several files hold into one."""
    schema = parts.features.arrow_schema
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in parts.with_format("arrow").iter(batch_size=1000):
            writer.write_table(cast(pa.Table, batch).cast(schema))
