"""Built-in text: real, split without leaks, and a tokenizer that gives it back."""

import collections
import threading
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from fastalign.config import DataConfig
from fastalign.data import builtin, cache
from fastalign.data.encode import encode_dataset
from fastalign.data.sources import load_rows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return builtin.train_tokenizer(1024)


def test_there_is_enough_real_text() -> None:
    corpus = builtin.corpus()
    words = sum(len(d.text.split()) for d in corpus)
    assert 5_000 < len(corpus) < 12_000 and 150_000 < words < 600_000, "both vary with the interpreter"
    assert len({d.text for d in corpus}) == len(corpus)


def test_splits_share_no_module_and_no_text() -> None:
    corpus = builtin.corpus()
    sides = {side: {d.module for d in corpus if builtin.is_held_out(d.module) == side} for side in (True, False)}
    assert {m.partition(".")[0] for m in sides[True]}.isdisjoint(m.partition(".")[0] for m in sides[False])
    assert builtin.is_held_out("_pyio") == builtin.is_held_out("io")
    train, test = load_rows("builtin:docstrings"), load_rows("builtin:docstrings", "test")
    assert 0.03 < len(test) / (len(train) + len(test)) < 0.3
    assert set(train["chosen"]).isdisjoint(test["chosen"])
    assert set(train["rejected"]).isdisjoint(set(test["chosen"])), "a rejected side of the same split"


def test_pairs_are_of_three_kinds_and_repeatable() -> None:
    rows = load_rows("builtin:docstrings", "test")
    share = {kind: count / len(rows) for kind, count in collections.Counter(rows["kind"]).items()}
    assert set(share) == {"other", "shuffled", "truncated"} and min(share.values()) > 0.08
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        assert rejected.strip() and rejected != chosen and row["completion"] == chosen
        assert row["text"] == row["prompt"] + chosen and row["prompt"].endswith("\n")
        if row["kind"] == "truncated":
            assert chosen.startswith(rejected) and rejected[-1] not in ".!?"
        if row["kind"] == "shuffled":
            assert sorted(chosen.split()) == sorted(rejected.split())
    assert rows.to_list() == builtin.load("docstrings", "test").to_list()
    assert rows["rejected"][:] != builtin.load("docstrings", "test", seed=1)["rejected"][:]


def test_the_tokenizer_gives_text_back_and_has_fixed_special_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 1024
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    for text in ("Return the size of a file.", "  naïve\n\ttabs — and ☃"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_training_the_tokenizer_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [d.text for d in builtin.corpus()[:500]]
    first, second = (builtin._train_bpe(texts, 600).get_vocab() for _ in range(2))
    assert first == second
    assert builtin.train_tokenizer(1024).get_vocab() == tokenizer.get_vocab()


def test_its_template_marks_assistant_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "four."}]
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    scored = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(scored) == "four.<|eos|>"


@pytest.mark.parametrize(
    ("method", "sequences", "scores"),
    [
        ("sft", {1}, {0}),
        ("distill", {1}, {0}),
        ("dpo", {2}, {0}),
        ("reward", {2}, {0}),
        ("kto", {1}, {1}),
        ("rrhf", {3}, {3}),
        ("reward:soft_label", {2}, {2}),
        ("reward:k_wise", {3}, {3}),
    ],
)
def test_every_method_trains_on_it(
    tokenizer: PreTrainedTokenizerFast, method: str, sequences: set[int], scores: set[int]
) -> None:
    rows = load_rows("builtin:docstrings", "test", limit=50)
    encoded = encode_dataset(rows, tokenizer, DataConfig(max_length=256), method)
    assert encoded.counts["kept"] > 45
    assert {len(e.sequences) for e in encoded} == sequences
    assert {len(e.columns.known().get("scores", ())) for e in encoded} == scores
    assert {e.kind for e in encoded} == {"other", "shuffled", "truncated"}


def test_process_rewards_train_on_steps(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows("builtin:docstring-steps", "test", limit=50)
    encoded = encode_dataset(rows, tokenizer, DataConfig(max_length=256), "reward:process")
    assert len(encoded) > 45 and all(len(e.columns.step_labels) == e.sequences[0][1].sum() > 0 for e in encoded)


def test_words_have_their_letters_sorted_and_are_split_by_word() -> None:
    train, test = load_rows("builtin:sort_letters"), load_rows("builtin:sort_letters", "test")
    assert 1_500 < len(train) < 4_000 and len(test) == builtin.HELD_OUT_WORDS
    assert {*train["prompt"]}.isdisjoint(test["prompt"]) and len({*train["prompt"]}) == len(train)
    for row in [*train, *test]:
        word, arrow, rest = row["prompt"].partition(builtin.ARROW)
        assert 4 <= len(word) <= 7 and arrow and not rest
        assert row["completion"] == row["answer"] == row["chosen"] == "".join(sorted(word))
        assert row["rejected"] != row["answer"] and abs(len(row["rejected"]) - len(word)) <= 1
    assert {*builtin.load("sort_letters", "test", seed=1)["prompt"]} == {*test["prompt"]}, "whatever the seed"


def test_letters_are_tokens_and_prompts_join_their_completions() -> None:
    tokenizer = builtin.TOKENIZERS["builtin:letters"]()
    assert len(tokenizer) == 32 and len(tokenizer("listen -> ")["input_ids"]) == 7
    assert tokenizer("Ä")["input_ids"] == [tokenizer.unk_token_id]
    rows = load_rows("builtin:sort_letters", "test")
    encoded = encode_dataset(rows, tokenizer, DataConfig(max_length=16), "sft")
    assert encoded.counts == {"rows": len(rows), "prompt_not_a_prefix": 0, "kept": len(rows)}
    for row, example in zip(rows, encoded, strict=True):
        ((ids, scored),) = example.sequences
        assert tokenizer.decode(ids) == f"{row['prompt']}{row['completion']}<|eos|>"
        assert tokenizer.decode(ids[scored], skip_special_tokens=True) == row["answer"]


def test_unknown_names_splits_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of builtin:docstrings, .*, got 'builtin:poems'"):
        load_rows("builtin:poems")
    with pytest.raises(ValueError, match=r"the splits \['train', 'test'\], got 'validation'"):
        load_rows("builtin:docstrings", "validation")
    with pytest.raises(ValueError, match="at least 263 entries, got 100"):
        builtin.train_tokenizer(100)


def test_an_entry_is_made_once_by_many_and_never_in_part(tmp_path: Path) -> None:
    made: list[int] = []

    def make(directory: Path) -> None:
        made.append(1)
        (directory / "a").write_text("whole")

    def work() -> None:
        assert (cache.entry(str(tmp_path), "x/entry", make) / "a").read_text() == "whole"

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    with pytest.raises(ZeroDivisionError):
        cache.entry(str(tmp_path), "x/broken", lambda directory: (directory / "a").write_text("half") / 0)
    assert sorted(p.name for p in (tmp_path / "x").iterdir() if p.is_dir()) == ["entry"]


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the cache .*set data\.cache_dir"):
        cache.entry(str(tmp_path / "file"), "x/entry", lambda _: None)


def test_candidates_are_ranked(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows("builtin:docstrings", "test")
    for row in rows:
        assert row["scores"] in ([1, 0.5, 0], [1, 0]) and row["completions"][0] == row["chosen"]
        assert len(set(row["completions"])) == len(row["scores"]) == len(row["completions"])
        assert len(row["scores"]) == 2 or row["chosen"].startswith(row["completions"][1])
    assert sum(len(scores) == 3 for scores in rows["scores"]) > 0.8 * len(rows)


def test_steps_are_its_own_sentences_or_anothers(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows("builtin:docstring-steps", "test")
    documents = collections.defaultdict(str)
    for document in builtin.corpus():
        documents[f"{document.heading}\n"] += document.text
    labels = [label for row in rows for label in row["labels"]]
    assert len(rows) > 100 and 0.45 < sum(labels) / len(labels) < 0.6
    for row in rows:
        assert len(row["completions"]) == len(row["labels"]) > 1
        for step, label in zip(row["completions"], row["labels"], strict=True):
            assert step.strip() and (not label or step in documents[row["prompt"]])
    assert rows.to_list() == builtin.load("docstring-steps", "test").to_list()
