"""Datasets of the hub and directories of files, which `datasets` treats the same; and what all sources share."""

from __future__ import annotations

import atexit
import glob
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets import config as hf_config
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet

from fastalign import hub
from fastalign.data import cache, files, tables
from fastalign.disk import FULL, errno_of, reason, replace_file

log = logging.getLogger(__name__)

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Which reader a file needs, by its suffix; each may be followed by ``.gz``, parquet excepted."""
ARCHIVES = (".bz2", ".lz4", ".tar", ".xz", ".zip", ".zst", ".7z")
"""What is unpacked before it is read; ``.gz`` is read as it is."""

DESCRIBING = (".md", ".py", ".rst", ".yaml", ".yml")
NAMES = ("LICENSE", "LICENCE", "README", "DATASET_INFOS")
"""Files that describe the data beside them, by suffix and by name."""

UNREADABLE = (DatasetsError, ValueError, OSError, EOFError, zlib.error, StopIteration)  # the last: no rows

HELP = "give a hub name, a file (.jsonl .json .parquet .csv, or .gz of the text ones), a directory or builtin:NAME"


@dataclass(frozen=True)
class Source:
    """What a path names, before anything is read.

    Attributes:
        path: as the user gave it.
        section: the beginning of its settings' names: ``data.`` or ``data.eval_``.
        splits: the names of its splits.
        read: the rows of a split, with `files.PLACE` where they know it better than by their number.
        texts: every cell is text, as in a CSV file.
    """

    path: str
    section: str
    splits: Sequence[str]
    read: Callable[[str], Dataset]
    texts: bool = False


def open_repository(
    path: str, section: str, name: str | None, cache_dir: str | None, revision: str | None = None
) -> Source:
    """A dataset of the hub, or a directory of files, which `datasets` treats like one."""
    record = _record(path, name, revision, cache_dir)
    if not Path(path).is_dir() and hub.silent() is not None and (known := _recorded(record)) is not None:
        with hub.asked_once(f"dataset {path!r}"):
            return _file_source(path, section, [*known["splits"]], known["kind"], lambda: known, cache_dir)
    place = _linked(path) if Path(path).is_dir() else path
    try:
        builder = _builder(place, name, revision)
    except UNREADABLE as error:
        raise ValueError(_not_found(place, section, name, revision, error).replace(place, path)) from error
    if name is not None and name not in (names := [*builder.builder_configs] or ["default"]):
        raise ValueError(f"{section}name: {path!r} has the configurations {names}, got {name!r}")
    _warn_of_unread(builder, path, section)
    splits = [str(split) for split in builder.config.data_files or builder.info.splits or {}]
    if (kind := _kind(builder)) is None:
        return Source(path, section, splits, partial(_prepared, builder, path, section))
    _check_options(builder.config, path, section)
    found = lru_cache(partial(_downloaded, builder, path, record))
    return _file_source(path, section, splits, kind, found, cache_dir)


def _kind(builder: Any) -> str | None:
    """Which of our readers reads the files."""
    kinds = {Json: "json", Csv: "csv", Parquet: "parquet", Arrow: "arrow"}
    return next((kind for reader, kind in kinds.items() if isinstance(builder, reader)), None)


def _file_source(
    path: str,
    section: str,
    splits: Sequence[str],
    kind: str,
    found: Callable[[], dict[str, Any]],
    cache_dir: str | None,
) -> Source:
    """Files that are read here; ``found`` brings them: what is written by `_downloaded`."""

    def read(split: str) -> Dataset:
        record = found()
        located = [(name, Path(place)) for name, place in record["splits"][split]]
        if kind in tables.KINDS:
            return tables.read(located, kind, cache_dir)
        return files.read(located, kind, cache_dir, record["separator"])

    return Source(path, section, splits, naming(section, read), texts=kind == "csv")


def _warn_of_unread(builder: Any, path: str, section: str) -> None:
    """Says which files of a directory are not read: those of no split, and those of another kind than the first."""
    if not Path(path).is_dir() or len(builder.builder_configs) > 1:
        return
    known = {Path(url).resolve() for urls in (builder.config.data_files or {}).values() for url in urls}
    if unread := [str(file) for file in _data_files(Path(path)) if file.resolve() not in known]:
        shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
        log.warning("%spath: %d files of %s are in no split and not read: %s", section, len(unread), path, shown)


def _data_files(directory: Path) -> list[Path]:
    """What may hold rows: all files but hidden ones and those that describe the data."""
    inside = ((file, file.relative_to(directory).parts) for file in directory.rglob("*") if file.is_file())
    shown = [file for file, parts in inside if not any(part[0] in "._" for part in parts)]
    return sorted(file for file in shown if file.suffix.lower() not in DESCRIBING and file.stem.upper() not in NAMES)


def _builder(path: str, name: str | None, revision: str | None) -> Any:
    with hub.quiet():
        if Path(path).is_dir():
            return datasets.load_dataset_builder(path, name)
        with hub.asked_once(f"dataset {path!r}"):
            return datasets.load_dataset_builder(path, name, revision=revision)


def _linked(path: str) -> str:
    """A directory to be read in place of one in whose full name `datasets` would see a pattern: links to its files."""
    place = Path(path).resolve()
    if not glob.has_magic(str(place)):
        return path
    links = Path(tempfile.mkdtemp(prefix="fastalign-")).resolve()
    atexit.register(shutil.rmtree, links, ignore_errors=True)
    for entry in sorted(place.rglob("*")):
        here = links / entry.relative_to(place)
        here.mkdir() if entry.is_dir() else here.symlink_to(entry)
    return str(links)


def _check_options(config: Any, path: str, section: str) -> None:
    """Refuses cells of two separators, and what a README.md may say of its files but for the separator."""
    ends = {suffix(str(url)) for urls in (config.data_files or {}).values() for url in urls}
    if {".csv", ".tsv"} <= ends:
        remedy = "which separate their cells differently: keep one kind"
        raise ValueError(f"{section}path: {path!r} holds .csv and .tsv files, {remedy}")
    ours = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
    plain = type(config)()
    for option, value in vars(config).items():
        if option not in ours and value != getattr(plain, option):
            remedy = "load it with the datasets library and give the directory of save_to_disk"
            raise ValueError(f"{section}path: the README.md of {path!r} sets {option}, which is not read: {remedy}")


def _downloaded(builder: Any, path: str, record: Path) -> dict[str, Any]:
    """The files of every split with their names, on this machine; those of the hub are recorded for later runs."""
    manager = datasets.DownloadManager(dataset_name=builder.dataset_name, base_path=builder.base_path)
    kind, separator = _kind(builder), getattr(builder.config, "sep", ",")
    given: Any = builder.config.data_files
    splits = {str(split): [str(url) for url in urls] for split, urls in given.items()}
    if Path(path).is_dir():
        splits = {split: [url.replace(builder.base_path, path, 1) for url in urls] for split, urls in splits.items()}
        return {
            "kind": kind,
            "separator": separator,
            "splits": {k: _extracted(manager, v, v) for k, v in splits.items()},
        }
    try:
        with hub.quiet(), hub.asked_once(f"dataset {path!r}"):
            places: Any = manager.download(splits)
    except UNREADABLE as error:
        raise ValueError(hub.why_not(path, "dataset", error)) from error
    parts = {split: _extracted(manager, urls, places[split]) for split, urls in splits.items()}
    found = {"kind": kind, "separator": separator, "splits": parts}
    record.parent.mkdir(parents=True, exist_ok=True)
    replace_file(record, json.dumps(found).encode())
    return found


def _extracted(manager: Any, names: Sequence[str], places: Sequence[str]) -> list[tuple[str, str]]:
    """Each file and what errors call it; what an archive holds in its place."""
    found = []
    for name, place in zip(names, places, strict=True):
        if Path(name).suffix not in ARCHIVES:
            found.append((_short(name), place))
            continue
        inside = [*manager.iter_files(manager.extract(place))]
        found += [(_short(name) if len(inside) == 1 else f"{_short(name)}/{Path(file).name}", file) for file in inside]
    return found


def _short(name: str) -> str:
    """A file's path as a user would write it: without the commit, and from here where it lies below."""
    if name.startswith("hf://"):
        return re.sub(r"@[0-9a-f]{40}/", "/", name.removeprefix("hf://datasets/"))
    return name.removeprefix(f"{Path.cwd()}/")


def _record(path: str, name: str | None, revision: str | None, cache_dir: str | None) -> Path:
    """Where the files of a dataset of the hub are noted, for a run without the hub."""
    return cache.root(cache_dir) / "hub" / f"{cache.key(path, name, revision)}.json"


def _recorded(record: Path) -> dict[str, Any] | None:
    """What was noted, if all of it is still here."""
    if not record.is_file():
        return None
    found = json.loads(record.read_text())
    places = [place for split in found["splits"].values() for _, place in split]
    return found if all(Path(place).is_file() for place in places) else None


def _prepared(builder: Any, path: str, section: str, split: str) -> Dataset:
    """A split in a format that says its types itself."""
    try:
        with hub.quiet(), hub.asked_once(f"dataset {path!r}"):
            builder.download_and_prepare()
            rows = checked(builder.as_dataset(split=split))
    except UNREADABLE as error:
        raise ValueError(f"{section}path: cannot read {path!r}: {reason_of(error)}") from error
    files.refuse_place(rows.column_names, f"{section}path: {path!r}")
    return rows


def _not_found(path: str, section: str, name: str | None, revision: str | None, error: BaseException) -> str:
    """Why a repository or directory could not be opened."""
    if "onfig" in str(error) and (names := _configurations(path, revision)):
        got = ": name one" if name is None else f", got {name!r}"
        return f"{section}name: {path!r} has the configurations {names}{got}"
    if Path(path).is_dir():
        return f"{section}path: {path!r}: {reason_of(error)}; {HELP}"
    if "evision" in str(error):
        return f"data.revision: {hub.first_line(error)}"
    return f"{section}path: {hub.why_not(path, 'dataset', error, HELP)}"


def _configurations(path: str, revision: str | None) -> list[str]:
    try:
        with hub.quiet(), hub.asked_once(f"dataset {path!r}"):
            return datasets.get_dataset_config_names(path, revision=revision)
    except UNREADABLE:
        return []


def naming(section: str, read: Callable[[str], Dataset]) -> Callable[[str], Dataset]:
    """``read`` with the setting before its errors."""

    def named(split: str) -> Dataset:
        try:
            return read(split)
        except cache.Unwritable:
            raise
        except ValueError as error:
            raise ValueError(f"{section}path: {error}") from error

    return named


def checked(rows: Any) -> Dataset:
    """The rows of files; text that is not UTF-8 is read without complaint and would fail where no line is known."""
    rows.data.validate(full=True)
    return rows


def suffix(name: str) -> str:
    """The suffix that says the kind of a file."""
    place = Path(name)
    return Path(place.stem).suffix if place.suffix == ".gz" else place.suffix


def reason_of(error: BaseException) -> str:
    """The first line of the innermost cause that says anything."""
    while error.__cause__ is not None:
        error = error.__cause__
    if errno_of(error) in FULL:
        place = Path(hf_config.HF_DATASETS_CACHE)
        return f"its copy in {place}: {reason(error, place)}: free some space there, or set HF_DATASETS_CACHE"
    return hub.first_line(error)
