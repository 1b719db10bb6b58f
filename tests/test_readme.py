"""The README keeps its word: its Python runs, its commands parse, its settings exist."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fastalign.arguments import METHODS, parse_config

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = re.findall(r"(?:^|-m )fastalign (\w+)(.*)$", "\n".join(text for _, text in BLOCKS), re.MULTILINE)


def test_python_blocks_run_in_order():
    namespace = {}
    for number, block in enumerate(text for language, text in BLOCKS if language == "python"):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert namespace["loss"].isfinite() and namespace["weight"].grad.isfinite().all()


@pytest.mark.parametrize("method, words", [(m, w) for m, w in COMMANDS if m in METHODS and "--help" not in w])
def test_training_commands_parse(method, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = [word for word in shlex.split(words, comments=True) if word != "--print_config"]
    if "config.yaml" not in words and "run.yaml" not in words:
        parse_config(method, flags)


def test_yaml_blocks_are_configurations(tmp_path):
    for text in (text for language, text in BLOCKS if language == "yaml"):
        (tmp_path / "run.yaml").write_text(text)
        assert parse_config(yaml.safe_load(text)["method"], ["--config", str(tmp_path / "run.yaml")])
