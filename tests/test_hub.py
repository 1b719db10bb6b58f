"""The hub is asked once: what it answers, or that it does not, is one line that says what to do."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastalign import hub
from fastalign.config import Config, ModelConfig
from fastalign.engine.settings import check_settings
from fastalign.models.load import load_policy, load_tokenizer

KINDS = {"dataset": "data.path", "model": "model.path", "tokenizer": "model.tokenizer"}
ONE_ATTEMPT = 2.0  # seconds: the libraries' own retries take at least 23


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, new_cache: Callable[[Path], str]) -> dict[str, Any]:
    """What `hub_runs.py` found; nothing but its answers may be printed."""
    here = tmp_path_factory.mktemp("hub")
    new_cache(here / "cache")
    command = [sys.executable, str(Path(__file__).with_name("hub_runs.py")), str(here)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.splitlines() if "Retrying" in line or "thrown while" in line]
    assert not noise, "the libraries' retries are not told"
    return json.loads((here / "results.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("missing", ["and no such {kind} on the hub", "check the name", "hf auth login"]),
        ("gated", ["is gated on the hub", "hf auth login"]),
        ("down", ["the hub does not answer", "status 503", "HF_HUB_OFFLINE=1", "check the name and the network"]),
        ("odd", ["{kind} 'some/", "of the hub"]),
    ],
)
def test_a_refusal_is_one_line_at_once(answers: dict[str, Any], kind: str, mode: str, words: list[str]) -> None:
    found = answers[f"{mode} {kind}"]
    assert found["answer"].startswith(f"error: {KINDS[kind]}: ")
    assert all(word.format(kind=kind) in found["answer"] for word in words), found["answer"]
    assert "\n" not in found["answer"] and found["seconds"] < ONE_ATTEMPT
    assert mode != "down" or found["requests"] == 1


@pytest.mark.parametrize("kind", ["dataset", "model"])
def test_a_closed_hub_is_one_line_at_once(answers: dict[str, Any], kind: str) -> None:
    found = answers[f"closed {kind}"]
    for words in ("does not answer", "refused", "HF_HUB_OFFLINE=1", f"local cache has no such {kind}"):
        assert words in found["answer"]
    assert found["seconds"] < ONE_ATTEMPT


def test_a_silent_hub_is_waited_for_once_per_run(answers: dict[str, Any]) -> None:
    first, second = answers["silent dataset"], answers["silent model"]
    assert "nothing within 1 s (HF_HUB_ETAG_TIMEOUT)" in first["answer"] and first["requests"] == 1
    assert first["seconds"] < ONE_ATTEMPT
    assert "nothing within 1 s" in second["answer"] and second["requests"] == 0


def test_a_slow_download_is_not_cut_short(answers: dict[str, Any]) -> None:
    assert int(answers["slow tokenizer"]["answer"]) > 256 and answers["slow tokenizer"]["seconds"] > 1
    assert answers["slow model"]["answer"] == "Policy" and answers["slow model"]["seconds"] > 1


def test_without_the_hub_its_cache_serves_and_a_line_says_so(answers: dict[str, Any]) -> None:
    assert answers["cached main"]["answer"] == "[{'prompt': 'main/train', 'completion': '2024-01-01'}]"
    assert answers["cached model"]["answer"] == "Policy"
    for name in ("cached main", "cached model"):
        (line,) = answers[name]["told"]
        assert "from the local cache, the hub does not answer" in line and "HF_HUB_OFFLINE=1" in line


def test_configurations_splits_and_revisions_are_listed(answers: dict[str, Any]) -> None:
    there = "data.name: 'some/name' has the configurations ['main', 'socratic']"
    assert answers["without a configuration"]["answer"] == f"error: {there}: name one"
    assert answers["unknown configuration"]["answer"] == f"error: {there}, got 'x'"
    assert answers["unknown split"]["answer"] == "error: data.split: 'some/name' has the splits ['train'], got 'test'"
    assert answers["unknown revision"]["answer"].startswith("error: data.revision: Revision 'v9' doesn't exist")
    assert answers["main"]["answer"] == "[{'prompt': 'main/test', 'completion': '2024-01-01'}]"


@pytest.mark.parametrize("name", ["runs/sft/model", "./model", "~/model", "/model", "org/"])
def test_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    for setting, load in {"model.path": load_policy, "reference.path": load_policy, "model.tokenizer": None}.items():
        with pytest.raises(ValueError, match=f"^{setting}: no directory at '{os.path.expanduser(name)}': "):
            if load is None:
                load_tokenizer(ModelConfig(tokenizer=name))
            else:
                load(ModelConfig(path=name), setting=setting)


@pytest.mark.parametrize("setting", ["model.path", "model.tokenizer", "reference.path"])
def test_a_path_that_is_not_there_is_refused_before_any_work(setting: str) -> None:
    section, name = setting.split(".")
    config = Config("dpo")
    config.data.path, config.model.path = "builtin:docstrings", "some/model"
    setattr(getattr(config, section), name, "runs/sft/model")
    with pytest.raises(
        ValueError,
        match=f"^{setting}: no directory at 'runs/sft/model': run.output_dir runs/sft leaves it, so train that first",
    ):
        check_settings(config)


def test_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_attempt", lambda _: pytest.fail("the hub is asked in offline mode"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^model\.path: no directory 'some/model' here.* HF_HUB_OFFLINE=1 .*unset it"):
        load_policy(ModelConfig(path="some/model"))
