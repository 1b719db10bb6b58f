"""Prompts with other examples' completions: each once, from another row, the same whatever is read with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fastalign.config import DataConfig
from fastalign.data import sources
from fastalign.data.encode import encode_dataset
from fastalign.data.loader import Rows
from fastalign.data.mismatch import MismatchedDataset, choose_partners
from fastalign.data.pack import pack
from fastalign.models.groups import pick_sequences

Make = Callable[..., PreTrainedTokenizerFast]

UNPAIRED = [
    {"prompt": "The cat", "completion": " sat on the mat", "label": True},
    {"prompt": "Two and", "completion": " two is four", "label": False},
    {"prompt": "Human: ask away.", "completion": " of course", "label": True},
]


def run(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, max_length: int = 99) -> MismatchedDataset:
    data = DataConfig(max_length=max_length)
    return MismatchedDataset(encode_dataset(Dataset.from_list(rows), tokenizer, data, "kto"), max_length)


def parts(tokenizer: PreTrainedTokenizerFast, dataset: MismatchedDataset, index: int) -> tuple[str, str]:
    other = dataset[index].mismatched
    assert other is not None and other.example_id == dataset[index].example_id
    ((ids, scored),) = other.sequences
    return tokenizer.decode(ids[~scored]), tokenizer.decode(ids[scored])


def test_a_prompt_gets_the_completion_of_the_next_row(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer("bos")
    dataset = run(UNPAIRED, tokenizer)
    assert [parts(tokenizer, dataset, i) for i in range(3)] == [
        ("<s>The cat", " two is four</s>"),
        ("<s>Two and", " of course</s>"),
        ("<s>Human: ask away.", " sat on the mat</s>"),
    ]


def test_columns_are_read_whole_and_not_a_row_at_a_time(make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes a minute for a million rows."""
    dataset = encode_dataset(Dataset.from_list(UNPAIRED), make_tokenizer(), DataConfig(), "kto")
    monkeypatch.setattr(Dataset, "__iter__", None)
    made = MismatchedDataset(dataset, 99)
    assert made.partners.tolist() == [1, 2, 0] and made.lengths() is made.lengths()


def test_of_pairs_each_side_gets_the_same_side_of_the_next_row(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    rows = [{"prompt": p, "chosen": f" good{p}", "rejected": f" bad{p}"} for p in ("The", "Two", "may")]
    dataset = run(rows, tokenizer)
    assert [parts(tokenizer, dataset, i)[1] for i in range(6)] == [
        f" {side}{p}</s>" for p in ("Two", "may", "The") for side in ("good", "bad")
    ]


def test_of_a_dialogue_all_earlier_turns_are_the_prompt(make_tokenizer: Make) -> None:
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    turns = [{"role": role, "content": text} for role, text in (("user", "two?"), ("assistant", "four."))]
    asked = {"prompt": [*turns, turns[0]], "completion": [turns[1]], "label": True}
    other = {**asked, "prompt": [turns[0]], "completion": [{"role": "assistant", "content": "the cat"}]}
    given_turns, scored = parts(tokenizer, run([asked, other], tokenizer), 0)
    assert given_turns == "<user>two?<|end|><assistant>four.<|end|><user>two?<|end|><assistant>"
    assert scored == "the cat<|end|>"


def test_the_sequence_is_cut(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    length = len(tokenizer("Human: ask away.")["input_ids"]) + 1
    dataset = run(UNPAIRED, tokenizer, length)
    lengths = [len(e.mismatched.sequences[0][0]) for e in dataset if e.mismatched]
    assert max(lengths) == length and all(e.mismatched and e.mismatched.sequences[0][1].any() for e in dataset)


def test_one_row_has_no_other(make_tokenizer: Make) -> None:
    pair = {"prompt": "Two", "chosen": " a", "rejected": " b"}
    for rows in ([pair], UNPAIRED[:1]):
        with pytest.raises(
            ValueError, match=r"two rows or more to train on, and as many held out if any are; got one$"
        ):
            run(rows, make_tokenizer())


@given(st.lists(st.integers(1, 2), min_size=2, max_size=9))
def test_partners_are_of_another_row_and_each_is_taken_once(sizes: list[int]) -> None:
    rows = np.repeat(np.arange(len(sizes)) * 3 + 7, sizes)
    partners = choose_partners(rows)
    assert (rows[partners] != rows).all()
    if len(rows) > 3:  # of rows with (2, 1) examples, two would need the one
        assert sorted(partners.tolist()) == list(range(len(rows)))


def test_steps_carry_them_whatever_the_batch(make_tokenizer: Make) -> None:
    dataset = run(UNPAIRED * 2, make_tokenizer())
    seen: dict[int, set[tuple[int, ...]]] = {}
    for size, tokens in ((1, 30), (3, 400), (6, 4000)):
        source = Rows(dataset, size, seed=size)
        for _ in range(6):
            for batch in pack(source.next(), tokens, share_prefix=True):
                other = pick_sequences(batch.companion, slice(1, None, 2))
                assert other.example_ids == batch.example_ids
                ends = other.cu_seqlens.tolist()
                for example, start, end in zip(batch.example_ids, ends[:-1], ends[1:], strict=True):
                    seen.setdefault(example, set()).add(tuple(other.labels[start:end].tolist()))
                assert len(batch.columns.scores) == batch.num_sequences == other.num_sequences
    assert sorted(seen) == list(range(6)) and all(len(labels) == 1 for labels in seen.values())


def test_real_preferences(make_tokenizer: Make, shared_file: Callable[[str], Path]) -> None:
    rows = sources.load_rows(str(shared_file("data/hh-rlhf/harmless-base-test.jsonl.gz")), limit=200)
    tokenizer = make_tokenizer()
    plain = encode_dataset(rows, tokenizer, DataConfig(max_length=512), "kto")
    dataset = MismatchedDataset(plain, 512)
    for own, example in zip(plain, dataset, strict=True):
        assert example.mismatched is not None
        ((ids, scored),), ((mine, mask),) = example.mismatched.sequences, own.sequences
        start = int(np.argmax(mask))
        assert len(ids) <= 512 and ids[:start].tolist() == mine[:start].tolist() and scored[start:].all()
        assert tokenizer.decode(ids[start : start + 1]).strip() or len(ids) > start
