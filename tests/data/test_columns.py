"""Every column of the rows is read, or it is said that it is not, once."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversations import ALONE, QUESTION, TEMPLATE, WHOLE, Make, answer, encode, pair, parts, turn, user
from datasets import Dataset

from fastalign.config import Config, DataConfig
from fastalign.data import formats
from fastalign.data.encode import encode_dataset
from fastalign.engine.setup import load_data


def test_pairs_without_a_question_are_said(make_tokenizer: Make, caplog: pytest.LogCaptureFixture) -> None:
    rows = [pair([answer("four")], [answer("five")]), WHOLE]
    with caplog.at_level(logging.WARNING):
        encode(rows, make_tokenizer(chat_template=TEMPLATE), "dpo")
    assert [r.message for r in caplog.records] == [
        "1 of 2 rows have no prompt, their completions are trained without a question: "
        "name the prompt's column with data.columns, e.g. {prompt: question}"
    ]


@pytest.mark.parametrize(
    ("row", "method", "unread"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "d", "id": 1}, "dpo", ["system", "id"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0, "kind": "d"}, "dpo", ["margin"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0, "kind": "d"}, "reward", []),
        ({"prompt": "a", "completion": "b", "tools": "c", "input": "d"}, "sft", ["input", "tools"]),
        ({"prompt": [user()], "completion": [answer("b")], "tools": "[]", "text": "x"}, "sft", ["text"]),
        ({"messages": [user(), answer("b")], "text": "x", "history": ["y"]}, "sft", ["history", "text"]),
        ({**ALONE, "messages": [user()], "extra": 1}, "reward:soft_label", ["extra"]),
        ({**WHOLE, "messages": [user()], "prompt": QUESTION}, "reward:soft_label", ["messages"]),
        ({"prompt": "a", "completion": "b", "label": True, "history": ["x"]}, "kto", ["history"]),
        ({"prompt": "a", "completions": ["b"], "scores": [1], "input": "x", "tools": "y"}, "rrhf", ["input", "tools"]),
        ({"prompt": "a", "completions": [[answer("b")]], "scores": [1], "tools": "[]"}, "rrhf", []),
        ({"prompt": "a", "completions": ["b"], "labels": [1], "question": "x"}, "reward:process", ["question"]),
    ],
)  # fmt: skip
def test_every_column_that_is_not_read_is_named_once(
    make_tokenizer: Make, row: dict, method: str, unread: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fastalign.data.columns"):
        encode([row], make_tokenizer(chat_template=TEMPLATE), method)
    repeated = row.get("messages") == row.get("chosen", [])[:1]
    context = [name for name in unread if name in formats.CONTEXT and not repeated]
    said = {r.levelname: r.message for r in caplog.records if r.name == "fastalign.data.columns"}
    others = [name for name in unread if name not in context]
    assert said.get("INFO", "columns not read: ") == f"columns not read: {', '.join(others)}"
    assert ("WARNING" in said) == bool(context) and ", ".join(context) in said.get("WARNING", "")
    if context:
        assert "data.columns" in said["WARNING"]


def test_a_column_that_one_of_the_first_rows_needs_is_read(
    make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**WHOLE, "messages": [user("x")]}, {**ALONE, "messages": [user()]}]
    with caplog.at_level(logging.INFO, logger="fastalign.data.columns"):
        encode(rows, make_tokenizer(chat_template=TEMPLATE), "reward:soft_label")
    assert "messages" not in caplog.text


def test_messages_that_repeat_prompt_and_answer_need_no_joining(
    make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    row = {**WHOLE, "prompt": QUESTION, "messages": WHOLE["chosen"]}
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    with caplog.at_level(logging.WARNING):
        encode([row], tokenizer, "dpo")
    assert not caplog.records
    encode([row, {**row, "messages": [turn("system", "be kind"), *WHOLE["chosen"]]}], tokenizer, "dpo")
    assert "columns that may belong to the prompt are not read: messages" in caplog.text


def test_a_column_of_text_that_is_refused_is_not_said_to_be_trained(
    make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": QUESTION, "chosen": json.dumps([answer("four")]), "rejected": [answer("five")]}
    with pytest.raises(ValueError, match="must both be strings or both be lists"):
        encode([row], make_tokenizer(chat_template=TEMPLATE), "dpo")
    assert not caplog.records


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_the_remedy_for_answers_in_a_column_of_their_own_is_said(make_tokenizer: Make, name: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    row = {name: [user()], "chosen": [answer("four")], "rejected": [answer("five")]}
    with pytest.raises(ValueError, match=rf"^row 0: '{name}' ends before the answer: set data\.format=preference"):
        encode([row], tokenizer, "sft")
    row = {name: [user()], "completion": "four"}
    with pytest.raises(ValueError, match=rf"^row 0: '{name}' ends .*data\.columns, {{prompt: {name}}}, to learn from"):
        encode([row], tokenizer, "sft")


NULLS = [
    ({"prompt": "a", "completion": "b"}, "sft", 1, "'completion'"),
    ({"prompt": "a", "completion": "b", "label": True}, "kto", 1, "'completion'"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", 1, "'chosen' or 'rejected'"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "kto", 2, "'chosen' or 'rejected'"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "sft", 1, "'chosen'"),
    ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 0]}, "rrhf", 1, "'completions'"),
    ({"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}, "reward:process", 1, "'completions'"),
    ({"text": "The cat"}, "sft", 1, "'text'"),
]


@pytest.mark.parametrize(("row", "method", "number", "column"), NULLS)
def test_rows_of_another_shape_are_said(
    make_tokenizer: Make, row: dict, method: str, number: int, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Dataset.from_list([{**row, "response": None}, {"prompt": "a", "response": "b"}])
    with caplog.at_level(logging.WARNING, logger="fastalign.data.columns"):
        counts = encode_dataset(rows, make_tokenizer(), DataConfig(), method).counts
    assert counts["dropped_null_completion"] == number and "dropped_empty_completion" not in counts
    said = f"{number} examples are dropped, {column} is null; one has "
    assert [r.message[: len(said)] for r in caplog.records] == [said] and "'response'" in caplog.text


def test_tools_given_twice_are_refused(make_tokenizer: Make) -> None:
    tools = [{"name": "adder"}]
    row = {"messages": [user(), answer("four")], "tools": tools, "chat_template_kwargs": {"tools": tools}}
    with pytest.raises(ValueError, match=r"^row 0: .* 'tools' and 'chat_template_kwargs' both give tools"):
        parts(make_tokenizer(chat_template=TEMPLATE), row, "sft")


def test_answers_beside_whole_texts_are_not_passed_over_in_silence(
    make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    row = {**ALONE, "messages": [user("hi"), answer("ho"), user()]}
    with caplog.at_level(logging.INFO, logger="fastalign.data.columns"):
        encode([row], make_tokenizer(chat_template=TEMPLATE), "sft")
    said = "columns of answers are not read: chosen, rejected: sft trains on whole texts here, set data.format"
    assert [r.message[: len(said)] for r in caplog.records if r.levelname == "WARNING"] == [said]
    assert "columns not read: probability" in caplog.text


@pytest.mark.parametrize("written", [json.dumps, str])
def test_conversations_written_out_as_text_are_said(
    make_tokenizer: Make, written: Callable[[Any], str], caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": written([user()]), "completion": "four"}
    with caplog.at_level(logging.WARNING):
        encode([row, row], make_tokenizer(), "sft")
    assert [r.message[:36] for r in caplog.records] == ["column 'prompt' is trained as text, "]


def test_of_training_and_held_out_rows_a_column_is_named_once(
    tmp_path: Path, make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", "system": "d", "id": 1}\n' * 4
    )
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = Config(method="dpo", data=DataConfig(path=str(tmp_path / "rows.jsonl"), eval_fraction=0.5))
    config.model.tokenizer = str(tmp_path / "tokenizer")
    config.model.config = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    with caplog.at_level(logging.INFO):
        load_data(config)
    assert len([r for r in caplog.records if "not read" in r.message]) == 2
    assert caplog.text.count("not read: id") == 1
