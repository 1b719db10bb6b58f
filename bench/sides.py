"""One side of ``bench/train.py``, alone in its process: build, train, write the log."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import common, peers
from bench.workload import StepLog, Workload


def fastalign_dpo(work: Workload, log: StepLog) -> Callable[[], Any]:
    """fastalign's own training job on the workload, with a clock around each of its steps."""
    from fastalign.config import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, RunConfig
    from fastalign.engine import train as engine

    config = Config(
        method="dpo",
        model=ModelConfig(path=str(work.model), autocast=work.dtype == "bfloat16"),
        data=DataConfig(path=str(work.data), max_length=work.max_length, cache_dir=str(work.path / "cache")),
        loss={"name": "dpo", "beta": work.beta},
        batch=BatchConfig(size=work.pairs),
        optim=OptimConfig(lr=work.lr, schedule="constant", clip_norm=1.0),
        run=RunConfig(output_dir=tempfile.mkdtemp(dir=work.path), steps=work.steps, seed=work.seed),
    )

    def train() -> None:
        with mock.patch.object(engine, "train_step", timed(engine.train_step, log)):
            engine.train(config)
        metrics = Path(config.run.output_dir, "metrics.jsonl").read_text().splitlines()
        log.losses.extend(json.loads(line)["loss"] for line in metrics)

    return train


def timed(train_step: Callable[..., Any], log: StepLog) -> Callable[..., Any]:
    """``train_step`` with a clock reading before the first call and after each."""

    def step(*args: Any) -> Any:
        if not log.wall:
            log.tick()
        result = train_step(*args)
        log.tick()
        return result

    return step


def run(side: str, work: Workload, profile: bool) -> None:
    """Train ``side`` on ``work`` and write its clock readings, losses and memory to ``<side>.json``."""
    torch.set_num_threads(work.threads)
    log = StepLog(profiler=torch.profiler.profile(record_shapes=True) if profile else None, profile_after=work.warmup)
    train = (
        fastalign_dpo(work, log) if side == "fastalign" else peers.trl_dpo(work, log, select_rows=side == "trl-fair")
    )
    train()
    result = {"wall": log.wall, "cpu": log.cpu, "losses": log.losses}
    result |= {"ready_mib": log.ready_mib, "peak_mib": common.peak_mib()}
    (work.path / f"{side}.json").write_text(json.dumps(result))
    if log.profiler is not None:
        print_profile(log.profiler)


def print_profile(profiler: torch.profiler.profile) -> None:
    """The operations that took longest themselves, and the same by input shape."""
    profiler.stop()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=50))
    by_shape = profiler.key_averages(group_by_input_shape=True)
    print(
        by_shape.table(
            sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50, max_shapes_column_width=60
        )
    )
