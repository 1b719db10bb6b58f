"""Commands around runs: a configuration to begin with, a table of runs, an adapter merged into its base."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from fastalign import cli
from fastalign.arguments import parse_config
from fastalign.engine.methods import METHODS
from fastalign.engine.output import report

TINY = [
    *("--model.config.hidden_size", "32", "--model.config.intermediate_size", "48", "--batch.size", "4"),
    *("--model.config.num_hidden_layers", "1", "--run.steps", "2", "--data.limit", "24", "--data.eval_path", "null"),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, new_cache):
    monkeypatch.setattr(report, "plots", lambda records: "")
    monkeypatch.setenv("FASTALIGN_CACHE", new_cache(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_what_init_writes_is_a_configuration_with_explanations(method, capsys):
    assert cli.main(["init", method]) == 0
    printed = capsys.readouterr().out
    assert f"fastalign {method} --config {method}.yaml" in printed
    text = Path(f"{method}.yaml").read_text()
    assert yaml.safe_load(text)["method"] == method and len(re.findall(r"^ +# \w", text, re.MULTILINE)) > 10
    config = parse_config(method, ["--config", f"{method}.yaml"])
    assert config.run.output_dir == f"runs/{method}" and config.data.path.startswith("builtin:")
    assert cli.main(["init", method]) == 1 and "exists: choose another file" in capsys.readouterr().err


def test_init_takes_flags_and_its_file_runs(capsys):
    assert (
        cli.main(["init", "dpo", "--out", "mine.yaml", "--model.path", "m", "--data.path", "d", "--optim.lr", "3e-6"])
        == 0
    )
    config = parse_config("dpo", ["--config", "mine.yaml"])
    assert (config.model.path, config.data.path, config.optim.lr) == ("m", "d", 3e-6)
    assert config == parse_config(
        "dpo", ["--model.path", "m", "--data.path", "d", "--optim.lr", "3e-6", "--run.output_dir", "runs/dpo"]
    )
    assert cli.main(["init", "sft"]) == 0 == cli.main(["sft", "--config", "sft.yaml", *TINY])
    assert cli.main(["init", "nothing"]) == 2 and "expected a method" in capsys.readouterr().err


def test_runs_are_compared_and_an_adapter_is_merged(capsys):
    for name, more in (("one", []), ("two", ["--optim.lr", "0.01", "--model.lora.r", "2"])):
        cli.main(["init", "sft", "--out", f"{name}.yaml"])
        assert cli.main(["sft", "--config", f"{name}.yaml", *TINY, "--run.output_dir", name, *more]) == 0
    capsys.readouterr()
    assert cli.main(["compare", "one", "two"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"optim\.lr\s+│\s+0\.001 │\s+0\.01", shown) and re.search(r"loss\s+│\s+\d", shown)
    assert "data.path" not in shown
    assert cli.main(["compare", "one", "two", "--metrics", "los"]) == 1
    assert "no run has the metric 'los'" in capsys.readouterr().err
    assert cli.main(["compare", "one", "nowhere"]) == 1 and "expected the output_dir" in capsys.readouterr().err
    assert cli.main(["merge", "two/model", "--out", "whole"]) == 0
    from peft import AutoPeftModelForCausalLM

    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        both = [
            m.from_pretrained(p)(ids).logits
            for m, p in ((AutoModelForCausalLM, "whole"), (AutoPeftModelForCausalLM, "two/model"))
        ]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)
    assert cli.main(["merge", "two/model", "--out", "whole"]) == 1 and "set --overwrite" in capsys.readouterr().err
    assert cli.main(["merge", "one/model", "--out", "other"]) == 1 and "is no adapter" in capsys.readouterr().err
