"""The sides of ``fastalign bench train``, each alone in its process: fastalign, TRL, and bare matrix products."""

from __future__ import annotations

import json
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import rollouts, workload
from bench.turns import StepLog
from bench.workload import TASKS, Row, Workload

ROOF = "roof"
"""The side that multiplies matrices and trains nothing."""
REWARD = """
def length(completions, **rest):
    return [len(text) % 8 / 8 for text in completions]
"""
"""The reward of tasks that sample, for every side: it costs next to nothing."""


def prepare(work: Workload, pairs: list[Row] | None = None) -> Row:
    """Write all that the sides read; returns what the data is like."""
    facts = workload.prepare(work, pairs)
    if work.task == "grpo-update":
        rollouts.prepare(work)
    work.reward.write_text(REWARD)
    return facts


def run(side: str, work: Workload, profile: bool = False, turns: int | None = None) -> None:
    """Train ``side`` on ``work`` and write its seconds, losses and memory to ``<side>.json``."""
    torch.set_num_threads(work.threads)
    if side == ROOF:
        (work.path / "roof.json").write_text(json.dumps(measure_roof(work)))
        return
    profiler = torch.profiler.profile(record_shapes=True) if profile else None
    log = StepLog(device=work.device, turns=turns, profiler=profiler, profile_after=work.warmup)
    build(side, work, log)()
    names = ("wall", "cpu", "queued", "losses", "tokens", "scored", "flops", "ready_mib", "peak_mib")
    names += ("sampling", "rewards")
    (work.path / f"{side}.json").write_text(json.dumps({name: getattr(log, name) for name in names}))
    if profiler is not None:
        print_profile(profiler)


def build(side: str, work: Workload, log: StepLog) -> Callable[[], Any]:
    """What trains a side."""
    if side.startswith("trl"):
        return trl_side(work, log, select_rows=side == "trl-fair")
    return rollouts.fastalign_update(work, log) if work.task == "grpo-update" else fastalign_job(work, log)


def print_profile(profiler: torch.profiler.profile) -> None:
    """The operations that took longest themselves, and the same by input shape."""
    profiler.stop()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=50))
    by_shape = profiler.key_averages(group_by_input_shape=True)
    print(by_shape.table(sort_by=by, row_limit=25, max_name_column_width=50, max_shapes_column_width=60))


# --- fastalign -------------------------------------------------------------------------------------------------------


def fastalign_job(work: Workload, log: StepLog) -> Callable[[], Any]:
    """fastalign's own training job on the workload."""
    from fastalign.config import BatchConfig, Config, DataConfig, ModelConfig, OptimConfig, ReferenceConfig, RunConfig
    from fastalign.engine.train import train
    from fastalign.rl import backends
    from fastalign.rl.sampler import Stops

    config = Config(
        method=work.task,
        model=ModelConfig(path=str(work.model), autocast=work.dtype == "bfloat16"),
        data=DataConfig(path=str(work.data), max_length=work.max_length, cache_dir=str(work.path / "cache")),
        loss={"beta": work.beta} if TASKS[work.task].reference else {},
        reference=ReferenceConfig(cache=str(work.path / "logps") if work.precomputed else "off"),
        batch=BatchConfig(size=work.examples),
        optim=OptimConfig(lr=work.lr, schedule="constant", clip_norm=1.0),
        run=RunConfig(output_dir=tempfile.mkdtemp(dir=work.path), steps=work.steps, seed=work.seed),
        **(sampling_settings(work) if TASKS[work.task].samples else {}),
    )

    def job() -> None:
        with patch.object(backends, "stops_of", lambda *known: Stops()):  # answers go on after EOS
            train(config, on_step=lambda step: log.tick())
        metrics = Path(config.run.output_dir, "metrics.jsonl").read_text().splitlines()
        for record in map(json.loads, metrics):
            log.losses.append(record["loss"])
            log.tokens.append(record["tokens_computed"])
            log.scored.append(record["tokens_response"])
            if TASKS[work.task].samples:
                log.sampling.append(record["t_generate"])
                log.rewards.append(record["reward"])
            else:
                log.flops.append(record["flops_model"])

    return job


def sampling_settings(work: Workload) -> dict[str, Any]:
    """Eight answers to every prompt, and their reward."""
    from fastalign.config import AlgorithmConfig, SamplerConfig

    return {
        "rewards": [{"function": f"{work.reward}:length"}],
        "algorithm": AlgorithmConfig(num_generations=rollouts.GROUP),
        "sampler": SamplerConfig(max_new_tokens=work.answer),
    }


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl_side(work: Workload, log: StepLog, *, select_rows: bool) -> Callable[[], Any]:
    """The task's trainer: everything is built here, the returned function trains.

    Args:
        select_rows: score completion rows only, as TRL does on a GPU. As installed it scores every padded row on a CPU.
    """
    import trl.trainer.utils
    from transformers import AutoTokenizer

    if select_rows:
        trl.trainer.utils._use_triton = lambda device: True
    trainer = trainer_class(work, log)
    config = getattr(trl, TASKS[work.task].trainer.replace("Trainer", "Config"))
    more = {"reward_funcs": runpy.run_path(str(work.reward))["length"]} if work.task.startswith("grpo") else {}
    return trainer(
        model=str(work.model),
        args=config(**trl_settings(work)),
        train_dataset=trl_dataset(work),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        callbacks=[trl_clock(work, log)],
        **more,
    ).train


def trl_clock(work: Workload, log: StepLog) -> Any:
    """A callback that reads the clock after each step, and keeps the losses and rewards."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            log.tick()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            log.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                log.losses.append(logs["loss"])
                log.rewards += [logs["reward"]] if TASKS[work.task].samples else []

    return Clock()


def trl_dataset(work: Workload) -> Any:
    """The rows in the order in which fastalign visits them; of given rollouts, their numbers."""
    from datasets import Dataset, load_dataset

    if work.task == "grpo-update":
        count = work.steps * work.examples
        return Dataset.from_dict({"prompt": ["given"] * count, "group": list(range(count))})
    return load_dataset("json", data_files=str(work.ordered), split="train", cache_dir=str(work.path / "hf"))


def trl_settings(work: Workload) -> dict[str, Any]:
    """What makes both sides equal: no checkpointing, same optimizer, same order of rows, no dropout.

    TRL's own choices that differ are gradient checkpointing and bf16, both on by default, and AdamW's second decay.
    SFT takes its fastest setting: on a GPU a step is flattened into one row; on a CPU, whose dense mask costs
    more than it saves, two sequences are. Measured on two cores, sequences a second with 1, 2, 4 and 16 flattened:
    fp32 19.7, 19.1, 17.2, 10.1; bf16 20.5, 24.5, 22.4, 15.9; padded in fours, fp32, 14.4.
    """
    sequences = work.examples * (rollouts.GROUP if work.task.startswith("grpo") else 1)
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
    return {**common, **task_settings(work)}


def task_settings(work: Workload) -> dict[str, Any]:
    """The task's."""
    preference = {"max_length": work.max_length, "beta": work.beta, "precompute_ref_log_probs": work.precomputed}
    update = {"num_generations": rollouts.GROUP, "steps_per_generation": 1, "shuffle_dataset": False}
    policy = {**update, "beta": 0.0, "loss_type": "dapo", "epsilon": 0.2, "temperature": 1.0}
    endless = {"max_completion_length": work.answer, "generation_kwargs": {"eos_token_id": work.vocab_size}}
    rows = (2 if work.examples % 2 == 0 else 1) if work.device == "cpu" else work.examples
    flat = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": work.examples // rows}
    return {
        "dpo": preference,
        "kto": preference,
        "reward": {"max_length": work.max_length},
        "sft": {"max_length": None, "padding_free": rows > 1, **flat},
        "grpo-update": policy,
        "grpo": {**policy, **endless},
    }[work.task]


def trainer_class(work: Workload, log: StepLog) -> Any:
    """TRL's trainer; that of the update of GRPO is given its rollouts in place of generating them."""
    import trl

    if work.task == "grpo":
        return sampling_trainer(work, log)
    if work.task != "grpo-update":
        return getattr(trl, TASKS[work.task].trainer)
    groups = rollouts.read(work)

    class Update(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            chosen = [groups[row["group"]] for row in inputs[:: rollouts.GROUP]]
            return padded(chosen, self.processing_class.pad_token_id)

    return Update


def sampling_trainer(work: Workload, log: StepLog) -> Any:
    """GRPOTrainer that tells the seconds and tokens of its sampling, and to which EOS is a token like any other."""
    import trl

    class Sampling(trl.GRPOTrainer):
        def _generate(self, prompts: list[str]) -> Any:
            self.eos_token_ids = [work.vocab_size]  # no token has that number
            start = time.perf_counter()
            made = super()._generate(prompts)
            log.sampling.append(time.perf_counter() - start)
            log.scored.append(sum(map(len, made[1])))
            return made

    return Sampling


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


# --- the roof --------------------------------------------------------------------------------------------------------

ROOF_ROWS = 1536
"""Rows of every product: the tokens of a usual step."""
ROOF_ROUNDS = 7


def product_shapes(work: Workload) -> list[tuple[int, int, int]]:
    """(outputs, inputs, how many) of the model's weights, the head included."""
    d = work.hidden_size
    keys = max(1, max(1, d // 64) // 2) * 64
    layer = [(d, d, 2), (keys, d, 2), (3 * d, d, 2), (d, 3 * d, 1)]
    return [(n, k, count * work.layers) for n, k, count in layer] + [(work.vocab_size, d, 1)]


def products(work: Workload) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The libraries that PyTorch can multiply with here; the faster one is the roof."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": torch.mm}
    if work.device == "cpu" and work.dtype == "float32" and torch.backends.mkldnn.is_available():
        found["oneDNN"] = lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return found


def measure_roof(work: Workload) -> dict[str, Any]:
    """GFLOP/s of each library over forward and both backward products of every weight; the best of the rounds."""
    torch.set_num_threads(work.threads)
    options = {"dtype": getattr(torch, work.dtype), "device": work.device}
    flops = sum(6 * ROOF_ROWS * n * k * count for n, k, count in product_shapes(work))
    rates = {}
    for name, product in products(work).items():
        seconds = sum(count * time_weight(product, n, k, options) for n, k, count in product_shapes(work))
        rates[name] = flops / seconds / 1e9
    return rates


def time_weight(product: Callable[[Tensor, Tensor], Tensor], n: int, k: int, options: dict[str, Any]) -> float:
    """Seconds of ``x w^T``, ``g w`` and ``g^T x``."""
    x, w, g = torch.randn(ROOF_ROWS, k, **options), torch.randn(n, k, **options), torch.randn(ROOF_ROWS, n, **options)
    best = float("inf")
    for _ in range(ROOF_ROUNDS):
        start = time.perf_counter()
        for a, b in ((x, w.t()), (g, w), (g.t(), x)):
            product(a, b)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
