"""Damaged files are answered with one line that names them."""

import json
from pathlib import Path

import pytest
import torch
from test_checkpoint import stepped

from fastalign.engine.output import checkpoint, report, rundir
from fastalign.engine.train import train
from fastalign.parallel.mesh import Axis, World

WORLD = World(Axis(), torch.device("cpu"))
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


def cut(data: bytes) -> bytes:
    return data[:-40]


@pytest.mark.parametrize(
    "name, damage, words",
    [
        (TENSORS, cut, rf"step-2 is not a whole checkpoint: {TENSORS} has \d+ bytes, \d+ were written; resume from"),
        (TENSORS, lambda data: b"", rf"step-2 is not a whole checkpoint: {TENSORS} has 0 bytes, "),
        (TENSORS, lambda data: b"x" * len(data), r"step-2 is damaged \("),
        (TENSORS, None, rf"step-2 is not a whole checkpoint: {TENSORS} is missing; resume from another"),
        ("state.json", cut, r"state\.json is not JSON \("),
        ("state.json", lambda data: b"\xff\xfe", r"state\.json is not JSON \("),
        ("state.json", lambda data: b"[]", r"state\.json is damaged: expected an object with a schema"),
        (
            "state.json",
            lambda data: data.replace(b'"optimizer_steps"', b'"x"'),
            r"damaged: .* a dict 'optimizer_steps'",
        ),
        ("rng-0.json", cut, r"rng-0\.json is not JSON \("),
        ("rng-0.json", lambda data: b"{}", r"rng-0\.json is damaged"),
        ("rng-0.json", lambda data: b"[]", r"rng-0\.json is damaged"),
        (
            "rng-0.json",
            lambda data: json.dumps({**json.loads(data), "torch": "AA"}).encode(),
            r"rng-0\.json is damaged",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage, words):
    path = checkpoint.save_checkpoint(tmp_path, 2, *stepped(), {}, WORLD, keep=1)
    file = path / name
    content = file.read_bytes()
    file.unlink() if damage is None else file.write_bytes(damage(content))
    with pytest.raises(ValueError, match=words) as raised:
        checkpoint.load_checkpoint(path, *stepped(), WORLD)
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
