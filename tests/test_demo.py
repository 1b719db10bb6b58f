"""The demo in miniature: the same program and settings, fewer steps and rows, in this process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fastalign import cli
from fastalign.arguments import parse_config

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def in_this_process(command):
    """What `subprocess.run` would do with ``[python, -m, fastalign, ...]``, without importing torch again."""
    assert command[1:3] == ["-m", "fastalign"]
    return subprocess.CompletedProcess(command, cli.main(command[3:]) or 0)


@pytest.mark.slow
def test_demo_in_miniature(demo, tmp_path, monkeypatch, capfd):
    rows = demo.load_rows
    monkeypatch.setattr(demo.subprocess, "run", in_this_process)
    monkeypatch.setattr(demo, "load_rows", lambda path, split: rows(path, split).select(range(40)))
    few = ["--sft.run.steps", "3", "--dpo.run.steps", "3", "--sft.data.limit", "60", "--dpo.data.limit", "60"]
    few += [
        "--letters.run.steps",
        "3",
        "--grpo.run.steps",
        "2",
        "--grpo.batch.size",
        "4",
        "--grpo.data.eval_path",
        "null",
    ]
    scores = demo.main(few, output=tmp_path)
    assert set(scores) == {"all", *demo.KINDS}
    for before, after in scores.values():
        assert before["rewards/margins"] == 0 == before["rewards/accuracies"]
        assert after["rewards/margins"] != 0 and after["perplexity/chosen"] > 1
    printed = capfd.readouterr().out
    assert "Held-out modules" in printed
    for method in ("sft", "dpo", "letters", "grpo"):
        assert (tmp_path / method / "report.html").exists()
        assert (tmp_path / method / "model" / "model.safetensors").exists()


def test_demo_settings_are_those_of_its_runs(demo):
    settings = demo.split_settings(["--sft.run.steps", "7", "--dpo.loss.beta", "0.3"])
    assert settings == {"sft": ["--run.steps", "7"], "dpo": ["--loss.beta", "0.3"], "letters": [], "grpo": []}
    with pytest.raises(SystemExit, match="expected --sft"):
        demo.split_settings(["--run.steps", "7"])


def test_dpo_starts_from_what_sft_leaves():
    sft = parse_config("sft", ["--config", str(EXAMPLES / "demo-sft.yaml")])
    dpo = parse_config("dpo", ["--config", str(EXAMPLES / "demo-dpo.yaml")])
    assert dpo.model.path == f"{sft.run.output_dir}/model"
    assert dpo.data.max_length == sft.data.max_length
