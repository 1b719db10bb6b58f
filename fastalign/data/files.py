"""Rows of JSON and CSV files exactly as they are written: a text stays that text, whatever it looks like.

The readers of `datasets` guess: "2024-01-01" becomes a date, 007 a number, None nothing at all. Here a JSON value keeps
the type that the file gives it, and a cell of a CSV file is text (see `numbers`).
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from fastalign.data import anyjson, cache
from fastalign.data.anyjson import AnyJson
from fastalign.words import kind_of

PLACE = "__place__"
"""The column that says where a row is, as errors name it: ``a.jsonl, line 6``."""


def refuse_place(names: Iterable[str], owner: str) -> None:
    """Refuses a column of the data that would be overwritten."""
    if PLACE in names:
        raise ValueError(f"{owner} has a column {PLACE!r}, a name that is kept for the rows' places: rename it")


Located = tuple[str, Path]
"""A file, and what errors call it."""
Rows = Iterator[tuple[str, dict[str, Any]]]
"""The rows of a file, each with its place in it: ``line 6``."""

Line = tuple[int, str]
"""A line's number and its text."""

BATCH = 1000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LEAST = {"json": "at least one JSON object", "csv": "a line of column names and at least one more"}


def read(files: Sequence[Located], kind: str, cache_dir: str | None = None, separator: str = ",") -> Dataset:
    """The rows of files one after the other, with their `PLACE`; on disk by content, so that memory stays small.

    The kind is "json" (a line per object, or one array of objects) or "csv"; ``.gz`` is known by its content.
    """
    if kind == "csv":
        csv.field_size_limit(2**31 - 1)  # the default refuses cells above 128 KiB
    names = [(name, digest(name, path)) for name, path in files]
    key = cache.key(
        names, kind, separator, cache.key(*(Path(str(m)).read_bytes() for m in (__file__, anyjson.__file__)))
    )

    def write(directory: Path) -> None:
        features = _features(_all_rows(files, kind, separator))
        if features is None:
            raise ValueError(f"{files[0][0]!r} has no rows: expected {_LEAST[kind]}")
        _write(directory / "rows.arrow", features, _all_rows(files, kind, separator))

    return Dataset.from_file(str(cache.entry(cache_dir, f"rows/{key}", write) / "rows.arrow"))


def numbers(rows: Dataset, names: Iterable[str]) -> Dataset:
    """The rows of a CSV file with numbers, true and false in the columns that hold judgements, not texts.

    A cell that is none of these stays text, for the error that names its row; an empty one is null.
    """
    for name in (name for name in names if name in rows.column_names):
        values = [_number(text) for text in rows[name]]
        kind = reduce(_merge, map(_kind, values), None)
        kind = float if kind is _MIXED and not any(isinstance(value, str) for value in values) else kind
        column, feature = _array(values, _feature(kind)), _feature(kind)
        rows = rows.remove_columns(name).add_column(name, column, feature=feature)  # type: ignore[arg-type]
    return rows


def _number(text: str) -> Any:
    word = text.strip().lower()
    if word in ("", "true", "false"):
        return {"": None, "true": True, "false": False}[word]
    try:
        return text if "_" in word else float(word)
    except ValueError:
        return text


def _all_rows(files: Sequence[Located], kind: str, separator: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row, with its place."""
    for name, path in files:
        try:
            for place, row in _csv_rows(name, path, separator) if kind == "csv" else _json_rows(name, path):
                yield f"{name}, {place}", row
        except (OSError, EOFError, zlib.error) as error:
            kind = Path(name).suffix[1:] or "text"
            raise ValueError(f"cannot read {name!r}: {error}: expected a whole {kind} file") from error


def digest(name: str, path: Path) -> str:
    """A hash of what a file holds."""
    try:
        digest = hashlib.blake2b(digest_size=16)
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {name!r}: {error.strerror}") from error


def _open(name: str, path: Path) -> BinaryIO:
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b" or name.endswith(".gz")
    return gzip.open(path, "rb") if compressed else open(path, "rb")  # type: ignore[return-value]


def _lines(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, with their ends and without a byte order mark."""
    with _open(name, path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                got = f"expected UTF-8, got bytes that are not UTF-8 ({error.reason})"
                raise ValueError(f"{name}, line {number}: {got}: save the file as UTF-8") from error


# JSON


def _json_rows(name: str, path: Path) -> Rows:
    rest = _lines(name, path)
    filled = ((number, line) for number, line in rest if line.strip())
    if (first := next(filled, None)) is None:
        return
    if first[1].lstrip()[0] == "[":
        yield from _array_rows(name, _text(first, None, rest))
        return
    second = next(filled, None)
    may_be_one_value = ".jsonl" not in Path(name).suffixes
    if may_be_one_value and (second is None or not _is_whole(first[1])):
        yield from _table_rows(name, _text(first, second, rest))
        return
    for number, line in itertools.chain([first], filter(None, [second]), filled):
        yield f"line {number}", _object(name, number, line)


def _text(first: Line, second: Line | None, rest: Iterable[Line]) -> str:
    """The whole text, with its lines at their line numbers."""
    head = [first, *filter(None, [second])]
    parts = ["\n" * (number - before - 1) + line for before, (number, line) in zip([0, first[0]], head, strict=False)]
    return "".join([*parts, *(line for _, line in rest)])


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _object(name: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line.rstrip("\r\n"), **_STRICT)
    except json.JSONDecodeError as error:
        got = f"malformed JSON ({error.msg}, column {error.colno})"
    except (ValueError, RecursionError) as error:
        got = str(error)
    else:
        if isinstance(value, dict) and (got := _half_pair(line, value)) is None:
            return value
        got = got if isinstance(value, dict) else kind_of(value)
    raise ValueError(f"{name}, line {number}: expected one JSON object, got {got}: fix or remove the line")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different: of two values one would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"one with the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name}, which is not JSON")


_STRICT: dict[str, Any] = {"object_pairs_hook": _once, "parse_constant": _no_number}
"""What the standard library would let pass."""


def _half_pair(text: str, value: Any) -> str | None:
    """What is said of an escape that is half a character; no tokenizer takes it."""
    if not _SURROGATE.search(text):
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"the escape \\u{ord(error.object[error.start]):04x}, half of a surrogate pair and no character"
    return None


def _array_rows(name: str, text: str) -> Rows:
    """The objects of one array; an error names the line."""
    decoder = json.JSONDecoder(**_STRICT)
    space = re.compile(r"\s*")
    at = space.match(text, space.match(text).end() + 1).end()  # type: ignore[union-attr]
    line, counted = 1, 0
    closed = text[at : at + 1] == "]"
    at += closed
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _bad_array(name, getattr(error, "lineno", line), getattr(error, "msg", str(error))) from error
        got = _half_pair(text[at:end], value) if isinstance(value, dict) else kind_of(value)
        if got is not None:
            raise _bad_array(name, line, got)
        yield f"line {line}", value
        at = space.match(text, end).end()  # type: ignore[union-attr]
        if text[at : at + 1] not in (",", "]"):
            raise _bad_array(name, text.count("\n", 0, at) + 1, "Expecting ',' delimiter")
        closed = text[at] == "]"
        at = space.match(text, at + 1).end()  # type: ignore[union-attr]
    if text[at:].strip(" \t\r\n"):
        raise _bad_array(name, text.count("\n", 0, at) + 1, "more after its end")


def _bad_array(name: str, line: int, got: str) -> ValueError:
    return ValueError(f"{name}, line {line}: expected a JSON array of objects, got {got}: fix the line")


def _table_rows(name: str, text: str) -> Rows:
    """The rows of one object: of a table by columns, as pandas writes it, or the object itself."""
    value = _document(name, text)
    columns = [*value.values()]
    keys = [*columns[0]] if columns and isinstance(columns[0], dict) else []
    if keys and keys[0].isdigit() and all(isinstance(column, dict) and [*column] == keys for column in columns):
        yield from ((f"row {key}", {name: column[key] for name, column in value.items()}) for key in keys)
    elif value:
        yield "line 1", value


def _document(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, **_STRICT)
    except (ValueError, RecursionError) as error:
        line, got = getattr(error, "lineno", 1), getattr(error, "msg", str(error))
        message = f"{name}, line {line}: expected one JSON object, got malformed JSON ({got})"
        raise ValueError(f"{message}: fix or remove the line") from error
    got = _half_pair(text, value) if isinstance(value, dict) else kind_of(value)
    if got is not None:
        raise ValueError(f"{name}: expected one JSON object, got {got}")
    return value


# CSV


def _csv_rows(name: str, path: Path, separator: str) -> Rows:
    reader = csv.reader((line for _, line in _lines(name, path)), delimiter=separator, strict=True)
    start = 1
    try:
        header = next((cells for cells in reader if cells), None)
        if header is None:
            return
        columns = _columns(name, header)
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) not in (0, len(columns)):
                got = f"expected {len(columns)} cells, as in the first line, got {len(cells)}"
                raise ValueError(f"{name}, line {start}: {got}: put cells that hold {separator!r} in double quotes")
            if cells:
                yield f"line {start}", dict(zip(columns, cells, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        remedy = "save the file with \\n at the ends of lines" if "new-line" in str(error) else "fix its quotes"
        raise ValueError(f"{name}, line {start}: not a CSV row ({error}): {remedy}") from error


def _columns(name: str, header: list[str]) -> list[str]:
    columns = [column or f"Unnamed: {position}" for position, column in enumerate(header)]
    if twice := {column for column in columns if columns.count(column) > 1}:
        raise ValueError(f"{name}, line 1: the column {min(twice)!r} appears twice: rename one")
    return columns


# Types: those of the values, where arrow has them; everything else is kept as JSON

_MIXED, _WIDE = object(), object()
"""The kinds of what has no one arrow type, and of integers that a float would round."""
_EXACT, _INT64 = range(-(2**53), 2**53 + 1), range(-(2**63), 2**63)


def _kind(value: Any) -> Any:
    """What a value is: a Python type, ("list", kind of the items), None for null, or `_MIXED`."""
    if value is None or type(value) in (str, bool, float):
        return None if value is None else type(value)
    if type(value) is int:
        return int if value in _EXACT else _WIDE if value in _INT64 else _MIXED
    if isinstance(value, list):
        inner = reduce(_merge, map(_kind, value), None)
        return _MIXED if inner is _MIXED else ("list", inner)
    return _MIXED


def _merge(one: Any, other: Any) -> Any:
    """What holds the values of both kinds without changing any."""
    if one == other or other is None:
        return one
    if one is None:
        return other
    for pair, both in ((int, float), float), ((int, _WIDE), _WIDE):
        if (one, other) in (pair, pair[::-1]):
            return both
    if isinstance(one, tuple) and isinstance(other, tuple):
        inner = _merge(one[1], other[1])
        return _MIXED if inner is _MIXED else ("list", inner)
    return _MIXED


def _features(rows: Rows) -> Features | None:
    """The columns of all rows; None without a row."""
    kinds: dict[str, Any] = {}
    found = False
    for place, row in rows:
        found = True
        refuse_place(row, place)
        try:
            kinds |= {name: _merge(kinds.get(name), _kind(value)) for name, value in row.items()}
        except RecursionError as error:
            raise ValueError(f"{place}: lists within lists, too deep to be read") from error
    return Features({name: _feature(kind) for name, kind in kinds.items()}) if found else None


def _feature(kind: Any) -> Any:
    if kind is _MIXED:
        return AnyJson()
    if isinstance(kind, tuple):
        return ListOf(_feature(kind[1]))
    return Value({None: "null", str: "string", bool: "bool", int: "int64", _WIDE: "int64", float: "float64"}[kind])


def _write(path: Path, features: Features, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    features = Features({**features, PLACE: Value("string")})
    schema, rows = features.arrow_schema, iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := [*itertools.islice(rows, BATCH)]:
            table = {name: [row.get(name) for _, row in batch] for name in features if name != PLACE}
            table[PLACE] = [place for place, _ in batch]
            arrays = [_array(values, features[name]) for name, values in table.items()]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _array(values: list[Any], feature: Any) -> pa.Array:
    if isinstance(feature, AnyJson):
        return pa.array(map(feature.encode_example, values), pa.string())
    return pa.array(values, Features({"x": feature}).arrow_schema.field("x").type)
