"""A run that is refused leaves its directory as it was."""

import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from fastalign.config import Config, DataConfig, RunConfig
from fastalign.data.pack import group_tokens
from fastalign.engine.fitting import check_groups
from fastalign.engine.methods import filled_in, objective_of
from fastalign.engine.output.rundir import check_same_run
from fastalign.engine.reference.precompute import precompute
from fastalign.engine.settings import check_settings
from fastalign.engine.setup import check_models, load_data
from fastalign.engine.train import train
from runs import LLAMA, numbers

SHORT = {"run.steps": 4, "run.save_every": 1, "run.keep": 4}
LATER = {"run.overwrite_later": True}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def own_rows(materials, tmp_path) -> Path:
    """A data file of this test alone."""
    path = tmp_path / "own.jsonl"
    path.write_text((materials / "rows.jsonl").read_text())
    return path


@pytest.fixture
def finished(configure, own_rows) -> Path:
    """The directory of a run with checkpoints at steps 1 to 4."""
    config = configure("sft", **SHORT, **{"data.path": str(own_rows)})
    train(config)
    return Path(config.run.output_dir)


def test_dropout_of_an_adapter_is_refused_before_anything_is_read(configure):
    config = configure("sft", **{"model.lora": {"r": 2, "lora_dropout": 0.05}, "data.path": "absent.jsonl"})
    with pytest.raises(ValueError, match=r"model\.lora\.lora_dropout must be 0, got 0\.05: .*; set it to 0"):
        train(config)
    assert not Path(config.run.output_dir).exists()


def test_settings_that_an_older_run_did_not_know_had_their_defaults_there(configure):
    before = asdict(configure("sft"))
    del before["model"]["resize_embeddings"], before["reference"]
    check_same_run(before, asdict(configure("sft")), Path("there"))
    now = asdict(configure("sft", **{"model.resize_embeddings": True}))
    with pytest.raises(ValueError, match=r"model\.resize_embeddings: False there, True here"):
        check_same_run(before, now, Path("there"))


@pytest.mark.parametrize(
    "key, value, told",
    [
        *(("data.num_proc", 4, False), ("batch.max_group_tokens", 900, False), ("sampler.url", "http://b/v1", False)),
        *(("reference.offload", True, True), ("sampler.max_rows", 8, True)),
        ("parallel.shard_gradients", True, True),
    ],
)
def test_what_only_says_where_and_how_it_is_computed_may_change(caplog, key, value, told):
    old, new = (asdict(filled_in(Config("grpo"), objective_of(Config("grpo")))) for _ in range(2))
    section, name = key.split(".")
    new[section][name] = value
    check_same_run(old, new, Path("step-1"))
    assert [f"resume: {key} was" in line for line in caplog.messages] == [True] * told


def test_a_resume_that_fails_leaves_later_checkpoints(configure, finished, own_rows):
    own_rows.write_text("".join(own_rows.read_text().splitlines(keepends=True)[:-4]))
    before = contents(finished)
    back = {"data.path": str(own_rows), "run.resume": str(finished / "checkpoints" / "step-2"), **LATER}
    with pytest.raises(ValueError, match="num_examples=96, this run has 92"):
        train(configure("sft", **SHORT, **back))
    assert contents(finished) == before


def test_latest_names_the_checkpoint_that_a_run_went_back_to(configure, finished, own_rows, monkeypatch):
    expected = numbers(finished)
    monkeypatch.setattr("fastalign.engine.train.run", lambda job, *rest: "")
    back = {"data.path": str(own_rows), "run.resume": str(finished / "checkpoints" / "step-2"), **LATER}
    train(configure("sft", **SHORT, **back))
    assert (finished / "checkpoints" / "latest").read_text() == "step-2\n"
    assert numbers(finished) == expected[:2]


def test_other_data_of_the_same_length_is_refused(configure, finished, own_rows):
    text = own_rows.read_text()
    own_rows.write_text("".join(reversed(text.splitlines(keepends=True))))
    before = contents(finished)
    again = {"data.path": str(own_rows), "run.resume": True}
    with pytest.raises(ValueError, match=r"step-4 was trained on other data: .* resume with the same rows"):
        train(configure("sft", **SHORT, **again))
    assert contents(finished) == before
    own_rows.write_text(text)
    train(configure("sft", **SHORT, **again, **{"data.cache_dir": str(own_rows.parent / "cache")}))


@pytest.mark.parametrize(
    "broken", [{"data.path": "absent.jsonl"}, {"model.config": {"hidden_size": 8}}, {"loss.no_such": 1}]
)
def test_a_set_up_that_fails_leaves_no_run_behind(configure, broken):
    config = configure("sft", **{"run.steps": 1}, **broken)
    with pytest.raises(ValueError):
        train(config)
    directory = Path(config.run.output_dir)
    assert not directory.exists() or contents(directory) == {}
    train(configure("sft", **{"run.steps": 1, "run.resume": True}))
    assert len(numbers(directory)) == 1


def test_a_directory_without_checkpoint_and_lines_is_fresh(configure):
    config = configure("sft", **{"run.steps": 1, "run.resume": True})
    directory = Path(config.run.output_dir)
    directory.mkdir()
    (directory / "config.yaml").write_text("method: dpo\n")  # of a run that died before its first step
    (directory / "metrics.jsonl").touch()
    train(config)
    assert len(numbers(directory)) == 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"optim.warmup": -1.0}, r"optim\.warmup must be at least 0, got -1\.0"),
        ({"optim.clip_norm": -1.0}, r"optim\.clip_norm must be at least 0"),
        ({"optim.weight_decay": -0.1}, r"optim\.weight_decay must be at least 0"),
        ({"optim.lr": -1e-3}, r"optim\.lr must be at least 0"),
        ({"optim.lr": math.nan}, r"optim\.lr must be at least 0, got nan"),
        ({"optim.eps": 0.0}, r"optim\.eps must be above 0, got 0\.0"),
        ({"optim.betas": (0.9, 1.0)}, r"optim\.betas must be in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"optim.betas": (-0.1, 0.9)}, r"optim\.betas must be in"),
        ({"run.save_every": -1}, r"run\.save_every must be at least 0"),
        ({"run.eval_every": -1}, r"run\.eval_every must be at least 0"),
        ({"batch.size": 0}, r"batch\.size must be at least 1, got 0"),
        ({"batch.tokens": 0}, r"batch\.tokens must be at least 1, got 0"),
        ({"batch.max_group_tokens": 0}, r"batch\.max_group_tokens must be at least 1, got 0"),
        ({"reference.cache": ""}, r"reference\.cache must be auto, off or a directory, got ''"),
        ({"run.seed": -1}, r"run\.seed must be at least 0 and below 2\*\*32, got -1"),
        ({"run.seed": 2**32}, r"run\.seed must be"),
        ({"run.steps": 0}, r"run\.steps must be at least 1"),
        ({"loss.beta": 0.0}, r"loss\.beta must be above 0, got 0\.0"),
        ({"loss.beta": -0.1, "loss.name": "simpo"}, r"loss\.beta must be above 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_any_work(configure, change, words):
    config = configure("dpo", **{"data.path": "absent.jsonl", **change})
    with pytest.raises(ValueError, match=words):
        train(config)
    assert not Path(config.run.output_dir).exists()


@pytest.mark.parametrize("start", [train, precompute])
def test_a_group_above_the_limit_is_refused_before_anything_is_computed(configure, start, tmp_path):
    logps = tmp_path / "logps"
    config = configure("dpo", **{"batch.max_group_tokens": 9, "reference.cache": str(logps)})
    with pytest.raises(
        ValueError,
        match=r"^data\.path: '.*': example \d+ takes \d+ computed tokens, more than batch\.max_group_tokens 9:",
    ):
        start(config)
    assert not Path(config.run.output_dir, "metrics.jsonl").exists() and not logps.exists()


def test_a_held_out_group_above_the_limit_is_told_with_its_data(configure, tmp_path, own_rows):
    longer = tmp_path / "longer.jsonl"
    longer.write_text(own_rows.read_text().replace('"prompt": "', '"prompt": "' + "again " * 20))
    config = configure("dpo", **{"data.eval_path": str(longer)})
    config.batch.share_prefix, config.batch.max_group_tokens = False, int(load_data(config)[1].totals().max())
    with pytest.raises(ValueError, match=rf"^data\.eval_path: '{longer}': example \d+ takes \d+ computed tokens"):
        train(config)


def test_a_group_that_fits_without_what_it_shares_is_accepted(configure):
    config = configure("dpo")
    dataset = load_data(config)[1]
    most = max(group_tokens(example, True) for example in dataset)
    assert most < dataset.totals().max()
    check_groups(dataset, replace(config.batch, max_group_tokens=most), "here")
    with pytest.raises(ValueError, match=rf"^here: example \d+ takes {most} computed tokens"):
        check_groups(dataset, replace(config.batch, max_group_tokens=most - 1), "here")


@pytest.mark.parametrize("setting", ["data.path", "data.eval_path"])
def test_columns_that_do_not_fit_are_told_with_their_setting(configure, tmp_path, setting):
    rows = tmp_path / "odd.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n' * 3)
    expected = rf"^{setting}: '{rows}': dpo expects the columns .*; found \['answer', 'question'\]: rename"
    with pytest.raises(ValueError, match=expected):
        train(configure("dpo", **{setting: str(rows)}))


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_where_the_model_is_to_be_is_not_replaced(configure, finished, own_rows, resume):
    config = configure("sft", "run" if resume else "fresh", **SHORT, **{"data.path": str(own_rows)})
    config.run.resume, model = resume, Path(config.run.output_dir) / "model"
    model.parent.mkdir(exist_ok=True)
    shutil.rmtree(model, ignore_errors=True)
    model.write_text("mine")
    with pytest.raises(ValueError, match=rf"{model} is"):
        train(config)
    assert model.read_text() == "mine" and not (model.parent / ".model.old").exists()


def test_settings_at_their_bounds_are_accepted(configure):
    zero = {f"optim.{name}": 0.0 for name in ("lr", "warmup", "clip_norm", "weight_decay")}
    check_settings(configure("sft", **zero, **{"optim.betas": (0.0, 0.0), "batch.size": 1, "run.seed": 2**32 - 1}))


def test_a_model_of_no_run_is_not_replaced(configure):
    config = configure("sft")
    model = Path(config.run.output_dir) / "model"
    model.mkdir(parents=True)
    (model / "notes.txt").write_text("mine")
    for resume in (False, True):
        config.run.resume = resume
        with pytest.raises(
            ValueError, match=r"model is there, and of no run .* it would be replaced; move it, or choose"
        ):
            train(config)
    assert (model / "notes.txt").read_text() == "mine"


def test_an_empty_output_dir_is_refused(configure):
    with pytest.raises(ValueError, match=r"run\.output_dir is empty: name a directory"):
        train(configure("sft", **{"run.output_dir": ""}))


@pytest.mark.parametrize("kind", ["bert", "t5", "deepseek_v3", "mamba"])
def test_a_model_that_cannot_run_is_refused_before_any_data_are_read(configure, tmp_path, kind):
    """Even at full size: no weight is made."""
    odd = configure("dpo", **{"model.config": {"model_type": kind}, "data.path": "absent.jsonl"})
    with pytest.raises(ValueError, match=rf"^model\.config: a {kind} model cannot run on packed rows: "):
        train(odd)
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "odd")
    beside = configure("dpo", **{"reference.path": str(tmp_path / "odd"), "data.path": "absent.jsonl"})
    with pytest.raises(ValueError, match=rf"^reference\.path: '{tmp_path}/odd': a {kind} model cannot run"):
        train(beside)


@pytest.mark.parametrize("method", ["dpo", "distill"])
def test_a_reference_of_another_tokenizer_is_refused(configure, materials, tmp_path, caplog, method):
    """As many tokens, of which two are each other; an added one that is renamed is warned of."""
    AutoConfig.for_model(**LLAMA, vocab_size=512).save_pretrained(tmp_path / "other")
    config = configure(method, **{"reference.path": str(tmp_path / "other")})
    tokenizer = AutoTokenizer.from_pretrained(materials / "tokenizer")
    check_models(config, tokenizer)  # it has none
    shutil.copytree(materials / "tokenizer", tmp_path / "other", dirs_exist_ok=True)
    check_models(config, tokenizer)
    file = tmp_path / "other" / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace("<poison>", "<other>"))
    assert not caplog.records
    check_models(config, tokenizer)
    assert "another token than the policy's for 1 of 512 ids: 2 is '<other>' there and '<poison>' here" in caplog.text
    made = json.loads(text)
    made["model"]["vocab"] |= {"A": made["model"]["vocab"]["B"], "B": made["model"]["vocab"]["A"]}
    file.write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"^reference\.path: its tokenizer .* 2 of 512 ids: \d+ is 'B' there and 'A'"):
        check_models(config, tokenizer)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model.dtype", "bf16", "model.dtype: expected one of auto, float32, bfloat16, got 'bf16'"),
        ("model.on_mismatch", "foo", "model.on_mismatch: expected one of raise, fallback, got 'foo'"),
        (
            "optim.master_weights",
            "false",
            "optim.master_weights: expected true or false or one of compensated, got 'false'",
        ),
        ("optim.lr", "1e-5", "optim.lr: expected a number, got '1e-5'"),
        ("run.steps", 2.5, "run.steps: expected a whole number or null, got 2.5"),
        ("run.resume", 1, "run.resume: expected true or false or a string, got 1"),
        ("reference.cache", False, "reference.cache: expected a string, got False"),
    ],
)
def test_values_of_other_types_are_refused_in_python_too(configure, key, value, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        train(configure("dpo", **{key: value}))


def test_paths_of_python_are_paths(tmp_path):
    config = Config(method="sft", run=RunConfig(output_dir=tmp_path, resume=tmp_path), data=DataConfig(path=tmp_path))
    assert (config.run.output_dir, config.run.resume, config.data.path) == (str(tmp_path),) * 3


def test_names_that_look_like_patterns_are_names(configure, materials, tmp_path, monkeypatch):
    home = tmp_path / "a [1]" / "b*c?"
    (home / "data").mkdir(parents=True)
    shutil.copytree(materials / "tokenizer", home / "tokenizer")
    (home / "data" / "train.jsonl").write_text((materials / "rows.jsonl").read_text())
    (home / "data" / "test.jsonl").write_text((materials / "held_out.jsonl").read_text())
    monkeypatch.setenv("HOME", str(home))
    first = configure(
        "sft", **SHORT, **{"run.output_dir": str(home / "first"), "model.tokenizer": str(home / "tokenizer")}
    )
    first.data = replace(first.data, path=str(home / "data"), cache_dir=str(home / "cache"))
    train(first)
    model = replace(first.model, path="~/first/model", tokenizer=None, config=None)
    then = replace(first, method="dpo", model=model, data=replace(first.data, format="auto", eval_split="test"))
    then = replace(
        then,
        run=replace(first.run, output_dir="~/then", steps=2),
        reference=replace(first.reference, path="~/first/model"),
    )
    train(then)
    then.run.resume, then.run.steps = True, 2
    train(then)
    assert len(numbers(home / "then")) == 2 and (home / "then" / "model").is_dir()
