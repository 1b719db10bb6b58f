"""Rows from everywhere, and one clear line when there are none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hub_runs import README

from fastalign.config import DataConfig
from fastalign.data.sources import load_rows, load_train_eval, split_rows

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "tools": None} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)

Write = Callable[[str, str], str]


def save(kind: str, directory: Path) -> str:
    path = directory / f"rows{kind}"
    rows = Dataset.from_list(ROWS)
    if kind == ".json":
        path.write_text(json.dumps(ROWS))
    elif kind in (".jsonl", ".jsonl.gz"):
        path.write_bytes(gzip.compress(LINES.encode()) if kind.endswith("gz") else LINES.encode())
    elif kind == ".csv":
        rows.remove_columns("tools").to_csv(str(path))
    elif kind == ".parquet":
        rows.to_parquet(str(path))
    elif kind == "-files":
        path.mkdir()
        (path / "train.jsonl").write_text(LINES)
    else:
        (rows if kind == "-saved" else DatasetDict(train=rows)).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", "-files", "-saved", "-dict"])
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    rows = load_rows(save(kind, tmp_path))
    assert rows["prompt"][:] == [r["prompt"] for r in ROWS]
    assert rows["completion"][:] == [r["completion"] for r in ROWS]
    assert ("tools" in rows.column_names) == (kind != ".csv"), "other columns pass through"


def test_columns_are_renamed_and_rows_limited(write: Write) -> None:
    path = write("a.jsonl", '{"question": "q", "answer": "a", "prompt": "in the way"}\n' * 4)
    rows = load_rows(path, columns={"prompt": "question", "completion": "answer"}, limit=3)
    assert rows.to_list() == [{"prompt": "q", "completion": "a"}] * 3


def test_a_column_in_the_way_of_a_renamed_one_is_told(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("a.jsonl", '{"question": "q", "prompt": "in the way"}\n')
    assert load_rows(path, columns={"prompt": "question"}).to_list() == [{"prompt": "q"}]
    said = f"data.columns: prompt of {path!r} is left out for what is renamed to it"
    assert [record.getMessage() for record in caplog.records] == [said]
    with pytest.raises(ValueError, match=r"^data\.columns has a column '__place__'"):
        load_rows(path, columns={"__place__": "question"})


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_none(path: str, write: Write) -> None:
    with pytest.raises(ValueError, match=r"^no training data is given: set data\.path"):
        load_train_eval(DataConfig(path=path))
    with pytest.raises(ValueError, match=r"^data\.path: expected a path, got '"):
        load_rows(path)
    with pytest.raises(ValueError, match=r"^data\.eval_path: expected a path, got '"):
        load_train_eval(DataConfig(path=write("a.jsonl", LINES), eval_path=path))


@pytest.mark.parametrize(
    ("split", "evaluated", "seen"),
    [("train", "train", 5), ("train[:3]", "train[2:]", 1), ("train[:3]", "train[3:]", 0)],
)
def test_evaluation_on_training_rows_is_told(
    write: Write, caplog: pytest.LogCaptureFixture, split: str, evaluated: str, seen: int
) -> None:
    data = DataConfig(path=write("a.jsonl", LINES), split=split, eval_split=evaluated)
    _, held_out = load_train_eval(data)
    assert held_out is not None
    said = f"data.eval_split: {seen} of the {len(held_out)} rows of {evaluated} are trained on too: "
    assert (said in caplog.text) == (seen > 0) and len(caplog.records) == (seen > 0)


def test_columns_can_change_places(write: Write) -> None:
    rows = load_rows(
        write("a.jsonl", '{"chosen": "a", "rejected": "b"}\n'), columns={"chosen": "rejected", "rejected": "chosen"}
    )
    assert rows.to_list() == [{"rejected": "a", "chosen": "b"}]


def test_a_changed_file_is_read_again(write: Write) -> None:
    assert load_rows(write("a.jsonl", '{"text": "one"}\n'))["text"][:] == ["one"]
    assert load_rows(write("a.jsonl", '{"text": "two"}\n'))["text"][:] == ["two"]


def test_a_slice_of_a_file(write: Write) -> None:
    assert load_rows(write("a.jsonl", LINES), split="train[1:3]")["prompt"][:] == ["p1", "p2"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            LINES + '{"prompt": "p", "comp\n' + LINES,
            r"a\.jsonl, line 6: .*malformed JSON \(Unterminated string",
        ),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', r"a\.jsonl, line 3: .*malformed JSON"),
        ("a.jsonl", LINES + "[1, 2]\n", r"a\.jsonl, line 6: expected one JSON object, got a list"),
        ("a.json", '[\n{"a": 1},\n{"a": 2 "b": 3}\n]', r"a\.json, line 3: expected a JSON array of objects"),
        ("a.jsonl", "", r"a\.jsonl' .*no rows"),
        ("a.json", "[]", r"a\.json' .*no rows"),
        ("a.parquet", "not parquet", r"cannot read '.*a\.parquet'"),
        ("a.txt", "words", r"a\.txt' is of no known kind: expected one of \.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(write: Write, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_rows(write(name, text))
    assert "\n" not in str(raised.value)


def test_a_malformed_line_of_a_compressed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((LINES + "{]\n").encode()))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 6: "):
        load_rows(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("inside", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(LINES.encode(), mtime=0)[:40],
            r"cannot read '.*a\.jsonl\.gz': .*expected a whole gz file",
        ),
        ("a.jsonl.gz", b"not gzip", r"cannot read '.*a\.jsonl\.gz': Not a gzipped file"),
        ("a.jsonl", LINES.encode() + b'{"prompt": "caf\xe9"}\n', r"a\.jsonl, line 6: .*not UTF-8"),
        ("a.json", b'[\n{"prompt": "caf\xe9"}]', r"a\.json, line 2: expected UTF-8"),
        ("a.csv", b"prompt\na\ncaf\xe9\n", r"a\.csv, line 3: expected UTF-8"),
        ("a.csv", b"", r"a\.csv' has no rows: expected a line of column names and at least one more"),
        ("a.csv", b"prompt,completion\n", r"a\.csv' has no rows: expected a line of column names"),
        ("a.parquet", b"not parquet at all", r"cannot read '.*a\.parquet': .*expected a whole parquet file"),
        ("a.jsonl", LINES.encode() + b"{]\n", r"a\.jsonl, line 6: expected one JSON object, got malformed"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], inside: bool, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_rows(str(tmp_path / "rows" / (name if not inside else "")))
    assert "\n" not in str(raised.value)
    assert "error" not in capfd.readouterr().err, "what the libraries log would stand beside the one line"


def test_a_broken_saved_dataset_is_named(write: Write) -> None:
    place = Path(write("rows/dataset_info.json", "{")).parent
    with pytest.raises(ValueError, match=r"cannot read the saved dataset '.*rows': "):
        load_rows(str(place))


@pytest.mark.parametrize("path", ["absent.jsonl", "/absent", "./absent", "~/absent"])
def test_a_missing_path_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(ValueError, match=f"no file or directory at '{path}'.*builtin:NAME"):
        load_rows(path)


def test_missing_columns_and_splits_are_named(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", LINES)
    with pytest.raises(
        ValueError, match=r"no column 'question' to be 'prompt'; found \['completion', 'prompt', 'tools'\]"
    ):
        load_rows(path, columns={"prompt": "question"})
    with pytest.raises(ValueError, match="renamed once only"):
        load_rows(path, columns={"chosen": "prompt", "rejected": "prompt"})
    with pytest.raises(ValueError, match=r"limit 0\) has no rows"):
        load_rows(path, limit=0)
    with pytest.raises(ValueError, match=r"has the splits \['train'\], got 'test'"):
        load_rows(save("-dict", tmp_path), split="test")
    with pytest.raises(ValueError, match=r"^data\.split: '.*' has the splits \['train'\], got 'test'"):
        load_rows(save("-files", tmp_path), split="test")


def test_held_out_rows_are_a_fixed_random_share() -> None:
    rows = Dataset.from_list([{"text": str(i)} for i in range(50)])
    train, held_out = split_rows(rows, 0.2, seed=1)
    assert (len(train), len(held_out)) == (40, 10)
    assert sorted([*train["text"], *held_out["text"]], key=int) == rows["text"][:]
    assert (
        split_rows(rows, 0.2, seed=1)[1]["text"][:]
        == held_out["text"][:]
        != split_rows(rows, 0.2, seed=2)[1]["text"][:]
    )
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"got {fraction} of 50 rows"):
            split_rows(rows, fraction)


def test_training_and_evaluation_rows(write: Write) -> None:
    path, held_out = write("a.jsonl", LINES), write("b.jsonl", LINES[: len(LINES) // 5 * 2])
    assert load_train_eval(DataConfig(path=path))[1] is None
    train, evaluation = load_train_eval(DataConfig(path=path, eval_path=held_out, limit=4))
    assert evaluation is not None and (len(train), len(evaluation)) == (4, 2)
    train, evaluation = load_train_eval(DataConfig(path=path, eval_fraction=0.4))
    assert evaluation is not None and (len(train), len(evaluation)) == (3, 2)


@pytest.fixture
def configured(write: Write) -> str:
    """A directory with two configurations, as datasets of the hub have them."""
    for name in ("main/train", "main/test", "socratic/train"):
        write(f"rows/{name}.jsonl", "".join(f'{{"prompt": "{name} {i}", "completion": "c"}}\n' for i in range(3)))
    return str(Path(write("rows/README.md", README)).parent)


def prompts(rows: Dataset | None) -> list[str]:
    assert rows is not None
    return rows["prompt"][:]


def test_a_configuration_is_named(configured: str) -> None:
    assert prompts(load_rows(configured, name="main", split="test"))[0] == "main/test 0"
    assert prompts(load_rows(configured, name="socratic"))[0] == "socratic/train 0"
    there = rf"^data\.name: '{configured}' has the configurations \['main', 'socratic'\]"
    with pytest.raises(ValueError, match=f"{there}: name one$"):
        load_rows(configured)
    with pytest.raises(ValueError, match=f"{there}, got 'x'$"):
        load_rows(configured, name="x")
    with pytest.raises(ValueError, match=r"^data\.split: .*has the splits \['train', 'test'\], got 'dev'$"):
        load_rows(configured, name="main", split="dev")


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({"eval_path": True}, "main/test 0"),
        ({"eval_split": "test"}, "main/test 0"),
        ({"eval_split": "test[1:]"}, "main/test 1"),
        ({"eval_path": True, "eval_name": "socratic"}, "socratic/train 0"),
        ({"eval_path": True, "eval_name": "socratic", "eval_split": "train[2:]"}, "socratic/train 2"),
    ],
)
def test_the_evaluation_split_is_the_one_for_that(configured: str, settings: dict[str, object], first: str) -> None:
    path = {"eval_path": configured} if settings.get("eval_path") else {}
    train, held_out = load_train_eval(DataConfig(path=configured, name="main", **{**settings, **path}))
    assert prompts(train)[0] == "main/train 0" and prompts(held_out)[0] == first


@pytest.mark.parametrize(
    ("splits", "settings", "message"),
    [
        (["train", "test", "validation"], {}, r"eval_split: .*\['train', 'validation', 'test'\]: name the one to"),
        (["train"], {}, r"eval_path: .*\['train'\], which is trained on: set data\.eval_fraction"),
        (["train", "test"], {"eval_split": "dev"}, r"eval_split: .*\['train', 'test'\], got 'dev'"),
        (["train", "test"], {"eval_split": "test[:x]"}, r"eval_split: expected a split or a slice .* got 'test\[:x\]'"),
        (["train", "test"], {"eval_fraction": 0.5}, r"eval_fraction: got 0\.5 beside data\.eval_path: set one"),
        (["train", "test"], {"eval_name": "x"}, r"eval_name: .* has the configurations \['default'\], got 'x'"),
        (["train", "test"], {"eval_path": "nope"}, r"eval_path: no file or directory 'nope' here"),
        (["train", "test"], {"eval_path": "no.csv"}, r"eval_path: no file or directory at 'no\.csv'"),
        (["train", "test"], {"eval_path": "builtin:x"}, r"eval_path: expected one of builtin:docstrings"),
        (["train", "test"], {"eval_path": "builtin:docstrings", "eval_split": "dev"}, r"eval_split: .*got 'dev'"),
        (["train", "test"], {"name": "x"}, r"name: .* has the configurations \['default'\], got 'x'"),
        (["train", "test"], {"revision": "v1"}, r"revision: .* is a directory and has no revisions, got 'v1'"),
    ],
)
def test_evaluation_data_that_cannot_be_meant_is_refused(
    write: Write, splits: list[str], settings: dict[str, object], message: str
) -> None:
    paths = [write(f"rows/{split}.jsonl", LINES) for split in splits]
    place = str(Path(paths[0]).parent)
    with pytest.raises(ValueError, match=rf"^data\.{message}") as raised:
        load_train_eval(DataConfig(**{"path": place, "eval_path": place, **settings}))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_a_file_has_one_split_and_no_configurations(write: Write) -> None:
    path = write("a.jsonl", LINES)
    with pytest.raises(ValueError, match=r"^data\.split: '.*a\.jsonl' has the splits \['train'\], got 'test'$"):
        load_rows(path, split="test")
    with pytest.raises(ValueError, match=r"^data\.name: '.*a\.jsonl' is a file and has no configurations, got 'main'"):
        load_rows(path, name="main")
    with pytest.raises(ValueError, match=r"^data\.eval_name: got 'main' without data\.eval_path"):
        load_train_eval(DataConfig(path=path, eval_name="main"))
    with pytest.raises(ValueError, match=r"^data\.eval_path: .* malformed JSON"):
        load_train_eval(DataConfig(path=path, eval_path=write("b.jsonl", '{"prompt": \n')))


@pytest.mark.parametrize("kind", [".jsonl", "-dict", "-saved", "-files", ".parquet"])
def test_slices_of_every_kind(kind: str, tmp_path: Path) -> None:
    path = save(kind, tmp_path)
    whole = prompts(load_rows(path))
    assert prompts(load_rows(path, split="train[1:3]")) == whole[1:3]
    assert prompts(load_rows(path, split="train[-1:]+train[:1]")) == [whole[-1], whole[0]]


def test_a_slice_of_what_is_built_in() -> None:
    assert len(load_rows("builtin:docstring-steps", split="test[1:3]")) == 2


def test_files_of_a_directory_that_are_in_no_split_are_told(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    place = Path(write("rows/train.jsonl", LINES)).parent
    write("rows/more.jsonl", LINES)
    assert len(load_rows(str(place))) == 5
    assert "data.path: 1 files of" in caplog.text and "rows/more.jsonl" in caplog.text


def test_options_of_a_readme_that_are_not_read_are_refused(write: Write) -> None:
    write("rows/train.csv", "prompt;completion\na;b\n")
    head = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n"
    place = Path(write("rows/README.md", f"{head}---\n")).parent
    assert load_rows(str(place)).to_list() == [{"prompt": "a", "completion": "b"}]
    write("rows/README.md", f"{head}  skiprows: 1\n---\n")
    with pytest.raises(ValueError, match=r"^data\.path: the README\.md of '.*' sets skiprows, which is not read"):
        load_rows(str(place))
