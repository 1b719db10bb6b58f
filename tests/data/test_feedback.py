"""Rows that say how good a completion is: formats, scored tokens, scores, what is dropped, and malformed rows."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastalign.config import DataConfig
from fastalign.data import formats, sources
from fastalign.data.encode import Encoder, encode_dataset
from fastalign.data.examples import TokenDataset, TokenExample
from fastalign.data.pack import build_batch
from fastalign.engine.setup import hash_tokens

Make = Callable[..., PreTrainedTokenizerFast]

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PAIR = {"prompt": "Two", "chosen": " cats sat", "rejected": " dogs"}
UNPAIRED = {"prompt": "Two", "completion": " cats", "label": True}
RANKED = {"prompt": "Two", "completions": [" cats sat", " dogs", " door"], "scores": [0.5, 2, -1]}
STEPS = {"prompt": "Two and two?", "completions": ["Two is two.", "And four is four."], "labels": [True, False]}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TALK = {"prompt": user("two?"), "chosen": assistant("four."), "rejected": assistant("five.")}
UNPAIRED_TALK = {"prompt": user("two?"), "completion": assistant("four."), "label": False}
RANKED_TALK = {"prompt": user("two?"), "completions": [assistant("four."), assistant("five.")], "scores": [1, 0]}


def run(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, method: str, **options: Any) -> TokenDataset:
    return encode_dataset(Dataset.from_list(rows), tokenizer, DataConfig(**options), method)


def texts(tokenizer: PreTrainedTokenizerFast, example: TokenExample) -> list[str]:
    return [tokenizer.decode(ids) for ids, _ in example.sequences]


def scored(tokenizer: PreTrainedTokenizerFast, example: TokenExample) -> list[str]:
    return [tokenizer.decode(ids[mask]) for ids, mask in example.sequences]


def places(example: TokenExample) -> list[list[int]]:
    """How far from the end of its sequence each scored token is."""
    return [(len(mask) - 1 - np.flatnonzero(mask)).tolist() for _, mask in example.sequences]


@pytest.mark.parametrize(
    ("method", "said", "scores"),
    [
        ("reward", {}, []),
        ("reward", {"margin": 1.5}, [1.5, 0]),
        ("reward", {"margin": -2, "probability": 0.75}, [-2, 0]),
        ("reward:soft_label", {"probability": 0.75}, [0.75, 0.25]),
        ("reward:soft_label", {"margin": 1.5, "probability": 1}, [1, 0]),
    ],
)
def test_a_reward_model_scores_the_last_token_of_each_side(
    make_tokenizer: Make, method: str, said: dict, scores: list[float]
) -> None:
    tokenizer = make_tokenizer("bos")
    pairs = run([{**PAIR, **said}], tokenizer, method)
    assert texts(tokenizer, pairs[0]) == ["<s>Two cats sat</s>", "<s>Two dogs</s>"] and places(pairs[0]) == [[0], [0]]
    assert pairs[0].own_rows and pairs.own_rows
    assert pairs[0].columns.known().get("scores", torch.zeros(0)).tolist() == scores
    batch = build_batch([pairs[0]], share_prefix=True)
    assert batch.labels.tolist() == batch.input_ids[batch.rows].tolist() == [tokenizer.eos_token_id] * 2


def test_a_reward_models_conversation_ends_as_its_template_does(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    for row in (TALK, {"chosen": TALK["prompt"] + TALK["chosen"], "rejected": TALK["prompt"] + TALK["rejected"]}):
        pair = run([row], tokenizer, "reward")[0]
        assert texts(tokenizer, pair)[0] == "<user>two?<|end|>\n<assistant>four.<|end|>\n" and places(pair) == [
            [0],
            [0],
        ]


def test_a_cut_reward_pair_is_scored_where_it_now_ends(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    rows = [{**PAIR, "chosen": " cat sat on the mat, and the dog sat by the door."}]
    cut = run(rows, tokenizer, "reward", max_length=5)
    assert [len(ids) for ids, _ in cut[0].sequences] == [5, len(tokenizer("Two dogs")["input_ids"]) + 1]
    assert places(cut[0]) == [[0], [0]] and cut.counts["truncated"] == 1
    with pytest.raises(ValueError, match="no row is left to train on: rows 1, dropped too long 1"):
        run(rows, tokenizer, "reward", max_length=5, truncation="drop")
    with pytest.raises(ValueError, match="dropped prompt too long 1"):
        run([{**PAIR, "prompt": "The cat sat on the mat"}], tokenizer, "reward", max_length=4)


@pytest.mark.parametrize("row", [RANKED, RANKED_TALK])
def test_candidates_keep_their_order_and_scores(make_tokenizer: Make, row: dict) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    ranked = run([row, row], tokenizer, "rrhf")
    assert ranked[1].columns.scores.tolist() == row["scores"] and not ranked[1].own_rows
    ends = [" cats sat</s>", " dogs</s>", " door</s>"] if row is RANKED else ["four.<|end|>\n", "five.<|end|>\n"]
    assert scored(tokenizer, ranked[1]) == ends, "rrhf learns from every token of a completion"
    ends = run([row, row], tokenizer, "reward:k_wise")[0]
    assert (
        places(ends) == [[0]] * len(row["scores"]) and ends.own_rows and ends.columns.scores.tolist() == row["scores"]
    )


def test_ragged_candidates_are_packed_in_groups(make_tokenizer: Make) -> None:
    fewer = {"prompt": "The", "completions": [" cat"], "scores": [1]}
    ranked = run([RANKED, fewer], make_tokenizer(), "rrhf")
    batch = build_batch(ranked.fetch([0, 1]), share_prefix=True)
    assert batch.cu_groups.tolist() == [0, 3, 4] and batch.columns.scores.tolist() == [0.5, 2, -1, 1]


def test_a_candidate_is_dropped_by_itself(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    long = " sat on the mat, and the dog sat by the door."
    rows = [
        {**RANKED, "completions": ["", long, " dogs"]},
        {**RANKED, "completions": [" ", long, None]},
        {**RANKED, "completions": [" ", "", None]},
        {**RANKED, "completions": [], "scores": []},
    ]
    options = {"max_length": 6, "truncation": "drop"}
    ranked = run(rows, tokenizer, "rrhf", **options)
    assert [(e.example_id, e.columns.scores.tolist(), texts(tokenizer, e)) for e in ranked] == [
        (0, [-1], ["Two dogs</s>"])
    ]
    lost = {"candidates_empty_completion": 6, "candidates_too_long": 2, "dropped_too_few_candidates": 3}
    assert {name: count for name, count in ranked.counts.items() if count} == {"rows": 4, **lost, "kept": 1}
    cut = run(rows, tokenizer, "rrhf", max_length=6)
    assert cut.counts["candidates_truncated"] == 2 and [e.columns.scores.tolist() for e in cut] == [[2, -1], [2]]
    compared = run(rows, tokenizer, "reward:k_wise", max_length=6)
    assert [e.example_id for e in compared] == [0], "one candidate has no other to be better than"


@pytest.mark.parametrize(("row", "end"), [(UNPAIRED, " cats</s>"), (UNPAIRED_TALK, "four.<|end|>\n")])
def test_an_unpaired_row_is_one_labelled_completion(make_tokenizer: Make, row: dict, end: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    for label in (True, False, 1, 0, 1.0):
        labelled = run([{**row, "label": label}], tokenizer, "kto")
        assert labelled[0].columns.scores.tolist() == [float(label)]
        assert scored(tokenizer, labelled[0]) == [end]


def test_a_pair_is_a_good_and_a_bad_completion(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    labelled = run([PAIR, {**PAIR, "chosen": " "}], tokenizer, "kto")
    assert [(e.example_id, e.columns.scores.tolist(), scored(tokenizer, e)) for e in labelled] == [
        (0, [1], [" cats sat</s>"]), (0, [0], [" dogs</s>"]), (1, [0], [" dogs</s>"])
    ]  # fmt: skip
    assert labelled.counts["dropped_empty_completion"] == 1 and labelled.counts["kept"] == 3
    ranked = run([PAIR], tokenizer, "rrhf")[0]
    assert ranked.columns.scores.tolist() == [1, 0] and scored(tokenizer, ranked) == [" cats sat</s>", " dogs</s>"]


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
@pytest.mark.parametrize("separator", ["\n", "", " and "])
def test_every_step_is_scored_at_its_separator(make_tokenizer: Make, adds: str, separator: str) -> None:
    tokenizer = make_tokenizer(adds)
    steps = run([STEPS, STEPS], tokenizer, "reward:process", step_separator=separator)
    ((ids, mask),) = steps[1].sequences
    assert steps[1].columns.step_labels.tolist() == [1, 0] and steps[1].own_rows
    start = ("<s>" if "bos" in adds else "") + STEPS["prompt"]
    through = [tokenizer.decode(ids[: end + 1]) for end in np.flatnonzero(mask)]
    first, second = STEPS["completions"]
    assert through == [f"{start}{first}{separator}", f"{start}{first}{separator}{second}{separator}"]
    batch = build_batch(steps.fetch([0, 1]), share_prefix=True)
    assert batch.columns.step_labels.tolist() == [1, 0, 1, 0] and batch.num_scored == 4 and batch.num_sequences == 2


def test_a_prompt_of_steps_may_be_a_conversation(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    (text,) = texts(tokenizer, run([{**STEPS, "prompt": user("two?")}], tokenizer, "reward:process")[0])
    assert text == "<user>two?<|end|>\n<assistant>Two is two.\nAnd four is four.\n"


def test_a_step_that_is_cut_loses_its_label(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    ((ids, mask),) = run([STEPS], tokenizer, "reward:process")[0].sequences
    first, last = np.flatnonzero(mask)
    cut = run([STEPS], tokenizer, "reward:process", max_length=int(last))
    assert cut[0].columns.step_labels.tolist() == [1] and cut.counts["steps_cut"] == cut.counts["truncated"] == 1
    assert cut[0].sequences[0][0].tolist() == ids[: first + 1].tolist(), "what follows the last label is not computed"
    with pytest.raises(ValueError, match="dropped no step fits 1"):
        run([STEPS], tokenizer, "reward:process", max_length=int(first))


def test_empty_steps_drop_their_row(make_tokenizer: Make) -> None:
    rows = [STEPS, {**STEPS, "completions": ["a", " "]}, {**STEPS, "completions": [], "labels": []}]
    assert run(rows, make_tokenizer(), "reward:process").counts["dropped_empty_completion"] == 2


@pytest.mark.parametrize("row", [{"prompt": "Two", "completion": " cats"}, PAIR])
def test_distillation_reads_what_sft_does(make_tokenizer: Make, row: dict) -> None:
    tokenizer = make_tokenizer()
    taught, tuned = (run([row], tokenizer, method)[0] for method in ("distill", "sft"))
    assert scored(tokenizer, taught) == scored(tokenizer, tuned) and taught.columns.scores is None


@pytest.mark.parametrize(
    ("row", "method", "message"),
    [
        ({**PAIR, "margin": "large"}, "reward", "row 1: column 'margin': expected a finite number, got a string$"),
        ({**PAIR, "margin": float("nan")}, "reward", "row 1: column 'margin': expected a finite number, got NaN$"),
        ({**PAIR, "margin": None}, "reward", "row 1: column 'margin': expected a finite number, got null$"),
        ({**PAIR, "probability": 1.5}, "reward:soft_label", r"row 1: column 'probability': expected a number .* 1\.5$"),
        ({**UNPAIRED, "label": 2}, "kto", "row 1: column 'label': expected true or false, or 1 or 0, got 2$"),
        ({**UNPAIRED, "label": None}, "kto", "row 1: column 'label': expected true or false, or 1 or 0, got null$"),
        ({**UNPAIRED, "label": "good"}, "kto", "row 1: column 'label': expected true or false, .* got a string$"),
        ({**RANKED, "scores": [1.0]}, "rrhf", "row 1: 'completions' has 3 entries and 'scores' 1: expected one"),
        ({**RANKED, "scores": [1.0, None, 0.0]}, "rrhf", "row 1: column 'scores': expected a finite number, got null$"),
        ({**RANKED, "scores": None}, "rrhf", "row 1: 'completions' has 3 entries and 'scores' 0"),
        ({**RANKED, "scores": 1}, "rrhf", "row 1: column 'scores': expected a list, got 1$"),
        ({**RANKED, "completions": "a"}, "rrhf", "row 1: column 'completions': expected a list, got a string$"),
        ({**RANKED, "completions": [1, 2, 3]}, "rrhf", "row 1: column 'completions': .*a number: put it in quotes"),
        ({**RANKED, "completions": ["a", "b", assistant("a")]}, "rrhf", "row 1: 'completions' must all be strings or"),
        ({**STEPS, "labels": [1, 3]}, "reward:process", "row 1: column 'labels': expected true or false, .* got 3$"),
        ({**STEPS, "labels": [True]}, "reward:process", "row 1: 'completions' has 2 entries and 'labels' 1"),
        ({**STEPS, "completions": [assistant("a")] * 2}, "reward:process", ".* each a string, got a list of mappings$"),
    ],
)  # fmt: skip
def test_malformed_rows_are_named(make_tokenizer: Make, row: dict, method: str, message: str) -> None:
    good = {**(STEPS if "labels" in row else RANKED), **PAIR, **UNPAIRED, "margin": 1.0, "probability": 0.5}
    columns = {name: [good[name], row[name]] for name in row}  # as lists: arrow refuses some mixtures of types itself
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    encoder = Encoder(tokenizer, DataConfig(), formats.recognise(columns, method), method, None, False)
    with pytest.raises(ValueError, match=message) as caught:
        encoder.batch(columns, [0, 1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "method", "message"),
    [
        (
            {**PAIR, "margin": 1.0},
            "reward:soft_label",
            r"expected a column 'probability' .*found \['chosen', 'margin', ",
        ),
        (PAIR, "reward:k_wise", r"reward --loss.name k_wise expects the columns scores\+prompt\+completions; found"),
        (PAIR, "reward:process", r"reward --loss.name process expects the columns prompt\+labels\+completions; found"),
        ({"prompt": "a", "completion": "b"}, "kto", r"kto expects the columns prompt\+label\+completion or rejected"),
        ({"prompt": "a", "completion": "b"}, "rrhf", r"rrhf expects .*found \['completion', 'prompt'\]: rename"),
    ],
)
def test_columns_that_do_not_fit_are_named(make_tokenizer: Make, row: dict, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([row], make_tokenizer(), method)
    with pytest.raises(ValueError, match=r"kto trains on unpaired or preference, got data\.format='ranked'"):
        run([row], make_tokenizer(), "kto", format="ranked")


def test_method_separator_and_scores_change_the_key(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    both = {**RANKED, "chosen": " a", "rejected": " b"}
    datasets = [
        *(run([both], tokenizer, method) for method in ("rrhf", "reward:k_wise", "reward", "kto", "dpo", "distill")),
        run([both], tokenizer, "rrhf", format="preference"),
        run([{**both, "scores": [0.5, 2, 1]}], tokenizer, "rrhf"),
        run([STEPS], tokenizer, "reward:process"),
        run([STEPS], tokenizer, "reward:process", step_separator=" and "),
    ]
    assert len({dataset.fingerprint for dataset in datasets}) == len(datasets)
    assert hash_tokens(datasets[0]) != hash_tokens(datasets[7]), "equal tokens with other scores are other data"


def test_columns_may_have_their_own_names(make_tokenizer: Make, write: Callable[[str, str], str]) -> None:
    file = write("votes.jsonl", '{"question": "Two", "answer": " cats", "liked": 1}\n')
    rows = sources.load_rows(file, columns={"prompt": "question", "completion": "answer", "label": "liked"})
    assert encode_dataset(rows, make_tokenizer(), DataConfig(), "kto")[0].columns.scores.tolist() == [1]


def test_a_probability_that_is_not_read_is_said(make_tokenizer: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run([{**PAIR, "probability": 0.5}], make_tokenizer(), "reward")
    assert "column 'probability' is not read: loss.name=soft_label learns from it" in caplog.text


@pytest.mark.parametrize("method", ["reward", "kto"])
def test_real_preferences(make_tokenizer: Make, shared_file: Callable[[str], Path], method: str) -> None:
    rows = sources.load_rows(str(shared_file("data/hh-rlhf/harmless-base-test.jsonl.gz")), limit=600)
    tokenizer = make_tokenizer()
    encoded = encode_dataset(rows, tokenizer, DataConfig(max_length=1024), method)
    each = 2 if method == "kto" else 1
    dropped = sum(count for name, count in encoded.counts.items() if name.startswith("dropped"))
    assert len(encoded) == encoded.counts["kept"] > 500 * each and len(encoded) + dropped == 600 * each
    for example in encoded.fetch(list(range(0, len(encoded), 7))):
        if method == "reward":
            assert places(example) == [[0], [0]] and example.columns.scores is None
        else:
            ((ids, mask),) = example.sequences
            assert tokenizer.decode(ids[~mask]).endswith("\n\nAssistant:") and mask[np.argmax(mask) :].all()
    if method == "kto":
        assert abs(sum(e.columns.scores[0] for e in encoded) - len(encoded) / 2) < 20, "as many good as bad"
