"""What a run says before its first step: facts of the run, and one example with its scored part marked."""

import io
import json
import os
import pty
import sys

import numpy as np
import pytest

from fastalign.data.examples import TokenExample
from fastalign.engine.output import overview
from fastalign.engine.output.overview import Part, decode_parts, describe_counts, escape, example_lines, shorten, show
from fastalign.engine.settings import check_settings
from fastalign.engine.train import train
from fastalign.models.load import load_tokenizer


@pytest.fixture
def tokenizer(configure):
    return load_tokenizer(configure("sft").model)


def block(text):
    """The printed facts by name, and the lines of the example."""
    lines = text.split("\nstep 1/")[0].splitlines()
    rows = [line.split("  ", 1) for line in lines if not line.startswith(" ")]
    return {name: said.strip() for name, said in rows}


def test_a_run_says_what_it_is_about_to_do(configure, materials, tmp_path, capsys):
    rows = [json.loads(line) for line in (materials / "rows.jsonl").read_text().splitlines()]
    rows[3]["chosen"] = ""
    long = rows[0]["prompt"] + "word " * 400
    rows[5].update(prompt=long)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"data.eval_path": str(materials / "held_out.jsonl")}
    config = configure("dpo", **held_out, **{"data.path": str(tmp_path / "rows.jsonl"), "run.steps": 32})
    config.loss = {"name": "ipo", "beta": 0.5}
    config.run.steps, config.run.epochs = None, 0.1
    train(config)
    said = block(capsys.readouterr().out)
    assert said["method"] == "dpo" and said["loss"] == "ipo (beta 0.5)"
    assert said["model"] == "random weights from model.config: llama, 2 layers"
    assert said["dtype"] == "weights float32, autocast off" and said["device"] == "cpu, 1 rank"
    assert said["reference"] == "the model as it starts" and said["writes to"] == config.run.output_dir
    assert said["training"].startswith(f"{tmp_path / 'rows.jsonl'}: 94 of 96 rows kept; dropped: ")
    assert "empty completion 1" in said["training"] and "prompt too long 1" in said["training"]
    assert "truncated to 192 tokens: " in said["training"]
    assert said["held out"].startswith(f"{materials / 'held_out.jsonl'}: 16 of 16 rows kept; none dropped; ")
    assert said["steps"].startswith("2 of 6 examples each, the last of the run of 4: ") and said["steps"].endswith(
        "epochs of 94 examples"
    )
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 32 + 2 * 512 * 32
    assert said["parameters"] == f"{weights:,}, all trained"
    assert said["example: prompt"] == escape(rows[0]["prompt"])
    for side in ("chosen", "rejected"):
        assert said[f"example: {side}"] == f"[[{escape(rows[0][side])}<eos>]]"


def test_the_example_is_left_out_on_request_and_a_resumed_run_says_where_it_goes_on(configure, capsys):
    train(configure("sft", **{"run.show_example": False, "run.steps": 2, "optim.schedule": "constant"}))
    assert "\nexample" not in capsys.readouterr().out
    train(configure("sft", **{"run.resume": True, "run.steps": 3, "optim.schedule": "constant"}))
    output = capsys.readouterr().out
    assert "going on after step 2" in output and "\nexample  " in output  # a free setting


def test_adapters_are_told_by_their_share(configure, capsys):
    pytest.importorskip("peft")
    train(configure("sft", **{"model.lora": {"r": 2}, "run.steps": 1}))
    said = block(capsys.readouterr().out)["parameters"]
    total, trained = (int(word.replace(",", "")) for word in said.split() if word[0].isdigit() and "%" not in word)
    assert 0 < trained < total / 5 and said.endswith(f"are trained ({trained / total:.2%})")


@pytest.mark.parametrize("setting", ["data.path", "model.config"])
def test_a_run_without_data_or_model_is_refused_before_any_work(configure, setting, tmp_path):
    config = configure("sft", **{setting: None})
    message = {"data.path": "no training data is given: set data.path to", "model.config": "no model is given: set"}
    with pytest.raises(ValueError, match=message[setting]) as refused:
        train(config)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_directory_that_is_not_there_is_refused_before_any_work_with_the_run_that_makes_it(configure):
    config = configure("distill", **{"reference.path": "runs/teacher/model"})
    with pytest.raises(ValueError, match=r"^reference\.path: no directory at 'runs/teacher/model': .*output_dir runs"):
        check_settings(config)
    check_settings(configure("distill", **{"reference.path": "owner/name"}))  # may be the hub's


# --- the example ---------------------------------------------------------------------------------------------------


def encoded(tokenizer, *pieces):
    """A sequence of (text, scored) pieces."""
    ids, scored = [], []
    for text, is_scored in pieces:
        new = tokenizer(text)["input_ids"]
        ids, scored = ids + new, scored + [is_scored] * len(new)
    return np.array(ids), np.array(scored)


def test_every_scored_stretch_of_a_conversation_is_marked(tokenizer):
    sequence = encoded(tokenizer, ("Ask", False), (" one", True), (" more", False), (" two", True))
    assert decode_parts(*sequence, tokenizer) == [
        *(Part("Ask", False), Part(" one", True), Part(" more", False), Part(" two", True))
    ]
    many = encoded(tokenizer, *(pair for _ in range(20) for pair in (("a", False), ("b", True))))
    parts = decode_parts(*many, tokenizer)
    assert len(parts) == overview.MOST_PARTS + 1 and parts[4].text == " ... 32 parts more ... "


def test_a_character_of_several_tokens_is_never_broken(tokenizer):
    ids = np.array(tokenizer("a\N{SNOWMAN}b")["input_ids"])  # a byte-level vocabulary that has no snowman
    assert len(ids) == 5
    for cut in range(1, 5):
        parts = decode_parts(ids, np.arange(5) >= cut, tokenizer)
        assert "".join(part.text for part in parts) == "a\N{SNOWMAN}b"


def test_of_ranked_candidates_the_best_and_the_worst_are_shown(tokenizer):
    sequences = tuple(encoded(tokenizer, ("Q:", False), (text, True)) for text in (" so-so", " good", " bad"))
    example = TokenExample(sequences, 0).fill(scores=[0.5, 2, -1])
    assert example_lines(example, tokenizer, "rrhf") == [
        ("example: prompt", [Part("Q:", False)]),
        ("example: best (2)", [Part(" good", True)]),
        ("example: worst (-1)", [Part(" bad", True)]),
    ]


def test_sides_that_share_nothing_have_an_empty_prompt(tokenizer):
    sides = tuple(encoded(tokenizer, (text, True)) for text in ("yes", "no"))
    example = TokenExample(tuple((ids, np.arange(len(ids)) > 0) for ids, _ in sides), 0)  # nothing predicts the first
    assert [name for name, _ in example_lines(example, tokenizer, "dpo")] == [
        *("example: prompt", "example: chosen", "example: rejected"),
    ]
    assert example_lines(example, tokenizer, "dpo")[0][1] == []


def test_a_label_is_told_and_a_reward_models_last_tokens_are_marked(tokenizer):
    labelled = TokenExample((encoded(tokenizer, ("Q:", False), (" no", True)),), 0).fill(scores=[0])
    assert [name for name, _ in example_lines(labelled, tokenizer, "kto")] == ["example (bad)"]
    sides = [encoded(tokenizer, (text, False), ("<eos>", True)) for text in ("Q: yes", "Q: no")]
    pair = TokenExample(tuple(sides), 0, own_rows=True)
    lines = dict(example_lines(pair, tokenizer, "reward"))
    assert lines["example: both begin"][0].text.startswith("Q:")
    assert lines["example: chosen"][-1] == lines["example: rejected"][-1] == Part("<eos>", True)


def test_a_long_text_loses_its_middle():
    assert shorten("x" * 20, 20) == "x" * 20
    assert shorten("begin" + "x" * 1000 + "end!!", 10) == "begin ... 1,000 characters ... end!!"


def test_counts_are_spelled():
    assert (
        describe_counts({"rows": 4, "kept": 8}, 9) == "4 rows make 8 examples; none dropped; truncated to 9 tokens: 0"
    )
    counts = {"rows": 9, "kept": 6, "truncated": 1, "dropped_too_long": 2, "candidates_too_long": 3}
    expected = "6 of 9 rows kept; dropped: too long 2; truncated to 9 tokens: 1; candidates too long 3"
    assert describe_counts(counts, 9) == expected


# --- where it is printed -------------------------------------------------------------------------------------------

LINES = [("method", [Part("sft", False)]), ("example", [Part("given\n\x1b[31m", False), Part("scored\u202e", True)])]


def test_brackets_mark_what_is_scored_where_there_is_no_colour(capsys):
    show(LINES)
    assert capsys.readouterr().out.splitlines() == [
        "method   sft",
        r"example  given\n\x1b[31m[[scored\u202e]]",
        "         (text between [[ and ]] is scored)",
    ]


def test_an_output_that_knows_ascii_only_gets_escapes(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    show([("example", [Part("naïve \N{SNOWMAN}", True)])])
    output.flush()
    assert output.buffer.getvalue().startswith(rb"example  [[na\xefve \u2603]]")


@pytest.mark.parametrize("colours", [True, False])
def test_a_terminal_shows_what_is_scored_in_green(monkeypatch, colours):
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        show(LINES)
        terminal.flush()
        seen = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "\x1b[31m" not in seen  # the text's own
    if colours:
        assert "\x1b[32mscored\\u202e\x1b[0m" in seen and "green text is scored" in seen and "[[" not in seen
    else:
        assert "[[scored\\u202e]]" in seen and "\x1b[32m" not in seen
