"""fastalign from Python: what the commands do, with models, tokenizers and datasets in memory as well as by name.

import fastalign

run = fastalign.train("dpo", model="Qwen/Qwen3-0.6B", dataset=pairs, loss="ipo", optim={"lr": 1e-6})
run.metrics.plot(x="step", y="loss")
model = run.model()
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.arguments import parse_config
from fastalign.commands import GenerateConfig, ScoreConfig
from fastalign.config import Config, DataConfig, ModelConfig, SamplerConfig
from fastalign.process import prepare_process

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INPUTS = "inputs"
"""Folder in a run's directory for what was given in memory: with it the run can be resumed and its settings reused."""


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run by its directory; `Run("runs/dpo")` opens one that a command made.

    Attributes:
        directory: `run.output_dir`.
    """

    directory: Path | str

    @property
    def config(self) -> dict[str, Any]:
        """All settings, as `config.yaml` has them."""
        from fastalign.engine.output.rundir import read_settings

        return read_settings(Path(self.directory))

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row for each step, with the columns of `metrics.jsonl`; times in seconds, memory in bytes."""
        import pandas

        from fastalign.engine.output.metrics import read_metrics

        return pandas.DataFrame(read_metrics(Path(self.directory) / "metrics.jsonl"))

    @property
    def report(self) -> Path:
        """`report.html`, written anew."""
        from fastalign.engine.output.report import write_report

        return Path(write_report(self.directory))

    def model(self, **options: Any) -> PreTrainedModel:
        """The trained model: a causal LM, a sequence classifier after `reward`, an adapter on its base after LoRA.

        Args:
            **options: of `from_pretrained`, e.g. `device_map`.

        Raises:
            ValueError: the run has not left its model yet.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        place = self._place()
        scores = self.config["method"] == "reward"
        if not (place / "adapter_config.json").exists():
            return (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_pretrained(
                place, **options
            )
        from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

        return (AutoPeftModelForSequenceClassification if scores else AutoPeftModelForCausalLM).from_pretrained(
            place, **options
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the model was trained with."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._place())

    def resume(self, **settings: Any) -> Run:
        """Go on from the newest checkpoint, e.g. `run.resume(run={"epochs": 2})`; settings are those of `train`."""
        given = {**settings, "run": {**settings.get("run", {}), "resume": True}}
        words = ["--config", str(Path(self.directory) / "config.yaml")]
        return _run(parse_config(self.config["method"], words, _sections(given)))

    def _place(self) -> Path:
        place = Path(self.directory) / "model"
        if not (place / "config.json").exists() and not (place / "adapter_config.json").exists():
            raise ValueError(f"{place} holds no model yet: resume the run, or write one with fastalign export")
        return place


def train(
    method: str,
    model: Any = None,
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    eval_dataset: Any = None,
    loss: Any = None,
    rewards: Any = None,
    config: str | Path | Sequence[str | Path] = (),
    **sections: Any,
) -> Run:
    """Train with a method and return the run; as `fastalign METHOD` on the command line.

    Args:
        method: `sft`, `dpo`, `kto`, `rrhf`, `reward`, `distill`, `grpo`, `ppo`, ...
        model: a hub name or directory (`model.path`), a dict as `model.config` takes it, or a model of transformers.
        dataset: a hub name, directory or file (`data.path`), a `datasets.Dataset`, or a list of rows.
        tokenizer: a name or directory, or a tokenizer; default: the model's own.
        eval_dataset: held-out rows, as `dataset`.
        loss: a name, several for their sum, a function of yours, or a dict of name and settings.
        rewards: for on-policy methods: functions with TRL's signature, names of built-in ones, or dicts as `rewards`
            takes them.
        config: YAML files that are read first.
        **sections: the other settings, e.g. `optim={"lr": 1e-6}`, `run={"output_dir": "runs/first", "steps": 100}`.

    What is given in memory is written to `inputs/` in the run's directory, so that the run can be resumed. A function
    must have a name in its module: a lambda or a nested function has none.

    Raises:
        ValueError: a setting, a row or a model that cannot be used, in one line that says what to do.
    """
    tree, files = _sections(sections), _files(config)
    if loss is not None:
        tree["loss"] = {**tree.get("loss", {}), **_loss(loss)}
    if rewards is not None:
        tree["rewards"] = [_reward(one) for one in ([rewards] if callable(rewards) else rewards)]
    directory = Path(parse_config(method, files, tree).run.output_dir)
    given = {"model": model, "tokenizer": tokenizer, "dataset": dataset, "eval_dataset": eval_dataset}
    named, writes = _named(given, directory / INPUTS)
    _merge(tree, named)
    settings = parse_config(method, files, tree)
    if writes and not settings.run.resume:
        _write_inputs(directory, writes)
    return _run(settings)


def evaluate(
    method: str,
    model: Any,
    dataset: Any,
    *,
    tokenizer: Any = None,
    loss: Any = None,
    config: str | Path | Sequence[str | Path] = (),
    **sections: Any,
) -> dict[str, float]:
    """The loss and the metrics of a model on rows, all of them, without training it.

    The arguments are those of `train`; `reference={"path": ...}` names the reference of a preference loss, by default
    the model itself, whose margins are then 0.

    Returns:
        `loss` and the method's metrics by name, e.g. `rewards/accuracies` for `dpo`, `perplexity` for `sft`.
    """
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        tree = _sections(sections)
        given = {"model": model, "tokenizer": tokenizer, "dataset": dataset}
        _merge(tree, _from_memory(given, folder))
        if loss is not None:
            tree["loss"] = {**tree.get("loss", {}), **_loss(loss)}
        _prepare()
        from fastalign.engine.evaluate import evaluate_model

        return evaluate_model(parse_config(method, _files(config), tree))


def generate(
    model: Any,
    prompts: Any,
    *,
    n: int = 1,
    seed: int = 0,
    tokenizer: Any = None,
    data: Mapping[str, Any] | None = None,
    **sampler: Any,
) -> list[dict[str, Any]]:
    """Sample completions.

    Args:
        model: as for `train`, or a `Run`.
        prompts: texts, conversations, rows with `prompt`, a `datasets.Dataset`, or a path.
        n: completions of each prompt.
        seed: the same seed gives a prompt the same completions.
        tokenizer: a name or directory, or a tokenizer; default: the model's own.
        data: settings of the prompts, e.g. `{"columns": {"prompt": "question"}}`.
        **sampler: settings of the sampler: `max_new_tokens`, `temperature`, `top_p`, `stop`, ...

    Returns:
        in the order of the prompts, for each completion the line that `fastalign generate` writes: `prompt_index`,
        `sample_index`, `prompt`, `completion`, `finish_reason`, ...
    """
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        given = {"model": model, "tokenizer": tokenizer, "dataset": _prompt_rows(prompts)}
        named = _from_memory(given, folder)
        out = str(Path(folder) / "samples.jsonl")
        _prepare()
        from fastalign.pipelines.generate import generate as run

        section = DataConfig(**{**(data or {}), **named.get("data", {})})
        run(GenerateConfig(out=out, n=n, seed=seed), ModelConfig(**named["model"]), _sampler(sampler), section)
        return [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]


def score(
    samples: Iterable[Mapping[str, Any]],
    rewards: Any,
    *,
    tokenizer: Any,
    best: int | None = None,
    dataset: Any = None,
) -> list[dict[str, Any]]:
    """Give completions their rewards.

    Args:
        samples: what `generate` returned.
        rewards: as for `train`.
        tokenizer: a name or directory, or a tokenizer: that of the model which sampled.
        best: keep so many completions of each prompt, those with the highest rewards; default: all.
        dataset: rows whose columns the reward functions read, in the order of the prompts.

    Returns:
        the lines of `samples` with `rewards` by name and `reward`, their weighted sum.
    """
    with tempfile.TemporaryDirectory(prefix="fastalign-") as folder:
        place = Path(folder)
        named = _from_memory({"tokenizer": tokenizer, "dataset": dataset}, folder)
        lines = "".join(json.dumps(dict(line)) + "\n" for line in samples)
        (place / "samples.jsonl").write_text(lines, encoding="utf-8")
        asked = [_reward(one) for one in ([rewards] if callable(rewards) else rewards)]
        settings = ScoreConfig(str(place / "samples.jsonl"), str(place / "scored.jsonl"), asked, best)
        _prepare()
        from fastalign.pipelines.score import score as run

        run(settings, ModelConfig(**named["model"]), DataConfig(**named.get("data", {})))
        return [json.loads(line) for line in (place / "scored.jsonl").read_text(encoding="utf-8").splitlines()]


def _run(config: Config) -> Run:
    _prepare()
    from fastalign.engine.train import train as run

    note = run(config)
    if note:
        logging.getLogger(__name__).warning("%s", note)
    return Run(Path(config.run.output_dir))


def _prepare() -> None:
    """Log as a command does, where the program that calls has set up no logging of its own."""
    if not logging.getLogger().handlers:
        prepare_process()


def _files(config: str | Path | Sequence[str | Path]) -> list[str]:
    paths = [config] if isinstance(config, str | Path) else config
    return [word for path in paths for word in ("--config", str(path))]


def _sections(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, `{"optim.lr": 1}` and `{"optim": {"lr": 1}}` alike."""
    tree: dict[str, Any] = {}
    for key, value in given.items():
        section, _, name = key.partition(".")
        _merge(tree, {section: {name: value} if name else dict(value) if isinstance(value, Mapping) else value})
    return tree


def _merge(tree: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put more settings into a tree of sections, in place."""
    for section, values in more.items():
        both = isinstance(values, dict) and isinstance(tree.get(section), dict)
        tree[section] = {**tree[section], **values} if both else values


Writes = dict[Path, Callable[[str], Any]]
"""What is to be written where."""


def _named(given: Mapping[str, Any], folder: Path) -> tuple[dict[str, dict[str, Any]], Writes]:
    """The sections `model` and `data` for what was given, and what is in memory and belongs below the folder."""
    places = {"model": ("model", "path"), "tokenizer": ("model", "tokenizer")}
    places |= {"dataset": ("data", "path"), "eval_dataset": ("data", "eval_path")}
    tree: dict[str, dict[str, Any]] = {}
    writes: Writes = {}
    for name, value in given.items():
        section, key = places[name]
        if value is None:
            continue
        if name == "model" and isinstance(value, Mapping):
            key, value = "config", dict(value)
        elif isinstance(value, Run):
            value = str(value._place())
        elif not isinstance(value, str | Path):
            write = value.save_pretrained if section == "model" else _dataset(value).save_to_disk
            writes[folder / name], value = write, folder / name
        tree.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
    return tree, writes


def _write_inputs(directory: Path, writes: Writes) -> None:
    """Write what was given in memory for a run that has not begun; what an attempt before has left is replaced."""
    from fastalign.engine.output.rundir import refuse_occupied

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several ranks cannot share what one has in memory: give models and datasets by name or path")
    refuse_occupied(directory)
    for place in writes:
        shutil.rmtree(place, ignore_errors=True)
    _write(writes)


def _write(writes: Writes) -> None:
    for place, write in writes.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        write(str(place))


def _from_memory(given: Mapping[str, Any], folder: str) -> dict[str, dict[str, Any]]:
    """The sections for what was given, which is written to a folder of this call."""
    tree, writes = _named(given, Path(folder))
    _write(writes)
    return tree


def _dataset(rows: Any) -> Any:
    """Rows as a dataset of the library."""
    import datasets

    if isinstance(rows, datasets.Dataset):
        return rows
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ValueError(f"expected a datasets.Dataset, got a {type(rows).__name__}: choose a split, or load it whole")
    return datasets.Dataset.from_list(list(rows))


def _prompt_rows(prompts: Any) -> Any:
    """Prompts as rows with a column `prompt`."""
    if isinstance(prompts, str | Path) or hasattr(prompts, "column_names"):
        return prompts
    return [one if isinstance(one, Mapping) else {"prompt": one} for one in prompts]


def _loss(loss: Any) -> dict[str, Any]:
    """The section `loss` of a name, a function, several of them, or what is the section already."""
    if isinstance(loss, Mapping):
        return {key: _import_path(value) if key == "name" and callable(value) else value for key, value in loss.items()}
    if isinstance(loss, str) or callable(loss):
        return {"name": loss if isinstance(loss, str) else _import_path(loss)}
    return {"name": [one if isinstance(one, str) else _import_path(one) for one in loss]}


def _reward(reward: Any) -> dict[str, Any]:
    """An entry of `rewards` of a function, a built-in one's name, or what is an entry already."""
    if isinstance(reward, Mapping):
        function = reward.get("function")
        return {**reward, "function": _import_path(function)} if callable(function) else dict(reward)
    return {"builtin": reward} if isinstance(reward, str) else {"function": _import_path(reward)}


def _import_path(function: Any) -> str:
    """`module:name` of a function."""
    name = getattr(function, "__qualname__", "<lambda>")
    if not name.isidentifier():
        raise ValueError(
            f"{name}: expected a function at the top of a module or notebook cell, with a name: def it there"
        )
    return f"{function.__module__}:{name}"


def _sampler(settings: Mapping[str, Any]) -> SamplerConfig:
    known = [field.name for field in fields(SamplerConfig)]
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"unknown setting {unknown[0]!r} of the sampler: expected one of {', '.join(known)}")
    return SamplerConfig(**settings)
