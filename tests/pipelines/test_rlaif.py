"""``fastalign rlaif``: revised answers and labelled pairs, by a small Llama here and behind a server."""

import json
import threading
from typing import ClassVar

import pytest
import torch
import yaml
from servers import JsonHandler, serving

from fastalign import cli
from fastalign.config import DataConfig, ModelConfig, SamplerConfig
from fastalign.data import builtin
from fastalign.models import load
from fastalign.pipelines import rlaif as module
from fastalign.pipelines.feedback import Asked, Item, LocalModel, letters
from fastalign.pipelines.principles import BUILTIN

PRINCIPLES = [
    {"critique": "Find faults.", "revision": "Mend them.", "preference": "Which is kinder?"},
    {"critique": "Find lies.", "revision": "Be honest.", "preference": "Which is truer?"},
]
ROWS = [
    {"prompt": f"Say {word}.", "chosen": f" Yes, {word}.", "rejected": f" No {word} at all, not today."}
    for word in ("a sentence", "nothing", "the name of a module")
]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama with the built-in tokenizer, whose distributions are not flat."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer, folder = builtin.train_tokenizer(), tmp_path_factory.mktemp("model") / "llama"
    policy = load.load_policy(ModelConfig(config={"model_type": "llama", **sizes}), tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    load.save_pretrained(policy, tokenizer, folder)
    return str(folder)


@pytest.fixture
def run(model, tmp_path, capsys):
    def rlaif(stage, *words, rows=ROWS, out="out.jsonl", local=True):
        argv = ["rlaif", "--stage", stage, "--out", str(tmp_path / out), "--sampler.max_new_tokens", "6"]
        (tmp_path / "principles.yaml").write_text(yaml.dump(PRINCIPLES))
        argv += ["--principles", str(tmp_path / "principles.yaml")]
        argv += ["--data.path", written(tmp_path / "rows.jsonl", rows), *(["--model.path", model] if local else [])]
        code = cli.main([*argv, *words])
        return code, capsys.readouterr()

    return rlaif


def test_answers_are_revised_by_drawn_principles(run, tmp_path):
    helpful = [{"prompt": "Say yes.", "completion": " Yes."}]
    words = ["--rounds", "3", "--mix", written(tmp_path / "mix.jsonl", helpful), "--seed", "3"]
    code, said = run("revise", *words)
    assert code == 0 and "holds 3 rows of 3 prompts, 1 more of mix; mean characters of an answer" in said.out
    made = lines(tmp_path / "out.jsonl")
    assert made[3:] == helpful
    assert [row["prompt"] for row in made[:3]] == [row["prompt"] for row in ROWS]
    for row in made[:3]:
        assert len(row["critiques"]) == len(row["revisions"]) == len(row["principles"]) == 3
        assert row["completion"] == row["revisions"][-1] and row["completion"].strip()
        assert all(text in ("Find faults.", "Find lies.") for text in row["principles"])
    assert {text for row in made[:3] for text in row["principles"]} == {"Find faults.", "Find lies."}
    whole = (tmp_path / "out.jsonl").read_bytes()
    for kept in (0, whole.index(b"\n") + 20, len(whole) - 3, len(whole)):
        (tmp_path / "out.jsonl").write_bytes(whole[:kept])
        assert run("revise", *words, "--resume")[0] == 0 and (tmp_path / "out.jsonl").read_bytes() == whole
    run("revise", *words[:-1], "4", "--overwrite")
    assert (tmp_path / "out.jsonl").read_bytes() != whole


def test_the_first_answer_is_that_of_generate(run, tmp_path, model):
    run("revise", "--rounds", "1")
    argv = ["generate", "--model.path", model, "--data.path", str(tmp_path / "rows.jsonl"), "--sampler.max_new_tokens"]
    assert cli.main([*argv, "6", "--out", str(tmp_path / "samples.jsonl")]) == 0
    firsts = [row["first"] for row in lines(tmp_path / "out.jsonl")]
    assert firsts == [row["completion"] for row in lines(tmp_path / "samples.jsonl")]


def expected_logps(model, texts):
    """Of `(A)` and `(B)` behind each text, by the model's own forward."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(model), []
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    for text in texts:
        start = len(tokenizer(text).input_ids)
        for option in (" (A)", " (B)"):
            ids = torch.tensor(tokenizer(text + option).input_ids)
            logps = plain(ids[None]).logits[0, :-1].log_softmax(-1)
            found.append(logps.gather(1, ids[1:, None])[start - 1 :].sum().item())
    return found


def test_pairs_of_the_data_are_labelled_in_both_orders(run, tmp_path, model):
    code, said = run("label", "--answers", "data")
    assert code == 0 and "holds 3 rows of 3 prompts; label entropy" in said.out and "agreement with the" in said.out
    made = lines(tmp_path / "out.jsonl")
    for row, given in zip(made, ROWS, strict=True):
        sides = [given["chosen"], given["rejected"]]
        assert [row["chosen"], row["rejected"]] == sides[:: 1 if row["agrees"] else -1]
        a, b = row["chosen"].strip(), row["rejected"].strip()
        head = f"Compare two answers to this.\n\n{row['prompt']}\n\n{row['principle']}\n\n"
        texts = [f"{head}(A) {x}\n\n(B) {y}\n\nThe better answer is" for x, y in ((a, b), (b, a))]
        found = [*row["logps_chosen_first"], *row["logps_chosen_second"]]
        assert found == pytest.approx(expected_logps(model, texts), abs=1e-4)
        first, second = torch.tensor([found[0] - found[1], found[3] - found[2]], dtype=torch.float64).sigmoid()
        assert row["probability"] == pytest.approx((first + second).item() / 2) and row["probability"] >= 0.5
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    run("label", "--answers", "data", "--overwrite", rows=swapped)
    for before, after in zip(made, lines(tmp_path / "out.jsonl"), strict=True):
        assert after["chosen"] == before["chosen"] and after["agrees"] is not before["agrees"]
        assert after["probability"] == pytest.approx(before["probability"], abs=1e-6)
    run("label", "--answers", "data", "--clamp", "[0.45, 0.5]", "--overwrite")
    assert all(0.5 <= row["probability"] <= 0.55 for row in lines(tmp_path / "out.jsonl"))


def test_sampled_pairs_of_conversations_train_a_soft_label_reward_model(run, tmp_path, model):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    code, said = run("label", rows=rows)
    made = lines(tmp_path / "out.jsonl")
    assert code == 0 and "order flips" in said.out and "agreement" not in said.out
    assert all(row["chosen"][0]["role"] == "assistant" and row["chosen"] != row["rejected"] for row in made)
    argv = ["reward", "--loss.name", "soft_label", "--model.path", model, "--data.path", str(tmp_path / "out.jsonl")]
    argv += ["--run.steps", "1", "--run.output_dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "cache")]
    assert cli.main(argv) == 0


def test_what_is_too_long_is_dropped_and_counted(run, tmp_path):
    rows = [*ROWS, {"prompt": "Say it. " * 30, "chosen": "a", "rejected": "b"}]
    code, said = run("label", "--answers", "data", "--data.max_length", "100", rows=rows)
    assert code == 0 and "holds 3 rows of 4 prompts" in said.out and "; dropped, too long: 1" in said.out
    code, said = run("label", "--answers", "data", "--data.max_length", "20", "--overwrite")
    assert code == 1 and "no row is left of 3 prompts; dropped, too long: 3" in said.err


def test_options_are_scored_together_as_apart(model):
    local = LocalModel(ModelConfig(path=model), SamplerConfig(), DataConfig())
    talks = [[{"role": "user", "content": "Which? " * n}] for n in (1, 9, 4)]
    asked = [Asked(Item(i, talk), talk) for i, talk in enumerate(talks)]
    apart = [local.options([one])[0] for one in asked]
    assert local.options(asked) == [pytest.approx(each, abs=1e-5) for each in apart]


class Chat(JsonHandler):
    """Speaks OpenAI's chat API for the small model; a letter is its likelier token behind the conversation."""

    local: ClassVar[LocalModel]
    seen: ClassVar[list] = []
    lock = threading.Lock()

    def do_GET(self):
        self.answer({"data": [{"id": "a-model"}]})

    def do_POST(self):
        asked = self.asked()
        self.seen.append(asked)
        if asked["model"] != "a-model":
            self.answer({"error": {"message": f"The model `{asked['model']}` does not exist."}}, 404)
            return
        with self.lock:
            one = Asked(Item(asked.get("seed", 0), asked["messages"]), asked["messages"])
            if asked.get("logprobs"):
                logps = dict(zip(("A", "(B"), self.local.options([one])[0], strict=True))
                likely = [{"token": token, "logprob": logp} for token, logp in logps.items()]
                self.answer({"choices": [{"logprobs": {"content": [{"top_logprobs": likely}]}}]})
            else:
                text = self.local.answers([one], 1, 0)[0][0]
                self.answer({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture(scope="module")
def url(model):
    Chat.local = LocalModel(ModelConfig(path=model), SamplerConfig(max_new_tokens=6), DataConfig())
    with serving(Chat) as url:
        yield url


def test_a_server_gives_the_feedback(run, tmp_path, url, monkeypatch):
    Chat.seen.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    code, said = run("revise", "--endpoint", url, "--rounds", "2", local=False)
    assert code == 0 and "holds 3 rows" in said.out, said.err
    assert len(Chat.seen) == 3 + 2 * 2 * 3 and len({asked["seed"] for asked in Chat.seen}) == len(Chat.seen)
    assert [turn["role"] for turn in Chat.seen[-1]["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert Chat.seen[0]["max_tokens"] == 6 and "top_k" not in Chat.seen[0]
    code, said = run("label", "--endpoint", url, "--answers", "data", out="labels.jsonl", local=False)
    assert code == 0 and "holds 3 rows" in said.out, said.err
    asked = Chat.seen[-1]
    assert asked["top_logprobs"] == 20 and asked["messages"][0]["content"].endswith("one letter, A or B.")
    code, said = run("label", "--endpoint", url, out="sampled.jsonl")  # answers sampled here
    assert code == 0 and all("top_logprobs" in asked for asked in Chat.seen[-6:])


def test_letters_are_found_in_all_their_spellings():
    likely = [
        {"token": token, "logprob": logp} for token, logp in (("A", -1.0), (" A", -1.0), ("An", -2.0), ("(", -5.0))
    ]
    assert letters(likely) == pytest.approx((-1 + 0.6931, -5.0), abs=1e-4)
    assert letters(likely[2:]) is None and letters([]) is None


def test_the_built_in_principles_are_printed(capsys):
    assert cli.main(["rlaif", "--principles", "builtin"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(BUILTIN)
    assert all({*principle} == {"critique", "revision", "preference"} for principle in yaml.safe_load(BUILTIN))


@pytest.mark.parametrize(
    ("stage", "words", "text"),
    [
        ("null", [], "stage is not set: --stage revise makes rows for sft"),
        ("label", ["--clamp", "[0.6, 0.4]"], "clamp: expected two probabilities, the lower first, e.g. [0.4, 0.6]"),
        ("revise", ["--rounds", "0"], "rounds: expected critiques and revisions of each answer, 1 or more, got 0"),
        ("revise", ["--answers", "data"], "answers: data: only --stage label compares the answers of the data"),
        ("label", ["--mix", "x.jsonl"], "mix: only --stage revise writes rows for sft"),
        ("label", ["--principles", "none.yaml"], "principles: cannot read 'none.yaml'"),
        ("label", ["--principles", __file__], "is not valid YAML"),
        ("revise", ["--data.columns", "{completion: chosen, prompt: nothing}"], "nothing"),
        ("label", ["--endpoint", "http://127.0.0.1:9/v1"], "endpoint: http://127.0.0.1:9/v1/models does not answer"),
        ("label", ["--endpoint_model", "a"], "endpoint_model names a model of a server: set endpoint too"),
        ("label", ["--sampler.backend", "vllm"], "sampler.backend: vllm gives no log-probs of options"),
    ],
)
def test_a_mistake_gets_one_line(run, tmp_path, stage, words, text):
    code, said = run(stage, *words)
    assert code != 0 and text in said.err and said.err.rstrip().count("fastalign: error") == 1, said.err
    assert not (tmp_path / "out.jsonl").exists() or not (tmp_path / "out.jsonl").read_bytes()


def test_files_principles_and_servers_that_do_not_fit_are_refused(run, tmp_path, url, monkeypatch):
    run("label", "--answers", "data")
    whole = (tmp_path / "out.jsonl").read_bytes()
    assert "exists: go on with --resume, or replace it" in run("label")[1].err
    assert "line 1 of" in (said := run("revise", "--resume")[1].err) and "is no row of --stage revise" in said
    said = run("label", "--answers", "data", "--resume", rows=ROWS[1:])[1].err
    assert "is of another prompt: resume with the prompts that it was begun with" in said
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    mix = written(tmp_path / "mix.jsonl", [{"prompt": [{"role": "user", "content": "Yes?"}], "completion": "Yes."}])
    assert "must all be texts or all conversations" in run("revise", "--mix", mix, out="b.jsonl")[1].err
    said = run("label", "--endpoint", url, "--endpoint_model", "b", "--answers", "data", out="b.jsonl")[1].err
    assert "endpoint: " in said and "/chat/completions answers 404" in said and "does not exist" in said
    kept = Chat.answer
    monkeypatch.setattr(Chat, "answer", lambda self, x, *_: kept(self, json.loads(json.dumps(x).replace("top_", ""))))
    said = run("label", "--endpoint", url, "--answers", "data", out="c.jsonl")[1].err
    assert "answers without choices.0.logprobs.content.0.top_logprobs, which is needed" in said
    monkeypatch.setitem(PRINCIPLES[0], "preference", "")
    assert "principles: number 1 has no text 'preference', which --stage label" in run("label", out="d.jsonl")[1].err


def test_the_entropy_of_a_label():
    assert module.binary_entropy(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 0.693147, 0], abs=1e-6)
