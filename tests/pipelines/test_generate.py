"""``fastalign generate``: from prompts to a file, in order, again from where it was stopped."""

import json

import pytest
import torch

from fastalign import cli
from fastalign.config import ModelConfig
from fastalign.data import builtin
from fastalign.models import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama with the built-in tokenizer, and an adapter and a reward model of its kind."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {"model_type": "llama", "num_key_value_heads": 1, **sizes}
    tokenizer = builtin.train_tokenizer()
    for name, options in (("whole", {}), ("reward", {"scalar_head": True})):
        policy = load.load_policy(ModelConfig(config=config), tokenizer=tokenizer, **options)
        load.save_pretrained(policy, tokenizer, folder / name)
    adapted = load.load_policy(ModelConfig(path=str(folder / "whole"), lora={"r": 2}), tokenizer=tokenizer)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
    load.save_pretrained(adapted, tokenizer, folder / "adapter")
    return folder


@pytest.fixture
def run(model, tmp_path, capsys):
    def generate(*words, name="whole", prompts="Say it.\n\nSing, then.\nGo\n", out="samples.jsonl"):
        (tmp_path / "prompts.txt").write_text(prompts)
        argv = ["generate", "--model.path", str(model / name), "--prompts", str(tmp_path / "prompts.txt")]
        argv += ["--out", str(tmp_path / out), "--sampler.max_new_tokens", "6", "--n", "2", *words]
        code = cli.main(argv)
        return code, capsys.readouterr()

    return generate


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_completions_are_written_in_the_order_of_prompts(run, tmp_path):
    code, said = run("--seed", "3", "--sampler.max_rows", "2")
    assert code == 0 and "holds 6 completions of 3 prompts" in said.out
    made = lines(tmp_path / "samples.jsonl")
    assert [(line["prompt_index"], line["sample_index"]) for line in made] == [
        (i, s) for i in (0, 2, 3) for s in (0, 1)
    ]
    assert [line["prompt"] for line in made[::2]] == ["Say it.", "Sing, then.", "Go"]
    assert all(line["logp"] < 0 and 1 <= line["tokens"] <= 6 and isinstance(line["completion"], str) for line in made)
    assert {line["finish_reason"] for line in made} <= {"eos", "length"}
    run("--seed", "3", out="again.jsonl")
    assert lines(tmp_path / "again.jsonl") == made
    run("--seed", "4", out="other.jsonl")
    assert lines(tmp_path / "other.jsonl") != made


def test_a_run_that_was_stopped_goes_on_with_the_same_completions(run, tmp_path):
    run()
    out = tmp_path / "samples.jsonl"
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for kept in (0, ends[0] - 5, ends[1] + 7, ends[2]):
        out.write_bytes(whole[:kept])
        code, said = run("--resume")
        assert code == 0 and out.read_bytes() == whole
        assert ("which were there" in said.out) == (kept > ends[0])
    assert run("--overwrite")[0] == 0 and out.read_bytes() == whole
    code, said = run()
    assert code == 1 and "exists: go on with --resume, or replace it with --overwrite" in said.err
    code, said = run("--resume", prompts="Say it.\nOther\n")
    assert code == 1 and "line 3 of" in said.err and "resume with the prompts and n that it was begun with" in said.err
    out.write_text("no json\n")
    assert "line 1 of" in run("--resume")[1].err
    assert out.read_text() == "no json\n"


def test_messages_come_from_a_file_and_settings_from_a_runs_own(run, tmp_path, model):
    rows = [{"prompt": [{"role": "user", "content": f"Number {i}?"}], "answer": i} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(f"optim: {{lr: 1e-5}}\nmethod: dpo\ndata: {{path: {tmp_path / 'rows.jsonl'}}}\n")
    words = ["--model.path", str(model / "whole"), "--config", str(tmp_path / "run.yaml"), "--out"]
    words += [str(tmp_path / "chat.jsonl"), "--sampler.max_new_tokens", "3"]
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert cli.main(["generate", *words, "--data.chat_template", str(template)]) == 0
    assert [line["prompt"] for line in lines(tmp_path / "chat.jsonl")] == [row["prompt"] for row in rows]


def test_an_adapter_samples_and_a_reward_model_is_refused(run, tmp_path):
    run()
    assert run(name="adapter", out="adapter.jsonl")[0] == 0
    assert lines(tmp_path / "adapter.jsonl") != lines(tmp_path / "samples.jsonl")
    code, said = run(name="reward", out="reward.jsonl")
    assert code == 1 and "is a reward model: it gives scores, not tokens" in said.err


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--n", "0"], 1, "n: expected completions per prompt, 1 or more, got 0"),
        (["--resume", "--overwrite"], 1, "resume and overwrite are both set"),
        (["--out", "/nowhere/at/all.jsonl"], 1, "out: expected the path of a file in a directory that exists"),
        (["--prompts", "none.txt"], 1, "prompts: no file at 'none.txt'"),
        (["--sampler.temprature", "1"], 2, "unknown key 'sampler.temprature': did you mean 'sampler.temperature'?"),
        (["--optim.lr", "1"], 2, "unknown key 'optim.lr'"),
        (["--seed"], 2, "expected one argument"),
        (["--sampler.top_p", "0"], 1, "sampler.top_p: expected a number from 0 to 1, got 0.0"),
    ],
)
def test_a_mistake_gets_one_line(run, words, code, said):
    found, output = run(*words)
    assert found == code and said in output.err and output.err.rstrip().count("fastalign: error") == 1


def test_help_and_printed_settings(capsys):
    for word in ("--help", "--print_config"):
        with pytest.raises(SystemExit):
            cli.main(["generate", word])
    said = capsys.readouterr().out
    assert "--n N" in said and "--sampler.temperature" in said and "--model.path" in said and "overwrite: false" in said
