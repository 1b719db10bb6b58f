"""A text of a file stays that text, whatever it looks like, and an error names its file and line."""

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastalign.config import DataConfig
from fastalign.data.encode import encode_dataset
from fastalign.data.sources import load_rows, load_train_eval


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return make_tokenizer()


Write = Callable[[str, str], str]

TEXTS = [
    *("None", "null", "NA", "nan", "N/A", "", "True", "false", "007", "7", "1e5", "-0", "1_000", "0x1f", "inf"),
    *("2024-01-01", "2024-01-01T00:00:00Z", "2024-01-01 10:00:00", "12:30", '{"a": 1}', "[1, 2]", '"quoted"'),
    *(" padded ", "tab\tbed", "line\nbreak", "line\r\nbreak", 'a "word", quoted', "café 😀 \u2028", "\ufeffmark", "#x"),
]
"""What readers like to take for something else."""
KINDS = [
    ".jsonl",
    ".jsonl.gz",
    "-array.jsonl",
    ".json",
    "-columns.json",
    ".csv",
    ".csv.gz",
    "-directory",
    "-directory-csv",
]


def save(kind: str, place: Path, rows: list[dict[str, Any]]) -> str:
    """The rows in a file or directory of a kind, each once."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind.startswith("-directory"):
        (place / "rows").mkdir()
        suffix = ".csv" if kind.endswith("csv") else ".jsonl"
        for number, part in enumerate((rows[::2], rows[1::2])):
            if part:
                save(suffix, place / "rows", part)
                (place / "rows" / f"a{suffix}").rename(place / "rows" / f"train-{number}{suffix}")
        return str(place / "rows")
    path = place / f"a{kind}"
    if ".csv" in kind:
        with open(place / "a.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0]], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
        lines = (place / "a.csv").read_bytes().decode()
    if kind in (".json", "-array.jsonl"):
        lines = json.dumps(rows, indent=1)
    if kind == "-columns.json":
        lines = json.dumps({name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]})
    data = lines.encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return str(path)


def in_order(kind: str, values: list[Any]) -> list[Any]:
    """As `save` spreads them over files."""
    return [*values[::2], *values[1::2]] if kind.startswith("-directory") else values


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_stays_as_it_is_written(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": text} for text in TEXTS]
    assert [*load_rows(save(kind, tmp_path, rows))] == in_order(kind, rows)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".json"])
def test_a_column_of_nothing_but_one_kind_of_text_stays_text(kind: str, tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (place := tmp_path / str(number)).mkdir()
        rows = [{"prompt": text, "completion": "x"}] * 2
        assert load_rows(save(kind, place, rows))["prompt"][:] == [text, text]


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".json", "-directory"])
def test_json_values_keep_their_types_in_mixed_columns(kind: str, tmp_path: Path) -> None:
    values = ["7", 7, 7.5, True, None, "true", "null", [1], ["1", 1], {"a": "2024-01-01"}, '{"a": 1}', [], {}]
    rows = [{"prompt": value, "completion": "x"} for value in values]
    read = load_rows(save(kind, tmp_path, rows))["prompt"][:]
    assert [(type(value), value) for value in read] == [(type(v), v) for v in in_order(kind, values)]


def test_conversations_come_back_without_added_fields(write: Write) -> None:
    turns = [{"role": "user", "content": "2024-01-01"}, {"role": "assistant", "content": "007", "name": "None"}]
    tools = [{"name": "f", "parameters": {"x": {"default": None}, "y": {"enum": ["1", 2]}}}]
    rows = [{"messages": turns, "tools": tools}, {"messages": turns[:1], "tools": tools[:0]}]
    assert [*load_rows(write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))] == rows


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_conversations_of_a_file_are_trained_like_those_of_a_dataset(
    write: Write, tokenizer: PreTrainedTokenizerBase, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    turns = [{"role": "user", "content": "2024-01-01"}, {"role": "assistant", "content": "four"}]
    row = {"messages": turns} if form == "messages" else {"prompt": turns[:1], "completion": turns[1:]}
    data = DataConfig(
        path=write("a.jsonl", json.dumps(row) + "\n" + json.dumps(row)), chat_template=write("t.jinja", template)
    )
    read = encode_dataset(load_train_eval(data)[0], tokenizer, data, "sft")
    known = encode_dataset(Dataset.from_list([row, row]), tokenizer, data, "sft")
    assert read.table.to_dict() == known.table.to_dict() and "written out" not in caplog.text
    assert "user: 2024-01-01" in tokenizer.decode(read.table[0]["input_ids"])


def test_columns_that_change_late_and_come_late(write: Write) -> None:
    rows: list[dict[str, Any]] = [{"prompt": str(i), "score": i, "ids": []} for i in range(1200)]
    rows += [{"prompt": "2024-01-01", "score": 0.5, "ids": [1], "late": None}, {"prompt": "x", "late": "yes"}]
    read = load_rows(write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [*read] == [{"prompt": None, "score": None, "ids": None, "late": None, **row} for row in rows]


def test_whatever_json_says_is_read(write: Write) -> None:
    draw = random.Random(0)

    def value(depth: int = 0) -> Any:
        kinds = [draw.choice(TEXTS), draw.randint(-(2**66), 2**66), draw.random(), draw.randint(0, 9), True, None]
        if depth < 3:
            kinds += [[value(depth + 1) for _ in range(draw.randint(0, 3))], {draw.choice("ab"): value(depth + 1)}]
        return draw.choice(kinds)

    for number in range(30):
        rows = [{name: value() for name in "xyz"} for _ in range(draw.randint(1, 6))]
        path = write(f"{number}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        assert [*load_rows(path)] == rows


def test_the_marks_that_editors_leave_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfprompt,completion\r\n"a\r\nb", c \r\n\r\n')
    assert [*load_rows(str(tmp_path / "a.csv"))] == [{"prompt": "a\r\nb", "completion": " c "}]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert load_rows(str(tmp_path / "a.jsonl"))["prompt"][:] == ["a", "b"]


def test_a_long_cell_is_read(write: Write) -> None:
    text = "word, " * 50_000
    assert load_rows(write("a.csv", f'prompt,completion\n"{text}",x\n'))["prompt"][:] == [text]


def test_judgements_in_csv_are_numbers(write: Write) -> None:
    path = write("a.csv", "prompt,completion,label,margin,extra\na,b,true,1,1\nc,d,False,0.25,2\n")
    rows = load_rows(path)
    assert (rows["label"][:], rows["margin"][:], rows["extra"][:]) == ([True, False], [1.0, 0.25], ["1", "2"])
    renamed = load_rows(write("b.csv", "prompt,completion,liked\na,b,1\nc,d,0\n"), columns={"label": "liked"})
    assert renamed["label"][:] == [1.0, 0.0]


def test_a_slice_without_rows_is_refused_in_csv_too(write: Write) -> None:
    with pytest.raises(ValueError, match=r"^data\.path: .* \(split 'train\[:0\]', limit None\) has no rows"):
        load_rows(write("a.csv", "prompt,completion,label\na,b,true\n"), split="train[:0]")


@pytest.mark.parametrize("form", ['{"a": %s}', '[{"a": %s}]', '{\n"a": %s}', '{"a": %s}\n{"a": 1}\n'])
@pytest.mark.parametrize("depth", [900, 100_000])
def test_values_nested_too_deep_are_one_line(write: Write, form: str, depth: int) -> None:
    with pytest.raises(ValueError, match=r"^data\.path: .*a\.json, line \d") as raised:
        load_rows(write("a.json", form % ("[" * depth + "]" * depth)))
    assert "\n" not in str(raised.value)


def test_an_empty_array_is_no_rows_and_ends_once(write: Write) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(write("a.json", "[ ]\n"))
    with pytest.raises(ValueError, match=r"line 1: .*more after its end"):
        load_rows(write("b.json", "[]]"))


@pytest.mark.parametrize(("cell", "got"), [("maybe", "a string"), ("", "null"), ("nan", "NaN"), ("2", "2.0")])
def test_a_cell_that_is_no_judgement_is_named(
    write: Write, tokenizer: PreTrainedTokenizerBase, cell: str, got: str
) -> None:
    data = DataConfig(path=write("a.csv", f'prompt,completion,label\na,b,true\n"c\nd",e,{cell}\n'))
    with pytest.raises(ValueError, match=rf"a\.csv, line 3: column 'label': expected true or false.*got {got}$"):
        encode_dataset(load_train_eval(data)[0], tokenizer, data, "kto")
    encode_dataset(load_train_eval(data)[0], tokenizer, data, "sft")  # reads no label


def test_empty_cells_are_empty_texts(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    data = DataConfig(path=write("a.csv", "prompt,completion\na,b\nc,\n,d\n"))
    encoded = encode_dataset(load_train_eval(data)[0], tokenizer, data, "sft")
    assert (encoded.counts["kept"], encoded.counts["dropped_empty_completion"]) == (2, 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"a": "x"}\n{"a": "\\ud800 x"}\n',
            r"a\.jsonl, line 2: .* escape \\ud800, half of a surrogate pair",
        ),
        (
            "a.json",
            '[{"a": "x"},\n{"a": ["\\udc00"]}]',
            r"a\.json, line 2: .* escape \\udc00, half of a surrogate pair",
        ),
        ("a.jsonl", '{"a": 1, "a": 2}\n', r"a\.jsonl, line 1: .*the key 'a' twice"),
        ("a.jsonl", '{"a": {"b": 1, "b": 2}}\n', r"a\.jsonl, line 1: .*the key 'b' twice"),
        ("a.jsonl", '{"a": 1}\n{"a": NaN}\n', r"a\.jsonl, line 2: .*NaN, which is not JSON"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', r"a\.json, line 2: .*Expecting ',' delimiter"),
        ("a.json", '[{"a": 1}]\n[]', r"a\.json, line 2: .*more after its end"),
        ("a.json", '[{"a": 1}\n]]', r"a\.json, line 2: .*more after its end"),
        ("a.csv", "a,b\r1,2\r", r"a\.csv, line 1: .*save the file with \\n at the ends of lines"),
        ("a.jsonl", '{"a": 1}\n{"__place__": "x"}\n', r"a\.jsonl, line 2 has a column '__place__'"),
        ("a.json", '[{"a": 1},\n"x"]', r"a\.json, line 2: expected a JSON array of objects, got a str"),
        ("a.json", '[{"a": 1},\n', r"a\.json, line 2: expected a JSON array of objects"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, line 3: expected 2 cells, as in the first line, got 1"),
        ("a.csv", 'a,b\n"x\ny",2\n3,4,5\n', r"a\.csv, line 4: expected 2 cells, as in the first line, got 3"),
        ("a.csv", 'a,b\n1,"x" y\n', r"a\.csv, line 2: not a CSV row"),
        ("a.csv", 'a,b\n1,"x\n2,y\n', r"a\.csv, line 2: not a CSV row"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv, line 1: the column 'a' appears twice"),
    ],
)
def test_what_cannot_be_kept_is_refused(write: Write, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.path: .*{message}") as raised:
        load_rows(write(name, text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.jsonl", '{"prompt": "p", "completion": "c"}\n\n{"prompt": 7, "completion": "c"}\n', r"a\.jsonl, line 3"),
        ("a.json", '[{"prompt": "p", "completion": "c"},\n{"prompt": 7, "completion": "c"}]', r"a\.json, line 2"),
        ("rows/train.jsonl", '{"prompt": 7, "completion": "c"}\n', r"rows/train\.jsonl, line 1"),
    ],
)
@pytest.mark.parametrize("processes", [None, 2])
def test_a_number_for_a_text_is_refused_where_it_stands(
    write: Write, tokenizer: PreTrainedTokenizerBase, name: str, text: str, place: str, processes: int | None
) -> None:
    path = write(name, text)
    data = DataConfig(path=str(Path(path).parent) if "/" in name else path, num_proc=processes)
    with pytest.raises(
        ValueError,
        match=rf"{place}: column 'prompt': expected a string .*, got a number: put it in quotes, or map .*data\.col",
    ):
        encode_dataset(load_train_eval(data)[0], tokenizer, data, "sft")


def test_rows_of_other_sources_are_named_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_list([{"prompt": 6, "completion": "c"}, {"prompt": 7, "completion": "c"}])
    rows.to_parquet(str(tmp_path / "a.parquet"))
    data = DataConfig(path=str(tmp_path / "a.parquet"), split="train[1:]")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: column 'prompt': expected a string .*, got a number"):
        encode_dataset(load_train_eval(data)[0], tokenizer, data, "sft")


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_data(write: Write) -> None:
    path = write("a.jsonl", '{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"^cannot write the cache .*set data\.cache_dir or FASTALIGN_CACHE"):
        load_rows(path, cache_dir=path)
