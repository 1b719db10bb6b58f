"""Completions of prompts into a file, a line of JSON each, in the order of the prompts: `fastalign generate`.

What is in memory does not grow with the number of prompts: some thousand are sampled together, and lines are written as
soon as all before them are. A run that was stopped goes on where it was, with the same completions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from datasets import Dataset

from fastalign.commands import GenerateConfig, RlaifConfig
from fastalign.config import DataConfig, ModelConfig, SamplerConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.data.prompt_dataset import PromptDataset, encode_prompts
from fastalign.data.sources import load_rows
from fastalign.engine.forward import wants_autocast
from fastalign.engine.output.progress import stage
from fastalign.engine.setup import builtin_tokenizer
from fastalign.models.load import check_model, load_policy, load_tokenizer
from fastalign.models.policy import Policy
from fastalign.models.verify import verify_packed
from fastalign.rl.backends import make_sampler
from fastalign.rl.sampler import Sampler, check_settings
from fastalign.types import Prompt, Rollout

PROMPTS_TOGETHER = 4096
"""Prompts in memory at a time: so many that the few rows at the end of each lot cost nothing."""
SCORES = "ForSequenceClassification"
"""How transformers ends the class names of models that score."""


class Out(Protocol):
    """The settings of a command that writes a file and can go on with one."""

    out: str
    resume: bool
    overwrite: bool


def generate(settings: GenerateConfig, model: ModelConfig, sampler: SamplerConfig, data: DataConfig) -> str:
    """Sample and write completions; returns what was done, in words.

    Raises:
        ValueError: settings, prompts or a model that cannot be sampled from.
    """
    check(settings, sampler)
    tokenizer = load_tokenizer(model, fallback=builtin_tokenizer)
    prompts = encode_prompts(read_prompts(settings, data), tokenizer, data, sampler.max_new_tokens)
    written = resume(settings, partial(check_line, settings, prompts))
    first = prompts.fetch([*range(min(len(prompts), 4))])
    policy, precision = load(model, tokenizer, first) if sampler.backend != "vllm" else (None, nullcontext)
    if sampler.exact == "auto":  # nothing here is compared with training
        sampler = replace(sampler, exact="off")
    source = make_sampler(policy, sampler, tokenizer, precision=precision)
    with open(settings.out, "a", encoding="utf-8") as file:
        count = write_all(file, source, prompts, settings, written, tokenizer)
    kept = f", {written} of which were there" if written else ""
    return f"done: {settings.out} holds {count} completions of {len(prompts)} prompts{kept}"


def check(settings: GenerateConfig, sampler: SamplerConfig) -> None:
    """Refuse what would lose or mix up files, or sample nothing."""
    check_settings(sampler)
    if settings.n < 1:
        raise ValueError(f"n: expected completions per prompt, 1 or more, got {settings.n}")
    check_out("generate", settings)


def check_out(command: str, settings: Out) -> None:
    """Refuse a file that cannot be begun or gone on with, and several processes that would write it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"fastalign {command} runs in one process: start it without torchrun")
    if settings.resume and settings.overwrite:
        raise ValueError("resume and overwrite are both set: keep what is in the file, or replace it")
    out = Path(settings.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out: expected the path of a file in a directory that exists, got {settings.out!r}")
    if out.exists() and not (settings.resume or settings.overwrite):
        raise ValueError(f"out: {settings.out!r} exists: go on with --resume, or replace it with --overwrite")


def read_prompts(settings: GenerateConfig | RlaifConfig, data: DataConfig) -> Dataset:
    """The rows that hold the prompts."""
    path = settings.prompts or data.path
    if not path:
        raise ValueError("no prompts are given: set --prompts to a .txt file or to what data.path takes")
    if path.endswith(".txt"):
        if not Path(path).is_file():
            raise ValueError(f"prompts: no file at {path!r}")
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        return Dataset.from_dict({"prompt": lines})
    options = {"name": data.name, "revision": data.revision, "cache_dir": data.cache_dir}
    return load_rows(path, data.split, data.columns, data.limit, **options)


def load(
    model: ModelConfig, tokenizer: Any, examples: Sequence[TokenExample]
) -> tuple[Policy, Callable[[], AbstractContextManager]]:
    """The model, compared with its plain forward on a few examples, and the context of its forwards."""
    check_model(model, tokenizer)
    refuse_reward_model(model)
    policy = load_policy(model, tokenizer=tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    autocast = wants_autocast(model, device)

    def precision() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()

    with precision():
        verify_packed(policy, build_batch(examples, True).to(device))
    return policy, precision


def refuse_reward_model(model: ModelConfig) -> None:
    """Refuse a directory whose model scores; its trunk alone might load as a causal LM with a tied head."""
    config = Path(model.path or "", "config.json")
    kinds = json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None
    if any(kind.endswith(SCORES) for kind in kinds or ()):
        raise ValueError(f"model.path: {model.path!r} is a reward model: it gives scores, not tokens")


# --- the file --------------------------------------------------------------------------------------------------------


def write_all(
    file: IO[str], sampler: Sampler, prompts: PromptDataset, settings: GenerateConfig, written: int, tokenizer: Any
) -> int:
    """Sample what is not written yet and write it; the number of lines in the file."""
    total, first = len(prompts) * settings.n, written // settings.n
    with stage("sampling", total, shown=True) as show:
        for done, (index, rollout) in enumerate(in_order(sampler, prompts, settings, first), first * settings.n + 1):
            show(done)
            if done > written:
                file.write(json.dumps(as_line(index, rollout, prompts, tokenizer), ensure_ascii=False) + "\n")
                file.flush()
    return total


def in_order(
    sampler: Sampler, prompts: PromptDataset, settings: GenerateConfig, first: int
) -> Iterator[tuple[int, Rollout]]:
    """The samples of every prompt from the first on, in order, each with the prompt's place."""
    for start in range(first, len(prompts), PROMPTS_TOGETHER):
        places = range(start, min(start + PROMPTS_TOGETHER, len(prompts)))
        lot = [Prompt(prompts.ids(i), int(prompts.positions[i])) for i in places]
        finished: dict[tuple[int, int], Rollout] = {}
        waiting = iter([(i, sample) for i in places for sample in range(settings.n)])
        place, sample = next(waiting)
        for rollout in sampler.generate(lot, settings.n, settings.seed):
            finished[rollout.row, rollout.sample] = rollout
            while (found := finished.pop((int(prompts.positions[place]), sample), None)) is not None:
                yield place, found
                place, sample = next(waiting, (place, settings.n))


def as_line(index: int, rollout: Rollout, prompts: PromptDataset, tokenizer: Any) -> dict[str, Any]:
    """What the file says of a completion; ``prompt_index`` is the row of the data, empty prompts and all."""
    return {
        "prompt_index": rollout.row,
        "sample_index": rollout.sample,
        "prompt": prompts.prompt(index),
        "completion": tokenizer.decode(rollout.tokens.tolist(), skip_special_tokens=True),
        "finish_reason": rollout.finish,
        "logp": float(rollout.sampler_logps.sum(dtype="float64")),
        "tokens": len(rollout.tokens),
    }


def resume(settings: Out, keep: Callable[[bytes, int], bool]) -> int:
    """Lines that stay in the file; the others are cut off.

    Args:
        settings: the file, and whether it is begun anew.
        keep: whether a line stays, given its place, and with it those before; raises where it is of another run. A last
            line that was not written to its end never stays.
    """
    path = Path(settings.out)
    if settings.overwrite or not path.exists():
        path.write_bytes(b"")
        return 0
    count, end = 0, 0
    with open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n") or not keep(line, count):
                break
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def check_line(settings: GenerateConfig, prompts: PromptDataset, line: bytes, count: int) -> bool:
    """Refuse a line that is no sample, or of other prompts, or of another number of each; else true."""
    index, sample = divmod(count, settings.n)
    where = f"out: line {count + 1} of {settings.out!r}"
    try:
        found = json.loads(line)
        place = found["prompt_index"], found["sample_index"], found["prompt"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{where} is no completion: choose another file, or --overwrite it") from error
    expected = (int(prompts.positions[index]), sample, prompts.prompt(index)) if index < len(prompts) else None
    if place != expected:
        raise ValueError(
            f"{where} is sample {place[1]} of prompt {place[0]}, which these prompts with n {settings.n} do not have "
            "there: resume with the prompts and n that it was begun with"
        )
    return True
