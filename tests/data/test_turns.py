"""Which turns are scored: the assistant's alone in every method, but for those that say no; what a turn may hold."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from fastalign.config import DataConfig
from fastalign.data import formats
from fastalign.data.encode import Encoder, encode_dataset
from fastalign.data.mismatch import MismatchedDataset

Make = Callable[..., PreTrainedTokenizerFast]
Turn = dict[str, Any]

PLAIN = (
    "{% for t in tools or [] %}<tool {{ t.name }}>{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.name }}]{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for t in tools or [] %}<tool {{ t.name }}>{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% for c in m.tool_calls or [] %} {% generation %}[{{ c.name }}]{{ eos_token }}{% endgeneration %}{% else %}"
    "{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EVERY_KEY = "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }} {% endfor %}{{ eos_token }}{% endfor %}"


def user(text: Any, **more: Any) -> Turn:
    return {"role": "user", "content": text, **more}


def answer(text: Any, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> Turn:
    return {"role": "tool", "content": text}


def words(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def masks(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], method: str) -> list[tuple[str, list[str]]]:
    """For each sequence of a row its text, and its scored stretches."""
    columns = {name: [value] for name, value in row.items()}
    encoder = Encoder(tokenizer, DataConfig(), formats.recognise(columns, method), method, None, False)
    out = encoder.batch(columns, [0])
    found = []
    for ids, scored, lengths in zip(out["input_ids"], out["scored"], out["lengths"], strict=True):
        ends = np.cumsum(lengths)[:-1]
        for tokens, mask in zip(np.split(np.array(ids), ends), np.split(np.array(scored), ends), strict=True):
            edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
            found.append((tokenizer.decode(tokens), [tokenizer.decode(tokens[i:j]) for i, j in edges]))
    return found


CALL = answer("", tool_calls=[{"name": "adder"}])
TRAJECTORIES = {
    "one answer": [answer("four")],
    "tool": [answer("let me see"), tool("the tool says four"), answer("four")],
    "tool call": [CALL, tool("the tool says four"), answer("four")],
    "two calls": [answer("I call", tool_calls=[{"name": "a"}, {"name": "b"}]), tool("x"), tool("y"), answer("four")],
    "user": [answer("which two?"), user("both"), answer("four")],
    "ends with the user": [answer("four"), user("thank you")],
    "muted first": [answer("which two?", weight=0), user("both"), answer("four", weight=1)],
    "muted last": [answer("which two?"), user("both"), answer("four", train=False)],
    "muted between": [CALL, tool("four"), {**CALL, "training": False}, tool("four"), answer("four")],
}


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("completion", TRAJECTORIES.values(), ids=TRAJECTORIES)
@pytest.mark.parametrize("history", [[], [answer("hello"), user("2+2?")]], ids=["asked once", "asked twice"])
def test_every_method_scores_what_sft_does_in_messages(
    make_tokenizer: Make, template: str, completion: list[Turn], history: list[Turn]
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    prompt = [user("2+2?"), *history]
    quiet = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    tools = {"tools": [{"name": "adder"}]}
    expected = masks(tokenizer, {"messages": quiet + completion, **tools}, "sft")
    assert expected[0][1] and "tool says" not in "".join(expected[0][1])
    row = {"prompt": prompt, "completion": completion, "label": True, "chosen": completion, **tools}
    pair = {"prompt": prompt, "chosen": completion, "rejected": [answer("five")], **tools}
    ranked = {"prompt": prompt, "completions": [completion, completion], "scores": [1, 0], **tools}
    for method, each in (("sft", row), ("distill", row), ("sft", pair), ("kto", row), ("kto", pair), ("dpo", pair)):
        assert masks(tokenizer, each, method)[:1] == expected, method
    assert masks(tokenizer, {**pair, "rejected": completion}, "dpo") == expected * 2
    assert masks(tokenizer, ranked, "rrhf") == expected * 2
    whole = {"chosen": prompt + completion, "rejected": [*prompt, answer("five")], **tools}
    assert masks(tokenizer, whole, "dpo")[:1] == masks(tokenizer, whole, "rrhf")[:1] == expected
    for method, each in (("reward", pair), ("reward:k_wise", ranked)):
        text, scored = masks(tokenizer, each, method)[0]
        last = tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)[-1:])
        assert (text, scored) == (expected[0][0], [last]), "a reward model judges the whole"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"train": 0}])
def test_a_turn_that_says_no_is_not_learnt(make_tokenizer: Make, template: str, no: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    talk = [user("2+2?"), answer("five", **no), user("sure?"), answer("four", weight=1, train=True, training=None)]
    assert masks(tokenizer, {"messages": talk}, "sft")[0][1] == ["four</s>"]
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[t.pop("role")], "value": t.pop("content"), **t} for t in map(dict, talk)]
    assert masks(tokenizer, {"conversations": shared}, "sft") == masks(tokenizer, {"messages": talk}, "sft")


QWEN = "{% if messages[0].role != 'system' %}<system>You are kind{{ eos_token }}{% endif %}" + PLAIN


@pytest.mark.parametrize("template", [PLAIN, QWEN, MARKED], ids=["plain", "default system", "marked"])
def test_of_a_first_turn_that_is_the_assistants_no_header_is_scored(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    talk = [answer("hello"), user("2+2?"), answer("four")]
    shared = [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]
    for row in ({"messages": talk}, {"conversations": shared}, {"prompt": [], "completion": talk}):
        assert masks(tokenizer, row, "sft")[0][1] == ["hello</s>", "four</s>"]
    pair = {"chosen": [answer("hello")], "rejected": [answer("go away")]}
    assert [scored for _, scored in masks(tokenizer, pair, "dpo")] == [["hello</s>"], ["go away</s>"]]
    assert masks(tokenizer, {"messages": [CALL, tool("x")]}, "sft")[0][1] == ["[adder]</s>"]


def test_of_steps_without_a_prompt_the_header_is_given(make_tokenizer: Make) -> None:
    row = {"prompt": [], "completions": ["two", "four"], "labels": [1, 1]}
    text, _ = masks(make_tokenizer(chat_template=QWEN), row, "reward:process")[0]
    assert text.startswith("<system>You are kind</s><assistant>two")


def test_a_first_turn_that_cannot_be_found_is_refused(make_tokenizer: Make) -> None:
    template = (
        "{% for m in messages %}{% if not loop.first or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    row = {"messages": [answer("hello"), user("2+2?"), answer("four")]}
    with pytest.raises(ValueError, match=r"^row 0: the chat template does not write the content of a first turn"):
        masks(make_tokenizer(chat_template=template), row, "sft")


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "text": "2+2?"}, answer("four")],
        [{"role": "user", "value": "2+2?"}, answer("four")],
        [{"role": "user", "content": None, "text": "2+2?"}, answer("four")],
        [user(None), answer("four")],
        [{"from": "human", "value": None}, {"from": "gpt", "value": "four"}],
        [{"role": "system", "id": 5}, user("2+2?"), answer("four")],
        [user("2+2?"), {"role": "assistant", "text": "four"}],
        [user("2+2?"), {"role": "assistant", "content": None, "text": "four"}],
        [user("2+2?"), answer(None), user("well?"), answer("four")],
        [user("2+2?"), answer("four"), user("well?"), answer(None)],
    ],
)
def test_a_turn_that_says_nothing_is_refused(make_tokenizer: Make, turns: list[Turn]) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    message = (
        r"^row 0: '\w+' has a turn of '\w+' that says nothing, with \[.*\]: expected {role, content}, or tool_calls"
    )
    rows = [{"messages": turns}, {"prompt": [user("hi")], "completion": turns}, {"prompt": turns, "completion": "four"}]
    for row in rows:
        with pytest.raises(ValueError, match=message) as caught:
            masks(tokenizer, row, "sft")
        assert "\n" not in str(caught.value)


def test_only_what_is_said_makes_a_turn_full(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    for turn in (answer("", id="a1"), answer(" ", timestamp=5.0), answer(None, id=7)):
        encoder = Encoder(tokenizer, DataConfig(), "text", "sft", None, False)
        assert encoder.render({"messages": [user("2+2?"), turn]}) is None
        assert encoder.counts["dropped_empty_completion"] == 1
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "adder"}]}
    assert masks(tokenizer, {"messages": [user("2+2?"), call]}, "sft")[0][1] == ["[adder]</s>"]


def test_flags_do_not_reach_the_template(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=EVERY_KEY)
    flags = {"weight": 1, "train": True, "training": True}
    plain, flagged = ([user("2+2?", **more), answer("four", **more)] for more in ({}, flags))
    assert masks(tokenizer, {"messages": flagged}, "sft") == masks(tokenizer, {"messages": plain}, "sft")
    muted = [*plain, user("sure?"), answer("no", train=False)]
    text = masks(tokenizer, {"messages": muted}, "sft")[0][0]
    assert "train" not in text and "role=assistant content=no" in text


def test_a_row_without_a_turn_to_train_is_dropped_and_said(
    make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    pair = {"prompt": [user("2+2?")], "chosen": [answer("four", weight=1)], "rejected": [answer("five", weight=1)]}
    muted = {**pair, "rejected": [answer("five", weight=0)]}

    def run(rows: list[dict[str, Any]], method: str) -> Any:
        return encode_dataset(Dataset.from_list(rows), tokenizer, DataConfig(), method)

    with caplog.at_level(logging.WARNING):
        pairs = run([muted, pair], "dpo")
    assert [e.example_id for e in pairs] == [1] and pairs.counts["dropped_no_turn_to_train"] == 1
    assert [r.message for r in caplog.records] == [
        "1 completions have no turn to train: all their assistant turns have weight 0, train false or training false"
    ]
    assert [(e.example_id, e.columns.scores.tolist()) for e in run([muted, pair], "kto")] == [
        (0, [1]),
        (1, [1]),
        (1, [0]),
    ]
    assert run([muted, pair], "rrhf").counts["candidates_no_turn_to_train"] == 1
    with pytest.raises(ValueError, match=r"dropped no turn to train 1 .*have weight 0, train false or training false$"):
        run([{"messages": [user("2+2?"), answer("four", train=False)]}], "sft")


@pytest.mark.parametrize("template", [PLAIN, MARKED, EVERY_KEY])
def test_text_parts_are_one_text(make_tokenizer: Make, template: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    said, parts = [user("2+2?"), answer("it is four")], [user(words("2+2?")), answer(words("it is", " four"))]
    assert masks(tokenizer, {"messages": parts}, "sft") == masks(tokenizer, {"messages": said}, "sft")
    shared = [{"from": "human", "value": words("2+2?")}, {"from": "gpt", "value": words("it is ", "four")}]
    assert masks(tokenizer, {"conversations": shared}, "sft") == masks(tokenizer, {"messages": said}, "sft")
    rows = [
        {
            "prompt": turns[:1],
            "chosen": turns[1:],
            "rejected": turns[1],
            "completions": [turns[1]] * 2,
            "scores": [1, 0],
        }
        for turns in (said, parts)
    ]
    for method in ("dpo", "kto", "rrhf", "reward", "reward:k_wise"):
        assert masks(tokenizer, rows[0], method) == masks(tokenizer, rows[1], method)
    asked = {"prompt": "2+2?", "chosen": parts, "rejected": parts[1]}
    assert masks(tokenizer, asked, "dpo") == masks(tokenizer, rows[0], "dpo")


def test_null_fields_of_parts_are_none(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    parts = [{"type": "text", "text": "four", "image": None}]
    rows = Dataset.from_list([{"messages": [user(parts), answer(parts, weight=None)]}])
    ((ids, _),) = encode_dataset(rows, tokenizer, DataConfig(), "sft")[0].sequences
    assert tokenizer.decode(ids) == "<user>four</s><assistant>four</s>"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (user([{"type": "image", "url": "x"}]), "'messages' has a content part of type 'image': expected {type: text"),
        (user([*words("a"), {"type": "audio"}]), "a content part of type 'audio'"),
        (user([{"type": "text"}]), r"a content part with \['type'\]"),
        (user(["a", "b"]), "a turn whose content is a list of strings: expected a string or a list of text parts"),
        (user({"a": 1}), "a turn whose content is a mapping"),
        (user(5), "a turn whose content is a number"),
        (answer("a", weight=0.5), "a turn with weight 0.5: expected true or false, or 1 or 0"),
        (answer("a", train="no"), "a turn with train a string: expected true or false"),
        ({"role": 5, "content": "a"}, "a turn whose role is a number"),
        ({"role": "model", "content": "a"}, r"without a scored token: .* got turns of \['model', 'user'\]"),
    ],
)
def test_what_a_turn_cannot_hold_is_refused(make_tokenizer: Make, turn: Turn, message: str) -> None:
    row = {"messages": [user("2+2?"), turn, *([] if turn["role"] == "model" else [answer("b")])]}
    with pytest.raises(ValueError, match=f"^row 0: .*{message}") as caught:
        masks(make_tokenizer(chat_template=PLAIN), row, "sft")
    assert "\n" not in str(caught.value)


def test_a_completion_without_an_answer_is_refused(make_tokenizer: Make) -> None:
    row = {"prompt": [user("2+2?"), answer("ask away")], "chosen": [user("four")], "rejected": [user("five")]}
    for method in ("dpo", "reward", "kto", "sft"):
        with pytest.raises(ValueError, match=r"row 0: .*an assistant turn to learn from, got turns of \['user'\]"):
            masks(make_tokenizer(chat_template=PLAIN), row, method)


def test_marks_that_cannot_be_told_apart_are_refused(make_tokenizer: Make) -> None:
    last = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    row = {"prompt": [user("2+2?"), answer("?"), user("2+2?")], "completion": [answer("four")]}
    with pytest.raises(ValueError, match="row 0: which generation markers of the chat template belong to which"):
        masks(make_tokenizer(chat_template=last), row, "sft")


def test_mismatched_trajectories_are_scored_where_their_own_are(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    talk = TRAJECTORIES["tool"]
    rows = [{"prompt": [user(text)], "completion": talk, "label": True} for text in ("2+2?", "1+3?")]
    encoded = encode_dataset(Dataset.from_list(rows), tokenizer, DataConfig(), "kto")
    for example, own in zip(MismatchedDataset(encoded, 99), encoded, strict=True):
        assert example.mismatched is not None
        assert all(np.array_equal(a, b) for a, b in zip(example.mismatched.sequences[0], own.sequences[0], strict=True))
