"""Where rows come from: the hub, local files and directories, or what is built in."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from fastalign.config import DataConfig
from fastalign.data import builtin

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Which reader a file needs, by its suffix; each may be followed by ``.gz``, parquet excepted."""

_HELP = "give a hub name, a file (.jsonl .json .parquet .csv, or .gz of the text ones), a directory or builtin:NAME"


def load_rows(
    path: str, split: str = "train", columns: dict[str, str] | None = None, limit: int | None = None
) -> Dataset:
    """Reads a dataset by name, whatever its kind.

    Args:
        path: hub name, file, directory (of files, or written by ``save_to_disk``) or ``builtin:NAME``.
        split: of a hub dataset, a directory or a built-in; a file has no splits, only slices such as ``train[:100]``.
        columns: expected name -> name in the data; the columns are renamed, all others pass through.
        limit: keep only the first so many rows.

    Returns:
        At least one row.

    Raises:
        ValueError: nothing there, an unknown split, a malformed line (with file and line number), no column of a name
            in ``columns``, or no rows.
    """
    rows = _rename(_load(path, split), columns or {}, path)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"data.path: {path!r} (split {split!r}, limit {limit}) has no rows: expected at least one")
    return rows


def load_train_eval(data: DataConfig, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """The training rows and the held-out rows, if any: ``eval_path`` (its split `test`), else ``eval_fraction``.

    ``limit`` holds for the training rows only.
    """
    rows = load_rows(data.path, data.split, data.columns, data.limit)
    if data.eval_path:
        return rows, load_rows(data.eval_path, "test", data.columns)
    return split_rows(rows, data.eval_fraction, seed) if data.eval_fraction else (rows, None)


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


def _load(path: str, split: str) -> Dataset:
    if path.startswith("builtin:"):
        return builtin.load(path.removeprefix("builtin:"), split)
    place = Path(path).expanduser()
    if place.is_dir():
        return _load_directory(place, split)
    if place.is_file():
        return _load_file(place, split)
    if _suffix(place) in SUFFIXES or place.is_absolute() or path.startswith((".", "~")):
        raise ValueError(f"data.path: no file or directory at {path!r}: {_HELP}")
    return _load_hub(path, split)


def _load_file(place: Path, split: str) -> Dataset:
    reader = SUFFIXES.get(_suffix(place))
    if reader is None:
        raise ValueError(f"data.path: {str(place)!r} is of no known kind: expected one of {', '.join(SUFFIXES)}")
    try:
        with _silent("datasets.packaged_modules.json.json"):  # it logs what the error below says better
            return datasets.load_dataset(reader, data_files={split.partition("[")[0]: str(place)}, split=split)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:  # StopIteration: the readers' word for no rows
        reason = json_problem(place) if reader == "json" else None
        raise ValueError(reason or f"data.path: cannot read {str(place)!r}: {_reason(error)}") from error


def _load_directory(place: Path, split: str) -> Dataset:
    if not any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return _load_hub(str(place), split)
    rows = datasets.load_from_disk(str(place))
    if not isinstance(rows, DatasetDict):
        return rows
    if split not in rows:
        raise ValueError(f"data.split: {str(place)!r} has the splits {sorted(rows)}, got {split!r}")
    return rows[split]


def _load_hub(name: str, split: str) -> Dataset:
    """A dataset by hub name, or a directory of files, which `datasets` treats alike."""
    try:
        return datasets.load_dataset(name, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        looked_for = f"data.path: looked for the dataset {name!r}, split {split!r}"
        raise ValueError(f"{looked_for}: {_reason(error)}; {_HELP}") from error


def json_problem(place: Path) -> str | None:
    """What is wrong with a JSON or JSON lines file, as ``file, line n: reason``; None when every line is an object."""
    opener = gzip.open if place.suffix == ".gz" else open
    with opener(place, "rb") as file:
        content: bytes = file.read()
    if content.strip() in (b"", b"[]"):
        return f"data.path: {str(place)!r} has no rows: expected at least one JSON object"
    if _suffix(place) == ".json" and content.lstrip()[:1] == b"[":
        return _bad_array(place, content)
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip() and (reason := _bad_object(line)):
            return f"{place}, line {number}: expected one JSON object, got {reason}: mend or remove the line"
    return None


def _bad_array(place: Path, content: bytes) -> str | None:
    try:
        json.loads(content)
    except json.JSONDecodeError as error:
        return f"{place}, line {error.lineno}: expected a JSON array of objects, got {error.msg}: mend the line"
    return None


def _bad_object(line: bytes) -> str | None:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"malformed JSON ({error.msg}, column {error.colno})"
    except UnicodeDecodeError as error:
        return f"bytes that are not UTF-8 ({error.reason})"
    return None if isinstance(value, dict) else f"a {type(value).__name__}"


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
def _silent(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _suffix(place: Path) -> str:
    return Path(place.stem).suffix if place.suffix == ".gz" else place.suffix


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause that says anything."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__
