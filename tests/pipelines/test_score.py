"""``fastalign score``: rewards of the completions in a file, and the best ones as rows to train on."""

import json

import pytest

from fastalign import cli

REWARDS = """
def long(completions, answer, **columns):
    return [float(len(text)) if right else None for text, right in zip(completions, answer)]
"""


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """The command on three completions of either of two prompts, whose rows have answers; code and output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARDS)
    rows = [{"prompt": "ab -> ", "answer": "ab"}, {"prompt": "ba -> ", "answer": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["ab", "a", "abba"]
    lines = [{"prompt_index": i, "sample_index": s, "prompt": rows[i]["prompt"], "completion": text}
             for i in range(2) for s, text in enumerate(texts)]  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def score(*words, rewards="[{function: mine.py:long, weight: 2.0}, {builtin: exact_match}]"):
        argv = ["score", "--rewards", rewards, "--model.tokenizer", "builtin:letters", "--data.path", "rows.jsonl"]
        code = cli.main([*argv, *words])
        return code, capsys.readouterr()

    return score


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_completion_gets_its_rewards_with_the_columns_of_its_row(run, tmp_path):
    code, said = run()
    assert code == 0 and "holds 6 of 6 completions" in said.out
    made = lines(tmp_path / "scored.jsonl")
    assert [line["rewards"] for line in made[:3]] == [
        {"long": 2.0, "exact_match": 1.0},
        {"long": 1.0, "exact_match": 0.0},
        {"long": 4.0, "exact_match": 0.0},
    ]
    assert [line["reward"] for line in made[:3]] == [5.0, 2.0, 8.0]
    assert made[3]["rewards"] == {"long": None, "exact_match": 0.0}  # no answer: the function gave none


def test_the_best_of_each_prompt_are_rows_for_sft(run, tmp_path):
    run("--best", "2", "--out", "best.jsonl")
    made = lines(tmp_path / "best.jsonl")
    assert [(line["prompt"], line["completion"]) for line in made][:2] == [("ab -> ", "abba"), ("ab -> ", "ab")]
    assert len(made) == 4


@pytest.mark.parametrize(
    "words, text",
    [
        (["--best", "0"], "best: expected completions per prompt, 1 or more, got 0"),
        (["--samples", "none.jsonl"], "samples: no file at 'none.jsonl': make one with fastalign generate"),
        (
            ["--samples", "rows.jsonl"],
            "samples: line 1 of 'rows.jsonl' is no completion as fastalign generate writes it",
        ),
        (["--out", "mine.py"], "out: 'mine.py' exists: choose another file, or replace it with --overwrite"),
        (["--data.limit", "1"], "samples: prompt 1 is beyond the 1 rows of data.path: name their own data"),
        (["--rewards", "[{function: mine.py:wide}]"], "mine.py has no function 'wide'"),
        (["--rewards", "[]"], "rewards: none is set"),
    ],
)
def test_what_cannot_be_scored_is_one_line(run, tmp_path, words, text):
    code, said = run(*words)
    assert code != 0 and text in said.err and said.err.count("\n") <= 2, said.err
    assert not (tmp_path / "scored.jsonl").exists()
