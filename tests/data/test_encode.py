"""From rows to scored tokens: formats, boundaries, truncation, counts and the cache."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from fastalign.config import DataConfig
from fastalign.data import encode, formats, sources
from fastalign.data.encode import encode_dataset, turn_length
from fastalign.data.examples import TokenDataset, TokenExample
from fastalign.data.forest import agreement
from fastalign.data.pack import build_batch

Make = Callable[..., PreTrainedTokenizerFast]

PLAIN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Writes an empty reasoning block before the last turn only, as several published templates do.
REASONING = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(thinking)\n\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def run(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, method: str = "sft", **options: Any
) -> TokenDataset:
    return encode_dataset(Dataset.from_list(rows), tokenizer, DataConfig(**options), method)


def parts(tokenizer: PreTrainedTokenizerFast, example: TokenExample) -> list[tuple[str, str]]:
    """For each sequence the text that is given and the text that is scored."""
    return [(tokenizer.decode(ids[~scored]), tokenizer.decode(ids[scored])) for ids, scored in example.sequences]


def test_progress_tells_the_rows_there_are(
    make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encode, "_LINE_SECONDS", -1.0)
    monkeypatch.setattr(encode, "_BATCH_ROWS", 2)
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: True)
    with caplog.at_level(logging.INFO, logger="fastalign"):
        run([{"prompt": "a", "completion": "b"}] * 5, make_tokenizer())
    said = [record.getMessage() for record in caplog.records if "tokenising" in record.getMessage()]
    assert said == [f"tokenising: {done} of 5 rows" for done in (2, 4, 5)]


@pytest.mark.parametrize(
    ("adds", "given"), [("", "Two and"), ("bos", "<s>Two and"), ("eos", "Two and"), ("bos eos", "<s>Two and")]
)
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_a_completion_is_scored_with_one_eos(make_tokenizer: Make, adds: str, given: str, pad: str) -> None:
    tokenizer = make_tokenizer(adds, pad)
    encoded = run([{"prompt": "Two and", "completion": " two</s> is four."}], tokenizer)
    assert parts(tokenizer, encoded[0]) == [(given, " two</s> is four.</s>")], (
        "an EOS inside a text is a token like others"
    )
    assert encoded.counts == {"rows": 1, "prompt_not_a_prefix": 0, "kept": 1}


@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"])
def test_one_token_for_bos_and_eos(make_tokenizer: Make, adds: str) -> None:
    tokenizer = make_tokenizer(adds, bos="</s>")
    encoded = run([{"prompt": "Two and", "completion": " two is four."}], tokenizer)
    given = ("</s>" if "bos" in adds else "") + "Two and"
    assert parts(tokenizer, encoded[0]) == [(given, " two is four.</s>")]


def test_an_unknown_text_that_is_the_eos_token_tells_nothing() -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0, "two": 1}, unk_token="</s>"))
    words.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **dict.fromkeys(["bos_token", "eos_token"], "</s>"))
    assert encode.added_tokens(tokenizer) == ([0], [])


@pytest.mark.parametrize("adds", ["", "bos", "bos eos"])
def test_special_tokens_in_the_text_are_not_doubled(make_tokenizer: Make, adds: str) -> None:
    tokenizer = make_tokenizer(adds)
    encoded = run([{"prompt": "<s>Two", "completion": " cats</s>"}], tokenizer)
    assert parts(tokenizer, encoded[0]) == [("<s>Two", " cats</s>")]


@pytest.mark.parametrize("adds", ["", "bos"])
def test_of_a_text_all_tokens_but_the_first_are_scored(make_tokenizer: Make, adds: str) -> None:
    tokenizer = make_tokenizer(adds)
    ids, scored = run([{"text": "The cat sat."}], tokenizer)[0].sequences[0]
    assert tokenizer.decode(ids) == ("<s>" if adds else "") + "The cat sat.</s>"
    assert scored.tolist() == [False] + [True] * (len(ids) - 1)


def test_a_merge_across_the_boundary_belongs_to_the_completion(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    encoded = run([{"prompt": "The c", "completion": "at sat"}], tokenizer)
    assert " cat" in tokenizer.convert_ids_to_tokens(tokenizer("The cat")["input_ids"])[1].replace("Ġ", " ")
    assert parts(tokenizer, encoded[0]) == [("The", " cat sat</s>")]
    assert encoded.counts["prompt_not_a_prefix"] == 1


def test_a_moved_boundary_is_said_once(make_tokenizer: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run([{"prompt": "The c", "completion": f"at sat {i}"} for i in range(3)], make_tokenizer())
    assert [r.message[:33] for r in caplog.records] == ["3 prompts are not a token prefix "]


@pytest.mark.parametrize(
    ("template", "end", "answer"),
    [(PLAIN, "", "four.<|end|>\n"), (MARKED, "\n", "four.<|end|>"), (REASONING, "", "(thinking)\n\nfour.<|end|>\n")],
)
def test_a_conversational_completion_begins_after_the_generation_prompt(
    make_tokenizer: Make, template: str, end: str, answer: str
) -> None:
    tokenizer = make_tokenizer("bos", chat_template=template)
    encoded = run([{"prompt": [user("two?")], "completion": [assistant("four.")]}], tokenizer)
    given, scored = parts(tokenizer, encoded[0])[0]
    assert given == f"<user>two?<|end|>\n<assistant>{end}", "the template writes every special token"
    assert scored == answer


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (MARKED, "four.<|end|>yes, no<|end|>"),
        (PLAIN, "four.<|end|>\nyes, no<|end|>\n"),
        (REASONING, "four.<|end|>\n(thinking)\n\nyes, no<|end|>\n"),
    ],
)
def test_every_assistant_turn_is_scored_with_its_end(make_tokenizer: Make, template: str, turns: str) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    dialogue = [user("two?"), assistant("four."), user("sure?"), assistant("yes, no")]
    encoded = run([{"messages": dialogue}], tokenizer)
    assert parts(tokenizer, encoded[0])[0][1] == turns


def test_sharegpt_is_a_conversation(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer(chat_template=MARKED)
    turns = [("system", "be kind"), ("human", "two?"), ("gpt", "four.")]
    encoded = run([{"conversations": [{"from": who, "value": text} for who, text in turns]}], tokenizer)
    assert parts(tokenizer, encoded[0]) == [
        ("<system>be kind<|end|>\n<user>two?<|end|>\n<assistant>\n", "four.<|end|>")
    ]


def test_a_template_file_replaces_the_tokenizers(make_tokenizer: Make, write: Callable[[str, str], str]) -> None:
    row = {"prompt": [user("two?")], "completion": [assistant("four.")]}
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"row 0: .*no chat template: set data\.chat_template"):
        run([row], tokenizer)
    assert parts(tokenizer, run([row], tokenizer, chat_template=write("t.jinja", PLAIN))[0])[0][1] == "four.<|end|>\n"
    with pytest.raises(ValueError, match=r"none at 'absent\.jinja'"):
        run([row], tokenizer, chat_template="absent.jinja")


def test_tools_and_template_arguments_reach_the_template(make_tokenizer: Make) -> None:
    template = "{{ tools[0]['function']['name'] }} {{ mood }}:" + PLAIN
    row = {
        "prompt": [user("two?")],
        "completion": [assistant("four.")],
        "tools": [{"type": "function", "function": {"name": "adder"}}],
        "chat_template_kwargs": {"mood": "calm"},
    }
    tokenizer = make_tokenizer(chat_template=template)
    assert parts(tokenizer, run([row], tokenizer)[0])[0][0].startswith("adder calm:<user>")


PROMPTED = {"prompt": "Two", "chosen": " cats", "rejected": " dogs"}
IMPLICIT = {"chosen": "Two cats", "rejected": "Two dogs"}
TALK = {"prompt": [user("two?")], "chosen": [assistant("four.")], "rejected": [assistant("five.")]}
IMPLICIT_TALK = {"chosen": TALK["prompt"] + TALK["chosen"], "rejected": TALK["prompt"] + TALK["rejected"]}
STRING_BESIDE_TALK = {"prompt": "two?", **IMPLICIT_TALK}


@pytest.mark.parametrize("row", [PROMPTED, IMPLICIT, TALK, IMPLICIT_TALK, STRING_BESIDE_TALK])
def test_a_pair_is_chosen_then_rejected(make_tokenizer: Make, row: dict) -> None:
    tokenizer = make_tokenizer(chat_template=PLAIN)
    pair = run([row], tokenizer, "dpo")[0]
    text = isinstance(row["chosen"], str)
    given = "Two" if row is PROMPTED else "Two" if text else "<user>two?<|end|>\n<assistant>"
    ends = (" cats</s>", " dogs</s>") if text else ("four.<|end|>\n", "five.<|end|>\n")
    assert parts(tokenizer, pair) == [(given, ends[0]), (given, ends[1])]
    assert parts(tokenizer, run([row], tokenizer, "sft")[0]) == [(given, ends[0])], "sft learns the chosen side"


def test_raw_dialogues_split_at_the_last_answer_of_chosen(make_tokenizer: Make) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: two?\n\nAssistant:"
    rows = [
        {"chosen": f"{start} I think four", "rejected": f"{start} I think five"},
        {"chosen": f"{start} yes", "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: three?\n\nAssistant: yes"},
        {"chosen": f"{start} four", "rejected": f"{start} "},
    ]
    tokenizer = make_tokenizer()
    encoded = run(rows, tokenizer, "dpo")
    assert parts(tokenizer, encoded[0]) == [(start, " I think four</s>"), (start, " I think five</s>")]
    assert [e.example_id for e in encoded] == [0]
    assert encoded.counts["dropped_prompt_mismatch"] == encoded.counts["dropped_empty_completion"] == 1


SILENT = [assistant("")]


@pytest.mark.parametrize(
    ("row", "method"),
    [
        ({"prompt": [user("two?")], "completion": SILENT}, "sft"),
        ({"prompt": [user("two?")], "completion": [{"role": "assistant", "content": None}]}, "sft"),
        ({"messages": [user("two?"), assistant(" \n")]}, "sft"),
        ({"conversations": [{"from": "human", "value": "two?"}, {"from": "gpt", "value": None}]}, "sft"),
        ({**TALK, "chosen": SILENT}, "dpo"),
        ({**TALK, "rejected": SILENT}, "dpo"),
        ({**IMPLICIT_TALK, "rejected": TALK["prompt"] + SILENT}, "dpo"),
    ],
)
def test_an_empty_turn_is_no_completion(make_tokenizer: Make, row: dict, method: str) -> None:
    with pytest.raises(ValueError, match=r"no row is left to train on: rows 1, dropped empty completion 1 "):
        run([row], make_tokenizer(chat_template=PLAIN), method)


def test_a_turn_of_tool_calls_is_a_completion() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "adder"}}]}
    assert not formats.is_empty([call]) and formats.is_empty([{**call, "tool_calls": []}])


def test_the_kind_and_the_row_number_are_carried(make_tokenizer: Make) -> None:
    rows = [{**PROMPTED, "chosen": "", "kind": "a"}, {**PROMPTED, "kind": "b"}, {**PROMPTED, "kind": None}]
    assert [(e.example_id, e.kind) for e in run(rows, make_tokenizer(), "dpo")] == [(1, "b"), (2, None)]


def test_truncation_cuts_completions_and_drops_full_prompts(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    prompt = "The cat sat on the mat"
    length = len(tokenizer(prompt)["input_ids"])
    rows = [
        {"prompt": prompt, "completion": " and"},
        {"prompt": prompt, "completion": " and the dog sat by the door"},
        {"prompt": f"{prompt}, and", "completion": " the dog"},
    ]
    cut = run(rows, tokenizer, max_length=length + 2)
    assert [len(e.sequences[0][0]) for e in cut] == [length + 2] * 2
    assert parts(tokenizer, cut[1])[0] == (prompt, " and the"), "what is cut has no EOS"
    assert cut.counts == {
        "rows": 3, "prompt_not_a_prefix": 0, "truncated": 1, "dropped_prompt_too_long": 1, "kept": 2
    }  # fmt: skip
    dropped = run(rows, tokenizer, max_length=length + 2, truncation="drop")
    assert (
        dropped.counts["dropped_too_long"] == dropped.counts["dropped_prompt_too_long"] == dropped.counts["kept"] == 1
    )


@pytest.mark.parametrize("length", [-5, 0, 1])
def test_a_length_without_room_for_a_scored_token_is_refused(make_tokenizer: Make, length: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.max_length: expected at least 2, .* got {length}$"):
        run([PROMPTED], make_tokenizer(), max_length=length)


def test_one_side_without_room_drops_the_pair(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    rows = [PROMPTED, {"prompt": "The cat sat on the mat", "chosen": " a", "rejected": " b"}]
    assert [e.example_id for e in run(rows, tokenizer, "dpo", max_length=4)] == [0]


def test_nothing_left_is_an_error_with_the_counts(make_tokenizer: Make) -> None:
    with pytest.raises(ValueError, match=r"no row is left.*rows 2, dropped empty completion 2"):
        run([{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": " \n"}], make_tokenizer())


@pytest.mark.parametrize(
    ("row", "method", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "sft",
            r"expects the columns prompt\+completion or .*found \['answer', 'question'\]",
        ),
        ({"prompt": "a", "completion": "b"}, "dpo", r"dpo expects the columns rejected\+chosen; found"),
        ({**PROMPTED, "images": ["x"]}, "dpo", "'images': images are not supported"),
        ({"prompt": "a", "completion": 3}, "sft", "row 0: column 'completion': expected a string or .* got a number"),
        ({"messages": "a"}, "sft", "row 0: column 'messages': expected a list of {role, content}, got a string"),
        ({"chosen": "a", "rejected": [assistant("b")]}, "dpo", "row 0: 'chosen' and 'rejected' must both be"),
        ({**PROMPTED, "prompt": 5}, "dpo", "row 0: column 'prompt': expected a string or a list .* got a number"),
        ({"messages": [user("a")]}, "sft", "row 0: a conversation without a scored token"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "sft", "row 0: .*a turn from 'narrator'"),
        ({"conversations": [{"value": "x"}]}, "sft", r"row 0: .*a turn without 'from', with \['value'\]: expected"),
        ({"conversations": [{"from": "human"}]}, "sft", "row 0: .*a turn without 'value'"),
        ({"conversations": [{"from": "human", "value": 1}]}, "sft", "row 0: .*'value' is a number: expected a string"),
        ({"conversations": "a"}, "sft", "row 0: column 'conversations': expected a list of .* got a string"),
        ({"conversations": ["a", "b"]}, "sft", "row 0: column 'conversations': .* got a list of strings"),
        (
            {"prompt": [user("a")], "completion": {"content": "b"}},
            "sft",
            "row 0: column 'completion': .* list of mappings",
        ),
        ({**TALK, "tools": 5}, "dpo", "row 0: column 'tools': expected a list of tools or its JSON, got a number"),
        ({**TALK, "tools": "free text"}, "dpo", r"row 0: column 'tools': .*, got a text \(Expecting value"),
        ({**TALK, "chat_template_kwargs": "x"}, "dpo", "row 0: column 'chat_template_kwargs': expected a mapping"),
    ],
)
def test_rows_that_do_not_fit_are_named(make_tokenizer: Make, row: dict, method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([row], make_tokenizer(chat_template=PLAIN), method)


def test_a_template_file_that_is_no_text_is_named(make_tokenizer: Make, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"data\.chat_template: expected UTF-8 in '.*t\.jinja'"):
        run([PROMPTED], make_tokenizer(), chat_template=str(tmp_path / "t.jinja"))


@pytest.mark.parametrize("template", ["{{ messages + 1 }}", "{{ 1 // 0 }}", "{{ raise_exception('no') }}"])
def test_a_template_that_fails_is_named(make_tokenizer: Make, template: str) -> None:
    with pytest.raises(ValueError, match="row 0: the chat template refuses a conversation: "):
        run([{"messages": [user("a"), assistant("b")]}], make_tokenizer(chat_template=template))


def test_plain_text_takes_no_template_arguments(make_tokenizer: Make) -> None:
    row = {"prompt": "Two", "completion": " cats", "tools": "free text", "chat_template_kwargs": "free"}
    tokenizer = make_tokenizer()
    assert parts(tokenizer, run([row], tokenizer)[0]) == [("Two", " cats</s>")]


def test_format_overrides_recognition() -> None:
    both = ["prompt", "completion", "text"]
    assert formats.recognise(both, "sft") == "prompt_completion"
    assert formats.recognise(both, "sft", "text") == "text"
    with pytest.raises(ValueError, match=r"dpo trains on preference, got data\.format='text'"):
        formats.recognise(both, "dpo", "text")
    with pytest.raises(
        ValueError, match=r"^reward --loss\.name k_wise expects the columns scores\+prompt\+completions;"
    ):
        formats.recognise(both, "reward:k_wise")


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        run([{"text": "a b"}], tokenizer)


def test_a_turn_whose_end_merges_with_what_follows_is_found() -> None:
    assert turn_length([1], [1, 5, 6, 7], [5, 6, 99, 3]) == 2
    assert turn_length([1], [1, 8, 5, 6], [5, 6, 3]) == 2, "its front was left out"
    with pytest.raises(ValueError, match="renders an assistant turn differently"):
        turn_length([1], [1, 5, 6], [7, 8])


def test_a_second_run_does_not_tokenise(make_tokenizer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, options = [PROMPTED, {**PROMPTED, "chosen": ""}], {"cache_dir": str(tmp_path)}
    first = run(rows, make_tokenizer(), "dpo", **options)
    monkeypatch.setattr(encode.Encoder, "batch", lambda *_: pytest.fail("tokenised again"))
    again = run(rows, make_tokenizer(), "dpo", **options)
    assert again.counts == first.counts and again.fingerprint == first.fingerprint
    assert all(np.array_equal(a, b) for x, y in zip(first, again, strict=True) for s, t in zip(x.sequences, y.sequences, strict=True) for a, b in zip(s, t, strict=True))  # fmt: skip  # noqa: E501


def test_whatever_decides_the_tokens_changes_the_key(make_tokenizer: Make) -> None:
    rows = [PROMPTED]
    keys = [
        run(rows, make_tokenizer(), "dpo").fingerprint,
        run(rows, make_tokenizer(), "sft").fingerprint,
        run(rows, make_tokenizer("bos"), "dpo").fingerprint,
        run(rows, make_tokenizer(chat_template=PLAIN), "dpo").fingerprint,
        run(rows, make_tokenizer(), "dpo", max_length=9).fingerprint,
        run(rows, make_tokenizer(), "dpo", truncation="drop").fingerprint,
        run([{**PROMPTED, "chosen": " cat"}], make_tokenizer(), "dpo").fingerprint,
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_is_of_the_content_not_of_its_storage(make_tokenizer: Make, write: Callable[[str, str], str]) -> None:
    file = write("pairs.jsonl", '{"prompt": "Two", "chosen": " cats", "rejected": " dogs"}\n')
    rows = sources.load_rows(file)
    twice = Dataset.from_list([{**PROMPTED, "prompt": "x"}, PROMPTED]).select([1])
    keys = {encode_dataset(r, make_tokenizer(), DataConfig(), "dpo").fingerprint for r in (rows, twice)}
    assert keys == {run([PROMPTED], make_tokenizer(), "dpo").fingerprint}


def test_real_preferences(make_tokenizer: Make, shared_file: Callable[[str], Path]) -> None:
    rows = sources.load_rows(str(shared_file("data/hh-rlhf/harmless-base-test.jsonl.gz")))
    tokenizer = make_tokenizer()
    pairs = run(rows.to_list(), tokenizer, "dpo", max_length=1024)
    assert len(rows) == 2312 and pairs.counts["kept"] + sum(
        count for name, count in pairs.counts.items() if name.startswith("dropped")
    ) == 2312  # fmt: skip
    assert pairs.counts["dropped_prompt_mismatch"] <= 10 and pairs.counts["kept"] > 2000
    examples = pairs.fetch(list(range(0, len(pairs), 10)))
    for example in examples:
        prompts = {tokenizer.decode(ids[~scored]) for ids, scored in example.sequences}
        assert len(prompts) == 1 and prompts.pop().endswith("\n\nAssistant:"), f"row {example.example_id}"
    saved = build_batch(examples, False).num_tokens / build_batch(examples, True).num_tokens
    assert saved > 1.4, "sharing prompts saves 1.58x of the tokens on the whole set"
    assert all(agreement([ids for ids, _ in e.sequences]) >= np.argmax(e.sequences[0][1]) - 1 for e in examples)


def test_real_word_problems(make_tokenizer: Make, shared_file: Callable[[str], Path]) -> None:
    path = str(shared_file("data/gsm8k/train.jsonl"))
    rows = sources.load_rows(path, columns={"prompt": "question", "completion": "answer"}, limit=300)
    tokenizer = make_tokenizer()
    encoded = run(rows.to_list(), tokenizer, max_length=4096)
    assert encoded.counts["kept"] == 300
    for row, example in zip(rows, encoded, strict=True):
        given, scored = parts(tokenizer, example)[0]
        assert given + scored == f"{row['prompt']}{row['completion']}</s>" and "#### " in scored


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_same_tokens_counts_and_key(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], processes: int, tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {i}?", "chosen": "four " * (i % 9) * 3, "rejected": "five"} for i in range(2503)]
    tokenizer, found = make_tokenizer(), []
    for number in (None, processes):
        data = DataConfig(max_length=12, cache_dir=str(tmp_path / str(number)), num_proc=number)
        found.append(encode_dataset(Dataset.from_list(rows), tokenizer, data, "dpo"))
    one, several = found
    assert one.counts == several.counts and list(one.counts) == list(several.counts)
    assert 0 < one.counts["kept"] < len(rows) and one.counts["truncated"] and one.counts["dropped_empty_completion"]
    assert one.fingerprint == several.fingerprint and one.table.to_dict() == several.table.to_dict()
    assert len([*tmp_path.rglob("*.arrow")]) == 2, "the parts are gone"


def test_a_number_of_processes_that_cannot_be_is_refused(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    with pytest.raises(ValueError, match=r"^data\.num_proc: expected at least 1 process, got 0$"):
        run([{"text": "a"}], make_tokenizer(), num_proc=0)
