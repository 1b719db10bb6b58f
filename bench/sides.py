"""One side of ``fastalign bench train``, alone in its process: build, train, write the log."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import rollouts, roof
from bench.workload import TASKS, StepLog, Workload


def fastalign_job(work: Workload, log: StepLog) -> Callable[[], Any]:
    """fastalign's own training job on the workload, with a clock around each of its steps."""
    from fastalign.config import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, ReferenceConfig, RunConfig
    from fastalign.engine import train as engine

    config = Config(
        method=work.task,
        model=ModelConfig(path=str(work.model), autocast=work.dtype == "bfloat16"),
        data=DataConfig(path=str(work.data), max_length=work.max_length, cache_dir=str(work.path / "cache")),
        loss={"beta": work.beta} if TASKS[work.task].reference else {},
        reference=ReferenceConfig(cache=str(work.path / "logps") if work.precomputed else "off"),
        batch=BatchConfig(size=work.examples),
        optim=OptimConfig(lr=work.lr, schedule="constant", clip_norm=1.0),
        run=RunConfig(output_dir=tempfile.mkdtemp(dir=work.path), steps=work.steps, seed=work.seed),
    )

    def train() -> None:
        with mock.patch.object(engine, "iteration", timed(engine.iteration, log)):
            engine.train(config)
        metrics = Path(config.run.output_dir, "metrics.jsonl").read_text().splitlines()
        for record in map(json.loads, metrics):
            log.losses.append(record["loss"])
            log.tokens.append(record["tokens_computed"])
            log.scored.append(record["tokens_response"])
            log.flops.append(record["flops_model"])

    return train


def timed(iteration: Callable[..., Any], log: StepLog) -> Callable[..., Any]:
    """``iteration`` with a clock reading before the first call and after each."""

    def step(*args: Any) -> Any:
        if not log.wall:
            log.tick()
        result = iteration(*args)
        log.tick()
        return result

    return step


def build(side: str, work: Workload, log: StepLog) -> Callable[[], Any]:
    """What trains a side."""
    if side != "fastalign":
        from bench.trl_sides import trl_side

        return trl_side(work, log, select_rows=side == "trl-fair")
    return rollouts.fastalign_update(work, log) if work.task == "grpo-update" else fastalign_job(work, log)


def run(side: str, work: Workload, profile: bool) -> None:
    """Train ``side`` on ``work`` and write its clock readings, losses and memory to ``<side>.json``."""
    torch.set_num_threads(work.threads)
    if side == "roof":
        (work.path / "roof.json").write_text(json.dumps(roof.measure(work)))
        return
    log = StepLog(
        device=work.device,
        profiler=torch.profiler.profile(record_shapes=True) if profile else None,
        profile_after=work.warmup,
    )
    build(side, work, log)()
    names = ("wall", "cpu", "losses", "tokens", "scored", "flops", "ready_mib", "peak_mib")
    result = {name: getattr(log, name) for name in names}
    (work.path / f"{side}.json").write_text(json.dumps(result))
    if log.profiler is not None:
        print_profile(log.profiler)


def print_profile(profiler: torch.profiler.profile) -> None:
    """The operations that took longest themselves, and the same by input shape."""
    profiler.stop()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=50))
    by_shape = profiler.key_averages(group_by_input_shape=True)
    print(by_shape.table(sort_by=by, row_limit=25, max_name_column_width=50, max_shapes_column_width=60))
