"""The small commands around runs: begin one, read one, make a model of one."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastalign.arguments import asked_method, docstrings, find_losses, parse_config, split_config
from fastalign.config import Config, as_dict
from fastalign.engine.methods import METHODS, ON_POLICY
from fastalign.process import prepare_process
from fastalign.written import UsageError, in_yaml

ESSENTIALS = (
    *("model.path", "model.config", "model.tokenizer", "model.lora", "reference.path"),
    *("data.path", "data.eval_path", "data.eval_fraction", "data.columns", "data.max_length"),
    *("loss.name", "loss.beta", "algorithm.name", "algorithm.num_generations", "algorithm.kl_coef"),
    *("sampler.max_new_tokens", "sampler.temperature"),
    *("batch.size", "batch.tokens", "optim.lr", "optim.schedule", "optim.warmup"),
    *("run.output_dir", "run.epochs", "run.steps", "run.eval_every", "run.save_every", "run.trackers"),
)
"""What `init` writes and explains; everything else it leaves to the defaults."""
LLAMA = {
    **{"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024},
}
BUILTIN = {
    "model": {"config": LLAMA, "tokenizer": "builtin:bpe"},
    "data": {"path": "builtin:docstrings", "eval_path": "builtin:docstrings", "max_length": 256},
    "batch": {"size": 16, "tokens": 4096},
    "optim": {"lr": 1e-3, "warmup": 0.05},
    "run": {"steps": 50},
}
"""A run that needs no download: a small Llama from random weights, on built-in text."""
LETTERS = {
    "model": {"config": {**LLAMA, "hidden_size": 128, "intermediate_size": 344}, "tokenizer": "builtin:letters"},
    "data": {"path": "builtin:sort_letters", "eval_path": "builtin:sort_letters", "max_length": 32},
    "sampler": {"max_new_tokens": 8},
    "rewards": [{"builtin": "exact_match"}],
    "batch": {"size": 32, "tokens": 4096},
    "optim": {"lr": 2e-4, "warmup": 0.05},
    "run": {"steps": 20},
}


def init(argv: list[str]) -> int:
    """Write a commented configuration to begin with: fastalign init dpo --model.path MODEL --data.path FILE."""
    if not argv or argv[0] not in METHODS:
        asked = argv[0] if argv else "nothing"
        names = ", ".join(METHODS)
        if argv and argv[0] in ("-h", "--help"):
            print(
                "usage: fastalign init METHOD [--out run.yaml] [--section.key value ...]\n\n"
                f"{init.__doc__}\nWithout model and data it is a small run on built-in text.\n\nmethods: {names}"
            )
            return 0
        raise UsageError(f"init: expected a method, one of {names}, got {asked}")
    method, words, out = argv[0], [*argv[1:]], Path(f"{argv[0]}.yaml")
    if "--out" in words:
        place = words.index("--out")
        if place + 1 == len(words):
            raise UsageError("--out: expected the file to write")
        out = Path(words[place + 1])
        del words[place : place + 2]
    if out.exists():
        raise ValueError(f"{out} exists: choose another file with --out")
    config = starting_config(method, words)
    out.write_text(commented(config, out), encoding="utf-8")
    print(f"{out}: edit it, then start the run with\n  fastalign {method} --config {out}")
    return 0


def starting_config(method: str, words: list[str]) -> Config:
    """The settings that `init` writes: the asked ones over a small run on built-in text where neither model nor data
    are given."""
    given = {flag.key for flag in split_config(words)[1]}
    start: dict[str, Any] = {"run": {"output_dir": f"runs/{method}"}}
    if not given & {"model.path", "model.config", "data.path"}:
        start = LETTERS if method in ON_POLICY else BUILTIN
        start = {**start, "run": {**start["run"], "output_dir": f"runs/{method}"}}
        start |= {"reference": {"path": "runs/sft/model"}} if method == "distill" else {}
    elif "model.path" not in given and "model.config" not in given:
        start["model"] = {"path": "Qwen/Qwen3-0.6B"}
    elif "data.path" not in given:
        start["data"] = {"path": "data.jsonl"}
    return parse_config(method, words, start)


def commented(config: Config, out: Path) -> str:
    """The essential settings of a run as YAML, each below what it means."""
    settings = as_dict(config)
    names = settings["loss"]["name"]
    texts = docstrings(config.method, find_losses(config.method, [names] if isinstance(names, str) else names))
    lines = [f"# fastalign {config.method} --config {out}", f"# Every other setting: fastalign {config.method} --help"]
    lines += [f"method: {config.method}"]
    for section, values in settings.items():
        if section == "rewards":
            entries = values or [{"function": "my_rewards.py:accuracy"}]
            lines += ["", *comment("What scores completions: functions, models, built-in ones; see docs/rewards.md.")]
            lines += ["rewards:", *(f"  - {in_yaml(entry)}" for entry in entries)]
        elif isinstance(values, dict) and (written := [*entries_of(section, values, texts)]):
            empty = all(line.lstrip().startswith("#") for line in written)  # a section without settings is refused
            lines += [
                "",
                *([f"# {section}:", *(f"# {line}" for line in written)] if empty else [f"{section}:", *written]),
            ]
    return "\n".join(lines) + "\n"


def entries_of(section: str, values: Mapping[str, Any], texts: Mapping[str, str | None]) -> Iterator[str]:
    """The lines of a section's essential settings; those without a value are commented out."""
    for name, value in values.items():
        if (key := f"{section}.{name}") in ESSENTIALS:
            yield from (f"  {line}" for line in comment(texts.get(key) or ""))
            yield f"  {'# ' if value is None or value == {} or value == [] else ''}{name}: {in_yaml(value)}"


def comment(text: str) -> list[str]:
    """A text as comments."""
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), 100)]


def merge(argv: list[str]) -> int:
    """Add a LoRA adapter to its base and write the whole model: fastalign merge runs/lora/model --out DIR."""
    parser = argparse.ArgumentParser(prog="fastalign merge", description=merge.__doc__)
    parser.add_argument(
        "adapter", type=Path, help="directory of the adapter: the model/ of a LoRA run, or any of PEFT's"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: the base's own")
    parser.add_argument("--overwrite", action="store_true", help="replace that directory where it is there")
    given = vars(parser.parse_args(argv))
    prepare_process()
    from fastalign.engine.exporting import merge_adapter  # brings transformers and datasets

    print(merge_adapter(given.pop("adapter"), **given))
    return 0


def compare(argv: list[str]) -> int:
    """Print the metrics of runs side by side, and the settings that differ: fastalign compare RUN RUN."""
    parser = argparse.ArgumentParser(prog="fastalign compare", description=compare.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of runs")
    parser.add_argument("--metrics", nargs="+", default=[], help="print only these, e.g. eval_loss rewards/accuracies")
    given = parser.parse_args(argv)
    from fastalign.engine.output.comparison import compare as run

    run(given.runs, given.metrics)
    return 0


def replay(argv: list[str]) -> int:
    """Draw a completion of a run again from its checkpoint: fastalign replay RUN --step 120 --sample 7."""
    parser = argparse.ArgumentParser(prog="fastalign replay", description=replay.__doc__)
    parser.add_argument("run_dir", help="the output_dir of an on-policy run")
    parser.add_argument("--step", type=int, required=True, help="the step that it was sampled in")
    parser.add_argument("--sample", type=int, default=0, help="which line of the step in samples.jsonl, from 0")
    given = parser.parse_args(argv)
    prepare_process()
    from fastalign.engine.replay import replay as run  # brings transformers and datasets

    words = ["--config", str(Path(given.run_dir, "config.yaml"))]
    config = parse_config(asked_method(words, default="grpo"), words)
    text, equal = run(config, Path(given.run_dir), given.step, given.sample)
    print(text)
    return 0 if equal else 1


def export(argv: list[str]) -> int:
    """Write a checkpoint of a run as a Hugging Face model: fastalign export RUN --step 120 --dtype bfloat16."""
    parser = argparse.ArgumentParser(prog="fastalign export", description=export.__doc__)
    parser.add_argument("run_dir", help="the output_dir of a run, which may be going on")
    parser.add_argument("--step", help="of the checkpoint, or `best` (run.keep_best); default: the newest")
    parser.add_argument("--critic", action="store_true", help="the critic of ppo, in place of the policy")
    parser.add_argument("--merge-lora", action="store_true", help="add the adapter to its base: one whole model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: as they are")
    parser.add_argument("--out", type=Path, help="directory to write; default: RUN/export/step-N")
    parser.add_argument("--overwrite", action="store_true", help="replace that directory where it is there")
    given = vars(parser.parse_args(argv))
    prepare_process()
    from fastalign.engine.exporting import export_checkpoint  # brings transformers and datasets

    directory = Path(given.pop("run_dir"))
    words = ["--config", str(directory / "config.yaml")]
    print(export_checkpoint(parse_config(asked_method(words, default="sft"), words), directory, **given))
    return 0


def report(argv: list[str]) -> int:
    """Rewrite the report.html of a run directory."""
    parser = argparse.ArgumentParser(prog="fastalign report", description=report.__doc__)
    parser.add_argument("run_dir", help="the output_dir of a run")
    run_dir = parser.parse_args(argv).run_dir
    from fastalign.engine.output.report import write_report  # brings torch

    print(write_report(run_dir))
    return 0
