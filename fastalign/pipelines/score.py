"""Rewards of the completions in a file: `fastalign score`, between `generate` and `sft` the second stage of RAFT."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from fastalign.commands import ScoreConfig
from fastalign.config import DataConfig, ModelConfig
from fastalign.data.prompt_dataset import prompt_column
from fastalign.data.sources import load_rows
from fastalign.disk import writing
from fastalign.engine.output.progress import stage
from fastalign.engine.setup import builtin_tokenizer
from fastalign.models.load import load_tokenizer
from fastalign.parallel.mesh import local_device
from fastalign.rl.groups import combine
from fastalign.rl.scoring import Scorer
from fastalign.types import Rollout

TOGETHER = 64
"""Prompts whose completions are scored at the same time."""

Line = dict[str, Any]


def score(settings: ScoreConfig, model: ModelConfig, data: DataConfig) -> str:
    """Score a file of completions, and write each line with its rewards, or the best ones of each prompt.

    Raises:
        ValueError: settings or files that cannot be used, or what a reward function did wrong.
    """
    check(settings)
    lines = [*read_samples(Path(settings.samples))]
    rows = read_columns(data)
    tokenizer = load_tokenizer(model, fallback=builtin_tokenizer)
    scored = list[Line]()
    groups = [[*group] for _, group in groupby(lines, key=lambda line: line["prompt_index"])]
    with (
        closing(Scorer(settings.rewards, tokenizer, local_device())) as scorer,
        stage("scoring", len(groups), shown=True) as tell,
    ):
        for start in range(0, len(groups), TOGETHER):
            some = groups[start : start + TOGETHER]
            pending = [scorer.submit(*group_of(group, rows, tokenizer)) for group in some]
            scored += [line for each in zip(some, pending, strict=True) for line in with_rewards(*each, scorer)]
            tell(min(start + TOGETHER, len(groups)))
    written = scored if settings.best is None else best(scored, settings.best)
    with writing("scores", Path(settings.out), then="score again"), open(settings.out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in written)
    known = [line["reward"] for line in scored if line["reward"] is not None]
    mean = f"{sum(known) / len(known):.4g}" if known else "unknown"
    return f"done: {settings.out} holds {len(written)} of {len(lines)} completions; mean reward of all: {mean}"


def check(settings: ScoreConfig) -> None:
    """Refuse what would score nothing or lose a file."""
    if not settings.rewards:
        raise ValueError("rewards: none is set; e.g. --rewards '[{function: my_rewards.py:accuracy}]'")
    if settings.best is not None and settings.best < 1:
        raise ValueError(f"best: expected completions per prompt, 1 or more, got {settings.best}")
    out = Path(settings.out)
    if out.exists() and (out.is_dir() or not settings.overwrite):
        raise ValueError(f"out: {settings.out!r} exists: choose another file, or replace it with --overwrite")
    if not out.parent.is_dir():
        raise ValueError(f"out: no directory at {str(out.parent)!r}")


def read_samples(path: Path) -> Iterator[Line]:
    """The lines that `fastalign generate` wrote.

    Raises:
        ValueError: no such file, or a line that is no completion.
    """
    if not path.is_file():
        raise ValueError(f"samples: no file at {str(path)!r}: make one with fastalign generate")
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                line["prompt_index"] = int(line["prompt_index"])
                line["completion"], line["prompt"] = str(line["completion"]), line["prompt"]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"samples: line {number} of {str(path)!r} is no completion as fastalign generate writes it: {error}"
                ) from error
            yield line


def read_columns(data: DataConfig) -> Dataset | None:
    """The rows that the prompts came from, whose columns reward functions read; None without ``data.path``."""
    if data.path is None:
        return None
    options = {"name": data.name, "revision": data.revision, "cache_dir": data.cache_dir}
    return load_rows(data.path, data.split, data.columns, data.limit, **options)


def group_of(lines: Sequence[Line], rows: Dataset | None, tokenizer: Any) -> tuple[list[Rollout], dict[str, Any]]:
    """The completions of a prompt as a scorer takes them, and the prompt's row."""
    index, rollouts, columns = int(lines[0]["prompt_index"]), [], {}
    if rows is not None:
        if index >= len(rows):
            raise ValueError(
                f"samples: prompt {index} is beyond the {len(rows)} rows of data.path: name their own data"
            )
        row = dict(rows[index])
        columns = {name: value for name, value in row.items() if name != prompt_column([*row])}
    for place, line in enumerate(lines):
        ids = np.array(tokenizer(line["completion"], add_special_tokens=False).input_ids, dtype=np.int64)
        finish = line.get("finish_reason", "eos")
        known = np.zeros(len(ids), dtype=np.float32)
        rollouts.append(Rollout(np.zeros(0, dtype=np.int64), ids, known, index, place, finish, 0))
    return rollouts, {**columns, "prompt": lines[0]["prompt"]}


def with_rewards(lines: Sequence[Line], future: Future[Any], scorer: Scorer) -> list[Line]:
    """The lines with ``rewards`` by function and their weighted sum ``reward``; null where there is none."""
    table = future.result().table
    total = combine(table, scorer.weights)

    def number(x: float) -> float | None:
        return None if math.isnan(x) else x

    return [
        {**line, "rewards": dict(zip(scorer.names, map(number, each), strict=True)), "reward": number(reward)}
        for line, each, reward in zip(lines, table.tolist(), total.tolist(), strict=True)
    ]


def best(lines: Sequence[Line], number: int) -> list[Line]:
    """The best completions of each prompt, best first, those without a reward left out."""
    kept: list[Line] = []
    for _, group in groupby(lines, key=lambda line: line["prompt_index"]):
        known = [line for line in group if line["reward"] is not None]
        kept += islice(sorted(known, key=lambda line: -line["reward"]), number)
    return kept
