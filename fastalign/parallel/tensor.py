"""Tensor parallelism: the ranks of the tensor axis compute every layer together, each with its part of the weights.

    hidden states [T, D]                             whole and the same on every rank
        |  enter: the identity; backward adds up the gradients of the ranks
    q, k, v, gate, up      split by columns          a part of the heads and of the MLP's width
    o, down                split by rows             a part of each sum
        |  leave: adds up the parts; backward is the identity
    hidden states [T, D]

Entered and left once for attention and once for the MLP, a layer takes four all-reduces of ``[T, D]`` in a forward and
a backward. Embedding and LM head are split over the vocabulary: a token of another rank is embedded as 0 before the
ranks add up, and the fused ops of the head exchange a few numbers per row and add up the gradient of the hidden states.
With `parallel.sequence_parallel` a rank has ``[T/tp, D]`` of them between attentions and MLPs: see `exchange`.

Each weight that is split is a `DTensor` placed `Shard(0)` or `Shard(1)` over the tensor axis, which FSDP shards once
more over the data axis; so optimizers, checkpoints and exports know which part each rank has. Layers never compute with
a `DTensor`: to them the weight of a module is this rank's part, a plain tensor.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fastalign.models.lora import base_name
from fastalign.models.policy import Policy
from fastalign.parallel.exchange import Enter, Gather, Join, Leave, Scatter, Share
from fastalign.parallel.mesh import World

logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
"""It warns that a weight cut along one dimension by both axes takes two gathers to be whole."""

COLUMNS, ROWS, SAME, VOCABULARY, HEAD = "colwise", "rowwise", "replicated_with_grad_allreduce", "vocabulary", "head"
"""How a layer is split. The first three are transformers' words; the third is a norm of the heads, which is whole on
every rank and sees some of the heads there."""
SUMMED, SHARED = "summed", "shared"
"""Weights that are whole on every rank: one whose gradient is a sum over ranks, and a bias that is added on every rank
to a part of a sum, so each adds its share of it."""
Way = int | str
"""A dimension along which a weight is split, `SUMMED` or `SHARED`."""
WAYS: dict[tuple[str, str], dict[str, Way]] = {
    (COLUMNS, ""): {"weight": 0, "bias": 0},
    (COLUMNS, "lora_A"): {"weight": SUMMED},
    (COLUMNS, "lora_B"): {"weight": 0, "bias": 0},
    (ROWS, ""): {"weight": 1, "bias": SHARED},
    (ROWS, "lora_A"): {"weight": 1},
    (ROWS, "lora_B"): {"weight": SUMMED, "bias": SHARED},
    (SAME, ""): {"weight": SUMMED},
    (VOCABULARY, ""): {"weight": 0},
    (HEAD, ""): {"weight": 0, "bias": 0},
    (HEAD, "lora_A"): {},  # the ops of the head add up its gradient
    (HEAD, "lora_B"): {"weight": 0},
}
"""What becomes of the weights of a layer and of the factors of its adapter."""


@dataclass
class Team:
    """The ranks that compute the layers of a model together.

    Attributes:
        mesh: the tensor axis.
        group: theirs.
        whole: each has all weights for now, and computes alone.
        sequence: in packed rows each has some of the tokens between attentions and MLPs.
        parted: so it is in the forward that runs, or ran last.
    """

    mesh: DeviceMesh
    group: dist.ProcessGroup
    whole: bool = False
    sequence: bool = False
    parted: bool = False

    def enter(self, x: Tensor, rows: int | None) -> Tensor:
        """``[1, T, D]`` that an attention or MLP reads; ``rows`` is T where it must be known."""
        return Gather.apply(x, rows, self.group) if self.parted else Enter.apply(x, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """What the ranks' parts of a sum add up to; of this rank's tokens where it has some."""
        return Scatter.apply(x, self.group) if self.parted else Leave.apply(x, self.group)

    def join(self, x: Tensor, rows: int) -> Tensor:
        """``[1, T, D]`` of the tokens of all ranks."""
        return Join.apply(x, rows, self.group)

    def gather_columns(self, x: Tensor, columns: int) -> Tensor:
        """``[..., columns]`` of the parts ``[..., c]`` that the ranks have of its last dimension."""
        shape = torch.Size((*x.shape[:-1], columns))
        known: dict[str, Any] = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
        return DTensor.from_local(x, self.mesh, [Shard(x.dim() - 1)], run_check=False, **known).full_tensor()

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        smallest = torch.tensor(number, device=self.mesh.device_type)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.group)
        return int(smallest)


def split_layers(policy: Policy, world: World, *, sequence: bool = False) -> Policy:
    """Split a policy over the tensor axis, in place and before it is sharded; its weights need not be there yet.

    Args:
        policy: the same on every rank.
        world: the ranks; without a tensor axis nothing is done.
        sequence: split the tokens of norms and of the residual stream as well.

    Raises:
        ValueError: a model that cannot be split, or not into so many parts.
    """
    if world.tensor is None:
        return policy
    assert world.mesh is not None and world.tensor.group is not None
    plan = plan_of(policy.config)
    check_sizes(policy.config, world.tensor.size)
    check_complete(policy, plan)
    team = policy.team = Team(world.mesh["tp"], world.tensor.group, sequence=sequence)
    made: dict[int, tuple[Any, nn.Parameter]] = {}  # by what stood there, which stays alive: tied weights stay one
    for module, ways in split_modules(policy, plan):
        for name, way in ways.items():
            x = module._parameters[name]
            if x is not None and isinstance(way, int):
                made[id(x)] = made.get(id(x)) or (x, part_of(x, way, team))
                module._parameters[name] = made[id(x)][1]
        see_in_part(module, ways, team)
    for module in joint_modules(policy.backbone, plan):
        module.register_forward_pre_hook(entering(team), with_kwargs=True)
        module.register_forward_hook(leaving(team))
    if sequence:
        split_tokens(policy, plan, team)
    return policy


def split_tokens(policy: Policy, plan: dict[str, str], team: Team) -> None:
    """Let each rank have some of the tokens outside of attentions and MLPs.

    Raises:
        ValueError: a model that has more there than norms.
    """
    inside = {id(module) for joint in joint_modules(policy.backbone, plan) for module in joint.modules()}
    inside |= {id(module) for module in policy.model.get_input_embeddings().modules()}
    for name, module in policy.backbone.named_modules():
        own = {key: x for key, x in module._parameters.items() if x is not None and id(module) not in inside}
        if any(x.dim() > 1 for x in own.values()):
            raise ValueError(f"parallel.sequence_parallel: {name} of {policy.config.model_type} models is no norm")
        if own:
            see_in_part(module, dict.fromkeys(own, SUMMED), team)
    policy.backbone.register_forward_pre_hook(beginning(team), with_kwargs=True)
    policy.backbone.register_forward_hook(ending(team), with_kwargs=True)


# --- what is split, and how ------------------------------------------------------------------------------------------


def plan_of(config: Any) -> dict[str, str]:
    """How the layers of a model are split: transformers' plan, whose names have ``*`` for the number of a layer.

    Raises:
        ValueError: there is none, or it takes more than is done here.
    """
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"parallel.tp: transformers has no plan for splitting the layers of {config.model_type} models "
            "(base_model_tp_plan): set parallel.tp to 1"
        )
    served = {COLUMNS, ROWS, SAME}
    if other := {name: how for name, how in plan.items() if how not in served}:
        name, how = next(iter(other.items()))
        raise ValueError(
            f"parallel.tp: {name} of {config.model_type} models is split as {how!r} by transformers' plan, which is "
            "not served: set parallel.tp to 1"
        )
    return plan


def check_sizes(config: Any, parts: int) -> None:
    """Refuse a number of parts into which heads, MLP or vocabulary cannot be split."""
    names = {"num_attention_heads": "attention heads", "num_key_value_heads": "key/value heads"}
    names |= {"intermediate_size": "units of an MLP"}
    sizes = {words: size for name, words in names.items() if isinstance(size := getattr(config, name, None), int)}
    common = math.gcd(*sizes.values())
    if common % parts:
        text = ", ".join(f"{size} {words}" for words, size in sizes.items())
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        raise ValueError(f"parallel.tp {parts} does not divide the model's {text}: set it to one of {fits}")
    if (parts - 1) * -(-config.vocab_size // parts) >= config.vocab_size:
        raise ValueError(f"parallel.tp {parts} leaves a rank without any of {config.vocab_size} tokens: lower it")


def check_complete(policy: Policy, plan: dict[str, str]) -> None:
    """Refuse weights inside an attention or MLP of which the plan does not say how they are split."""
    known = {id(module) for _, module, _, _ in found_modules(policy, plan)}
    inside = {id(module) for joint in joint_modules(policy.backbone, plan) for module in joint.modules()}
    for name, module in policy.backbone.named_modules():
        if id(module) in inside - known and any(x is not None for x in module._parameters.values()):
            raise ValueError(
                f"parallel.tp: {name} of {policy.config.model_type} models is not in transformers' plan for splitting "
                "layers: set parallel.tp to 1"
            )


def split_modules(policy: Policy, plan: dict[str, str]) -> Iterator[tuple[nn.Module, dict[str, Way]]]:
    """The modules with weights of their own that see these in part, and what becomes of each weight.

    Raises:
        ValueError: an adapter whose weights are not of the kinds of `WAYS`.
    """
    for name, module, how, inner in found_modules(policy, plan):
        own = {key for key, x in module._parameters.items() if x is not None}
        if not own:
            continue
        ways = WAYS.get((how, inner.split(".")[0]))
        if ways is None or not own <= {"weight", "bias"}:
            raise ValueError(
                f"parallel.tp: the adapter of {name} has {inner.split('.')[0]}, which cannot be split: leave it out of "
                "model.lora.target_modules, or set parallel.tp to 1"
            )
        if ways := {key: way for key, way in ways.items() if key in own}:
            yield module, ways


def found_modules(policy: Policy, plan: dict[str, str]) -> Iterator[tuple[str, nn.Module, str, str]]:
    """All modules of the layers that are split: the layer's name, the module, how, and its name inside the layer."""
    patterns = {re.compile(re.escape(name).replace(r"\*", r"\d+") + r"(?:\.(.+))?"): how for name, how in plan.items()}
    for name, module in policy.backbone.named_modules():
        for pattern, how in patterns.items():
            if found := pattern.fullmatch(base_name(name)):
                inner = found[1] or ""
                yield base_name(name).removesuffix(f".{inner}"), module, how, inner
    outer = {"the embedding": (policy.model.get_input_embeddings(), VOCABULARY)}
    if not policy.has_scalar_head:
        outer["the LM head"] = policy.head, HEAD
    for name, (layer, how) in outer.items():
        for inner, module in layer.named_modules():
            yield name, module, how, base_name(f".{inner}")[1:]


def joint_modules(backbone: nn.Module, plan: dict[str, str]) -> list[nn.Module]:
    """The modules that hold layers split by columns and the one split by rows that reads these: attentions and MLPs."""
    patterns = {pattern.rpartition(".")[0] for pattern, how in plan.items() if how == ROWS}
    shapes = [re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in patterns]
    return [module for name, module in backbone.named_modules() if any(shape.fullmatch(name) for shape in shapes)]


def part_of(x: nn.Parameter, dimension: int, team: Team) -> nn.Parameter:
    """This rank's part of a weight, which knows the whole."""
    chunks = x.detach().chunk(team.mesh.size(), dimension)
    mine = chunks[team.mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
    known: dict[str, Any] = {"shape": x.shape, "stride": x.stride()}
    part = DTensor.from_local(mine, team.mesh, [Shard(dimension)], run_check=False, **known)
    return nn.Parameter(part, x.requires_grad)


# --- how layers see their weights ------------------------------------------------------------------------------------


def see_in_part(module: nn.Module, ways: dict[str, Way], team: Team) -> None:
    """Let a module's forward read this rank's part of its weights."""
    module.team = team  # pyright: ignore
    module.__class__ = seen_in_part(type(module), tuple(ways.items()))


@cache
def seen_in_part(kind: type, ways: tuple[tuple[str, Way], ...]) -> type:
    """A class of module whose weights are this rank's parts to whoever reads them; an embedding's, of its tokens."""
    bases = (SplitEmbedding, kind) if issubclass(kind, nn.Embedding) else (kind,)
    views = {name: property(view_of(name, way)) for name, way in ways}
    return type(kind.__name__, bases, {**views, "__module__": kind.__module__})


def view_of(name: str, way: Way) -> Callable[[Any], Tensor]:
    """Reads a weight of a module as its forward uses it; outside of forwards, where FSDP has it sharded, as it is."""

    def view(module: Any) -> Tensor:
        x, team = module._parameters[name], module.team
        if team.whole or (isinstance(x, DTensor) and x.device_mesh != team.mesh):
            return x
        if way == SUMMED:
            return Enter.apply(x, team.group)
        if way == SHARED:
            return Share.apply(x, team.mesh.size())
        return x.to_local() if isinstance(x, DTensor) else x

    return view


class SplitEmbedding(nn.Module):
    """An embedding that has some of the tokens."""

    team: Team
    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """``[..., D]`` of ``[...]`` tokens."""
        if self.team.whole:
            return super().forward(input)
        each = -(-self.num_embeddings // self.team.mesh.size())  # pyright: ignore
        local = input - each * self.team.mesh.get_local_rank()
        elsewhere = (local < 0) | (local >= len(self.weight))
        found = super().forward(local.masked_fill(elsewhere, 0))
        return self.team.leave(found.masked_fill(elsewhere[..., None], 0))


# --- where layers are entered and left -------------------------------------------------------------------------------


def entering(team: Team) -> Callable[..., Any]:
    """A hook before the forward of an attention or MLP."""

    def enter(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> Any:
        if team.whole:
            return None
        angles = options.get("position_embeddings")
        rows = None if angles is None else angles[0].shape[-2]  # an MLP may read the rows that are filled up
        if arguments:
            return (team.enter(arguments[0], rows), *arguments[1:]), options
        return arguments, {**options, "hidden_states": team.enter(options["hidden_states"], rows)}

    return enter


def leaving(team: Team) -> Callable[..., Any]:
    """A hook after it."""

    def leave(module: nn.Module, arguments: tuple, output: Any) -> Any:
        if team.whole:
            return None
        if isinstance(output, tuple):
            return team.leave(output[0]), *output[1:]
        return team.leave(output)

    return leave


def beginning(team: Team) -> Callable[..., Any]:
    """A hook before the forward of a backbone: tokens are split of packed rows."""

    def begin(module: nn.Module, arguments: tuple, options: dict[str, Any]) -> None:
        team.parted = not team.whole and options.get("packed_layout") is not None

    return begin


def ending(team: Team) -> Callable[..., Any]:
    """A hook after it: the head reads hidden states of any token."""

    def end(module: nn.Module, arguments: tuple, options: dict[str, Any], output: Any) -> Any:
        if team.parted:
            output.last_hidden_state = team.join(output.last_hidden_state, options["input_ids"].shape[1])
        return output

    return end


# --- every rank for itself -------------------------------------------------------------------------------------------


@contextmanager
def whole_layers(model: nn.Module) -> Iterator[None]:
    """Give each rank all weights of a split model meanwhile, so that its forwards need no other rank.

    All ranks must enter it together, with the weights gathered over the data axis. Inside there are no gradients.
    """
    team = getattr(model, "team", None)
    if team is None:
        yield
        return
    places = [(module._parameters, name) for module in model.modules() for name in module._parameters]
    kept = [(owner, name, x) for owner, name in places if isinstance(x := owner[name], DTensor)]
    made: dict[int, nn.Parameter] = {}
    was = team.whole
    try:
        for owner, name, x in kept:
            if id(x) not in made:
                made[id(x)] = nn.Parameter(x.detach().full_tensor(), requires_grad=False)  # pyright: ignore
            owner[name] = made[id(x)]
        team.whole = True
        yield
    finally:
        team.whole = was
        for owner, name, x in kept:
            owner[name] = x
