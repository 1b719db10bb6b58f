"""Rows of parquet and arrow files with the types that the files give them; files that differ in a type are refused.

`datasets` takes the types of the first file and turns the values of all others into them: 7 becomes true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, LargeList, Value
from datasets import Sequence as ListOf
from datasets.table import cast_array_to_feature, table_cast

from fastalign import hub
from fastalign.data import cache
from fastalign.data.files import BATCH, PLACE, Located, digest, refuse_place

KINDS = ("parquet", "arrow")

_NUMBERS = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)}
_TEXTS = {"string", "large_string"}
_LISTS = (list, ListOf, LargeList)


class _Differ(Exception):
    """Two types of which none holds the other's values: where, and both."""


def read(files: Sequence[Located], kind: str, cache_dir: str | None = None) -> Dataset:
    """The rows of files one after the other, with their `PLACE`; on disk by content, so that memory stays small.

    A column or field that a file lacks is null there; integers beside fractions become fractions where that is exact.
    """
    names = [(name, digest(name, path)) for name, path in files]
    key = cache.key(names, kind, cache.key(Path(__file__).read_bytes()))

    def write(directory: Path) -> None:
        features = _features(files, kind)
        schema, count = Features({**features, PLACE: Value("string")}).arrow_schema, 0
        with pa.OSFile(str(directory / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for table in _tables(files, kind, features):
                writer.write_table(table.cast(schema))
                count += len(table)
        if count == 0:
            raise ValueError(f"{files[0][0]!r} has no rows: expected at least one")

    return Dataset.from_file(str(cache.entry(cache_dir, f"rows/{key}", write) / "rows.arrow"))


# What a file holds


@contextmanager
def _opened(name: str, path: Path, kind: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema of a file, and its rows in batches."""
    try:
        with pa.OSFile(str(path)) as file:
            if kind == "arrow":
                yield _arrow(file)
            else:
                opened = pq.ParquetFile(file)
                yield opened.schema_arrow, opened.iter_batches(BATCH)
    except (pa.ArrowException, OSError) as error:
        expected = f"expected a whole {kind} file"
        raise ValueError(f"cannot read {name!r}: {hub.first_line(error)}: {expected}") from error


def _arrow(file: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Either of arrow's two formats."""
    try:
        reader = pa.ipc.open_stream(file)
        return reader.schema, iter(reader)
    except (pa.ArrowInvalid, OSError):
        file.seek(0)
        whole = pa.ipc.open_file(file)
        return whole.schema, (whole.get_batch(number) for number in range(whole.num_record_batches))


def _tables(files: Sequence[Located], kind: str, features: Features) -> Iterator[pa.Table]:
    """Every row, with its place."""
    for name, path in files:
        row = 0
        with _opened(name, path, kind) as (_, batches):
            for batch in batches:
                table = pa.Table.from_batches([batch])
                table = _cast(table.cast(_plain(table.schema)), features, name, row)
                places = pa.array([f"{name}, row {row + number}" for number in range(len(table))], pa.string())
                yield table.append_column(PLACE, places)
                row += len(table)


def _plain(schema: pa.Schema) -> pa.Schema:
    """The types of the values: the categories of pandas are texts, or what else they name."""
    for number, column in enumerate(schema):
        if pa.types.is_dictionary(column.type):
            schema = schema.set(number, column.with_type(column.type.value_type))
    return schema


def _cast(table: pa.Table, features: Features, name: str, row: int) -> pa.Table:
    """The rows in the types of all files; other text than UTF-8, and a value that would be lost, are refused."""
    for column in table.column_names:
        at = f"{name}, row %d: column {column!r}"
        values, feature = table[column].combine_chunks(), features[column]
        _check(values, row, f"{at}: expected UTF-8: save the file as UTF-8", lambda part: part.validate(full=True))
        _check(values, row, at, lambda part, feature=feature: cast_array_to_feature(part, feature))
    return table_cast(table, features.arrow_schema)


def _check(values: Any, row: int, said: str, check: Callable[[Any], object]) -> None:
    """Refuses the first value that a check refuses."""
    if (reason := _fails(values, check)) is None:
        return
    bad = next((i for i in range(len(values)) if (reason := _fails(values.slice(i, 1), check)) is not None), 0)
    raise ValueError(f"{said % (row + bad)}: {reason}")


def _fails(values: Any, check: Callable[[Any], object]) -> str | None:
    try:
        check(values)
    except (pa.ArrowException, ValueError, TypeError) as error:
        return hub.first_line(error)
    return None


# The types of all files together


def _features(files: Sequence[Located], kind: str) -> Features:
    """The columns of all files."""
    known: dict[str, Any] = {}
    since: dict[str, str] = {}
    for name, path in files:
        with _opened(name, path, kind) as (schema, _):
            found = _columns(name, _plain(schema))
        refuse_place(found, name)
        for column, feature in found.items():
            try:
                merged = _merge(known.get(column, feature), feature, column)
            except _Differ as differ:
                place, one, other = differ.args
                there = f"column {place!r} holds {_said(other)}, but {_said(one)} in {since[column]}"
                raise ValueError(f"{name}: {there}: save the files with the same types") from differ
            if merged != known.get(column):
                known[column], since[column] = merged, name
    return Features(known)


def _columns(name: str, schema: pa.Schema) -> Features:
    for column in schema.names:
        if schema.names.count(column) > 1:
            raise ValueError(f"{name}: the column {column!r} appears twice: rename one")
    try:
        return Features.from_arrow_schema(schema)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{name}: a column of a type that is not read: {hub.first_line(error)}") from error


def _merge(one: Any, other: Any, at: str) -> Any:
    """What holds the values of both types without changing any."""
    if one == other or other == Value("null"):
        return one
    if one == Value("null"):
        return other
    if isinstance(one, dict) and isinstance(other, dict):
        both = {**other, **one}
        names = [*one, *(name for name in other if name not in one)]
        return {k: _merge(one.get(k, both[k]), other.get(k, both[k]), f"{at}.{k}") for k in names}
    if isinstance(one, _LISTS) and isinstance(other, _LISTS):
        inner = _merge(_items(one), _items(other), at)
        if LargeList in (type(one), type(other)):
            return LargeList(inner)
        return [inner] if isinstance(inner, dict) else ListOf(inner)
    if type(one) is Value and type(other) is Value:
        dtypes = {one.dtype, other.dtype}
        if dtypes <= _TEXTS:
            return Value("large_string")
        if dtypes <= _NUMBERS:
            return Value(str(np.promote_types(one.dtype, other.dtype)))
    raise _Differ(at, one, other)


def _items(feature: Any) -> Any:
    return feature[0] if isinstance(feature, list) else feature.feature


def _said(feature: Any) -> str:
    if isinstance(feature, dict):
        return "objects"
    return "lists" if isinstance(feature, _LISTS) else str(getattr(feature, "dtype", type(feature).__name__))
