"""A prompt stands once in a sequence and the answers alone are scored, whichever shape prompt and answers have."""

import logging
from typing import Any

import pytest
from conversations import (
    ALONE,
    ASKED,
    ONE,
    QUESTION,
    SHAREGPT,
    STRINGS,
    TEMPLATE,
    WHOLE,
    Make,
    Turn,
    answer,
    encode,
    gpt,
    human,
    pair,
    parts,
    turn,
    user,
)
from datasets import Dataset

from fastalign.config import DataConfig
from fastalign.data.encode import encode_dataset
from fastalign.data.forest import agreement

METHODS = ("dpo", "reward", "reward:soft_label", "kto", "rrhf", "sft", "distill")

PAIRS = {
    "string beside answers": {**ALONE, "prompt": QUESTION},
    "string beside one message": {**ONE, "prompt": QUESTION},
    "string beside conversations": {**WHOLE, "prompt": QUESTION},
    "string with white space": {**WHOLE, "prompt": f" {QUESTION}\n"},
    "turns beside answers": {**ALONE, "prompt": [user()]},
    "turns beside conversations": {**WHOLE, "prompt": [user()]},
    "turns beside one of each": pair([user(), answer("four")], [answer("five")], prompt=[user()]),
    "turns beside strings": {**STRINGS, "prompt": [user()]},
    "one turn beside one message": {**ONE, "prompt": user()},
    "answered turns beside answers": {**ALONE, "prompt": [user(), answer("four")]},
    "answered turns beside conversations": {**WHOLE, "prompt": [user(), answer("four")]},
    "messages beside one message": {**ONE, "messages": [user()]},
    "messages beside answers": {**ALONE, "messages": [user()]},
    "messages beside strings": {**STRINGS, "messages": [user()]},
    "answered messages beside answers": {**ALONE, "messages": [user(), answer("five")]},
    "messages beside conversations": {**WHOLE, "messages": [user(), answer("four")]},
    "conversations beside one message": {**ONE, "conversations": [user()]},
    "sharegpt": {**SHAREGPT, "conversations": [human()]},
    "sharegpt prompt": {**SHAREGPT, "prompt": [human()]},
    "sharegpt turn": {**SHAREGPT, "prompt": human()},
    "sharegpt whole": pair([human(), gpt("four")], [human(), gpt("five")]),
    "sharegpt whole beside a string": pair([human(), gpt("four")], [human(), gpt("five")], prompt=QUESTION),
    "both notations": {**SHAREGPT, "prompt": [user()]},
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_a_prompt_of_a_pair_is_there_once(make_tokenizer: Make, row: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    both = [(ASKED, "four</s>"), (ASKED, "five</s>")]
    for method in METHODS:
        expected = both[:1] if method in ("sft", "distill") else both
        if method.startswith("reward"):
            expected = [(given + text.removesuffix("</s>"), "</s>") for given, text in both]
        if {"messages", "conversations"} & set(row) and method in ("sft", "distill"):
            continue  # these read the conversation
        assert parts(tokenizer, row, method) == expected, method


COMPLETIONS = {
    "string beside answers": (QUESTION, [answer("four")]),
    "string beside one message": (QUESTION, answer("four")),
    "string beside conversations": (QUESTION, [user(), answer("four")]),
    "turns beside conversations": ([user()], [user(), answer("four")]),
    "turns beside strings": ([user()], "four"),
    "sharegpt": (human(), [gpt("four")]),
}


@pytest.mark.parametrize(("prompt", "completion"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_a_prompt_of_completions_is_there_once(make_tokenizer: Make, prompt: Any, completion: Any) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    row = {"prompt": prompt, "completion": completion, "label": True, "scores": [1, 0]}
    ranked = {**row, "completions": [completion, completion]}
    for method, each in (("sft", row), ("distill", row), ("kto", row), ("rrhf", ranked)):
        assert set(parts(tokenizer, each, method)) == {(ASKED, "four</s>")}, method
    assert set(parts(tokenizer, ranked, "reward:k_wise")) == {(f"{ASKED}four", "</s>")}


@pytest.mark.parametrize("prompt", [[user()], [human()], human()])
def test_a_prompt_of_steps_is_there_once(make_tokenizer: Make, prompt: Any) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    row = {"prompt": prompt, "completions": ["two", "four"], "labels": [1, 1]}
    assert parts(tokenizer, row, "reward:process") == [(f"{ASKED}twofour", "\n\n")]


@pytest.mark.parametrize(
    ("prompt", "chosen", "given"),
    [
        (QUESTION, [turn("system", "kind"), answer("a")], "<system>kind</s>" + ASKED),
        (QUESTION, [turn("system", "kind"), user(), answer("a")], "<system>kind</s>" + ASKED),
        ([user()], [turn("system", "kind"), user(), answer("a")], "<system>kind</s>" + ASKED),
        ([turn("system", "kind"), user()], [user(), answer("a")], "<system>kind</s>" + ASKED),
        ([turn("system", "kind"), user()], [turn("system", "kind"), user(), answer("a")], "<system>kind</s>" + ASKED),
        ([turn("system", "kind")], [user(), answer("a")], "<system>kind</s>" + ASKED),
        ([user()], [user("hi"), answer("ho"), user(), answer("a")], "<user>hi</s><assistant>ho</s>" + ASKED),
        ([user("hi"), answer("ho")], [user(), answer("a")], "<user>hi</s><assistant>ho</s>" + ASKED),
        ([user("hi"), answer("ho"), user()], [user(), answer("a")], "<user>hi</s><assistant>ho</s>" + ASKED),
    ],
)
def test_turns_around_the_prompt_are_kept(make_tokenizer: Make, prompt: Any, chosen: Any, given: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    row = pair(chosen, [*chosen[:-1], answer("b")], prompt=prompt)
    assert parts(tokenizer, row, "dpo") == [(given, "a</s>"), (given, "b</s>")]


def test_of_longer_conversations_all_that_both_sides_begin_with_is_the_prompt(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    history = [user(), answer("four"), user("sure?")]
    row = pair([*history, answer("yes")], [*history, answer("no")], prompt=QUESTION)
    assert [text for _, text in parts(tokenizer, row, "dpo")] == ["yes</s>", "no</s>"]
    exact = parts(tokenizer, {**row, "prompt": [user()]}, "dpo")
    assert [text for _, text in exact] == ["four</s>yes</s>", "four</s>no</s>"], "turns say where the answers begin"


GREETED = [turn("system", "kind"), answer("hello"), user()]
HISTORY = [user("hi"), answer("hello"), user()]
HISTORY_ASKED = "<user>hi</s><assistant>hello</s>" + ASKED


@pytest.mark.parametrize("prompt", [QUESTION, [user()]])
@pytest.mark.parametrize(
    ("chosen", "rejected", "given"),
    [
        (HISTORY, [user()], HISTORY_ASKED),
        ([user()], HISTORY, HISTORY_ASKED),
        (HISTORY, [], HISTORY_ASKED),
        (GREETED, GREETED, "<system>kind</s><assistant>hello</s>" + ASKED),
        ([turn("system", "kind"), user()], [user()], "<system>kind</s>" + ASKED),
        ([user()], [turn("system", "kind"), user()], "<system>kind</s>" + ASKED),
        (HISTORY, [user("hi"), answer("ho"), user()], None),
        (HISTORY, [user("hey"), answer("hello"), user()], None),
        ([turn("system", "kind"), user()], [turn("system", "rude"), user()], None),
    ],
)
def test_both_sides_have_one_prompt_whatever_stands_before_it(
    make_tokenizer: Make, prompt: Any, chosen: list[Turn], rejected: list[Turn], given: str | None
) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    row = pair([*chosen, answer("four")], [*rejected, answer("five")], prompt=prompt)
    ranked = {"prompt": prompt, "completions": [row["chosen"], row["rejected"]], "scores": [1, 0]}
    for method, each in (("dpo", row), ("kto", row), ("rrhf", row), ("rrhf", ranked)):
        if given is None:
            with pytest.raises(ValueError, match=r"^row 0: .* have different turns before the prompt: expected"):
                parts(tokenizer, each, method)
        else:
            assert parts(tokenizer, each, method) == [(given, "four</s>"), (given, "five</s>")], method


def test_common_turns_may_differ_in_white_space(make_tokenizer: Make) -> None:
    row = pair([user(), answer("four")], [user(f"{QUESTION}\n"), answer("five")])
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    assert parts(tokenizer, row, "dpo") == [(ASKED, "four</s>"), (ASKED, "five</s>")]


@pytest.mark.parametrize(
    ("prompt", "given"),
    [
        ("continue", "<user>continue</s>"),
        ([user("continue")], "<user>continue</s>"),
        (
            [user("hi"), answer("one"), user("continue")],
            "<user>hi</s><assistant>one</s><user>continue</s>",
        ),
        ([turn("system", "kind"), user("continue")], "<system>kind</s><user>continue</s>"),
    ],
)
def test_an_answer_that_begins_with_the_assistant_is_an_answer_alone(
    make_tokenizer: Make, prompt: Any, given: str
) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    talk = [answer("one"), user("continue"), answer("two")]
    whole = f"{given}<assistant>one</s><user>continue</s><assistant>two</s>"
    for row, method in (
        ({"prompt": prompt, "completion": talk}, "sft"),
        ({"prompt": prompt, "completion": talk, "label": True}, "kto"),
        (pair(talk, [answer("three")], prompt=prompt), "dpo"),
    ):
        before, scored = parts(tokenizer, row, method)[0]
        assert scored == "one</s>two</s>" and len(before) + len(scored) == len(whole), method


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair([user("a"), answer("b")], [user("a"), answer("c")], prompt=QUESTION), "first user turn of 'chosen' say"),
        (pair([user("a"), answer("b")], [user("a"), answer("c")], prompt=[user()]), "first user turn of 'chosen' say"),
        (pair([user(), answer("b")], [user("a"), answer("c")], prompt=QUESTION), "first user turn of 'rejected' say"),
        ({"prompt": QUESTION, "completion": [user("a"), answer("b")]}, "first user turn of 'completion' say"),
        (
            {"prompt": QUESTION, "completions": [[user("a"), answer("b")]] * 2, "scores": [1, 0]},
            "first user turn of 'completions' say",
        ),
        (
            {**WHOLE, "chosen": [turn("system", "x"), user(), answer("b")], "prompt": [turn("system", "y"), user()]},
            "different system turns",
        ),
        (
            pair([turn("system", "x"), answer("b")], [turn("system", "y"), answer("c")], prompt=QUESTION),
            "different turns before the prompt",
        ),
        (
            pair([answer("hi"), user(), answer("b")], [answer("hi"), user(), answer("c")], prompt=QUESTION),
            "'chosen' and 'rejected' begin with an answer, and 'prompt' follows in them",
        ),
        ({"prompt": QUESTION, "completions": ["a", [answer("b")]], "scores": [1, 0]}, "'completions' must all be"),
        ({"question": QUESTION, "system": "kind", "chosen": "four", "rejected": "five"}, r"e\.g\. {prompt: question}$"),
        ({"instruction": QUESTION, **ALONE}, r"not read: 'instruction': rename .* {prompt: instruction}$"),
        ({"context": QUESTION, **ONE}, "there is no prompt: the answers would be trained without their question"),
        ({"history": [QUESTION], **STRINGS, "prompt": None}, "there is no prompt"),
        ({"question": QUESTION, "chosen": "It is four", "rejected": "It is five"}, "there is no prompt"),
    ],
)  # fmt: skip
def test_contradictions_and_lost_questions_are_refused(make_tokenizer: Make, row: dict, message: str) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    method = "dpo" if "chosen" in row else "rrhf" if "scores" in row else "sft"
    with pytest.raises(ValueError, match=f"^row 0: .*{message}") as caught:
        parts(tokenizer, row, method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("before", ["", "\n "])
def test_strings_that_begin_with_their_prompt_have_it_once(
    make_tokenizer: Make, before: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    answers = [f"{before}{QUESTION} {text}" for text in ("four", "five")]
    row = {"prompt": QUESTION, "completion": answers[0], "label": True}
    ranked = {"prompt": QUESTION, "completions": answers, "scores": [1, 0]}
    given = f"{before}{QUESTION}"
    with caplog.at_level(logging.WARNING):
        assert encode([pair(*answers, prompt=QUESTION)], tokenizer, "dpo") == [
            (given, " four</s>"),
            (given, " five</s>"),
        ]
    assert [r.message for r in caplog.records] == [
        "completions begin with their prompt in 1 of the first 1 rows: the prompt is read once"
    ]
    assert encode([ranked], tokenizer, "rrhf") == [(given, " four</s>"), (given, " five</s>")]
    assert encode([row], tokenizer, "sft") == encode([row], tokenizer, "kto") == [(given, " four</s>")]
    steps = {"prompt": QUESTION, "completions": [answers[0], "five"], "labels": [1, 0]}
    assert encode([steps], tokenizer, "reward:process") == [(f"{given} fourfive", "\n\n")]


def test_an_answer_may_begin_as_its_prompt_does_by_chance(
    make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "Hi", "completion": "Hi there"}, {"prompt": "Two", "completion": " cats"}]
    rows += [{"prompt": "cat", "completion": "cat"}] * 2  # what is copied and no more is an answer
    with caplog.at_level(logging.WARNING):
        found = encode(rows, make_tokenizer(), "sft")
    assert [given + text for given, text in found] == ["HiHi there</s>", "Two cats</s>", *["catcat</s>"] * 2]
    assert "begin with their prompt in 1 of the first 4 rows: they are answers" in caplog.text


def test_a_row_unlike_the_others_is_named(make_tokenizer: Make) -> None:
    rows = [pair(f"{QUESTION} four", f"{QUESTION} five", prompt=QUESTION)] * 2
    rows.append(pair(f"{QUESTION} four", "five", prompt=QUESTION))
    with pytest.raises(ValueError, match=r"row 2: 'rejected' does not begin with its prompt, as .* most rows do"):
        encode(rows, make_tokenizer(), "dpo")


@pytest.mark.parametrize("prompt", ["\n\nHuman: hi\n\nAssistant:", "Human: hi", "hi", [user("hi")], None])
def test_a_prompt_beside_raw_dialogues_is_in_them_once(make_tokenizer: Make, prompt: Any) -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    row = {"prompt": prompt, "chosen": f"{start} yes", "rejected": f"{start} no"}
    tokenizer = make_tokenizer()
    assert encode([row], tokenizer, "dpo") == [(start, " yes</s>"), (start, " no</s>")]
    if isinstance(prompt, str):
        row = {"prompt": prompt, "completion": f"{start} yes", "label": True}
        assert encode([row], tokenizer, "kto") == encode([row], tokenizer, "sft") == [(start, " yes</s>")]


def test_another_prompt_beside_raw_dialogues_is_refused(make_tokenizer: Make) -> None:
    start = "\n\nHuman: hi\n\nAssistant:"
    with pytest.raises(ValueError, match="row 0: 'prompt' is not in 'chosen', a whole dialogue"):
        encode([{"prompt": "ho", "chosen": f"{start} yes", "rejected": f"{start} no"}], make_tokenizer(), "dpo")


def test_whole_texts_repeat_the_question_of_another_column(make_tokenizer: Make) -> None:
    row = {"question": QUESTION, "chosen": f"{QUESTION} four", "rejected": f"{QUESTION} six"}
    found = encode([row], make_tokenizer(), "dpo")
    assert [given + text for given, text in found] == [f"{QUESTION} four</s>", f"{QUESTION} six</s>"]
    assert (
        parts(make_tokenizer(chat_template=TEMPLATE), {**WHOLE, "question": "x", "system": "y"}, "dpo")[0][0] == ASKED
    )


@pytest.mark.parametrize("row", [PAIRS["string beside answers"], PAIRS["turns beside conversations"]])
def test_both_sides_share_the_tokens_of_their_prompt(make_tokenizer: Make, row: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    ((first, second),) = [
        [ids for ids, _ in e.sequences]
        for e in encode_dataset(Dataset.from_list([row]), tokenizer, DataConfig(), "dpo")
    ]
    assert agreement([first, second]) >= len(tokenizer(ASKED)["input_ids"])
