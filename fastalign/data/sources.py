"""Where rows come from: the hub, local files and directories, or what is built in."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from fastalign.config import DataConfig
from fastalign.data import builtin
from fastalign.words import kind_of

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Which reader a file needs, by its suffix; each may be followed by ``.gz``, parquet excepted."""

_UNREADABLE = (DatasetsError, ValueError, OSError, EOFError, zlib.error, StopIteration)  # the last: no rows

_HELP = "give a hub name, a file (.jsonl .json .parquet .csv, or .gz of the text ones), a directory or builtin:NAME"


def load_rows(
    path: str,
    split: str = "train",
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    name: str | None = None,
) -> Dataset:
    """Reads a dataset by name, whatever its kind.

    Args:
        path: hub name, file, directory (of files, or written by ``save_to_disk``) or ``builtin:NAME``.
        split: of a hub dataset, a directory or a built-in; a file has no splits, only slices such as ``train[:100]``.
        columns: expected name -> name in the data; the columns are renamed, all others pass through.
        limit: keep only the first so many rows.
        name: configuration of a hub dataset.

    Returns:
        At least one row.

    Raises:
        ValueError: nothing there, an unknown split, a malformed line (with file and line number), no column of a name
            in ``columns``, or no rows.
    """
    rows = _rename(_load(path, split, name), columns or {}, path)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"data.path: {path!r} (split {split!r}, limit {limit}) has no rows: expected at least one")
    return rows


def load_train_eval(data: DataConfig, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """The training rows and the held-out rows, if any: ``eval_path`` (its split `test`), else ``eval_fraction``.

    ``limit`` holds for the training rows only.
    """
    rows = load_rows(training_path(data), data.split, data.columns, data.limit, data.name)
    if data.eval_path:
        name = data.name if data.eval_path == data.path else None
        return rows, load_rows(data.eval_path, "test", data.columns, name=name)
    return split_rows(rows, data.eval_fraction, seed) if data.eval_fraction else (rows, None)


def training_path(data: DataConfig) -> str:
    """``data.path``; ValueError when it is not set: nothing is trained on by default."""
    if data.path is None:
        raise ValueError(
            "no training data is given: set data.path to a file, a directory or a hub name, e.g. --data.path "
            "pairs.jsonl (to try things out: --data.path builtin:docstrings)"
        )
    return data.path


def split_rows(rows: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Rows for training and a random share held out, each in the original order; the same for the same seed.

    Raises:
        ValueError: the fraction is not inside (0, 1), or leaves a side empty.
    """
    held_out = max(1, round(fraction * len(rows)))
    if not 0 < fraction < 1 or held_out >= len(rows):
        message = f"got {fraction} of {len(rows)} rows"
        raise ValueError(f"data.eval_fraction: expected a share in (0, 1) that leaves rows to train on, {message}")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[held_out:])), rows.select(np.sort(order[:held_out]))


def _load(path: str, split: str, name: str | None) -> Dataset:
    if name is not None and (path.startswith("builtin:") or Path(path).expanduser().exists()):
        raise ValueError(f"data.name: {name!r} is a configuration of a hub dataset, and {path!r} is none: leave it out")
    if path.startswith("builtin:"):
        return builtin.load(path.removeprefix("builtin:"), split)
    place = Path(path).expanduser()
    if place.is_dir():
        return _load_directory(place, split)
    if place.is_file():
        return _load_file(place, split)
    if _suffix(place) in SUFFIXES or place.is_absolute() or path.startswith((".", "~")):
        raise ValueError(f"data.path: no file or directory at {path!r}: {_HELP}")
    return _load_hub(path, split, name)


def _load_file(place: Path, split: str) -> Dataset:
    reader = SUFFIXES.get(_suffix(place))
    if reader is None:
        raise ValueError(f"data.path: {str(place)!r} is of no known kind: expected one of {', '.join(SUFFIXES)}")
    try:
        return _checked(_quietly(reader, split, data_files={split.partition("[")[0]: str(place)}))
    except _UNREADABLE as error:
        reason = file_problem(place) or f"data.path: cannot read {str(place)!r}: {_reason(error)}"
        raise ValueError(reason) from error


def _load_directory(place: Path, split: str) -> Dataset:
    if not any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return _load_files(place, split)
    try:
        rows = datasets.load_from_disk(str(place))
    except _UNREADABLE as error:
        raise ValueError(f"data.path: cannot read the saved dataset {str(place)!r}: {_reason(error)}") from error
    if not isinstance(rows, DatasetDict):
        return rows
    if split not in rows:
        raise ValueError(f"data.split: {str(place)!r} has the splits {sorted(rows)}, got {split!r}")
    return rows[split]


def _load_files(place: Path, split: str) -> Dataset:
    """A directory of files, which `datasets` treats like one of the hub."""
    try:
        return _checked(_quietly(str(place), split))
    except _UNREADABLE as error:
        files = (
            []
            if str(error).startswith("Unknown split")
            else sorted(file for file in place.rglob("*") if file.is_file())
        )
        reason = next((reason for file in files if (reason := file_problem(file))), None)
        raise ValueError(reason or _not_found(str(place), split, error)) from error


def _load_hub(path: str, split: str, name: str | None) -> Dataset:
    try:
        return _quietly(path, split, name=name)
    except _UNREADABLE as error:
        raise ValueError(_not_found(path, split, error)) from error


def _not_found(name: str, split: str, error: BaseException) -> str:
    return f"data.path: looked for the dataset {name!r}, split {split!r}: {_reason(error)}; {_HELP}"


def _quietly(path: str, split: str, **options: Any) -> Dataset:
    """`datasets.load_dataset` without what its libraries log on the way to an error, which says it better."""
    with _level("datasets", logging.CRITICAL), _level("huggingface_hub", logging.ERROR):
        return datasets.load_dataset(path, split=split, **options)


def _checked(rows: Dataset) -> Dataset:
    """The rows of files; text that is not UTF-8 is read without complaint and would fail where no line is known."""
    rows.data.validate(full=True)
    return rows


def file_problem(place: Path) -> str | None:
    """What is wrong with a file of a known kind, as ``file, line n: reason`` if it is a text; None if nothing is."""
    kind = SUFFIXES.get(_suffix(place))
    if kind is None:
        return None
    try:
        if kind == "parquet":
            pq.read_schema(place)
            return None
        content = _content(place)
    except (pa.ArrowInvalid, EOFError, OSError, zlib.error) as error:
        return f"data.path: cannot read {str(place)!r}: {_reason(error)}: expected a whole {place.suffix[1:]} file"
    if kind == "csv":
        return _bad_csv(place, content)
    return _bad_array(place, content) if _is_array(place, content) else _bad_lines(place, content)


def _content(place: Path) -> bytes:
    opener = gzip.open if place.suffix == ".gz" else open
    with opener(place, "rb") as file:
        return file.read()


def _is_array(place: Path, content: bytes) -> bool:
    return _suffix(place) == ".json" and content.lstrip()[:1] == b"["


def _bad_csv(place: Path, content: bytes) -> str | None:
    if len(content.split()) == 0 or len(content.strip().splitlines()) == 1:
        return f"data.path: {str(place)!r} has no rows: expected a line of column names and at least one more"
    return _bad_text(place, content)


def _bad_array(place: Path, content: bytes) -> str | None:
    if content.strip()[1:-1].strip() == b"":
        return _no_objects(place)
    if reason := _bad_text(place, content):
        return reason
    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        return f"{place}, line {error.lineno}: expected a JSON array of objects, got {error.msg}: mend the line"
    return None


def _bad_lines(place: Path, content: bytes) -> str | None:
    if not content.strip():
        return _no_objects(place)
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip() and (reason := _bad_object(line)):
            return f"{place}, line {number}: expected one JSON object, got {reason}: mend or remove the line"
    return None


def _no_objects(place: Path) -> str:
    return f"data.path: {str(place)!r} has no rows: expected at least one JSON object"


def _bad_text(place: Path, content: bytes) -> str | None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"{place}, line {line}: expected UTF-8, got other bytes ({error.reason}): save the file as UTF-8"
    return None


def _bad_object(line: bytes) -> str | None:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"malformed JSON ({error.msg}, column {error.colno})"
    except UnicodeDecodeError as error:
        return f"bytes that are not UTF-8 ({error.reason})"
    return None if isinstance(value, dict) else kind_of(value)


def _rename(rows: Dataset, columns: dict[str, str], path: str) -> Dataset:
    found = rows.column_names
    for expected, actual in columns.items():
        if actual not in found:
            raise ValueError(
                f"data.columns: {path!r} has no column {actual!r} to be {expected!r}; found {sorted(found)}"
            )
    renames = {actual: expected for expected, actual in columns.items()}
    if len(renames) < len(columns):
        raise ValueError(f"data.columns: a column can be renamed once only, got {columns}")
    in_the_way = [name for name in columns if name in found and name not in renames]
    return rows.remove_columns(in_the_way).rename_columns({a: e for a, e in renames.items() if a != e})


@contextmanager
def _level(name: str, level: int) -> Iterator[None]:
    """A library's logger says only what is at least so grave."""
    logger = logging.getLogger(name)
    was = logger.level
    logger.setLevel(max(level, was))
    try:
        yield
    finally:
        logger.setLevel(was)


def _suffix(place: Path) -> str:
    return Path(place.stem).suffix if place.suffix == ".gz" else place.suffix


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause that says anything."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__
