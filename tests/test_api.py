"""fastalign from Python: models, tokenizers and rows in memory, runs that are read and resumed, what is refused."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastalign
from fastalign.data.builtin import letter_tokenizer, sort_letters
from fastalign.engine.output import report


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path, new_cache):
    monkeypatch.setattr(report, "plots", lambda records: "")
    monkeypatch.setenv("FASTALIGN_CACHE", new_cache(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model():
    """A Llama for the letters' tokenizer."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(letter_tokenizer()), **size, **heads))


def rows(count=24):
    return sort_letters("train").to_list()[:count]


def accuracy(completions, answer, **kwargs):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def logistic(pair, *, beta: float = 0.1):
    """A user's loss of pairs."""
    from fastalign.losses.preference import log_ratios

    chosen, rejected = log_ratios(pair)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


def test_a_run_of_what_is_in_memory_is_read_resumed_and_sampled_from(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    pairs = datasets.Dataset.from_list(
        [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["answer"][::-1] + "z"} for row in rows()]
    )
    options = {
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "batch.size": 8,
        "run": {"output_dir": "first", "steps": 2},
    }
    run = fastalign.train("dpo", model, pairs, tokenizer=letter_tokenizer(), loss="ipo", **options)
    assert [*run.metrics["step"]] == [1, 2] and run.metrics["loss"].notna().all()
    assert (run.config["loss"]["name"], run.config["optim"]["lr"]) == ("ipo", 0.01)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), "the caller's model changed"
    trained = run.model()
    assert any(not torch.equal(x, before[name]) for name, x in trained.state_dict().items())
    assert run.tokenizer().get_vocab() == letter_tokenizer().get_vocab() and run.report.is_file()
    more = run.resume(run={"steps": 3})
    assert [*more.metrics["step"]] == [1, 2, 3]
    found = fastalign.generate(run, [row["prompt"] for row in rows(3)], n=2, max_new_tokens=4, seed=1)
    assert [(one["prompt_index"], one["sample_index"]) for one in found] == [(i, j) for i in range(3) for j in range(2)]


def test_functions_are_losses_and_rewards(model):
    run = fastalign.train(
        *("grpo", model, rows()),
        tokenizer=letter_tokenizer(),
        rewards=[accuracy, {"builtin": "length", "target": 4, "weight": 0.1}],
        **{"sampler.max_new_tokens": 4, "batch.size": 2, "algorithm.num_generations": 2, "run.steps": 1},
    )
    assert {"rewards/accuracy/mean", "rewards/length/mean"} <= {*run.metrics}
    pairs = [{"prompt": row["prompt"], "chosen": row["answer"], "rejected": "z"} for row in rows()]
    mine = {"loss": {"name": logistic, "beta": 0.2}, "run": {"output_dir": "mine", "steps": 1}, "batch.size": 8}
    ours = {"loss": {"name": "dpo", "beta": 0.2}, "run": {"output_dir": "ours", "steps": 1}, "batch.size": 8}
    losses = [
        fastalign.train("dpo", model, pairs, tokenizer=letter_tokenizer(), **each).metrics["loss"][0]
        for each in (mine, ours)
    ]
    assert losses[0] == losses[1]


@torch.no_grad()
def test_scores_and_evaluation(model):
    tokenizer = letter_tokenizer()
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    samples = fastalign.generate("model", rows(2), n=3, max_new_tokens=3)
    scored = fastalign.score(samples, accuracy, tokenizer=tokenizer, dataset=rows(2), best=1)
    assert len(scored) == 2 and all(line["reward"] == line["rewards"]["accuracy"] for line in scored)
    found = fastalign.evaluate("sft", "model", [{"prompt": r["prompt"], "completion": r["answer"]} for r in rows(8)])
    plain = AutoModelForCausalLM.from_pretrained("model")
    total = count = 0.0
    for row in rows(8):
        prompt, answer = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "answer"))
        ids = torch.tensor([prompt + answer + [tokenizer.eos_token_id]])
        logps = plain(ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(logps[torch.arange(len(logps)), ids[0, 1:]][len(prompt) - 1 :].sum())
        count += len(answer) + 1
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda: fastalign.train("dop", "m", "d"), "unknown method 'dop'"),
        (lambda: fastalign.train("dpo", "m", "d", optim={"lrr": 1}), "unknown key 'optim.lrr' in the call"),
        (lambda: fastalign.train("dpo", "m", "d", optim={"lr": "fast"}), "optim.lr: expected a number"),
        (lambda: fastalign.train("dpo", "m", "d", loss=lambda pair: pair), "expected a function at the top"),
        (lambda: fastalign.train("dpo", "m", datasets.DatasetDict()), "choose a split"),
        (lambda: fastalign.generate("m", ["a"], temprature=1), "unknown setting 'temprature' of the sampler"),
        (lambda: fastalign.Run("nowhere").model(), "holds no model yet"),
    ],
)
def test_what_is_wrong_is_one_line(call, expected):
    with pytest.raises(ValueError, match=expected) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_directory_that_holds_a_run_is_left_alone(model, monkeypatch):
    options = {"tokenizer": letter_tokenizer(), "run": {"output_dir": "first", "steps": 1}, "batch.size": 8}
    demonstrations = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows()]
    with pytest.raises(ValueError, match="unknown key"):
        fastalign.train("sft", model, demonstrations, **options, optim={"lrr": 1})
    assert not Path("first").exists(), "a mistake in the settings leaves nothing"
    with pytest.raises(ValueError, match="data"):
        fastalign.train("sft", model, [{"question": "?"}], **options)
    fastalign.train("sft", model, demonstrations, **options)  # a mistake in the rows may be mended and tried again
    kept = json.dumps(fastalign.Run("first").config), Path("first/inputs/model/model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"first already holds a run"):
        fastalign.train("sft", model, demonstrations, **options)
    now = Path("first/inputs/model/model.safetensors").stat().st_mtime_ns
    assert (json.dumps(fastalign.Run("first").config), now) == kept
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give models and datasets by name or path"):
        fastalign.train("sft", model, demonstrations, **options)


def test_the_directory_of_a_file_is_used(model):
    Path("run.yaml").write_text("method: sft\nrun: {output_dir: there, steps: 1}\nbatch: {size: 8}\n")
    demonstrations = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows()]
    run = fastalign.train("sft", model, demonstrations, tokenizer=letter_tokenizer(), config="run.yaml")
    assert str(run.directory) == "there" and len(run.metrics) == 1
