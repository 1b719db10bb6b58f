"""What fits: the largest micro-batch of a setting, the settings that make the fastest step, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from fastalign.engine.plan.memory import Memory, memory
from fastalign.engine.plan.setting import Setting
from fastalign.engine.plan.speed import Speed, speed
from fastalign.engine.settings import check_alone


@dataclass(frozen=True)
class Plan:
    """A setting with what was found of it."""

    setting: Setting
    memory: Memory
    speed: Speed

    @property
    def limit(self) -> float:
        """Bytes that a rank may take."""
        return self.setting.device.usable

    @property
    def fits(self) -> bool:
        """Whether it takes no more."""
        return self.memory.peak <= self.limit


def plan(setting: Setting) -> Plan:
    """Everything about a setting.

    Raises:
        ValueError: an update of several micro-batches where it may have one.
    """
    check_alone(setting.micro_batches, setting.config)
    found = memory(setting)
    return Plan(setting, found, speed(setting, found))


def changed(setting: Setting, **sections: dict[str, Any]) -> Setting:
    """The setting with other values in some sections of its configuration."""
    config = setting.config
    new = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(setting, config=replace(config, **new))


def largest(setting: Setting) -> int | None:
    """The largest `batch.tokens` that fits, in whole examples; None where not even one example does.

    No more than a rank's share of an update: a larger budget would be the same run. That one is tried first, since it
    alone adds no micro-batches up, for which FSDP keeps the gradients of whole layers.
    """
    each = setting.group.tokens

    def fits(examples: int) -> bool:
        return memory(changed(setting, batch={"tokens": examples * each})).peak <= setting.device.usable

    if fits(setting.examples):
        return setting.examples * each
    if setting.config.optim.in_backward:
        return None  # it adds none up
    low, high = 0, setting.examples - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * each or None


def fitted(setting: Setting) -> Plan | None:
    """The settings of mesh, checkpointing and micro-batch that make the fastest predicted step; None if none fits."""
    best: Plan | None = None
    for parallel in meshes(setting):
        for again, more in product((False, "mlp", True), beside(setting, parallel)):
            one = changed(setting, parallel=parallel | more, model={"gradient_checkpointing": again})
            tokens = largest(one)
            if tokens is None:
                continue
            found = plan(changed(one, batch={"tokens": tokens}))
            if best is None or found.speed.step < best.speed.step * 0.999:  # of equals the first, which is simpler
                best = found
    return best


def meshes(setting: Setting) -> Iterator[dict[str, int]]:
    """Sections `parallel` that are worth a try: tensor parallelism within a node, shards within one or over all."""
    gpus, node = setting.asked.gpus, setting.asked.gpus_per_node
    for tp in (n for n in (1, 2, 4, 8, 16) if gpus % n == 0 and n <= node and divides(setting, n)):
        data = gpus // tp
        for shard in sorted({data, max(1, min(data, node // tp)), 1}, reverse=True):
            if data % shard == 0:
                yield {"dp_replicate": data // shard, "dp_shard": shard, "tp": tp}


def beside(setting: Setting, mesh: dict[str, int]) -> Iterator[dict[str, Any]]:
    """What else is tried on a mesh: gradients added up in shards, a copy to sample from that is split as layers are."""
    copies: list[dict[str, Any]] = [{}]
    if setting.samples and mesh["tp"] > 1 and setting.config.parallel.generate is None:
        copies.append({"generate": split_copy(setting, mesh["tp"])})
    for copy, reduces in product(copies, (False, True)):
        yield {**copy, "shard_gradients": reduces or setting.config.parallel.shard_gradients}


def split_copy(setting: Setting, tp: int) -> dict[str, Any]:
    """`parallel.generate` in the precision of the forward."""
    return {"tp": tp, "dtype": "bfloat16"} if setting.half else {"tp": tp}


def divides(setting: Setting, tp: int) -> bool:
    """Whether the model can be cut for so many ranks."""
    try:
        changed(setting, parallel={"tp": tp, "dp_replicate": 1, "dp_shard": -1}).policy()
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Rung:
    """A change that takes less memory.

    Attributes:
        words: the settings.
        peak: bytes, at the smallest micro-batch.
        fits: whether that is enough.
    """

    words: str
    peak: float
    fits: bool


def rungs(setting: Setting) -> list[Rung]:
    """What each rung of the memory ladder would bring, most first; of those that change nothing none is listed."""
    least = changed(setting, batch={"tokens": setting.group.tokens})
    tried = [("batch.tokens as small as one example", least)]
    tried += [(words, change) for words, change in ladder(least)]
    found = [(words, memory(one)) for words, one in tried]
    peak = memory(setting).peak
    made = [Rung(words, m.peak, m.peak <= setting.device.usable) for words, m in found if m.peak < peak * 0.999]
    return sorted(made, key=lambda rung: rung.peak)


def ladder(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """The rungs, each alone on top of the smallest micro-batch."""
    config, gpus = setting.config, setting.asked.gpus
    own = setting.reference in ("a frozen copy", "a model of its own")
    if own and setting.objective.head == "logps" and not setting.objective.on_policy:
        words = "reference.cache: a directory (log-probs computed ahead)"
        yield words, changed(setting, reference={"cache": "kept"})
    if setting.micro_batches > 1:
        size = setting.layout.data * setting.updates * max(1, setting.tokens // setting.group.tokens)
        yield f"batch.size: {size} (no adding up of micro-batches)", changed(setting, batch={"size": size})
        if gpus > 1 and not config.parallel.shard_gradients:
            yield "parallel.shard_gradients: true", changed(setting, parallel={"shard_gradients": True})
    if setting.samples and config.parallel.generate is None and gpus % 8 == 0 and divides(setting, 8):
        copy = split_copy(setting, 8)
        words = ", ".join(f"{name}: {value}" for name, value in copy.items())
        yield f"parallel.generate: {{{words}}}", changed(setting, parallel={"generate": copy})
    for word, again in (("mlp", "mlp"), ("true", True)):
        if config.model.gradient_checkpointing not in (again, True):
            words = f"model.gradient_checkpointing: {word}"
            yield words, changed(setting, model={"gradient_checkpointing": again})
    if setting.layout.replicate > 1:
        shards = {"dp_replicate": 1, "dp_shard": -1}
        yield "parallel.dp_replicate: 1 (all ranks share one copy)", changed(setting, parallel=shards)
    for tp in (2, 4, 8):
        if tp > config.parallel.tp and gpus % tp == 0 and tp <= setting.asked.gpus_per_node and divides(setting, tp):
            yield f"parallel.tp: {tp}", changed(setting, parallel={"tp": tp, "dp_replicate": 1, "dp_shard": -1})
    if config.optim.name == "adamw" and not config.optim.offload:
        yield "optim.name: adamw_8bit", changed(setting, optim={"name": "adamw_8bit"})
    if setting.device.kind == "cuda" and config.optim.master_weights is True and config.optim.name == "adamw":
        yield "optim.offload: true", changed(setting, optim={"offload": True})
    if setting.device.kind == "cuda" and not config.model.activation_offloading:
        yield "model.activation_offloading: true", changed(setting, model={"activation_offloading": True})
    if setting.micro_batches == 1 and not (config.optim.in_backward or config.optim.offload):
        words = "optim.in_backward: true, optim.clip_norm: 0"
        yield words, changed(setting, optim={"in_backward": True, "clip_norm": 0.0})
    if config.model.lora is None:
        yield "model.lora: {r: 16}", changed(setting, model={"lora": {"r": 16}})
    if config.model.dtype == "float32":
        half = {"model": {"dtype": "bfloat16"}, "optim": {"master_weights": "compensated"}}
        yield "model.dtype: bfloat16, optim.master_weights: compensated", changed(setting, **half)
    if own and setting.device.kind == "cuda" and not config.reference.offload:
        yield "reference.offload: true", changed(setting, reference={"offload": True})
    for more in (2, 4, 8):
        wide = replace(setting, asked=replace(setting.asked, gpus=gpus * more))
        yield f"--gpus {gpus * more}", changed(wide, parallel={"dp_replicate": 1, "dp_shard": -1})
