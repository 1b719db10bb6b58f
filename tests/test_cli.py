"""The command line: what it accepts, what it answers to mistakes, what it passes on."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fastalign import cli
from fastalign.arguments import UsageError, parse_config
from fastalign.config import Config, as_dict
from fastalign.engine.interrupt import Interrupted
from fastalign.engine.methods import METHODS
from fastalign.losses.traits import canonical as canonical_names
from fastalign.losses.traits import keywords
from fastalign.parallel.mesh import LostRank

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.name != "kubernetes.yaml")


@pytest.fixture
def engine(monkeypatch):
    """Stands in for the training loop: records the configuration, or raises what it is told to."""
    module = types.ModuleType("fastalign.engine.train")
    module.seen, module.error = [], None

    def train(config):
        module.seen.append(config)
        if module.error:
            raise module.error

    module.train = train
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def write(tmp_path):
    def write_yaml(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_yaml


def test_defaults_are_those_of_the_dataclasses_and_the_loss_function():
    assert parse_config("dpo", []) == Config("dpo", loss={"name": "dpo", "beta": 0.1})
    assert parse_config("sft", []) == Config("sft", loss={"name": "sft"})


def test_flags_win_over_files_and_later_files_over_earlier_ones(write):
    first = write(
        "optim: {lr: 1e-3, betas: [0.8, 0.99]}\ndata: {columns: {prompt: q}}\nloss: {name: ipo, beta: 0.5}", "a"
    )
    second = write("optim: {lr: 2e-3}", "b")
    config = parse_config("dpo", ["--loss.beta", "0.7", "--config", first, "--config", second, "--run.steps=3"])
    assert (config.optim.lr, config.optim.betas, config.run.steps) == (2e-3, (0.8, 0.99), 3)
    assert config.data.columns == {"prompt": "q"}
    assert config.loss == {"name": "ipo", "beta": 0.7}


@pytest.mark.parametrize("word", ["off", "false", "no", "False"])
def test_sharing_is_switched_off_in_yamls_words(write, word):
    assert parse_config("dpo", []).batch.share_prefix
    assert not parse_config("dpo", ["--batch.share_prefix", word]).batch.share_prefix
    assert not parse_config("dpo", ["--config", write(f"batch: {{share_prefix: {word}}}")]).batch.share_prefix


def test_mappings_and_unions_are_settable_from_flags():
    flags = "--data.columns.prompt question --model.config.model_type llama --run.resume true --run.trackers+ wandb"
    config = parse_config("sft", flags.split())
    assert config.data.columns == {"prompt": "question"}
    assert config.model.config == {"model_type": "llama"}
    assert config.run.resume is True
    assert config.run.trackers == ["wandb"]
    assert parse_config("sft", ["--run.resume", "runs/a/checkpoints/step-3"]).run.resume == "runs/a/checkpoints/step-3"


@pytest.mark.parametrize("name", ["ipo", "simpo", "sigmoid"])
def test_the_losses_keywords_are_the_schema(name):
    losses = METHODS["dpo"].losses
    canonical = canonical_names(losses)[name]
    expected = keywords(losses[canonical])
    assert parse_config("dpo", ["--loss.name", name]).loss == {"name": canonical, **expected}
    assert parse_config("dpo", [f"--loss.name={name}"]).loss["name"] == canonical


@pytest.mark.parametrize(
    "method, flags, expected",
    [
        ("dpo", "--loss.bta 3", "unknown key 'loss.bta': did you mean 'loss.beta'?"),
        ("dpo", "--optim.learning_rate 3", "did you mean 'optim.lr'?"),
        ("sft", "--max_length 3", "did you mean 'data.max_length'?"),
        ("dpo", "--ref_model x", "did you mean 'reference.path'?"),
        ("kto", "--precompute_ref_log_probs true", "did you mean 'reference.cache'?"),
        ("sft", "--use_peft true", "did you mean 'model.lora'?"),
        ("grpo", "--beta 0.1", "did you mean 'algorithm.kl_coef'?"),
        ("online-dpo", "--beta 0.1", "did you mean 'loss.beta'?"),
        ("grpo", "--epsilon_high 0.3", "did you mean 'loss.clip_high'?"),
        ("grpo", "--reward_funcs x", "did you mean 'rewards'?"),
        ("ppo", "--response_length 53", "did you mean 'sampler.max_new_tokens'?"),
        ("dpo", "--loss.gamma_beta_ratio 1", "(the loss is 'dpo')"),
        ("dpo", "--loss.name idpo", "loss.name: dpo has no loss 'idpo': did you mean 'ipo'?"),
        ("dpo", "--loss {name:ipo}", "unknown key 'loss'"),
        ("dpo", "--loss.beta strong", "loss.beta: expected a number, got strong"),
        ("dpo", "--run.steps 1.5", "run.steps: expected a whole number or null, got 1.5"),
        ("dpo", "--optim.betas [1,2,3]", "optim.betas: expected two numbers such as [0.9, 0.95], got [1, 2, 3]"),
        ("dpo", "--optim.schedule step", "optim.schedule: expected one of constant, linear, cosine, got step"),
        ("dpo", "--reference.dtype x", "reference.dtype: expected one of auto, float32, bfloat16, or null, got x"),
        ("dpo", "--model.autocast x", "model.autocast: expected true or false or null, got x"),
        ("dpo", "--model.lora x", "model.lora: expected a mapping such as {r: 16, lora_alpha: 32}, or null, got x"),
        ("dpo", "--data.columns q", "data.columns: expected a mapping of strings such as {prompt: question}, got q"),
        ("dpo", "--run.trackers x", "run.trackers: expected a list of tensorboard, wandb, trackio, got x"),
        (
            "dpo",
            "--loss.name dpo,sft --loss.loss_weights x",
            "expected a list of numbers such as [1, 0.2], or null, got",
        ),
        ("rrhf", "--loss.sft x", "loss.sft: expected one of sum, mean, got x"),
        ("dpo", "--optim.lr=", "optim.lr: expected a number, got nothing"),
        ("dpo", "--optim.lr", "--optim.lr: expected one argument"),
        ("dpo", "--config", "--config: expected one argument"),
        ("dpo", "--config absent.yaml", "cannot read the configuration absent.yaml: No such file"),
        ("dpo", "stray", "unrecognized arguments: stray"),
    ],
)
def test_a_wrong_flag_gets_one_line_and_exit_code_2(capsys, engine, method, flags, expected):
    assert cli.main([method, *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastalign: error: ") and captured.err.count("\n") == 1
    assert expected in captured.err
    assert not captured.out and not engine.seen


@pytest.mark.parametrize(
    "text, expected",
    [
        ("loss: {bta: 3}", "unknown key 'loss.bta' in {path}: did you mean 'loss.beta'?"),
        ("modle: {path: x}", "unknown key 'modle.path' in {path}: did you mean 'model.path'?"),
        ("optim: {lr: fast}", "optim.lr: expected a number, got fast"),
        ("data: {limit: yes}", "data.limit: expected a whole number or null, got yes"),
        ("optim: {schedule: [a]}", 'optim.schedule: expected one of constant, linear, cosine, got ["a"]'),
        ("optim: [lr: 1", "{path} is not valid YAML"),
        ("- optim", "{path}: expected a mapping such as `optim: {{lr: 1e-5}}`, got a list of strings"),
        ("", "{path}: expected a mapping such as `optim: {{lr: 1e-5}}`, got null"),
        ("method: dop", "{path} is for the unknown method \"dop\": did you mean 'dpo'?"),
        ("method: [dpo]", "{path} is for the unknown method"),
        ("batch: {size: null}", "batch.size in {path}: expected a whole number, got null"),
        ("optim: {betas: null}", "optim.betas in {path}: expected two numbers such as [0.9, 0.95], got null"),
        ("loss: {beta: null}", "loss.beta in {path}: expected a number, got null"),
        ("batch: 5", "batch in {path}: expected a mapping such as `batch: {{size: ...}}`, got 5"),
        ("batch:", "batch in {path}: expected a mapping such as `batch: {{size: ...}}`, got null"),
        ("loss: ipo", 'loss in {path}: expected a mapping such as `loss: {{name: ...}}`, got "ipo"'),
        ("method: sft", "{path} is for 'sft', not 'dpo': run fastalign sft"),
    ],
)
def test_a_wrong_file_gets_one_line_and_exit_code_2(capsys, engine, write, text, expected):
    path = write(text)
    assert cli.main(["dpo", "--config", path]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected.format(path=path) in error and not engine.seen


def test_a_null_is_allowed_where_it_means_something(write):
    config = parse_config("sft", ["--config", write("run: {steps: null}\nmodel: {config: {pad_token_id: null}}")])
    assert config.run.steps is None and config.model.config == {"pad_token_id": None}


def test_a_failing_run_gets_one_line_and_exit_code_1(capsys, engine, monkeypatch):
    engine.error = ValueError("the loss is NaN\nat step 3")
    assert cli.main(["sft"]) == 1
    assert capsys.readouterr().err == "fastalign: error: the loss is NaN at step 3\n"
    monkeypatch.setenv("FASTALIGN_DEBUG", "1")
    assert cli.main(["sft"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(engine):
    engine.error = TypeError("a bug")
    with pytest.raises(TypeError):
        cli.main(["sft"])


@pytest.mark.parametrize("asked", [None, "debug"])
def test_the_hubs_retries_are_not_told_unless_asked_for(engine, monkeypatch, asked):
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    if asked:
        monkeypatch.setenv("HF_HUB_VERBOSITY", asked)
    assert cli.main(["sft"]) == 0
    assert os.environ.pop("HF_HUB_VERBOSITY") == (asked or "error")


def test_an_interrupt_is_clean(capsys, engine):
    engine.error = KeyboardInterrupt()
    assert cli.main(["sft"]) == 130
    assert capsys.readouterr().err == "fastalign: error: interrupted\n"


def test_a_signal_decides_the_exit_code_and_rank_0_tells_it(capsys, engine, monkeypatch):
    naps = []
    monkeypatch.setattr(cli.time, "sleep", naps.append)
    engine.error = Interrupted(15, "interrupted after step 3 of 9; saved it")
    assert cli.main(["sft"]) == 143 and not naps
    assert capsys.readouterr().err == "fastalign: error: interrupted after step 3 of 9; saved it\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["sft"]) == 143 and naps == [3]
    assert capsys.readouterr().err == ""


def test_sigterm_ends_any_command_with_its_code(capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "info", lambda argv: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["info"]) == 143
    assert capsys.readouterr().err == "fastalign: error: interrupted\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            MemoryError("attention: no memory for 64 bytes to work in"),
            "out of memory: attention: no memory for 64 bytes",
        ),
        (MemoryError(), "out of memory; lower batch.tokens"),
        (ImportError("the native extension is of another version"), "the native extension is of another version"),
    ],
)
def test_what_the_machine_lacks_is_one_line(capsys, engine, error, said):
    engine.error = error
    assert cli.main(["sft"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"fastalign: error: {said}") and line.count("\n") == 1


def test_a_rank_whose_peer_is_gone_waits_to_be_stopped(engine, monkeypatch, tmp_path, capsys):
    """And leaves what it has to say to the launcher, which knows of the other rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(cli.LAST_WORDS, str(tmp_path / "words"))
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    engine.error = LostRank("another rank has ended")
    assert cli.main(["sft"]) == 143
    assert capsys.readouterr().err == "" and (tmp_path / "words").read_text() == "interrupted"
    engine.error = RuntimeError("a fault of this rank")
    with pytest.raises(RuntimeError, match="a fault of this rank"):
        cli.main(["sft"])


def test_other_ranks_let_rank_0_speak_first(capsys, engine, monkeypatch):
    naps = []
    monkeypatch.setattr(cli.time, "sleep", naps.append)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["dpo", "--nonsense"]) == 2 and naps == []
    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["dpo", "--nonsense"]) == 2 and naps == [10]
    assert signal.getsignal(signal.SIGTERM) is before


def test_torchrun_is_left_the_line_as_the_reason_of_a_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert cli.main(["dpo", "--nonsense"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    reason = "unknown key 'nonsense'"
    *_, line, border = str(ChildFailedError("fastalign", {0: failure})).splitlines()
    assert line.startswith(f"  traceback : fastalign: error: {reason}") and set(border) == {"="}


def test_a_failure_of_ranks_ends_with_one_line(tmp_path):
    """Of real ranks: the line of rank 0, its exit code, and nothing of torchrun's own."""
    (tmp_path / "bad.yaml").write_text("loss: {bta: 3}")
    command = [sys.executable, "-m", "fastalign", "torchrun", "--standalone", "--nproc-per-node", "2"]
    command += ["dpo", "--config", str(tmp_path / "bad.yaml")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "RANK": "0"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fastalign: error: unknown key 'loss.bta'") and done.stderr.count("\n") == 1


def test_a_rank_that_is_killed_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "fastalign").mkdir()
    (tmp_path / "fastalign" / "__init__.py").touch()
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "fastalign" / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        assert cli.main(["torchrun", "--standalone", "--nproc-per-node", "1", "dpo"]) == 128 + signal.SIGKILL
    finally:
        logging.disable(logging.NOTSET)
    assert capsys.readouterr().err == "fastalign: error: rank 0 was stopped by SIGKILL\n"


@pytest.mark.parametrize("method", METHODS)
def test_print_config_can_be_loaded_again(capsys, engine, write, method):
    flags = ["--optim.lr", "1e-5", "--data.columns.prompt", "q", "--batch.size", "3"]
    with pytest.raises(SystemExit, match="0"):
        cli.main([method, *flags, "--print_config"])
    printed = write(capsys.readouterr().out)
    assert parse_config(method, ["--config", printed]) == parse_config(method, flags)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_configuration_can_be_loaded_again(write, method):
    config = parse_config(method, ["--optim.betas", "[0.5, 0.6]"])
    tree = as_dict(config)
    tree["optim"]["betas"] = list(config.optim.betas)
    assert parse_config(method, ["--config", write(yaml.safe_dump(tree))]) == config


def test_help_comes_from_the_docstrings(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["dpo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr LR Peak learning rate. (type: a number, default: 1e-05)" in text
    assert "--loss.beta BETA weight of the KL penalty; larger stays closer to the reference." in text
    assert "One of dpo, cdpo, robust, ipo" in text


@pytest.mark.parametrize("method", METHODS)
def test_help_spells_no_types_of_python(capsys, method):
    with pytest.raises(SystemExit, match="0"):
        cli.main([method, "--help"])
    text = capsys.readouterr().out
    assert not re.findall(r"Literal\[|Optional\[|Union\[|dict\[|list\[|tuple\[|\btype: (?:str|int|float|bool)\b", text)


def test_commands_and_methods_are_listed(capsys):
    assert cli.main(["--help"]) == cli.main([]) == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in [*METHODS, *cli.COMMANDS])


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert cli.main(["dp"]) == 2
    assert "unknown command 'dp': did you mean 'dpo'?" in capsys.readouterr().err


@pytest.mark.parametrize("path", EXAMPLES, ids=[str(path.relative_to(ROOT / "examples")) for path in EXAMPLES])
def test_examples_are_valid(path):
    method = yaml.safe_load(path.read_text())["method"]
    assert parse_config(method, ["--config", str(path)]).method == method


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "fastalign", "version"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("fastalign ")


def test_ref_logps_takes_the_method_from_its_word_or_the_file(monkeypatch, capsys, write):
    module = types.ModuleType("fastalign.engine.reference.precompute")
    seen = []
    module.precompute = lambda config: seen.append(config.method) or "4 examples"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = ["--config", write("method: kto")]
    for words in ([], ["kto"], file, ["--optim.lr", "1", *file]):
        assert cli.main(["ref-logps", *words]) == 0
    assert seen == ["dpo", "kto", "kto", "kto"] and capsys.readouterr().out == "4 examples\n" * 4
    assert cli.main(["ref-logps", "--config", write("method: kot")]) == 2
    assert "unknown method 'kot': did you mean 'kto'?" in capsys.readouterr().err
    assert cli.main(["ref-logps", "dpo", *file]) == 2


def test_usage_errors_are_value_errors():
    assert issubclass(UsageError, ValueError)


def test_info_names_each_ops_backend_and_the_reason(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    for op, state in facts["ops"].items():
        assert state["chosen"]["cpu"] in state["backends"], op
        assert all(state["backends"].values()), op
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in facts["ops"])
    assert "; mesh parallel.dp_replicate x parallel.dp_shard x parallel.tp\n" in text
