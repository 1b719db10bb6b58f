"""Parquet and arrow files keep the types they give, agree on them, and an error names file, column and row."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from fastalign.config import DataConfig
from fastalign.data.files import PLACE
from fastalign.data.sources import load_rows, load_train_eval

Save = Callable[..., str]


@pytest.fixture(params=["parquet", "arrow"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Save:
    """``save({"label": [7]}, ...)``: a directory of a file for each; its path."""

    def put(*files: Any) -> str:
        (place := tmp_path / "rows").mkdir()
        for name, columns in zip("abc", files, strict=False):
            table = columns if isinstance(columns, pa.Table) else pa.table(columns)
            if request.param == "parquet":
                pq.write_table(table, place / f"{name}.parquet")
            else:
                with pa.ipc.new_stream(str(place / f"{name}.arrow"), table.schema) as writer:
                    writer.write_table(table)
        return str(place)

    return put


def not_text() -> pa.Table:
    """Rows whose second is no UTF-8."""
    ends = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0")
    return pa.table({"prompt": pa.Array.from_buffers(pa.string(), 2, [None, ends, pa.py_buffer(b"a\xe9x")])})


DAY = pa.array([0], pa.date32())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"label": [True]}, {"label": [7]}], r"b\.\w+: column 'label' holds int64, but bool in .*a\.\w+: save the "),
        ([{"completion": ["007"]}, {"completion": [7]}], r"b\.\w+: column 'completion' holds int64, but string in .*a"),
        ([{"completion": [7]}, {"completion": ["007"]}], r"b\.\w+: column 'completion' holds string, but int64"),
        ([{"x": [None]}, {"x": ["a"]}, {"x": [True]}], r"c\.\w+: column 'x' holds bool, but string in .*b\."),
        ([{"text": ["x"]}, {"text": DAY}], r"b\.\w+: column 'text' holds date32, but string in"),
        ([{"margin": [0.5]}, {"margin": ["3"]}], r"b\.\w+: column 'margin' holds string, but float64 in"),
        ([{"m": [[{"role": "user"}]]}, {"m": [[{"role": 7}]]}], r"b\.\w+: column 'm\.role' holds int64, but string"),
        ([{"m": [[{"role": "user"}]]}, {"m": ["hello"]}], r"b\.\w+: column 'm' holds string, but lists in"),
        ([{"x": [2**53 + 1]}, {"x": [0.5]}], r"a\.\w+, row 0: column 'x': Integer value 9007199254740993 not in range"),
        ([{"prompt": ["x"]}, not_text()], r"b\.\w+, row 1: column 'prompt': expected UTF-8: save the file as UTF-8"),
        ([{"x": pa.array([], pa.int64())}], r"a\.\w+' has no rows: expected at least one"),
        ([{PLACE: ["x"]}], r"a\.\w+ has a column '__place__', a name that is kept"),
    ],
)
def test_files_that_would_be_changed_are_refused(save: Save, files: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.path: .*{message}") as raised:
        load_rows(save(*files))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("files", "values"),
    [
        ([{"x": [3]}, {"x": [1.7]}], [3.0, 1.7]),
        ([{"x": [0.5]}, {"x": [3]}], [0.5, 3.0]),
        ([{"x": pa.array([3], pa.int32())}, {"x": [2**40]}], [3, 2**40]),
        ([{"x": ["007"]}, {"x": pa.array(["7"], pa.large_string())}], ["007", "7"]),
        ([{"x": [None]}, {"x": [True]}, {"x": [None]}], [None, True, None]),
        ([{"x": [[]]}, {"x": [["a"]]}], [[], ["a"]]),
        ([{"y": [1]}, {"x": ["a"]}], [None, "a"]),
        ([{"x": pa.array(["a", "b"]).dictionary_encode()}], ["a", "b"]),
        ([{"x": pa.array([], pa.int64())}, {"x": [3]}], [3]),
        (
            [{"x": [[{"role": "a"}]]}, {"x": [[{"role": "b", "weight": 0}], None]}],
            [[{"role": "a", "weight": None}], [{"role": "b", "weight": 0}], None],
        ),
    ],
)
def test_files_that_fit_together_keep_their_values(save: Save, files: list[Any], values: list[Any]) -> None:
    read = load_rows(save(*files))["x"][:]
    assert [(type(value), value) for value in read] == [(type(value), value) for value in values]


def test_rows_of_a_directory_are_named_by_file(save: Save) -> None:
    place = save({"x": [1, 2]}, {"x": [3]})
    places = load_train_eval(DataConfig(path=place))[0][PLACE]
    assert [Path(said).name.replace("parquet", "arrow") for said in places] == [
        "a.arrow, row 0",
        "a.arrow, row 1",
        "b.arrow, row 0",
    ]


def test_a_damaged_arrow_file_is_not_called_parquet(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(ValueError, match=r"cannot read '.*a\.arrow': .*: expected a whole arrow file$"):
        load_rows(str(tmp_path / "rows"))


def test_patterns_in_names_are_names(tmp_path: Path) -> None:
    for name in ("run[1]", "run*", "run2"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"x": [name]}), tmp_path / name / "a.parquet")
    for name in ("run[1]", "run*"):
        assert load_rows(str(tmp_path / name / "a.parquet"))["x"][:] == [name]
        assert load_rows(str(tmp_path / name))["x"][:] == [name]
    broken = tmp_path / "a?" / "in [b]" / "rows.jsonl"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"x": "kept"}')
    assert load_rows(str(tmp_path / "a?"))["x"][:] == ["kept"]
    broken.write_text('{"x": 1}\n{')
    with pytest.raises(ValueError, match=re.escape(f"{broken}, line 2: expected one JSON object")):
        load_rows(str(tmp_path / "a?"))


@pytest.mark.parametrize("form", ["numpy", "pandas"])
def test_a_saved_dataset_is_read_without_its_format(tmp_path: Path, form: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    Dataset.from_list(rows).with_format(form).save_to_disk(str(tmp_path / "d[1]"))
    read = [*load_rows(str(tmp_path / "d[1]"))]
    assert read == rows and type(read[0]["messages"]) is list


def test_a_saved_dataset_keeps_no_column_of_places(tmp_path: Path) -> None:
    Dataset.from_list([{PLACE: "x"}]).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(ValueError, match=r"^data\.path: '.*rows' has a column '__place__'.*rename it$"):
        load_rows(str(tmp_path / "rows"))


@pytest.mark.parametrize("other", ["b.tsv", "b.txt", "c.JSONL", "b.csv", "c.CSV", "e.xlsx"])
def test_files_of_another_kind_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str) -> None:
    (place := tmp_path / "rows").mkdir()
    for name in ("a.jsonl", "d.jsonl", other, "README.md", ".hidden"):
        (place / name).write_text('{"prompt": "a"}\n' if name.endswith("jsonl") else "")
    with caplog.at_level(logging.WARNING):
        assert len(load_rows(str(place))) == 2
    assert f"data.path: 1 files of {place} are in no split and not read: {place}/{other}" in caplog.text


def test_cells_set_apart_by_commas_and_tabs_are_refused(tmp_path: Path) -> None:
    (place := tmp_path / "rows").mkdir()
    (place / "a.csv").write_text("prompt,completion\na,b\n")
    (place / "b.tsv").write_text("prompt\tcompletion\na\tb\n")
    with pytest.raises(ValueError, match=r"^data\.path: '.*rows' holds \.csv and \.tsv files, .*: keep one kind$"):
        load_rows(str(place))
