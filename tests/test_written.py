"""Words in YAML and behind flags: read as what their setting takes, in the file and on the command line alike."""

import json

import pytest
import yaml

from fastalign import cli
from fastalign.arguments import METHODS, UsageError, defaults, parse_config, schema_of
from fastalign.config import Config, as_dict
from fastalign.words import as_yaml
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
        ("run.steps", "1e3", "run.steps: expected a whole number or null, got 1e3"),
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
    with pytest.raises(UsageError, match=r"is not valid YAML: '(lr|optim)' is given more than once; keep one"):
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
    from fastalign.arguments import find_losses

    for annotation in schema_of(find_losses("rrhf", [])).values():
        if "None" in annotation:
            assert read(Plain("~"), annotation) is None
        else:
            with pytest.raises(ValueError):
                read(Plain("~"), annotation)
    assert Config("dpo").optim.master_weights is True


WORDS = '{a: "off", b: "1:30", c: "null", d: "8", e: {f: "1e5", g: ["on", "~"]}, h: "# x", i: "", j: off, k: 1e5}'
READ = {"a": "off", "b": "1:30", "c": "null", "d": "8", "e": {"f": "1e5", "g": ["on", "~"]}, "h": "# x", "i": ""}
READ |= {"j": False, "k": 1e5}


@pytest.mark.parametrize("key", ["model.config", "model.lora", "model.quantization"])
def test_quoted_words_in_free_mappings_are_texts(both, key):
    for value in both(key, WORDS):
        assert value == READ and type(value["k"]) is float


@pytest.mark.parametrize(
    "word, expected",
    [
        ("off", False),
        ('"off"', "off"),
        ("'8'", "8"),
        ("8", 8),
        ("1e-6", 1e-6),
        ("null", None),
        ("", ""),
        ("none", "none"),
        ('[1, off, "off"]', [1, False, "off"]),
        ('{x: "1:30"}', {"x": "1:30"}),
    ],
)
def test_a_part_of_a_free_mapping_is_read_as_in_a_file(word, expected):
    value = parse_config("sft", ["--model.config.a.b", word]).model.config
    assert value == {"a": {"b": expected}} and type(value["a"]["b"]) is type(expected)


def test_the_last_writer_of_a_part_wins_and_the_other_parts_stay(tmp_path):
    (tmp_path / "run.yaml").write_text('model: {config: {a: {b: "off", c: 2}, d: "3"}}\ndata: {columns: {prompt: "8"}}')

    def parse(*flags):
        return parse_config("sft", ["--config", str(tmp_path / "run.yaml"), *flags])

    assert parse("--model.config.a.b", "on").model.config == {"a": {"b": True, "c": 2}, "d": "3"}
    assert parse("--model.config.a={b: 1}").model.config == {"a": {"b": 1}, "d": "3"}
    assert parse("--model.config.d.x.y=1").model.config == {"a": {"b": "off", "c": 2}, "d": {"x": {"y": 1}}}
    assert parse("--model.config.d", "1", "--model.config", "{e: 1}").model.config == {"e": 1}
    assert parse("--model.config", "{e: 1}", "--model.config.d", "1").model.config == {"e": 1, "d": 1}
    assert parse("--model.config", "null", "--model.config.d", "1").model.config == {"d": 1}
    assert parse("--data.columns.answer", "[a]").data.columns == {"prompt": "8", "answer": "[a]"}


@pytest.mark.parametrize(
    "key, word, expected",
    [
        ("data.revision", "'null'", "null"),
        ("data.revision", '"~"', "~"),
        ("data.name", "'null'", "null"),
        ("data.chat_template", "'null'", "null"),
        ("model.tokenizer", "'null'", "null"),
        ("run.resume", "'off'", "off"),
        ("run.resume", "'true'", "true"),
        ("data.columns", "{prompt: 'null'}", {"prompt": "null"}),
        ("model.autocast", "'off'", False),  # takes no text
        ("run.steps", "'10'", 10),
    ],
)
def test_quotes_make_a_text_where_one_is_taken(tmp_path, key, word, expected):
    section, name = key.split(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: {word}}}")
    value = getattr(getattr(parse_config("sft", ["--config", str(tmp_path / "run.yaml")]), section), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("key", ["reference.dtype", "model.autocast", "run.steps", "model.lora"])
def test_a_quoted_null_is_refused_where_no_text_is_taken(tmp_path, key):
    section, name = key.split(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: 'null'}}")
    with pytest.raises(UsageError, match=f'^{key}: expected .* or null, got "null"$'):
        parse_config("dpo", ["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("key", ["run.resume", "run.output_dir", "data.split", "reference.cache", "model.dtype"])
@pytest.mark.parametrize("word", ["null", "~"])
def test_a_null_behind_a_flag_is_refused_as_in_a_file(key, word):
    with pytest.raises(UsageError, match=f"^{key}: expected .*, got null: leave it out for the default$"):
        parse_config("dpo", [f"--{key}", word])


@pytest.mark.parametrize(
    "key, word, expected",
    [
        ("run.seed", "0o17", 15),
        ("run.steps", "0o17", 15),
        ("run.seed", "0x1F", 31),
        ("run.seed", "0b11", 3),
        ("optim.lr", "1_0", 10.0),
        ("optim.betas", "[.5, 0b0]", (0.5, 0.0)),
        ("run.output_dir", "'[a, b]'", "[a, b]"),
        ("run.output_dir", "'{a: b}'", "{a: b}"),
    ],
)
def test_flags_and_files_read_alike(tmp_path, key, word, expected):
    section, name = key.split(".")
    (tmp_path / "run.yaml").write_text(f"{section}: {{{name}: {word}}}")
    for words in (["--config", str(tmp_path / "run.yaml")], [f"--{key}", word.strip("'")]):
        value = getattr(getattr(parse_config("sft", words), section), name)
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "method, words, expected",
    [
        ("dpo", ["--loss.loss_weights", "[1.0]"], r"^loss.loss_weights: .*'dpo' is alone.* `loss.name: \[dpo, sft\]`$"),
        ("kto", ["--loss_weights", "1"], r"^loss_weights: .*'kto' is alone.* `loss.name: \[kto, bco\]`$"),
        ("sft", ["--loss_weights", "1"], "'sft' is the only loss of sft, so there is no sum to weigh; leave it out$"),
        ("dpo", ["--loss.name", "[]"], r"^loss\.name: expected .* got \[\]"),
        ("dpo", ["--run.steps+", "1"], r"^--run\.steps\+: a \+ appends to a list, which run\.steps is not$"),
        ("dpo", ["--run.seed", "9" * 5000], "^run.seed: expected a whole number, got 9999"),
        ("dpo", ["--data.name", "true"], "^data.name: expected a string or null, got true$"),
        ("dpo", ["--model.config.", "1"], r"^unknown key 'model\.config\.'"),
        (
            "dpo",
            ["--method", "kto"],
            "^--method: the method is the word behind fastalign, here dpo; leave the flag out$",
        ),
        ("dpo", ["--print_config=comments"], "^unrecognized arguments: --print_config=comments$"),
        ("dpo", ["--model.lora", "{r: 8"], "^model.lora: '{r: 8' is not valid YAML"),
        ("dpo", ["--model.lora", "{r: !!timestamp 2024-01-01}"], "is of a type that no setting takes: date"),
        ("dpo", ["--model.lora", "{r: &a [*a]}"], "a part of it holds itself"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_refused(method, words, expected):
    with pytest.raises(UsageError, match=expected):
        parse_config(method, words)


def test_a_file_given_once_more_wins_over_those_between(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f"run: {{seed: {seed}}}")
    a, b = (f"--config={tmp_path / name}" for name in "ab")
    assert parse_config("sft", [a, b, a]).run.seed == 1


def test_a_setting_that_stands_in_its_section_and_alone_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("optim.lr: 1\noptim: {lr: 2}")
    with pytest.raises(UsageError, match=r"^optim\.lr is given more than once in .*; keep one$"):
        parse_config("sft", ["--config", str(tmp_path / "run.yaml")])
    (tmp_path / "run.yaml").write_text("optim.lr: 2")
    assert parse_config("sft", ["--config", str(tmp_path / "run.yaml")]).optim.lr == 2


def test_a_plus_appends_to_the_losses_and_to_lists():
    assert parse_config("dpo", ["--loss.name+", "sft"]).loss["name"] == ["dpo", "sft"]
    flags = ["--loss.name", "ipo", "--loss.name+", "sft", "--loss.loss_weights+", "1", "--loss.loss_weights+", "[2]"]
    loss = parse_config("dpo", flags).loss
    assert (loss["name"], loss["loss_weights"]) == (["ipo", "sft"], [1.0, 2.0])


def test_printed_and_saved_settings_are_read_again_as_they_were(tmp_path, capsys):
    texts = [
        *"~8.-+",
        "1e5",
        "0o17",
        "0x10",
        "0b1",
        "1_0",
        "010",
        "off",
        "Null",
        "1:30",
        ".inf",
        ".5",
        "2024-01-01",
        "",
    ]
    (tmp_path / "run.yaml").write_text(json.dumps({"model": {"config": {"a": texts, "b": [1e5, 8, True, None]}}}))
    words = ["--config", str(tmp_path / "run.yaml"), "--data.revision", "1e5"]
    config = parse_config("dpo", words)
    assert config.model.config == {"a": texts, "b": [1e5, 8, True, None]}
    with pytest.raises(SystemExit, match="0"):
        parse_config("dpo", [*words, "--print_config"])
    for text in (capsys.readouterr().out, as_yaml(as_dict(config))):
        (tmp_path / "again.yaml").write_text(text)
        assert parse_config("dpo", ["--config", str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize("method", METHODS)
def test_every_default_is_one_of_its_type(method):
    from fastalign.engine.methods import METHODS as methods

    for name, loss in methods[method].losses.items():
        losses = {name: loss}
        schema = schema_of(losses)
        for section, values in defaults(losses).items():
            for key, value in values.items():
                if (section, key) != ("loss", "name"):
                    assert read(Loader(as_yaml({"x": value})).get_data()["x"], schema[f"{section}.{key}"]) == value
