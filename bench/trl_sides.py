"""TRL's trainers on the workloads of ``fastalign bench train``, set up as equals: see `settings`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench import rollouts
from bench.workload import TASKS, StepLog, Workload


def trl_side(work: Workload, log: StepLog, *, select_rows: bool) -> Callable[[], Any]:
    """The task's trainer: everything is built here, the returned function trains.

    Args:
        select_rows: score completion rows only, as TRL does on a GPU. As installed it scores every padded row on a CPU.
    """
    import trl.trainer.utils
    from transformers import AutoTokenizer

    if select_rows:
        trl.trainer.utils._use_triton = lambda device: True
    trainer = trainer_class(work)
    config = getattr(trl, TASKS[work.task].trainer.replace("Trainer", "Config"))
    more = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if work.task == "grpo-update" else {}
    return trainer(
        model=str(work.model),
        args=config(**settings(work)),
        train_dataset=dataset(work),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[clock(log)],
        **more,
    ).train


def clock(log: StepLog) -> Any:
    """A callback that reads the clock after each step, and keeps the losses."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            log.tick()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            log.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                log.losses.append(logs["loss"])

    return Clock()


def dataset(work: Workload) -> Any:
    """The rows in the order in which fastalign visits them; of given rollouts, their numbers."""
    from datasets import Dataset, load_dataset

    if work.task == "grpo-update":
        count = work.steps * work.examples
        return Dataset.from_dict({"prompt": ["given"] * count, "group": list(range(count))})
    return load_dataset("json", data_files=str(work.ordered), split="train", cache_dir=str(work.path / "hf"))


def settings(work: Workload) -> dict[str, Any]:
    """What makes both sides equal: no checkpointing, same optimizer, same order of rows, no dropout.

    TRL's own choices that differ are gradient checkpointing and bf16, both on by default, and AdamW's second decay.
    SFT takes its fastest setting: on a GPU a step is flattened into one row; on a CPU, whose dense mask costs
    more than it saves, two sequences are. Measured on two cores, sequences a second with 1, 2, 4 and 16 flattened:
    fp32 19.7, 19.1, 17.2, 10.1; bf16 20.5, 24.5, 22.4, 15.9; padded in fours, fp32, 14.4.
    """
    sequences = work.examples * (rollouts.GROUP if work.task == "grpo-update" else 1)
    common = {
        "output_dir": str(work.path / "trl"),
        "model_init_kwargs": {"dtype": "float32"},
        "per_device_train_batch_size": sequences,
        "max_steps": work.steps,
        "learning_rate": work.lr,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": work.dtype == "bfloat16",
        "train_sampling_strategy": "sequential",
        "use_cpu": work.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": work.seed,
    }
    return {**common, **own_settings(work)}


def own_settings(work: Workload) -> dict[str, Any]:
    """The task's."""
    preference = {"max_length": work.max_length, "beta": work.beta, "precompute_ref_log_probs": work.precomputed}
    update = {"num_generations": rollouts.GROUP, "steps_per_generation": 1, "shuffle_dataset": False}
    rows = (2 if work.examples % 2 == 0 else 1) if work.device == "cpu" else work.examples
    flat = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": work.examples // rows}
    return {
        "dpo": preference,
        "kto": preference,
        "reward": {"max_length": work.max_length},
        "sft": {"max_length": None, "padding_free": rows > 1, **flat},
        "grpo-update": {**update, "beta": 0.0, "loss_type": "dapo", "epsilon": 0.2, "temperature": 1.0},
    }[work.task]


def trainer_class(work: Workload) -> Any:
    """TRL's trainer; that of GRPO is given its rollouts in place of generating them."""
    import trl

    if work.task != "grpo-update":
        return getattr(trl, TASKS[work.task].trainer)
    groups = rollouts.read(work)

    class Update(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            chosen = [groups[row["group"]] for row in inputs[:: rollouts.GROUP]]
            return padded(chosen, self.processing_class.pad_token_id)

    return Update


def padded(groups: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Rollouts as GRPOTrainer keeps them: prompts padded on the left, once per answer, answers on the right."""
    from trl.trainer.utils import pad as stack

    prompts = [torch.tensor(group["prompt_ids"]) for group in groups for _ in group["completion_ids"]]
    answers = [torch.tensor(ids) for group in groups for ids in group["completion_ids"]]
    old = [torch.tensor(x) for group in groups for x in group["old_logps"]]
    ones = ([torch.ones_like(x) for x in part] for part in (prompts, answers))
    masks = [stack(x, 0, side) for x, side in zip(ones, ("left", "right"), strict=True)]
    return {
        "prompt_ids": stack(prompts, pad, "left"),
        "prompt_mask": masks[0],
        "completion_ids": stack(answers, pad, "right"),
        "completion_mask": masks[1],
        "advantages": torch.tensor([a for group in groups for a in group["advantages"]]),
        "old_per_token_logps": stack(old, 0.0, "right"),
        "num_items_in_batch": masks[1].sum(),
    }
