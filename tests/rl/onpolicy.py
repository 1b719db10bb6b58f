"""On-policy steps of completions that are given: a real job around a small model, and no sampler."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.config import AlgorithmConfig, BatchConfig, Config, OptimConfig, RunConfig, SamplerConfig
from fastalign.data.examples import TokenExample
from fastalign.engine.feed import Feed
from fastalign.engine.forward import Models
from fastalign.engine.methods import make_objective
from fastalign.engine.optim import Trained
from fastalign.engine.output.accounting import account
from fastalign.engine.output.metrics import means
from fastalign.engine.prepare import first_carried
from fastalign.engine.train import Job, iteration, pack_share
from fastalign.models.policy import Policy
from fastalign.parallel.mesh import Axis, World
from fastalign.rl.groups import Group
from fastalign.rl.rollouts import Rollouts
from fastalign.rl.selection import select
from fastalign.types import Rollout

VOCAB, MOST = 37, 8
"""Tokens that there are, and that a completion may have."""
ALONE = World(Axis(), torch.device("cpu"))
SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "vocab_size": VOCAB, "n_positions": 64}
COMMANDS = {
    **dict.fromkeys(("dr_grpo", "dapo", "gspo", "cispo", "sapo"), "grpo"),
    **dict.fromkeys(("reinforce_pp", "reinforce_pp_baseline", "reinforce"), "reinforce-pp"),
    "online_dpo": "online-dpo",
}
"""The commands of algorithms that are named otherwise."""


class Given(Rollouts):
    """Hands out the same groups in every step, their columns in float64."""

    def __init__(self, plan: Any, world: World, groups: Sequence[Group]) -> None:
        sampler = SimpleNamespace(exact=False, sync=lambda policy, version: None)
        scorer = SimpleNamespace(names=("right",), weights=(1.0,), take_counts=dict)
        super().__init__(range(99), max(len(groups), 1), 0, None, plan, sampler, scorer, world)  # pyright: ignore
        self.given = list(groups)

    def next(self) -> list[TokenExample]:
        self.groups, self.seconds = self.given, {}
        examples = select(self.plan, self.groups)
        return [replace(one, columns=one.columns.map(torch.Tensor.double)) for one in examples]


def make_models(critic: str = "none", *, seed: int = 0) -> Models:
    """GPT-2 in float64, whose norms and attention have no fp32 inside, a reference with other weights, and a critic."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("gpt2", bos_token_id=None, eos_token_id=None, num_labels=1, pad_token_id=0, **SIZES)
    policy, reference = (
        Policy(AutoModelForCausalLM.from_config(config).double(), value_head=n == 0 and critic == "shared")
        for n in range(2)
    )
    other = Policy(AutoModelForSequenceClassification.from_config(config).double()) if critic == "separate" else None
    for model, size in ((policy, 0.1), (reference, 0.2), (other, 0.1)):
        if model is not None:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += size * torch.randn_like(parameter)
    return Models(policy, reference.requires_grad_(False), autocast=False, critic=other)


def make_group(row: int, lengths: Sequence[int], *, missing: Sequence[int] = (), cut: Sequence[int] = ()) -> Group:
    """Completions of these lengths; rewards are missing for some, some were cut off; the sampler is not exact."""
    draw = np.random.default_rng(100 + row)
    prompt = draw.integers(0, VOCAB, draw.integers(3, 25))
    rollouts = []
    for i, length in enumerate(lengths):
        tokens, logps = draw.integers(0, VOCAB, length), -3 + draw.normal(size=length).astype(np.float32)
        rollouts.append(Rollout(prompt, tokens, logps, row, i, "length" if i in cut else "eos", 0))
    rewards = draw.normal(size=len(lengths)).astype(np.float32).astype(np.float64)
    rewards[list(missing)] = np.nan
    return Group(rollouts, rewards[:, None], rewards, greedy=float(np.float32(draw.normal())))


def make_groups() -> list[Group]:
    """Of unequal sizes, as some completions have no reward; with completions of one token, and some cut off."""
    return [
        make_group(3, (5, 1, 8, 4)),
        make_group(1, (2, 8, 3, 6), missing=[2], cut=[1]),
        make_group(4, (1, 1, 7, 2)),
        make_group(0, (4, 8, 8, 3), missing=[0, 3], cut=[1, 2]),
        make_group(2, (6, 3, 2, 5)),
    ]


def make_job(
    name: str, models: Models, groups: Sequence[Group], folder: Path, *, world: World = ALONE, **settings: Any
) -> Job:
    """A job of one of the algorithms; keywords are settings of `algorithm`, or of another section: `sampler_top_k`."""
    parts: dict[str, dict] = {"sampler": {"max_new_tokens": MOST}, "loss": {}, "batch": {"tokens": 80}, "optim": {}}
    own: dict[str, Any] = {"name": name, "num_generations": 4}
    for key, value in settings.items():
        section, _, rest = key.partition("_")
        parts.get(section, own)[rest if section in parts else key] = value
    optim = {"lr": 0.5, "clip_norm": 0.0, "schedule": "constant", **parts["optim"]}
    method = COMMANDS.get(name, name)
    objective = make_objective(method, parts["loss"], AlgorithmConfig(**own), SamplerConfig(**parts["sampler"]))
    assert objective.on_policy is not None
    config = Config(
        method,
        batch=BatchConfig(**parts["batch"]),
        optim=OptimConfig(**optim),
        run=RunConfig(output_dir=str(folder)),
        algorithm=objective.on_policy.settings,
    )
    modules = {"policy": models.policy, "critic": models.critic}
    trained = {role: Trained(m, cast(Any, Descent(m))) for role, m in modules.items() if m is not None}
    source = Given(objective.on_policy, world, groups)
    accounting = account(models.policy, config.batch.budget, world.size, world.device, False)
    tokenizer: Any = SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids)))
    rest: Any = (source.prompts, config.batch, source, None, 9, accounting)
    models = models if objective.needs_reference else replace(models, reference=None)
    return Job(config, objective, world, tokenizer, models, trained, *rest, carried=first_carried())


class Descent(torch.optim.SGD):
    """Without moments: the weights move by the gradients, which can be compared; it too can skip an update."""

    found_inf: torch.Tensor | None = None

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__([p for p in module.parameters() if p.requires_grad], lr=1.0, foreach=False)

    def step(self, closure: Any = None) -> None:
        skip, self.found_inf = self.found_inf, None
        if not skip:
            super().step(closure)


def run(job: Job, steps: int = 1) -> dict[str, float]:
    """Steps of a job; the metrics of the last."""
    metrics = SimpleNamespace(write_samples=None, vitals=(0.0, 0.0))
    keeper: Any = SimpleNamespace(asked=lambda step: 0, metrics=metrics)
    for step in range(1, steps + 1):
        feed = Feed(job.source, lambda examples: pack_share(job, examples), ahead=False)
        result = iteration(job, keeper, feed, step)
    return {**means(job.objective, result.sums), **result.record, "grad_norm": result.grad_norm.item()}


def of_one_process(make: Callable[[], Any]) -> Any:
    """What a process makes alone, on every rank: rank 0 makes it."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]
