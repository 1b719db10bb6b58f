"""A plan in words, as JSON, and as the settings that it found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastalign.engine.plan.devices import KEPT_FREE, in_units
from fastalign.engine.plan.footprint import Footprint
from fastalign.engine.plan.memory import ARENA
from fastalign.engine.plan.search import Plan, Rung, largest, rungs
from fastalign.engine.plan.speed import LINK_SHARE
from fastalign.words import as_yaml

FITTED = {
    "batch": ("tokens",),
    "model": ("gradient_checkpointing",),
    "parallel": ("dp_replicate", "dp_shard", "tp", "shard_gradients", "generate"),
}
"""What `--fit` chooses."""


def as_json(found: Plan) -> dict[str, Any]:
    """Everything as JSON types; bytes and seconds."""
    setting, layout, memory, speed = found.setting, found.setting.layout, found.memory, found.speed
    policy = setting.policy()
    return {
        "method": setting.config.method,
        "device": {"name": setting.asked.device, **vars(setting.device)},
        "gpus": setting.asked.gpus,
        "mesh": vars(layout),
        "parameters": {"total": total(setting.models, found), "trained": total(setting.models, found, trained=True)},
        "reference": setting.reference,
        "batch": {
            "tokens": setting.tokens,
            "size": setting.config.batch.size,
            "micro_batches": setting.micro_batches,
            "largest_tokens": largest(setting),
        },
        "example": vars(setting.group),
        "bytes": memory.kinds,
        "phases": memory.phases,
        "peak": memory.peak,
        "limit": found.limit,
        "fits": found.fits,
        "activations_per_token": {
            name: {"per_layer": each, "outside": rest} for name, (each, rest) in policy.per_token().items()
        },
        "head": None if memory.head is None else str(memory.head),
        "sampled_at_once": memory.rows,
        "operations": speed.operations,
        "communication": speed.sent,
        "seconds": speed.seconds,
        "step_seconds": speed.step,
        "tokens_per_second": speed.tokens / speed.step,
        "assumptions": list(assumptions(found)),
        "settings": chosen(found),
    }


def total(models: Any, found: Plan, *, trained: bool = False) -> int:
    """Parameters of the whole policy, over all ranks that share a layer."""
    setting = found.setting
    scalar, value = setting.objective.method.scalar_head, setting.critic == "shared"
    whole: Footprint = models(setting.config.model, 1, setting.way, setting.group, scalar_head=scalar, value_head=value)
    return sum(w.numel for w in whole.weights if w.trained or not trained)


def chosen(found: Plan) -> dict[str, dict[str, Any]]:
    """The settings that `--fit` may choose, as they are."""
    config = found.setting.config
    sections = {name: vars(getattr(config, name)) for name in FITTED}
    return {section: {name: sections[section][name] for name in names} for section, names in FITTED.items()}


def as_settings(found: Plan) -> str:
    """A file that is given as another `--config`."""
    head = f"# Chosen by fastalign plan for {found.setting.asked.gpus} x {found.setting.asked.device}: predicted "
    return f"{head}{in_units(found.memory.peak)} a rank, {found.speed.step:.1f} s a step.\n{as_yaml(chosen(found))}"


def as_text(found: Plan) -> str:
    """The page for people."""
    lines = [*facts(found), "", *table("bytes of a rank", memory_rows(found)), ""]
    lines += [*table("activations, bytes per computed token", activation_rows(found)), ""]
    lines += [verdict(found), ""]
    if not found.fits:
        lines += [*ladder(rungs(found.setting), found.limit), ""]
    lines += [*table("a step, modelled", speed_rows(found)), "", "assumed:"]
    return "\n".join([*lines, *(f"  - {line}" for line in assumptions(found))])


def facts(found: Plan) -> Iterator[str]:
    """What is planned."""
    setting, group = found.setting, found.setting.group
    every, trained = total(setting.models, found), total(setting.models, found, trained=True)
    loss = setting.config.loss["name"]
    yield f"method      {setting.config.method}, loss {loss if isinstance(loss, str) else ' + '.join(loss)}"
    yield f"parameters  {every:,}, " + ("all trained" if every == trained else f"{trained:,} trained")
    each = f"{setting.asked.gpus} x {setting.asked.device}, {in_units(setting.device.memory)} each"
    yield f"devices     {each}: {setting.layout}"
    kind = setting.config.model.dtype + (", computed in bfloat16" if setting.half else "")
    words = {"mlp": ", MLPs recomputed in backward", True: ", layers recomputed in backward"}
    again = words.get(setting.config.model.gradient_checkpointing, "")
    yield f"weights     {kind}; attention {setting.way.attention}{again}"
    yield f"reference   {setting.reference}"
    lengths = f"{group.answers} x {group.answer} tokens after a prompt of {group.prompt}"
    yield f"example     {lengths}: {group.tokens:,} computed, {group.rows:,} scored"
    yield (
        f"batch       {setting.config.batch.size} examples; micro-batches of {setting.trained_tokens:,} tokens "
        f"(batch.tokens {setting.config.batch.budget:,}), {setting.micro_batches} a rank in "
        + (f"each of {updates} updates" if (updates := setting.updates * setting.passes) > 1 else "an update")
    )


def memory_rows(found: Plan) -> Iterator[tuple[str, str]]:
    """The kinds of bytes, and the most of each phase."""
    for name, size in found.memory.kinds.items():
        if size >= 0.5:
            yield name, in_units(size)
    if found.memory.head is not None:
        yield "head's plan", str(found.memory.head)
    if found.memory.rows:
        yield "sampled at once", f"{found.memory.rows} completions a rank"
    for name, size in found.memory.phases.items():
        yield f"most in: {name}", in_units(size)


def activation_rows(found: Plan) -> Iterator[tuple[str, str]]:
    """Activations by kind."""
    layers = found.setting.policy().layers
    for name, (each, rest) in found.setting.policy().per_token().items():
        outside = f", {rest:,.0f} outside of layers" if round(rest) else ""
        yield name, f"{each:,.0f} a layer x {layers}{outside}"


def verdict(found: Plan) -> str:
    """Whether it fits, and how large micro-batches may be."""
    memory, most = found.memory, largest(found.setting)
    peak = f"predicted peak {in_units(memory.peak)} of {in_units(found.limit)} that may be used ({memory.phase})"
    room = "not even one example fits" if most is None else f"the largest batch.tokens that fits is {most:,}"
    if found.fits:
        return f"{peak}: it fits; {room}"
    return f"{peak}: too much by {in_units(memory.peak - found.limit)}; {room}"


def ladder(found: Sequence[Rung], limit: float) -> list[str]:
    """What helps where a plan does not fit."""
    if not found:
        return ["nothing on the memory ladder makes it smaller"]
    rows = [(rung.words, f"{in_units(rung.peak)}, " + left(rung, limit)) for rung in found]
    lines = table("what would help, each alone with the smallest micro-batch", rows)
    together = "  none of them alone is enough; --fit FILE tries mesh, recomputing and micro-batches together"
    return lines if any(rung.fits for rung in found) else [*lines, together]


def left(rung: Rung, limit: float) -> str:
    """How far from fitting."""
    return "fits" if rung.fits else f"still {in_units(rung.peak - limit)} too much"


def speed_rows(found: Plan) -> Iterator[tuple[str, str]]:
    """Operations, bytes sent, seconds."""
    speed = found.speed
    for name, count in speed.operations.items():
        yield f"operations: {name}", f"{count / 1e12:,.1f} TFLOP a rank"
    for name, size in speed.sent.items():
        yield f"received over {name}", f"{in_units(size)} a rank"
    for name, seconds in speed.seconds.items():
        yield f"seconds: {name}", f"{seconds:.2f}"
    yield "step", f"{speed.step:.2f} s, {speed.tokens / speed.step:,.0f} tokens a second over all ranks"


def assumptions(found: Plan) -> Iterator[str]:
    """What the figures rest on."""
    setting, device, asked = found.setting, found.setting.device, found.setting.asked
    peak = device.half if setting.half else device.single
    yield (
        f"{asked.device}: {peak / 1e12:,.4g} TFLOP/s, memory at {device.bandwidth / 1e12:.3g} TB/s, "
        f"{device.link / 1e9:g} GB/s to a node's others, {device.network / 1e9:g} GB/s to other nodes ({device.source})"
    )
    yield (
        f"{asked.mfu:.0%} of the peak operations (--mfu), {asked.bandwidth_share:.0%} of the memory's speed "
        f"(--bandwidth_share), {LINK_SHARE:.0%} of links; {asked.gpus_per_node} devices a node"
    )
    shared = "shared" if setting.group.shared else "not shared"
    yield f"every example is as long as said above (--prompt, --answer); prompts are {shared}"
    if setting.layout.ranks > 1:
        yield "FSDP's transfers run beside computing, tensor parallelism's do not"
    if device.kind == "cuda":
        yield f"{KEPT_FREE:.0%} of the memory is left to driver, NCCL and the allocator"
    else:
        yield "the interpreter, its libraries and the data are not counted"
    if setting.samples and not found.memory.rows:
        yield "completions come from a server, whose time and memory are not counted"
    if found.memory.rows:
        yield (
            f"every completion is as long as it may be; the arena of keys and values takes {ARENA} times what is in "
            "it; rewards cost nothing but reward models"
        )
    if found.memory.kinds["in host memory"]:
        yield "what moves to host memory and back, and is computed there, takes no time"
    if setting.is_cached:
        yield "the reference's log-probs are computed ahead (reference.cache), once for all passes over the data"


def table(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """Rows below a title, names aligned."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{title}:", *(f"  {name:{width}}  {text}" for name, text in rows)]
