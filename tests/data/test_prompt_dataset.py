"""Prompts for sampling: from any layout, with every other column for reward functions."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastalign.config import DataConfig
from fastalign.data.prompt_dataset import PromptDataset, encode_prompts
from fastalign.data.sources import load_rows

Make = Callable[..., PreTrainedTokenizerFast]
TEMPLATE = (
    "{% if tools %}{{ '<tools>' + tools[0]['name'] }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ASKED = [{"role": "user", "content": "Two and two?"}]


def run(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, room: int = 8, **options: Any) -> PromptDataset:
    return encode_prompts(Dataset.from_list(rows), tokenizer, DataConfig(**options), room)


@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"])
def test_a_text_is_continued_with_the_tokenizers_own_tokens_in_front(make_tokenizer: Make, adds: str) -> None:
    tokenizer = make_tokenizer(adds)
    prompts = run([{"prompt": "Two and", "answer": "4"}], tokenizer)
    assert tokenizer.decode(prompts.ids(0)) == ("<s>" if "bos" in adds else "") + "Two and"
    assert prompts.ids(0).dtype == np.int64 and prompts.prompt(0) == "Two and"
    assert prompts.columns(0) == {"answer": "4"}
    ((ids, scored),) = prompts.fetch([0])[0].sequences
    assert ids.tolist() == prompts.ids(0).tolist() and scored.tolist() == [False] + [True] * (len(ids) - 1)
    assert prompts.lengths().tolist() == prompts.totals().tolist() == [len(ids)]


LAYOUTS = {
    "gsm8k": ({"question": "Two and two?", "answer": "#### 4"}, {}, {"answer": "#### 4"}),
    "verl": (
        {
            "data_source": "gsm8k",
            "prompt": ASKED,
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 0, "split": None},
        },
        {},
        {
            "data_source": "gsm8k",
            "reward_model": {"style": "rule", "ground_truth": "4"},
            "extra_info": {"index": 0, "split": None},
        },
    ),
    "openrlhf": ({"input": "Two and two?", "label": "4"}, {}, {"label": "4"}),
    "openrlhf messages": ({"context_messages": ASKED, "label": "4"}, {}, {"label": "4"}),
    "sharegpt": ({"prompt": [{"from": "human", "value": "Two and two?"}], "n": [1, 2]}, {}, {"n": [1, 2]}),
    "renamed": ({"q": "Two and two?", "question": "no"}, {"columns": {"prompt": "q"}}, {"question": "no"}),
    "preference": (
        {"prompt": "Two and two?", "chosen": "4", "rejected": "5"},
        {},
        {"chosen": "4", "rejected": "5"},
    ),
    "ranked": ({"prompt": "Two and two?", "completions": ["4", "5"], "scores": [1, 0]}, {}, {"scores": [1, 0]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_libraries_are_read_as_they_are(
    make_tokenizer: Make, tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    row, options, columns = LAYOUTS[layout]
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    with caplog.at_level(logging.INFO, "fastalign"):
        rows = load_rows(str(tmp_path / "rows.parquet"), **options)
        prompts = encode_prompts(rows, tokenizer, DataConfig(), 8)
    assert prompts.columns(0) == columns
    talks = layout in ("verl", "openrlhf messages", "sharegpt")
    assert prompts.prompt(0) == (ASKED if talks else "Two and two?")
    assert tokenizer.decode(prompts.ids(0)) == ("<user>Two and two?<assistant>" if talks else "Two and two?")
    assert ("those of the data are not trained on" in caplog.text) == (layout in ("preference", "ranked"))
    assert ("continued as they are" in caplog.text) != talks


def test_messages_are_written_with_their_tools_and_without_marks_of_training(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bos", chat_template=TEMPLATE)
    talk = [*ASKED, {"role": "assistant", "content": "4", "weight": 0}, {"role": "user", "content": "Sure?"}]
    prompts = run([{"prompt": talk, "tools": [{"name": "sum"}]}], tokenizer)
    assert tokenizer.decode(prompts.ids(0)) == "<tools>sum<user>Two and two?<assistant>4<user>Sure?<assistant>"
    assert prompts.prompt(0) == [*ASKED, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]


def test_prompts_without_room_for_a_completion_are_dropped_and_counted(
    make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    texts = ["a" * 12, "", "b" * 13, "c", None, "  "]
    lengths = [len(tokenizer(text)["input_ids"]) for text in (texts[0], texts[2])]
    assert lengths == [12, 13]
    with caplog.at_level(logging.INFO, "fastalign"):
        prompts = run([{"prompt": text, "n": i} for i, text in enumerate(texts)], tokenizer, room=8, max_length=20)
    assert [prompts.columns(i)["n"] for i in range(len(prompts))] == [0, 3]
    assert prompts.counts == {"rows": 6, "dropped_empty_prompt": 3, "dropped_prompt_too_long": 1, "kept": 2}
    said = "prompts: rows 6, dropped empty prompt 3, dropped prompt too long 1, kept 2 "
    assert f"{said}(at most 12 tokens: max_length 20 less 8 for the completion)" in caplog.text
    with pytest.raises(
        ValueError, match=r"no row is left .* prompt too long 1 \(at most 12 tokens: max_length 20 less 8"
    ):
        run([{"prompt": "b" * 13}], tokenizer, room=8, max_length=20)


def test_tokens_are_cached_by_content(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, rows = make_tokenizer(), [{"prompt": "What is two?", "answer": "2"}]
    first = run(rows, tokenizer)
    monkeypatch.setattr("fastalign.data.encode.Encoder.run", lambda *_: pytest.fail("is in the cache"))
    again = run(rows, tokenizer)
    assert again.fingerprint == first.fingerprint and again.ids(0).tolist() == first.ids(0).tolist()
    with pytest.raises(pytest.fail.Exception):
        run(rows, tokenizer, room=9)
    with pytest.raises(pytest.fail.Exception):
        run([{"prompt": "What is two?", "answer": "two"}], tokenizer)


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"text": "a"}, {}, r"on-policy method expects the columns prompt or question or .*; found \['text'\]: rename"),
        (
            {"instruction": "a", "input": "b"},
            {},
            r"several columns may be the prompt: instruction, input: name the one",
        ),
        ({"prompt": "a"}, {"format": "text"}, r"on-policy method trains on prompt, got data\.format='text'"),
        ({"prompt": "a", "image": "b"}, {}, "images are not supported"),
        ({"prompt": 3}, {}, r"row 0: column 'prompt': expected a string or a list of \{role, content\}, got a number"),
        ({"prompt": [*ASKED, {"role": "assistant", "content": "4"}]}, {}, "'prompt' ends with a turn of the assistant"),
        ({"prompt": ASKED}, {}, "the tokenizer has no chat template: set data.chat_template"),
        ({"prompt": "a"}, {"max_length": 8}, r"data\.max_length: .* got 8, and sampler\.max_new_tokens 8"),
        ({"prompt": "a"}, {"num_proc": 0}, r"data\.num_proc: expected at least 1 process"),
    ],
)
def test_what_holds_no_prompt_is_refused_in_one_line(
    make_tokenizer: Make, row: dict[str, Any], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        run([row], make_tokenizer(), **options)
    assert "\n" not in str(caught.value)


def test_context_that_is_not_read_is_named(make_tokenizer: Make, caplog: pytest.LogCaptureFixture) -> None:
    run([{"prompt": "Who is it?", "context": "It is Ann."}], make_tokenizer())
    assert "columns that may belong to the prompt are not read: context: join them to the prompt" in caplog.text
