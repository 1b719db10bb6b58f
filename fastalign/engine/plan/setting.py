"""What is planned: a configuration as a run would read it, on so many devices, for data of a certain length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from fastalign.commands import PlanConfig
from fastalign.config import Config, ModelConfig
from fastalign.engine.forward import wants_autocast
from fastalign.engine.methods import Objective, minibatches_of, objective_of, passes_of
from fastalign.engine.plan.devices import Device, device_of
from fastalign.engine.plan.footprint import Footprint, Group, Weights, describe_model, footprint, share_of
from fastalign.engine.plan.trace import Way
from fastalign.engine.reference.cache import WORTH, bytes_beside
from fastalign.engine.reference.frozen import reference_section
from fastalign.engine.settings import check_optimizer, check_types, settle
from fastalign.engine.train import filled_in
from fastalign.models.load import DTYPES, check_named
from fastalign.ops.backends import cpp
from fastalign.parallel.mesh import mesh_shape

ReferenceKind = Literal["none", "cached", "the policy without its adapter", "a frozen copy", "a model of its own"]
SEQUENCES = {"pair": 2, "group": 4}
"""Sequences of an example that methods off policy compare; of ranked ones as many as RRHF's data has."""


@dataclass(frozen=True)
class Layout:
    """The mesh."""

    replicate: int
    shard: int
    tp: int

    @property
    def data(self) -> int:
        """Ranks with examples of their own."""
        return self.replicate * self.shard

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data * self.tp

    def __str__(self) -> str:
        return f"dp_replicate {self.replicate} x dp_shard {self.shard} x tp {self.tp}"


@dataclass(frozen=True)
class Setting:
    """A run to be planned.

    Attributes:
        config: with defaults filled in.
        objective: the method with its loss.
        asked: the command's own settings.
        models: makes the footprint of a model; shared by the settings that a search tries.
    """

    config: Config
    objective: Objective
    asked: PlanConfig
    models: Callable[..., Footprint]

    @cached_property
    def device(self) -> Device:
        """What each rank computes on."""
        return device_of(self.asked.device, self.asked.memory, self.asked.gpus)

    @cached_property
    def layout(self) -> Layout:
        """The mesh of the section `parallel`."""
        try:
            return Layout(*mesh_shape(self.config.parallel, self.asked.gpus))
        except ValueError as error:
            raise ValueError(f"--gpus {self.asked.gpus}: {str(error).partition('; launch')[0]}") from error

    @cached_property
    def way(self) -> Way:
        """How models compute."""
        section, cuda = self.config.model, self.device.kind == "cuda"
        autocast = wants_autocast(section, torch.device(self.device.kind))
        half = autocast or DTYPES.get(section.dtype, torch.bfloat16) == torch.bfloat16
        backend = section.attention
        if backend == "auto":
            backend = ("varlen" if half else "sdpa") if cuda else ("sdpa" if cpp.unavailable() else "cpp")
        gathered = torch.bfloat16 if autocast and self.asked.gpus > 1 else None
        parts = self.layout.tp if self.config.parallel.sequence_parallel else 1
        return Way(not cuda, backend, autocast and gathered is None, gathered, parts)

    @property
    def half(self) -> bool:
        """Whether products are in bf16."""
        return self.way.autocast or self.way.dtype is not None or self.config.model.dtype != "float32"

    @cached_property
    def group(self) -> Group:
        """What the policy trains on of each example."""
        prompt, answer = self.lengths
        scalar = self.objective.method.scalar_head
        scored = 1 if scalar else answer if prompt else answer - 1
        return Group(prompt, answer, self.answers, self.config.batch.share_prefix, scored)

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Tokens of prompt and answer."""
        most, sampler = self.config.data.max_length, self.config.sampler
        answer = self.asked.answer or (sampler.max_new_tokens if sampler else most - most // 2)
        prompt = most - answer if self.asked.prompt is None else self.asked.prompt
        if answer < 1 or prompt < 0 or prompt + answer > most:
            raise ValueError(
                f"prompts of {prompt} and answers of {answer} tokens do not fit data.max_length {most}: "
                "set --prompt and --answer"
            )
        return prompt, answer

    @property
    def answers(self) -> int:
        """Sequences of an example that are trained on."""
        plan = self.objective.on_policy
        if plan is None:
            return 2 if self.objective.method.scalar_head else SEQUENCES.get(self.objective.method.align, 1)
        return {"all": self.samples, "best": 1, "best_and_worst": 2}[plan.algorithm.select]

    @property
    def samples(self) -> int:
        """Completions that are sampled of each prompt."""
        plan = self.objective.on_policy
        return 0 if plan is None else (plan.settings.num_generations or 1) + plan.algorithm.greedy

    @property
    def tokens(self) -> int:
        """Budget of a micro-batch; a larger group has one of its own."""
        return max(self.config.batch.budget, self.group.tokens)

    @property
    def sampling_tp(self) -> int:
        """Over how many ranks layers are split while completions are sampled."""
        tp = (self.config.parallel.generate or {}).get("tp", 1)
        if self.asked.gpus % tp:
            raise ValueError(f"--gpus {self.asked.gpus}: parallel.generate: tp {tp} does not divide the ranks")
        return tp

    @property
    def updates(self) -> int:
        """Into how many parts a pass over a step's examples is cut."""
        return minibatches_of(self.objective)

    @property
    def passes(self) -> int:
        """Over the examples of a step."""
        return passes_of(self.objective)

    @property
    def examples(self) -> int:
        """Of one update, on the rank that has most."""
        return max(1, math.ceil(self.config.batch.size / self.updates / self.layout.data))

    @property
    def micro_batches(self) -> int:
        """Of one update, on each rank."""
        return math.ceil(self.examples / max(1, self.tokens // self.group.tokens))

    @property
    def trained_tokens(self) -> int:
        """Of a micro-batch: the examples are spread evenly over them."""
        return math.ceil(self.examples / self.micro_batches) * self.group.tokens

    # --- models ------------------------------------------------------------------------------------------------------

    @property
    def critic(self) -> Literal["none", "shared", "separate"]:
        """Of PPO."""
        plan = self.objective.policy_gradient
        return "none" if plan is None else plan.settings.critic or "none"

    def policy(self) -> Footprint:
        """One rank's policy."""
        scalar = self.objective.method.scalar_head
        return self.footprint(self.config.model, scalar_head=scalar, value_head=self.critic == "shared")

    def critic_model(self) -> Footprint | None:
        """One rank's critic, where it is a model of its own."""
        if self.critic != "separate":
            return None
        section, path = replace(self.config.model, lora=None), getattr(self.config.algorithm, "critic_path", None)
        section = section if path is None else replace(section, path=path, config=None)
        return self.footprint(section, scalar_head=True)

    def reference_model(self) -> Footprint | None:
        """One rank's reference, where one is in memory beside the policy."""
        if self.reference in ("none", "cached", "the policy without its adapter"):
            return None
        if self.reference == "a model of its own":
            return self.footprint(reference_section(self.config))
        return self.footprint(replace(self.config.model, lora=None, gradient_checkpointing=False))

    def reward_models(self) -> list[Footprint]:
        """Models that score completions, whole on each rank; those that rest on the host are left out."""
        found = [reward for reward in self.config.rewards if isinstance(reward.get("model"), str)]
        here = [reward["model"] for reward in found if not (reward.get("offload") and self.device.kind == "cuda")]
        return [self.whole(ModelConfig(path=path, dtype="auto")) for path in here]

    def footprint(self, section: ModelConfig, **kind: bool) -> Footprint:
        """Of a model on one rank of the mesh."""
        return self.models(section, self.layout.tp, self.way, self.group, **kind)

    def whole(self, section: ModelConfig) -> Footprint:
        """Of a reward model."""
        return self.models(section, 1, replace(self.way, dtype=None), self.group, scalar_head=True)

    @cached_property
    def reference(self) -> ReferenceKind:
        """Where the reference's log-probs come from."""
        config, objective = self.config, self.objective
        if not objective.needs_reference:
            return "none"
        if self.is_cached:
            return "cached"
        if config.reference.path is not None:
            return "a model of its own"
        adapter = config.model.lora
        alone = adapter is not None and not (adapter.get("modules_to_save") or adapter.get("bias", "none") != "none")
        if alone and self.critic != "shared" and objective.head != "distributions":
            return "the policy without its adapter"
        return "a frozen copy"

    @property
    def reference_rests(self) -> bool:
        """Whether the reference is in host memory while the policy trains."""
        return self.config.reference.offload and self.device.kind == "cuda"

    @property
    def optimizer_rests(self) -> bool:
        """Whether masters and moments are in host memory."""
        return self.config.optim.offload and self.device.kind == "cuda"

    @cached_property
    def is_cached(self) -> bool:
        """Whether log-probs are computed ahead, as a run decides it; a number of steps counts as one pass."""
        config, objective = self.config, self.objective
        if objective.on_policy or objective.head != "logps" or config.reference.cache == "off":
            return False
        passes = config.run.epochs if config.run.steps is None else 1.0
        if config.reference.cache != "auto" or WORTH * passes >= 1:
            return True
        if self.device.kind != "cuda":
            return False
        weights = self.policy().weights
        trained, masters = [w for w in weights if w.trained] or weights, bool(config.optim.master_weights)
        beside = sum(w.numel * bytes_beside(w.dtype, masters) for w in trained) / self.layout.shard
        held = sum(w.numel * w.dtype.itemsize for w in weights) / self.layout.shard
        return self.device.memory - held - beside < self.device.memory / 4


def make_setting(config: Config, asked: PlanConfig) -> Setting:
    """A setting from a configuration as the command line gives it; its data and rewards need not be there.

    Raises:
        ValueError: settings that cannot be meant.
    """
    check_types(config)
    check_optimizer(config)
    check_named(config.model)
    if asked.gpus < 1 or asked.gpus_per_node < 1:
        raise ValueError(f"--gpus and --gpus_per_node must be at least 1, got {asked.gpus} and {asked.gpus_per_node}")
    if not (0 < asked.mfu <= 1 and 0 < asked.bandwidth_share <= 1):
        raise ValueError("--mfu and --bandwidth_share must be above 0 and at most 1")
    if config.model.quantization is not None:
        raise ValueError("model.quantization: quantised weights are not planned: leave it out")
    objective = objective_of(config)
    config = filled_in(config, objective)
    kind = torch.device("cpu" if asked.device == "cpu" else "cuda")
    if config.batch.tokens is None:
        config = settle(replace(config, model=replace(config.model, attention="auto")), kind)
    return Setting(config, objective, asked, remembered())


def remembered() -> Callable[..., Footprint]:
    """Makes footprints, each once; parameters are counted once for all ways to compute."""
    made: dict[str, Footprint] = {}
    counted: dict[str, Weights] = {}

    def models(section: ModelConfig, tp: int, way: Way, group: Group, **kind: bool) -> Footprint:
        section = replace(section, activation_offloading=False)  # the same tensors, elsewhere
        key = repr((section, tp, way, group, sorted(kind.items())))
        same = repr((replace(section, gradient_checkpointing=False), tp, sorted(kind.items())))
        if key not in made:
            part = share_of(describe_model(section, scalar_head=kind.get("scalar_head", False)), tp)
            made[key] = footprint(section, part, way, group, weights=counted.get(same), **kind)
            counted[same] = made[key].head
        return made[key]

    return models
