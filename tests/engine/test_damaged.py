"""Damaged files are answered with one line that names them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoint import roles, stepped

from fastalign.engine.output import checkpoint, report, rundir
from fastalign.engine.train import train
from fastalign.parallel.mesh import Axis, World
from runs import numbers

WORLD = World(Axis(), torch.device("cpu"))
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


def cut(data: bytes) -> bytes:
    return data[:-40]


@pytest.mark.parametrize(
    "name, damage, words",
    [
        (TENSORS, cut, rf"step-2 is not a whole checkpoint: {TENSORS} has \d+ bytes, \d+ were written; resume from"),
        (TENSORS, lambda data: b"", rf"step-2 is not a whole checkpoint: {TENSORS} has 0 bytes, "),
        (TENSORS, lambda data: b"x" * len(data), rf"step-2 is not a whole checkpoint: {TENSORS} is damaged \(Safetens"),
        (TENSORS, None, rf"step-2 is not a whole checkpoint: {TENSORS} is missing; resume from another"),
        ("state.json", cut, r"state\.json is not JSON \("),
        ("state.json", lambda data: b"\xff\xfe", r"state\.json is not JSON \("),
        ("state.json", lambda data: b"[]", r"state\.json is damaged: expected an object with a schema"),
        (
            "state.json",
            lambda data: data.replace(b'"optimizer_steps"', b'"x"'),
            r"damaged: .* a dict 'optimizer_steps'",
        ),
        ("rng-0.json", cut, r"rng-0\.json has \d+ bytes, \d+ were written; resume from"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage, words):
    refused(tmp_path, name, damage, words)


def refused(directory, name, damage, words):
    """A checkpoint with a file damaged so is refused in one line of these words."""
    path = checkpoint.save_checkpoint(directory, 2, roles(*stepped()), {}, WORLD, keep=1)
    file = path / name
    content = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage(content))
    with pytest.raises(ValueError, match=words) as raised:
        checkpoint.load_checkpoint(path, roles(*stepped()), WORLD)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_checkpoint_without_settings_is_named(configure):
    config = configure("sft", **{"run.steps": 1})
    train(config)
    file = Path(config.run.output_dir) / "checkpoints" / "step-1" / "state.json"
    state = json.loads(file.read_text())
    for key in ("config", "loader", "data"):
        file.write_text(json.dumps({k: v for k, v in state.items() if k != key}))
        with pytest.raises(ValueError, match=rf"state\.json is damaged: expected a \w+ '{key}'"):
            train(configure("sft", **{"run.steps": 1, "run.resume": True}))


def state(**changes):
    """Entries of ``state.json`` put otherwise; those that are None are left out."""

    def change(data):
        entries = {**json.loads(data), **changes}
        return json.dumps({key: value for key, value in entries.items() if value is not None}).encode()

    return "state.json", change


def header(old, new):
    """The same bytes with some of the header put otherwise."""
    assert len(old) == len(new)
    return TENSORS, lambda data: data.replace(old, new, 1)


DAMAGES = [
    (TENSORS, lambda data: b"x" * len(data), rf"{TENSORS} is damaged \(SafetensorError: "),
    (TENSORS, lambda data: data[:8] + b"[" + data[9:], rf"{TENSORS} is damaged \(SafetensorError: "),
    (*header(b'"data_offsets":[0,', b'"data_offsets":[8,'), rf"{TENSORS} is damaged \(SafetensorError: "),
    (
        *header(b'"policy.exp_avg.model.lm_head.weight":', b'"policy.exp_abc.model.lm_head.weight":'),
        "has no policy.exp_",
    ),
    (*header(b"saved_offsets", b"saved_offsetz"), rf"{TENSORS} is damaged \(KeyError: "),
    (*header(b'"shape":[48,32]', b'"shape":[32,48]'), r"is \(\d+, \d+\), its weight \("),
    ("rng-0.json", lambda data: b"", r"rng-0\.json has 0 bytes, \d+ were written"),
    ("rng-0.json", lambda data: b"x" * len(data), r"rng-0\.json is not JSON"),
    ("rng-0.json", lambda data: data.replace(b'"python"', b'"pythom"'), r"rng-0\.json is damaged \(KeyError: 'python'"),
    (*state(optimizer_steps={}), "optimizer_steps has no number for policy.model.lm_head.weight"),
    (
        *state(optimizer_steps={"policy.model.lm_head.weight": "two"}),
        "optimizer_steps has no number for policy.model.lm_head.weight",
    ),
    (*state(optimizer_steps=None), "expected a dict 'optimizer_steps'"),
    (*state(loader=None), "expected a dict 'loader'"),
    (*state(loader={"seed": 0, "num_examples": 96}), r"expected a int 'loader\.drawn'"),
    (*state(data=3), "expected a str 'data'"),
    (*state(carried={}), r"expected a dict 'carried\.baseline'"),
    (*state(owed=3), "expected a dict or None 'owed'"),
    (*state(config={}), r"expected a str 'config\.method'"),
    (*state(world_size=0), "says world_size 0, and lists generators of 1 rank"),
]


def test_what_cannot_be_resumed_from_is_passed_over_with_its_reason_and_refused_when_named(configure, caplog):
    settings = {"run.steps": 4, "run.save_every": 2}
    config = configure("sft", **settings)
    train(config)
    expected, directory = numbers(config.run.output_dir), Path(config.run.output_dir) / "checkpoints"
    last, named = directory / "step-4", configure("sft", **settings, **{"run.resume": str(directory / "step-4")})
    config.run.resume = True
    for name, damage, words in DAMAGES:
        file, content = last / name, (last / name).read_bytes()
        file.write_bytes(damage(content))
        assert file.read_bytes() != content, words
        caplog.clear()
        assert rundir.find_checkpoint(config, directory.parent) == directory / "step-2", words
        (line,) = (r.getMessage() for r in caplog.records)
        assert re.search(rf"^resume: step-4 is not a whole checkpoint \(.*{words}.*\): going on from .*step-2$", line)
        with pytest.raises(ValueError, match=rf"step-4.*{words}.*resume from another checkpoint$") as raised:
            rundir.find_checkpoint(named, directory.parent)
        assert "\n" not in str(raised.value)
        file.write_bytes(content)
    assert rundir.find_checkpoint(config, directory.parent) == rundir.find_checkpoint(named, directory.parent) == last
    shutil.copy(last / TENSORS, last / "copy.safetensors")
    assert rundir.find_checkpoint(config, directory.parent) == directory / "step-2"
    train(config)
    assert numbers(config.run.output_dir) == expected


@pytest.mark.parametrize("text", ["a: [", "", "- 1\n", "\x00"])
def test_a_broken_config_is_named(tmp_path, configure, text):
    config = configure("sft", **{"run.resume": True})
    directory = Path(config.run.output_dir)
    directory.mkdir()
    (directory / "config.yaml").write_text(text)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    for use in (lambda: rundir.claim(config, WORLD), lambda: report.write_report(directory)):
        with pytest.raises(ValueError, match=r"config\.yaml (is not YAML|holds no settings)"):
            use()


@pytest.mark.parametrize("line", ["1", "[]", '{"loss": 1}', '{"step": "one"}', '{"step": null}', "\ufffd", "nul\n{}"])
def test_a_line_of_metrics_that_is_no_step_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not (JSON|the object of a step)"):
        report.write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        report.write_report(tmp_path)
