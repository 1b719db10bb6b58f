"""Where rows come from: the hub, local files and directories, or what is built in."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets

from fastalign import hub
from fastalign.config import DataConfig
from fastalign.data import builtin, files, tables
from fastalign.data.repository import (
    HELP,
    SUFFIXES,
    UNREADABLE,
    Source,
    naming,
    open_repository,
    reason_of,
    suffix,
)

log = logging.getLogger(__name__)

JUDGEMENTS = ("label", "margin", "probability")
"""The columns that hold numbers, or true and false; in a CSV file every other cell is text."""
HELD_OUT = ("test", "validation")
"""The splits that are there to evaluate on."""


def load_rows(
    path: str,
    split: str = "train",
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Reads a dataset by name, whatever its kind.

    Args:
        path: hub name, file, directory (of files, or written by ``save_to_disk``) or ``builtin:NAME``.
        split: its name, a slice such as ``train[:100]``, or several with ``+``; a file has one split, ``train``.
        columns: expected name -> name in the data; the columns are renamed, all others pass through.
        limit: keep only the first so many rows.
        name: configuration of a hub dataset, or of a directory whose README.md lists some.
        revision: branch, tag or commit of a hub dataset.
        cache_dir: see `cache.root`; rows of text files are kept there.

    Returns:
        At least one row.

    Raises:
        ValueError: nothing there, an unknown configuration or split, a malformed line (with file and line number), no
            column of a name in ``columns``, or no rows.
    """
    source = open_source(path, name, revision, cache_dir)
    return take(source, split, columns or {}, limit).remove_columns(files.PLACE)


def load_train_eval(data: DataConfig, seed: int = 0) -> tuple[Dataset, Dataset | None]:
    """The training rows and the held-out rows, if any: of ``eval_path`` or ``eval_split``, else ``eval_fraction``.

    ``limit`` holds for the training rows only. The rows have a column `files.PLACE`, for errors.
    """
    _check_evaluation(data)
    source = open_source(training_path(data), data.name, data.revision, data.cache_dir)
    held_out = None if data.eval_path is data.eval_split is None else _held_out(source, data)
    split = None if held_out is None else eval_split(held_out, source, data)
    rows = take(source, data.split, data.columns, data.limit)
    if held_out is not None and split is not None:
        evaluated = take(held_out, split, data.columns)
        same = (source.path, data.name) == (held_out.path, data.eval_name or data.name)
        if same and {*_names(split)} & {*_names(data.split)}:
            _warn_of_seen(rows, evaluated, split)
        return rows, evaluated
    return split_rows(rows, data.eval_fraction, seed) if data.eval_fraction else (rows, None)


def _warn_of_seen(rows: Dataset, evaluated: Dataset, split: str) -> None:
    """Says how many rows are evaluated on and trained on."""
    if seen := len({*rows[files.PLACE]} & {*evaluated[files.PLACE]}):
        what = "data.eval_split: %d of the %d rows of %s are trained on too: the evaluation says little of new rows"
        log.warning(what, seen, len(evaluated), split)


def training_path(data: DataConfig) -> str:
    """``data.path``; ValueError when it is not set: nothing is trained on by default."""
    if not (data.path or "").strip():
        raise ValueError(
            "no training data is given: set data.path to a file, a directory or a hub name, e.g. --data.path "
            "pairs.jsonl (to try things out: --data.path builtin:docstrings)"
        )
    return str(data.path)


def _check_evaluation(data: DataConfig) -> None:
    """Refuses settings of the evaluation data that would not be read."""
    given = [f"data.{name}" for name in ("eval_path", "eval_split") if getattr(data, name) is not None]
    named = next(iter(given), None)
    if named is not None and data.eval_fraction:
        raise ValueError(f"data.eval_fraction: got {data.eval_fraction} beside {named}: set one of them")
    if named is None and data.eval_name:
        raise ValueError(f"data.eval_name: got {data.eval_name!r} without data.eval_path: set the dataset it is of")


def _held_out(source: Source, data: DataConfig) -> Source:
    """What is evaluated on: another split of the training data, or a dataset of its own."""
    path = training_path(data) if data.eval_path is None else data.eval_path
    name = data.eval_name or (data.name if path == data.path else None)
    revision = data.revision if path == data.path else None
    return open_source(path, name, revision, data.cache_dir, "data.eval_")


def eval_split(held_out: Source, source: Source, data: DataConfig) -> str:
    """The split to evaluate on: `data.eval_split`, else the one there is for that."""
    if data.eval_split is not None:
        return data.eval_split
    meant = [split for split in held_out.splits if split in HELD_OUT]
    trained_on = (source.path, data.name) == (held_out.path, data.eval_name or data.name)
    if len(meant) == 1:
        return meant[0]
    if len(held_out.splits) == 1 and not trained_on:
        return held_out.splits[0]
    there = f"{held_out.path!r} has the splits {[*held_out.splits]}"
    if len(held_out.splits) == 1:
        raise ValueError(f"data.eval_path: {there}, which is trained on: set data.eval_fraction to hold rows out")
    raise ValueError(f"data.eval_split: {there}: name the one to evaluate on")


def take(source: Source, split: str, columns: dict[str, str], limit: int | None = None) -> Dataset:
    """The rows of a split, or of slices, renamed; at least one, each with its `files.PLACE`."""
    rows = _rename(_slices(source, split), columns, source)
    if source.texts:
        rows = files.numbers(rows, JUDGEMENTS)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        asked = f"(split {split!r}, limit {limit})"
        raise ValueError(f"{source.section}path: {source.path!r} {asked} has no rows: expected at least one")
    return rows


def _slices(source: Source, split: str) -> Dataset:
    """The rows that ``train``, ``train[:100]`` or ``train+validation[10%:]`` names."""
    names = _names(split)
    if unknown := [name for name in names if name not in source.splits]:
        there = f"{source.path!r} has the splits {[*source.splits]}, got {unknown[0]!r}"
        raise ValueError(f"{source.section}split: {there}")
    whole = {name: _placed(source, name) for name in dict.fromkeys(names)}
    if split in whole:
        return whole[split]
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in whole.items()})
    except (ValueError, AssertionError) as error:
        expected = "expected a split or a slice of one, such as train[:100]"
        raise ValueError(f"{source.section}split: {expected}, got {split!r} ({hub.first_line(error)})") from error
    return concatenate_datasets([whole[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _names(split: str) -> list[str]:
    """The splits that a split, a slice or several of them is of."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def _placed(source: Source, split: str) -> Dataset:
    """The rows of a split, each with its place."""
    rows = source.read(split)
    if files.PLACE in rows.column_names:
        return rows
    name = source.path if len(source.splits) == 1 else f"{source.path} (split {split})"
    places = pa.array((f"{name}, row {number}" for number in range(len(rows))), pa.string())
    return rows.add_column(files.PLACE, places, feature=datasets.Value("string"))  # type: ignore[arg-type]


def split_rows(rows: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Rows for training and a random share held out, each in the original order; the same for the same seed."""
    held_out = max(1, round(fraction * len(rows)))
    if not 0 < fraction < 1 or held_out >= len(rows):
        message = f"got {fraction} of {len(rows)} rows"
        raise ValueError(f"data.eval_fraction: expected a share in (0, 1) that leaves rows to train on, {message}")
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[held_out:])), rows.select(np.sort(order[:held_out]))


def open_source(
    path: str,
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    section: str = "data.",
) -> Source:
    """Finds what a path names; ``section`` begins the settings' names in errors."""
    if not path.strip():
        raise ValueError(f"{section}path: expected a path, got {path!r}: {HELP}")
    place = Path(path).expanduser()
    if path.startswith("builtin:"):
        _refuse(section, path, "is built in", name=name, revision=revision)
        read = partial(builtin.load, builtin.known(path.removeprefix("builtin:"), f"{section}path"))
        return Source(path, section, builtin.SPLITS, read)
    if place.is_file():
        _refuse(section, path, "is a file", name=name, revision=revision)
        return _file(place, section, cache_dir)
    if place.is_dir():
        _refuse(section, path, "is a directory", revision=revision)
        if any((place / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            return _saved(place, section, name)
        return open_repository(str(place), section, name, cache_dir)
    if suffix(path) in SUFFIXES or hub.looks_local(path):
        raise ValueError(f"{section}path: no file or directory at {path!r}: {HELP}")
    return open_repository(path, section, name, cache_dir, revision)


def _refuse(section: str, path: str, what: str, **settings: str | None) -> None:
    """Refuses settings that would not be read."""
    for setting, value in settings.items():
        if value is not None:
            owner = "data." if setting == "revision" else section
            kinds = {"name": "configurations", "revision": "revisions"}[setting]
            raise ValueError(f"{owner}{setting}: {path!r} {what} and has no {kinds}, got {value!r}: leave it out")


def _file(place: Path, section: str, cache_dir: str | None) -> Source:
    kind = SUFFIXES.get(suffix(place.name))
    if kind is None:
        known = ", ".join(SUFFIXES)
        raise ValueError(f"{section}path: {str(place)!r} is of no known kind: expected one of {known}")
    located = [(str(place), place)]
    reader = tables.read if kind in tables.KINDS else files.read
    read = naming(section, lambda _: reader(located, kind, cache_dir))
    return Source(str(place), section, ["train"], read, texts=kind == "csv")


def _saved(place: Path, section: str, name: str | None) -> Source:
    """What ``save_to_disk`` wrote."""
    _refuse(section, str(place), "is a saved dataset", name=name)
    try:
        rows = datasets.load_from_disk(str(place)).with_format(None)  # of numpy or pandas, the rows are no rows
    except UNREADABLE as error:
        reason = f"cannot read the saved dataset {str(place)!r}: {reason_of(error)}"
        raise ValueError(f"{section}path: {reason}") from error
    splits = {str(split): part for split, part in rows.items()} if isinstance(rows, DatasetDict) else {"train": rows}
    for part in splits.values():
        files.refuse_place(part.column_names, f"{section}path: {str(place)!r}")
    return Source(str(place), section, [*splits], splits.__getitem__)


def _rename(rows: Dataset, columns: dict[str, str], source: Source) -> Dataset:
    found = [name for name in rows.column_names if name != files.PLACE]
    for expected, actual in columns.items():
        if actual not in found:
            there = f"{source.path!r} has no column {actual!r} to be {expected!r}; found {sorted(found)}"
            raise ValueError(f"data.columns: {there}")
    renames = {actual: expected for expected, actual in columns.items()}
    if len(renames) < len(columns):
        raise ValueError(f"data.columns: a column can be renamed once only, got {columns}")
    files.refuse_place(columns, "data.columns")
    in_the_way = [name for name in columns if name in found and name not in renames]
    if in_the_way:
        log.warning("data.columns: %s of %r is left out for what is renamed to it", ", ".join(in_the_way), source.path)
    return rows.remove_columns(in_the_way).rename_columns({a: e for a, e in renames.items() if a != e})
