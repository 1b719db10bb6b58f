"""One side of ``fastalign bench train``, alone in its process: build, train, write the log."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import workload
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


def trl_dpo(work: Workload, log: StepLog, *, select_rows: bool) -> Callable[[], Any]:
    """TRL's DPOTrainer on the workload: everything is built here, the returned function trains.

    Args:
        select_rows: score completion rows only, as TRL does on a GPU. As installed it scores every padded row on a CPU.
    """
    import trl.trainer.utils
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if select_rows:
        trl.trainer.utils._use_triton = lambda device: True

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            log.tick()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            log.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                log.losses.append(logs["loss"])

    trainer = DPOTrainer(
        model=str(work.model),
        args=_trl_config(DPOConfig, work),
        train_dataset=load_dataset(
            "json", data_files=str(work.ordered), split="train", cache_dir=str(work.path / "hf")
        ),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[Clock()],
    )
    return trainer.train


def _trl_config(config: Callable[..., Any], work: Workload) -> Any:
    """The settings that make both sides equal: no checkpointing, same optimizer, same order of pairs.

    TRL's own choices that differ are gradient checkpointing and bf16, both on by default, and AdamW's second decay.
    """
    return config(
        output_dir=str(work.path / "trl"),
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=work.pairs,
        max_steps=work.steps,
        max_length=work.max_length,
        beta=work.beta,
        learning_rate=work.lr,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=work.dtype == "bfloat16",
        train_sampling_strategy="sequential",
        use_cpu=work.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
    )


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
    log = StepLog(
        device=work.device,
        profiler=torch.profiler.profile(record_shapes=True) if profile else None,
        profile_after=work.warmup,
    )
    train = fastalign_dpo(work, log) if side == "fastalign" else trl_dpo(work, log, select_rows=side == "trl-fair")
    train()
    result = {"wall": log.wall, "cpu": log.cpu, "losses": log.losses}
    result |= {"ready_mib": log.ready_mib, "peak_mib": workload.peak_mib(work.device)}
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
