"""The peers: what is installed, and how each is run as its own documentation recommends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common import version
from bench.workload import StepLog, Workload

WANTED = {"trl": "1.16", "liger_kernel": "0.8"}


def missing(package: str) -> str | None:
    """Why ``package`` cannot be measured, or None when it can."""
    found = version(package)
    if found is None:
        return f"{package} is not installed (wanted {WANTED[package]}.x: pip install 'fastalign[peers]')"
    if not found.startswith(WANTED[package] + "."):
        return f"{package} {found} is installed, {WANTED[package]}.x is what this benchmark was written for"
    return None


def add(candidates: dict[str, Callable[..., Any]], name: str, package: str, run: Callable[..., Any]) -> dict[str, str]:
    """Enter a peer among the candidates if its package is here; else return ``{name: reason}``."""
    reason = missing(package)
    if reason is None:
        candidates[name] = run
        return {}
    return {name: reason}


def trl_selective_log_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs ``[N]`` from logits ``[N, V]`` as TRL's trainers compute them."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax(logits, labels)


def trl_fused_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs ``[N]`` by the fused head of TRL's trainers, with their tile width and no optional output."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())[
        0
    ]


def liger_dpo(hidden: Tensor, weight: Tensor, labels: Tensor, length: int, beta: float, compiled: bool) -> Tensor:
    """Liger's chunked DPO against a reference of zeros; it wants all chosen sequences before all rejected ones."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    halves = torch.stack(hidden.view(-1, 2, length, hidden.shape[-1]).unbind(1)).flatten(0, 1)
    targets = torch.stack(labels.view(-1, 2, length).unbind(1)).flatten(0, 1)
    loss = LigerFusedLinearDPOLoss(beta=beta, compiled=compiled, use_ref_model=False)
    return loss(weight, halves, targets)[0]


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
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
    )
