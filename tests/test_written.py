"""Words in YAML and behind flags: read as what their setting takes, in the file and on the command line alike."""

import json

import pytest
import yaml

from fastalign import cli
from fastalign.arguments import UsageError, parse_config
from fastalign.config import Config
from fastalign.written import Loader, Plain, read


@pytest.fixture
def both(tmp_path):
    """A setting given in a file, and the same behind a flag."""

    def parse(key, word, method="dpo"):
        section, name = key.split(".")
        file = tmp_path / "run.yaml"
        file.write_text(f"{section}: {{{name}: {word}}}")
        return [
            getattr(getattr(parse_config(method, words), section), name)
            for words in (["--config", str(file)], [f"--{key}", word], [f"--{key}={word}"])
        ]

    return parse


@pytest.mark.parametrize(
    "key, word, expected",
    [
        ("reference.cache", "off", "off"),
        ("reference.cache", "auto", "auto"),
        ("data.name", "no", "no"),  # Norwegian
        ("data.name", "2024-01-01", "2024-01-01"),
        ("data.name", "1.10", "1.10"),
        ("data.split", "on", "on"),
        ("data.revision", "1234567", "1234567"),
        ("data.revision", "12e4567", "12e4567"),
        ("data.revision", "2024_", "2024_"),
        ("data.revision", "0123", "0123"),
        ("data.revision", "null", None),
        ("data.revision", "~", None),
        ("run.output_dir", "1:30", "1:30"),
        ("run.output_dir", "0x10", "0x10"),
        ("run.resume", "yes", True),
        ("run.resume", "on", True),
        ("run.resume", "off", False),
        ("run.resume", "step-3", "step-3"),
        ("model.autocast", "on", True),
        ("model.autocast", "null", None),
        ("batch.share_prefix", "off", False),
        ("optim.master_weights", "no", False),
        ("optim.lr", "1e-6", 1e-6),
        ("optim.lr", "5", 5.0),
        ("optim.betas", "[0.5, 1e-1]", (0.5, 0.1)),
        ("run.steps", "010", 10),
        ("run.steps", "1_000", 1000),
        ("run.steps", "null", None),
        ("run.save_minutes", ".inf", float("inf")),
        ("data.columns", "{label: yes, prompt: no, on: 007}", {"label": "yes", "prompt": "no", "on": "007"}),
        ("model.lora", "{r: 8, use_rslora: on, bias: none}", {"r": 8, "use_rslora": True, "bias": "none"}),
        ("model.config", "{rope_theta: 1e6, pad_token_id: ~}", {"rope_theta": 1e6, "pad_token_id": None}),
        ("run.trackers", "[wandb]", ["wandb"]),
    ],
)
def test_a_word_is_what_its_setting_takes(both, key, word, expected):
    for value in both(key, word):
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "key, word, expected",
    [
        ("run.steps", "1__0", "run.steps: expected a whole number or null, got 1__0"),
        ("run.steps", "1:30", "run.steps: expected a whole number or null, got 1:30"),
        ("optim.lr", "1:30.5", "optim.lr: expected a number, got 1:30.5"),
        ("optim.lr", "2024-01-01", "optim.lr: expected a number, got 2024-01-01"),
        ("batch.size", "on", "batch.size: expected a whole number, got "),
        ("model.dtype", "off", "model.dtype: expected one of auto, float32, bfloat16, got off"),
        ("optim.schedule", "1", "optim.schedule: expected one of constant, linear, cosine, got 1"),
        ("model.autocast", "2", "model.autocast: expected true or false or null, got 2"),
    ],
)
def test_a_word_that_fits_no_type_is_refused(both, tmp_path, key, word, expected):
    section, name = key.split(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: {word}}}")
    for words in (["--config", str(tmp_path / "run.yaml")], [f"--{key}", word]):
        with pytest.raises(UsageError) as raised:
            parse_config("dpo", words)
        assert str(raised.value).startswith(expected)


@pytest.mark.parametrize("word", ["true", "false", "on", "yes", "no"])
def test_the_cache_of_the_reference_is_no_directory_of_such_a_name(tmp_path, word, capsys):
    (tmp_path / "run.yaml").write_text(f"reference: {{cache: {word}}}")
    for words in (["--config", str(tmp_path / "run.yaml")], ["--reference.cache", word]):
        assert cli.main(["dpo", *words, "--data.path", "x.jsonl", "--model.path", "x"]) != 0
        assert "reference.cache" in capsys.readouterr().err


def test_quotes_make_a_text_of_any_word(tmp_path):
    (tmp_path / "run.yaml").write_text("data: {name: '1e5', path: \"true\"}\nrun: {output_dir: 'off'}")
    config = parse_config("sft", ["--config", str(tmp_path / "run.yaml")])
    assert (config.data.name, config.data.path, config.run.output_dir) == ("1e5", "true", "off")


@pytest.mark.parametrize("text", ["optim: {lr: 1, lr: 2}", "optim: {lr: 1}\nrun: {}\noptim: {eps: 1}"])
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"is not valid YAML: '(lr|optim)' stands more than once; keep one"):
        parse_config("sft", ["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("text", ["model.config.hidden_size: 32", "model: {config.hidden_size: 32}"])
def test_a_part_of_a_mapping_is_nested_in_a_file(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(
        UsageError, match=r"^model\.config\.hidden_size: .* write model: {config: {hidden_size: \.\.\.}}$"
    ):
        parse_config("sft", ["--config", str(tmp_path / "run.yaml")])


def test_anchors_and_merges_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {lora: &a {r: 8}}\ndata: {columns: {prompt: q}}\n")
    tree = yaml.load("a: &x {k: on}\nb: {<<: *x, j: 010}", Loader)
    assert tree == {"a": {"k": "on"}, "b": {"k": "on", "j": "010"}} and isinstance(tree["b"]["k"], Plain)


@pytest.mark.parametrize("text", ["😀 é", "a\u007fb\u0085\u2028c", "x" * 5000, "a: b # c", "{[", "'\""])
def test_any_text_survives(tmp_path, text):
    (tmp_path / "run.yaml").write_text(json.dumps({"run": {"output_dir": text}}))
    assert parse_config("sft", ["--config", str(tmp_path / "run.yaml")]).run.output_dir == text
    columns = json.dumps({"prompt": text}, ensure_ascii=False)
    assert "\u007f" in text or parse_config("sft", ["--data.columns", columns]).data.columns == {"prompt": text}


def test_the_loss_is_answered_from_its_own_settings(capsys):
    for flag in ("--loss.gamma", "--loss.gamma_beta"):
        assert cli.main(["dpo", "--loss.name", "simpo", flag, "1"]) == 2
        error = capsys.readouterr().err
        assert "did you mean 'loss.gamma_beta_ratio'? (the loss is 'simpo')" in error
    for flag in ("--loss.simpo_gamma", "--loss.loss_weights"):
        assert cli.main(["dpo", "--loss.name", "dpo", flag, "1"]) == 2
        error = capsys.readouterr().err
        assert "gamma_beta_ratio" not in error and f"did you mean '{flag[2:]}'" not in error
    assert cli.main(["dpo", "--loss.nam", "simpo"]) == 2
    assert "did you mean 'loss.name'?" in capsys.readouterr().err


def test_homes_are_put_for_tildes(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("model.path", "model.tokenizer", "reference.path", "data.chat_template", "run.output_dir", "run.resume")
    words = [word for key in keys for word in (f"--{key}=~/there",)]
    config = parse_config("dpo", words)
    for key in keys:
        section, name = key.split(".")
        assert getattr(getattr(config, section), name) == str(tmp_path / "there")


def test_every_type_of_the_schema_can_be_read():
    from fastalign.arguments import find_losses, schema_of

    for annotation in schema_of(find_losses("rrhf", [])).values():
        assert read(Plain("~"), annotation) is None
    assert Config("dpo").optim.master_weights is True
