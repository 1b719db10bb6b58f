"""The bytes of one rank by kind, and in which phase of a step they are most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from fastalign.engine.adamw import CPU_PIECE, PIECE
from fastalign.engine.eight_bit import BYTES, makes_blocks
from fastalign.engine.plan.footprint import Footprint, Weight
from fastalign.engine.plan.setting import Setting
from fastalign.engine.plan.trace import Kept
from fastalign.models.load import DTYPES
from fastalign.models.offload import UNDER_WAY
from fastalign.models.raised import HALF
from fastalign.ops.head.plan import Plan, make_plan
from fastalign.rl.sampler import MEMORY_SHARE, MOST_ROWS

WIDENED = 20
"""Bytes per element of a piece of the weight whose step is taken in fp32: master, gradient, remainder, two moments."""
ARENA = 1.5
"""Keys and values grow by doubling: beside what is used there is on average half as much that is not."""


@dataclass(frozen=True)
class States:
    """What stays of a model between steps, and what its gradients take.

    Attributes:
        weights, masters, moments: on this rank; in place of masters there may be what rounding leaves of them.
        gradients: as the optimizer reads them.
        rests: masters and moments in host memory.
        reduced: gradients of whole layers, as they are reduced; 0 without FSDP.
        unsharded: those that are kept as long as micro-batches are added up.
        temporaries: of the optimizer's step.
        root, block: whole weights that FSDP has gathered: outside the layers, and one layer's; 0 without FSDP.
        root_gradients, block_gradients: of those, before they are reduced, with the buffer that is sent.
        whole: all weights gathered, as the sampler uses them; 0 without FSDP.
    """

    weights: float
    masters: float
    moments: float
    rests: float
    gradients: float
    reduced: float
    unsharded: float
    temporaries: float
    root: float
    block: float
    root_gradients: float
    block_gradients: float
    whole: float

    @property
    def kept(self) -> float:
        """Between steps."""
        return self.weights + self.masters + self.moments


def states(model: Footprint, setting: Setting, *, trained: bool = True, sharded: bool = True) -> States:
    """The states of a model; ``trained`` False for frozen ones, ``sharded`` False for one that is whole everywhere."""
    shard, mesh = (setting.layout.shard, setting.layout.data > 1 or setting.layout.tp > 1) if sharded else (1, False)
    part, learns = partial(local, shard=shard), [w for w in model.weights if w.trained and trained]
    optim, here = setting.config.optim, not setting.optimizer_rests
    asked = optim.master_weights
    masters, wide = asked is True, [w for w in learns if _has_master(w, asked is True)]
    remainders = [w for w in learns if _has_master(w, asked == "compensated")]
    widened = [*remainders, *(w for w in learns if _is_coded(w, setting))]
    in_block, rest = ([w for w in learns if w.block == place] for place in (0, None))
    one_by_one = [in_block, rest] if mesh else [[w] for w in learns]
    at_once = one_by_one if optim.in_backward and learns else [learns]  # what has gradients at the same time
    computed = setting.way.dtype.itemsize if setting.way.dtype is not None else 0
    full = partial(_gathered, computed=computed)
    sizes: dict[int | None, float] = {}
    for w in model.weights:
        sizes[w.block] = sizes.get(w.block, 0) + full([w])
    outside = sizes.pop(None, 0)
    most = CPU_PIECE if setting.device.kind == "cpu" else PIECE
    return States(
        weights=sum(part(w) * w.dtype.itemsize for w in model.weights),
        masters=4 * sum(map(part, wide)) * here + 2 * sum(map(part, remainders)),
        moments=sum(part(w) * _moment_bytes(w, masters, setting) for w in learns) * here,
        rests=12 * sum(map(part, learns)) * (not here),
        gradients=max(sum(part(w) * _gradient_bytes(w, bool(asked), mesh) for w in some) for some in at_once),
        reduced=_reduced(learns, setting) * mesh,
        unsharded=_reduced(learns, setting) * (mesh and not setting.config.parallel.shard_gradients),
        temporaries=max(4 * sum(part(w) for w in some if _has_master(w, masters)) for some in at_once) * mesh * here
        + WIDENED * min(max(map(part, widened), default=0), most),
        root=outside * mesh,
        block=max(sizes.values(), default=0) * mesh,
        root_gradients=(full(rest) + _reduced(rest, setting)) * mesh,
        block_gradients=(full(in_block) + _reduced(in_block, setting)) * mesh,
        whole=full(model.weights) * mesh,
    )


def local(weight: Weight, shard: int) -> int:
    """Elements on the rank that has most: FSDP cuts the first dimension."""
    return weight.numel if shard == 1 else -(-weight.shape[0] // shard) * (weight.numel // max(weight.shape[0], 1))


def _gathered(weights: Iterable[Weight], computed: int) -> float:
    return sum(w.numel * (computed or w.dtype.itemsize) for w in weights)


def _has_master(weight: Weight, masters: bool) -> bool:
    return masters and weight.dtype in HALF


def _is_coded(weight: Weight, setting: Setting) -> bool:
    return setting.config.optim.name == "adamw_8bit" and makes_blocks(weight.shape, weight.numel)


def _moment_bytes(weight: Weight, masters: bool, setting: Setting) -> float:
    """Of both."""
    if _is_coded(weight, setting):
        return 2 * BYTES
    return 2 * (4 if _has_master(weight, masters) else weight.dtype.itemsize)


def _gradient_bytes(weight: Weight, masters: bool, mesh: bool) -> int:
    """Of half precision with masters one process adds gradients up in fp32; FSDP rounds what it has reduced so."""
    return 4 if _has_master(weight, masters) and not mesh else weight.dtype.itemsize


def _reduced(weights: Iterable[Weight], setting: Setting) -> float:
    """Whole gradients as FSDP adds them up: in fp32 where it computes in half precision."""
    wide = setting.way.dtype is not None
    return sum(w.numel * (4 if wide or w.dtype in HALF else w.dtype.itemsize) for w in weights)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        kinds: by kind; not all of them are there at the same time.
        phases: the most of each phase.
        head: how the head is cut.
        rows: completions that are sampled at the same time; 0 for methods that sample none.
    """

    kinds: dict[str, float]
    phases: dict[str, float]
    head: Plan | None
    rows: int

    @property
    def peak(self) -> float:
        """The most of all."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """When it is reached."""
        return max(self.phases, key=lambda name: self.phases[name])


def memory(setting: Setting) -> Memory:
    """What one rank takes."""
    policy, critic = setting.policy(), setting.critic_model()
    frozen = [x for x in (setting.reference_model(),) if x is not None]
    ours = states(policy, setting)
    theirs = [states(critic, setting)] if critic is not None else []
    references = [states(x, setting, trained=False) for x in frozen]
    rewards = [states(x, setting, trained=False, sharded=False) for x in setting.reward_models()]
    kinds = {
        "weights": ours.weights,
        "masters": ours.masters,
        "moments": ours.moments,
        "critic: weights, masters, moments": sum(x.kept for x in theirs),
        "reference": sum(x.weights * (not setting.reference_rests) + x.root for x in references),
        "reward models": sum(x.weights for x in rewards),
        "copy to sample from": copy_to_sample(setting, policy),
    }
    kept = sum(kinds.values())
    step, phases, plan = training(setting, policy, ours, sum(_gradients(x, setting) for x in theirs))
    phases = {name: kept + size for name, size in phases.items()}
    if critic is not None:
        _, found, _ = training(setting, critic, theirs[0], _gradients(ours, setting))
        phases["training the critic"] = kept + max(found.values())
    cache, rows = sampling(setting, policy, kept, ours)
    if rows:
        phases["sampling"] = kept + gathered_to_sample(setting, ours) + cache
    if rows:
        step["while sampling: gathered weights"] = gathered_to_sample(setting, ours)
        step["while sampling: keys and values"] = cache
    kinds |= step
    return Memory(kinds, phases, plan, rows)


def _gradients(model: States, setting: Setting) -> float:
    """What the gradients of a model take while another one computes."""
    if setting.micro_batches == 1:
        return model.gradients
    return model.unsharded or model.gradients


def training(
    setting: Setting, model: Footprint, own: States, others: float
) -> tuple[dict[str, float], dict[str, float], Plan | None]:
    """Of forward, backward and optimizer: bytes by kind, the most of each phase, and the head's plan.

    Args:
        setting: the run.
        model: what trains.
        own: its states.
        others: gradients of another model that trains.
    """
    tokens, several = setting.trained_tokens, setting.micro_batches > 1
    every, (plan, workspace, gradient) = model.of(tokens), head(setting, model, tokens)
    kept = on_device(setting, every, model.layers)
    gathered, adding = own.root + 2 * own.block, (own.unsharded or own.gradients) if several else 0.0
    hidden = tokens / setting.group.tokens * setting.group.rows * model.head.width * (2 if setting.half else 4)
    forward = kept.total + hidden + workspace + gradient
    stays = (own.root or not several) and not goes_first(setting, own)
    backward = kept.total + kept.backward + (gradient if stays else 0) + own.block_gradients
    last = own.gradients + own.root_gradients + (0 if several else kept.total / max(model.layers, 1) + kept.backward)
    phases = {
        "forward and head": others + adding + gathered + forward,
        "backward": others + adding + gathered + max(backward, 0 if several else last),
        "optimizer": others + own.gradients + own.temporaries,
    }
    kinds = {
        "gradients": own.gradients,
        **({"gradients of the other trained model": others} if others else {}),
        **({"gradients of whole layers while adding up": own.unsharded} if several and own.unsharded else {}),
        "optimizer's temporaries": own.temporaries,
        "in host memory": own.rests + every.total - kept.total,
        "gathered by FSDP": gathered,
        **{f"activations: {name}": size for name, size in sorted(kept.kinds.items())},
        "activations: backward of a layer": kept.backward,
        "head: workspace": workspace + hidden,
        "head: gradient of its weight": gradient,
    }
    return kinds, phases, plan


def on_device(setting: Setting, kept: Kept, layers: int) -> Kept:
    """What a forward keeps on the device: of activations that leave for host memory those of a layer, or under way."""
    if not (setting.config.model.activation_offloading and setting.device.kind == "cuda" and kept.total):
        return kept
    share = min(1.0, 1 / max(layers, 1) + UNDER_WAY / kept.total)
    return Kept({name: size * share for name, size in kept.kinds.items()}, kept.backward)


def goes_first(setting: Setting, own: States) -> bool:
    """Whether backward begins by taking the step of the head, whose gradient is there alone then."""
    tied = getattr(setting.policy().config, "tie_word_embeddings", False)
    return setting.config.optim.in_backward and not own.root and not tied


def head(setting: Setting, model: Footprint, tokens: float) -> tuple[Plan | None, float, float]:
    """How the head of a model is cut, the bytes of its workspace, and those of its weight's gradient."""
    rows = round(tokens / setting.group.tokens * setting.group.rows)
    if setting.objective.head == "scores" or model.head.vocab == 1:
        return None, 4.0 * rows * model.head.width, 0.0
    size, like = 2 if setting.half else 4, model.head
    weight = setting.way.dtype.itemsize if setting.way.dtype is not None else like.head_bytes
    plan = make_plan(
        rows,
        like.vocab,
        like.width,
        itemsize=size,
        coefficients="token" if setting.objective.align == "token" else "unit",
        units=units(setting, rows),
        head_gradient=like.head_trained > 0,
        trained=like.head_trained,
        entropy=True,
        device=setting.device.kind,
        total_memory=int(setting.device.memory),
        scratch=like.vocab * like.width * size if size != weight else 0,
    )
    both = 2 if setting.objective.head == "distributions" else 1
    made = weight * like.vocab * like.head_trained
    return plan, float(both * plan.workspace_bytes), float(max(plan.accumulator_bytes, made))


def units(setting: Setting, rows: int) -> tuple[int, ...] | None:
    """Scored rows of what a chunk of the head may not split."""
    group, align = setting.group, setting.objective.align
    if align == "token":
        return None
    each = {"sequence": group.scored, "pair": 2 * group.scored, "group": group.rows}[align]
    return (each,) * max(1, rows // max(each, 1))


def copy_to_sample(setting: Setting, model: Footprint) -> float:
    """The weights of a copy for `parallel.generate`, split over the ranks that sample together."""
    asked = setting.config.parallel.generate
    if asked is None:
        return 0.0
    size = DTYPES[asked["dtype"]].itemsize if asked.get("dtype", "auto") != "auto" else None
    return sum(w.numel * (size or w.dtype.itemsize) for w in model.weights) * setting.layout.tp / setting.sampling_tp


def gathered_to_sample(setting: Setting, own: States) -> float:
    """Whole weights that are gathered while completions are sampled, where there is no copy for that."""
    return 0.0 if setting.config.parallel.generate is not None else own.whole * setting.layout.tp


def sampling(setting: Setting, model: Footprint, kept: float, own: States) -> tuple[float, int]:
    """Bytes of keys and values while completions are sampled, and how many are at the same time."""
    if setting.config.sampler is None or setting.config.sampler.backend == "vllm":
        return 0.0, 0
    config, (prompt, answer) = model.config, setting.lengths
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * setting.layout.tp
    heads /= setting.sampling_tp
    token = 2 * config.num_hidden_layers * heads * size * (2 if setting.half else 4)
    free = max(setting.device.memory - kept - gathered_to_sample(setting, own), 0.0)
    affordable = max(1, int(MEMORY_SHARE * free // (token * (prompt + answer))))
    dealt = setting.layout.ranks // setting.sampling_tp  # ranks or groups of them that sample prompts of their own
    rows = -(-setting.config.batch.size // dealt) * setting.samples
    rows = min(rows, setting.config.sampler.max_rows or min(MOST_ROWS, affordable))
    return ARENA * token * rows * (answer + prompt / max(1, setting.samples)), rows
