"""Every method beside sft and dpo trains for a few steps on real text and sees its own metric improve."""

import json
import re
import runpy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastalign.arguments import parse_config
from fastalign.config import Config
from fastalign.data import feedback, formats, sources
from fastalign.engine.methods import make_objective
from fastalign.engine.train import train
from runs import ROOT, records

Configure = Callable[..., Config]


@pytest.fixture(scope="session")
def judged(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of short built-in rows: ``docstrings`` of the kind that is easiest to tell apart, and ``steps``."""
    folder, paths = tmp_path_factory.mktemp("judged"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTALIGN_CACHE", str(materials / "cache"))
        pairs = sources.load_rows("builtin:docstrings", limit=2000)
        steps = sources.load_rows("builtin:docstring-steps", limit=2000)
    kept = {
        "docstrings": [r for r in pairs if 40 < len(r["chosen"]) < 200 and r["kind"] == "truncated"][:96],
        "steps": [r for r in steps if sum(map(len, r["completions"])) < 200][:96],
    }
    for name, rows in kept.items():
        assert len(rows) == 96
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def curve(config: Config, metric: str) -> tuple[float, float]:
    """A metric's mean over the first three steps and over the last quarter of a run."""
    train(config)
    values = [record[metric] for record in records(config.run.output_dir)]
    return statistics.fmean(values[:3]), statistics.fmean(values[-len(values) // 4 :])


def settings(path: str, steps: int = 24, **more: object) -> dict[str, object]:
    """A short run on a file, at a rate at which a tiny model learns."""
    sizes = {"batch.size": 12, "batch.tokens": 2000, "run.steps": steps, "optim.lr": 3e-3}
    return {"data.path": path, "data.format": "auto", **sizes, **more}


@pytest.mark.parametrize(
    ("method", "loss", "metric", "change"),
    [
        ("reward", {}, "accuracy", 0.1),
        ("reward", {"center_coef": 0.01}, "margin", 1.0),
        ("reward", {"name": "soft_label"}, "accuracy", 0.1),
        ("reward", {"name": "k_wise"}, "accuracy", 0.2),
        ("kto", {}, "rewards/margins", 0.5),
        ("kto", {"name": "bco"}, "rewards/margins", 0.5),
        ("rrhf", {"sft": "mean"}, "rank_accuracy", 0.15),
    ],
)
def test_a_methods_own_metric_rises(
    configure: Configure, judged: dict[str, str], method: str, loss: dict, metric: str, change: float
) -> None:
    options = {f"loss.{name}": value for name, value in loss.items()}
    before, after = curve(configure(method, **settings(judged["docstrings"], **options)), metric)
    assert after > before + change


def test_a_process_reward_model_learns_its_steps(configure: Configure, judged: dict[str, str]) -> None:
    options = settings(judged["steps"], 36, **{"loss.name": "process", "batch.size": 24, "optim.lr": 5e-3})
    before, after = curve(configure("reward", **options), "accuracy")
    assert after > before + 0.15


def test_a_student_comes_closer_to_its_teacher(configure: Configure) -> None:
    taught = configure("sft", "teacher", **{"run.steps": 20, "optim.lr": 5e-3})
    train(taught)
    teacher = {"reference.path": str(Path(taught.run.output_dir) / "model")}
    student = configure("distill", "student", **{"run.steps": 20, "optim.lr": 5e-3, **teacher})
    train(student)
    first, *_, last = records(student.run.output_dir)
    assert last["loss"] < first["loss"] / 2 and last["nll"] < first["nll"] - 0.5


def test_a_saved_reward_model_prefers_the_whole_docstring(configure: Configure, judged: dict[str, str]) -> None:
    config = configure("reward", **settings(judged["docstrings"], **{"run.eval_every": 0, "data.eval_fraction": 0.25}))
    train(config)
    assert records(config.run.output_dir)[-1]["eval_accuracy"] > 0.8, "pairs that it did not see"
    directory = Path(config.run.output_dir) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = [json.loads(line) for line in Path(judged["docstrings"]).read_text().splitlines()]
    scores = {
        side: [_score(model, tokenizer, row["prompt"] + row[side]) for row in rows] for side in ("chosen", "rejected")
    }
    better = [chosen > rejected for chosen, rejected in zip(scores["chosen"], scores["rejected"], strict=True)]
    assert sum(better) > 0.85 * len(rows)


@torch.no_grad()
def _score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return model(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize(("method", "metric", "change"), [("reward", "margin", 0.5), ("kto", "rewards/margins", 0.2)])
def test_real_preferences(
    configure: Configure, shared_file: Callable[[str], Path], method: str, metric: str, change: float
) -> None:
    path = str(shared_file("data/hh-rlhf/harmless-base-test.jsonl.gz"))
    options = settings(path, 16, **{"data.limit": 48, "data.max_length": 256, "batch.size": 24})
    before, after = curve(configure(method, **options), metric)
    assert after > before + change


def test_real_model_solutions(
    configure: Configure, shared_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solutions, ranked = shared_file("data/gsm8k/example_model_solutions.jsonl"), tmp_path / "ranked.jsonl"
    monkeypatch.setattr(sys, "argv", ["rank_gsm8k.py", str(solutions), str(ranked)])
    runpy.run_path(str(ROOT / "examples" / "rank_gsm8k.py"), run_name="__main__")
    rows = sources.load_rows(str(ranked))
    assert len(rows) == 1319 and all(row["scores"][0] == 1 and len(row["completions"]) == 5 for row in rows)
    assert 0.2 < statistics.fmean(score for row in rows for score in row["scores"][1:]) < 0.6
    options = settings(str(ranked), 20, **{"data.limit": 24, "data.max_length": 256, "loss.sft": "mean"})
    config = configure("rrhf", **options)
    train(config)
    first, *_, last = records(config.run.output_dir)
    assert last["rank_accuracy"] > first["rank_accuracy"] + 0.2 and last["sft_loss"] < first["sft_loss"] - 0.5


PAGE = re.findall(r"^fastalign (\w+) (--config .*)$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("method", "words"), [(method, words) for method, words in PAGE if method != "dpo"])
def test_the_commands_of_the_page_of_methods_find_their_columns(
    method: str, words: str, materials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTALIGN_CACHE", str(materials / "cache"))
    config = parse_config(method, words.split())
    kind = make_objective(method, config.loss).data
    for split in ("train", "test"):
        columns = sources.load_rows(config.data.path, split, limit=1).column_names
        assert formats.recognise(columns, kind, config.data.format)
        feedback.check_columns(columns, kind)
