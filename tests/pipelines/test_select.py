"""`fastalign select`: what each filter drops, the core set, and rows that are written unchanged."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign import cli
from fastalign.commands import SelectConfig
from fastalign.config import DataConfig, ModelConfig
from fastalign.data import builtin
from fastalign.models.load import load_policy, save_pretrained
from fastalign.pipelines import select as module
from fastalign.pipelines.select import Choice, are_diverse, embed, select

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2}
WORDS = [*"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, new_cache: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTALIGN_CACHE", new_cache(tmp_path_factory.mktemp("select") / "cache"))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """A model of letters."""
    path, tokenizer = tmp_path_factory.mktemp("model") / "llama", builtin.TOKENIZERS["builtin:letters"]()
    policy = load_policy(ModelConfig(config=LLAMA), tokenizer=tokenizer)
    return ModelConfig(path=str(save_pretrained(policy, tokenizer, path)))


def run(
    folder: Path,
    rows: list[dict[str, Any]],
    model: ModelConfig | None = None,
    data: dict[str, Any] | None = None,
    **s: Any,
) -> list[dict[str, Any]]:
    """The rows that are selected from a file of these."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    settings = SelectConfig(out=str(folder / "out.jsonl"), overwrite=True, **s)
    select(settings, DataConfig(path=str(folder / "rows.jsonl"), **(data or {})), model or ModelConfig())
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


ROWS = [
    {"prompt": "Who?", "completion": "It is Zoë.", "extra": {"a": [1, {"b": None}]}, "n": 1.5},
    {"prompt": "Who?", "completion": "  ", "extra": None, "n": 2},
    {"prompt": "Who?", "completion": "I.", "extra": {}, "n": 3},
    {"prompt": "who? ", "completion": " it  is ZOË.", "extra": None, "n": 4},
    {"prompt": "Who?", "completion": "x" * 50, "extra": None, "n": 5},
    {"prompt": "Where?", "completion": "It is here.", "extra": ["7"], "n": 6},
]


def test_rows_are_written_unchanged_and_every_other_is_counted_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastalign"):
        kept = run(tmp_path, ROWS, min_chars=3, max_chars=20, report=str(tmp_path / "report.html"))
    assert kept == [ROWS[0], ROWS[5]]
    assert "select: rows 6, empty 1, too short 1, too long 1, duplicate 1, kept 2" in caplog.text
    page = (tmp_path / "report.html").read_text()
    assert "select: 2 of 6 rows" in page and "<td>too short<td>1<td>16.7%" in page and "It is Zoë" not in page
    first = (tmp_path / "out.jsonl").read_bytes()
    run(tmp_path, ROWS, min_chars=3, max_chars=20)
    assert (tmp_path / "out.jsonl").read_bytes() == first
    assert run(tmp_path, ROWS, keep_duplicates=True, min_chars=3) == [ROWS[0], *ROWS[3:]]


TALK = [{"role": "user", "content": "A long question?"}, {"role": "assistant", "content": "No."}]


@pytest.mark.parametrize(
    ("row", "data", "text"),
    [
        ({"messages": TALK}, {}, ("A long question?\nNo.", "No.")),
        ({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]}, {}, ("A long question?\nNo.", "No.")),
        ({"text": "All of it."}, {}, ("All of it.", "All of it.")),
        ({"q": "Who? ", "a": "I."}, {"columns": {"prompt": "q", "completion": "a"}}, ("Who? I.", "I.")),
        ({"question": "Who?", "answer": "I."}, {}, ("Who?", "Who?")),
        ({"prompt": "Who? ", "completion": "Me.", "label": True}, {"format": "prompt"}, ("Who? ", "Who? ")),
    ],
)
def test_the_answer_is_what_is_learnt_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], data: dict[str, Any], text: tuple[str, str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "choose", lambda texts, *_: seen.extend(texts) or Choice(texts, [None]))
    assert run(tmp_path, [row], data=data) == [row] and seen == [text]


def test_near_duplicates_are_found_by_their_word_triples(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="near duplicates need datasketch")
    texts = [" ".join(WORDS), " ".join([*WORDS[:-1], "gate"]), " ".join(reversed(WORDS)), "the quick", "The  quick"]
    rows = [{"text": text} for text in texts]
    assert run(tmp_path, rows, near_duplicates=0.8, keep_duplicates=True) == [rows[0], rows[2], rows[3]]
    assert run(tmp_path, rows, near_duplicates=1.0) == rows[:4], "one word of another is no whole copy"


def test_languages_are_told(tmp_path: Path) -> None:
    pytest.importorskip("py3langid", reason="languages need py3langid")
    texts = ["This is the house in which my sister lives.", "Das ist das Haus, in dem meine Schwester wohnt."]
    rows = [{"text": text} for text in texts]
    assert run(tmp_path, rows, languages=["en"]) == rows[:1] and run(tmp_path, rows, languages=["en", "de"]) == rows
    with pytest.raises(ValueError, match=r"languages: expected codes among .*, de, .*, got 'english'"):
        run(tmp_path, rows, languages=["english"])


@pytest.mark.parametrize(
    ("library", "settings"), [("datasketch", {"near_duplicates": 0.8}), ("py3langid", {"languages": ["en"]})]
)
def test_a_missing_library_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    remedy = rf"{next(iter(settings))}: {library} is not installed: pip install 'fastalign\[select\]'"
    with pytest.raises(ImportError, match=remedy):
        run(tmp_path, ROWS, **settings)


def test_embeddings_are_the_means_of_the_plain_forward(model: ModelConfig) -> None:
    policy = load_policy(model)
    texts = ["listen", "a", "sort the letters"]
    found = embed(texts, model, max_length=9)
    tokenizer = builtin.TOKENIZERS["builtin:letters"]()
    policy.model.set_attn_implementation("sdpa")
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:9]])
        mean = policy.backbone(input_ids=ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_a_core_set_covers_what_is_left(tmp_path: Path, model: ModelConfig) -> None:
    rows = [{"text": word} for word in ("aaaa", "aaab", "zzzz", "zzzy", "aaaa", "mnop")]
    report = tmp_path / "report.html"
    kept = run(tmp_path, rows, model, budget=3, clusters=3, report=str(report))
    assert (
        len(kept) == 3 and all(row in rows for row in kept) and kept == run(tmp_path, rows, model, budget=3, clusters=3)
    )
    assert "Core set" in report.read_text() and "outside core set<td>2" in report.read_text()
    assert len(run(tmp_path, rows, model, budget=0.4)) == 2, "of the five that differ"
    assert run(tmp_path, rows, model, max_similarity=1.0, keep_duplicates=True) == [*rows[:4], rows[5]]


def test_rows_like_an_earlier_one_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 3)
    x = torch.nn.functional.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    stay: list[int] = []
    for i in range(len(x)):
        if all(x[i] @ x[j] < 0.7 for j in stay):
            stay.append(i)
    assert are_diverse(x, 0.7).nonzero().flatten().tolist() == stay and 4 < len(stay) < 15


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min_chars": 99}, "no row is left to select: rows 6, empty 1, too short 5"),
        ({"min_chars": 9, "max_chars": 8}, "max_chars: expected at least min_chars, 9, got 8"),
        ({"near_duplicates": 2}, "near_duplicates: expected a number above 0 and up to 1, got 2"),
        ({"budget": -1}, "budget: expected a share below 1 or a number of rows, got -1"),
        ({"clusters": 3}, "clusters: expected 1 or more, beside a budget, got 3"),
        ({"budget": 2}, "no model is given: set model.path"),
        ({"report": "/nowhere/report.html"}, "report: expected the path of a file in a directory that exists"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        run(tmp_path, ROWS, **settings)
    assert "\n" not in str(caught.value)


def test_more_rows_than_there_are_and_rows_of_the_wrong_type_are_refused(tmp_path: Path, model: ModelConfig) -> None:
    with pytest.raises(
        ValueError, match=r"budget: expected .* at most all that are left, got 9 rows in 3 clusters, of 4"
    ):
        run(tmp_path, ROWS, model, budget=9)
    with pytest.raises(ValueError, match=r"row 1: column 'completion': expected a string"):
        run(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 3}])


def test_the_command_takes_flags_and_files_and_replaces_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "select.yaml").write_text(f"data: {{path: {tmp_path}/rows.jsonl}}\nselect: {{min_chars: 3}}\n")
    words = ["select", "--config", str(tmp_path / "select.yaml"), "--out", str(tmp_path / "out.jsonl")]
    assert cli.main([*words, "--max_chars", "20"]) == 0
    assert f"done: {tmp_path}/out.jsonl holds 2 of 6 rows" in capsys.readouterr().out
    assert cli.main(words) == 2 or "exists: choose another file" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite", "--max_char", "20"]) == 2
    assert "did you mean 'select.max_chars'?" in capsys.readouterr().err
