"""One model of a run: made, sharded, its weights read, and its packed forward compared with the plain one.

    without weights, on the meta device      models/hollow.hollow_policy
        |
    split over the tensor axis               parallel/tensor.split_layers
        |
    sharded over the data axis               parallel/shard.shard
        |
    each rank reads its part of each tensor  from safetensors; random weights come from the main rank, tensor by tensor
        |
    verified, all ranks together             models/verify.verify_packed

So no rank holds a whole model, but the main one while it makes random weights. One process has nothing to shard: all is
its part. Weights that only transformers can load, all at once, are loaded by every rank before it is sharded, and the
log says why.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastalign.config import BatchConfig, Config, ModelConfig
from fastalign.data.loader import Examples
from fastalign.data.pack import pack
from fastalign.engine.agree import require_same
from fastalign.engine.forward import Models, wants_autocast
from fastalign.engine.methods import Objective
from fastalign.engine.reference.cache import Demand
from fastalign.models import lora
from fastalign.models.hollow import Hollow, hollow_policy
from fastalign.models.load import load_policy
from fastalign.models.policy import Policy
from fastalign.models.support import trained_positions
from fastalign.models.verify import verify_packed
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import base_digest, fill, reshard, shard
from fastalign.parallel.tensor import split_layers
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run's models are made from: settings, method, tokenizer, the data that will be read, and the ranks."""

    config: Config
    objective: Objective
    tokenizer: PreTrainedTokenizerBase
    demands: Sequence[Demand]
    world: World

    @property
    def autocast(self) -> bool:
        """Whether forwards run under bf16 autocast."""
        return wants_autocast(self.config.model, self.world.device)

    @property
    def examples(self) -> list[Examples]:
        """The data alone."""
        return [demand.dataset for demand in self.demands]

    def batch(self, share_prefix: bool) -> BatchConfig:
        """The batch section with the verdict of the verification in place of what was asked for."""
        return replace(self.config.batch, share_prefix=share_prefix)


def load(
    start: Start,
    section: ModelConfig,
    setting: str = "model.path",
    *,
    scalar_head: bool = False,
    value_head: bool = False,
    hollow: Hollow | None = None,
    rests: bool = False,
) -> Policy:
    """A model on this rank's device, sharded where there are several ranks; not verified.

    Args:
        start: settings and ranks.
        section: the model's.
        setting: what errors call the setting that names it.
        scalar_head, value_head: as `load_policy`.
        hollow: the model before its weights are there, if it was made already.
        rests: keep the shards of several ranks in host memory.
    """
    world = start.world
    known: dict[str, Any] = {"tokenizer": start.tokenizer, "seed": start.config.run.seed}
    known |= {"scalar_head": scalar_head, "setting": setting, "value_head": value_head}
    if section.quantization is not None or (section.path is None and world.mesh is None):
        return shard(load_policy(section, **known).to(world.device), world)
    hollow = hollow or hollow_policy(section, **known)
    if hollow.whole is not None:
        return load_whole(start, hollow.whole, section, known, rests)
    mine = lora.sample((name, x) for name, x in hollow.policy.named_parameters() if not x.is_meta)
    require_same(world, (mine, hollow.stored and hollow.stored.sample()), *other_weights(setting))
    policy = sharded(start, hollow, rests)
    if hollow.stored is not None:
        fill(policy, hollow.read, world, rests=rests)
    else:
        with without_repeated_warnings():
            made = FromMain(load_policy(section, **known) if world.is_main else None, world)
            fill(policy, made, world, every=True, rests=rests)
    policy.base_digest = None if policy.adapted is None else base_digest(policy, world)
    return policy


def load_whole(start: Start, reason: str, section: ModelConfig, known: dict[str, Any], rests: bool) -> Policy:
    """A model whose weights only transformers can load: every rank does, then it is sharded."""
    setting, world = known["setting"], start.world
    if world.mesh is not None:
        log.info("%s: every rank loads the whole model before it is sharded, as %s", setting, reason)
    with without_repeated_warnings():
        policy = load_policy(section, **known)
    require_same(world, lora.sample(policy.named_parameters()), *other_weights(setting))
    policy = split_layers(policy.to(world.device), world, sequence=start.config.parallel.sequence_parallel)
    return shard(policy, world, bf16=start.autocast, rests=rests)


@contextmanager
def without_repeated_warnings() -> Iterator[None]:
    """Keep what a model is warned of from the log, where it is made for the second time."""
    logger = logging.getLogger("fastalign.models")
    was = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(was)


def sharded(start: Start, hollow: Hollow, rests: bool = False) -> Policy:
    """A policy without weights, over the ranks."""
    device = start.world.device
    policy = hollow.policy._apply(lambda x: x if x.is_meta else x.to(device))
    policy = split_layers(policy, start.world, sequence=start.config.parallel.sequence_parallel)
    return shard(policy, start.world, bf16=start.autocast, rests=rests)


class FromMain:
    """Reads a model that the main rank made: it sends one tensor after the other, and lets go of each."""

    def __init__(self, policy: Policy | None, world: World) -> None:
        self.world = world
        made = policy or nn.Module()
        self.tensors: dict[str, Tensor] = {**dict(made.named_parameters()), **dict(made.named_buffers())}

    def __call__(self, name: str, part: tuple[slice, ...], x: Tensor) -> Tensor:
        """This rank's part of a tensor; all ranks ask for the same one."""
        sent = torch.empty(x.shape, dtype=x.dtype)
        if self.world.is_main:
            mine = self.tensors.pop(name)
            sent, mine.data = mine.detach().contiguous(), torch.empty(0, dtype=mine.dtype)
        return self.world.broadcast(sent)[part].clone()


def other_weights(setting: str) -> tuple[str, str]:
    """What `require_same` says of a rank that loaded another model than the main one, and what to do."""
    return f"loaded other weights from {setting}", f"give every rank the same {setting}"


def verified(start: Start, policy: Policy, share_prefix: bool, name: str = "the model") -> bool:
    """Whether prefixes are shared: a packed batch must agree with the plain forward, if need be without sharing.

    All ranks go on alike: one whose batch disagrees takes sharing from all.

    Raises:
        ValueError: a model that takes not all sequences, or does not compute packed rows exactly.
    """
    max_length = start.config.data.max_length
    check_lengths(policy, start.demands, max_length, name)
    shares = share_prefix and compare(start, policy, True, name)
    if not shares:
        compare(start, policy, False, name)
    check_lengths(policy, start.demands, max_length, name, warn=False)  # a forward pass shows every window
    reshard(policy)
    return shares


def compare(start: Start, policy: Policy, share_prefix: bool, name: str) -> bool:
    """Whether a packed batch agrees with the plain forward on every rank; raises where no other way is left to try."""
    on_mismatch = start.config.model.on_mismatch if share_prefix else "raise"
    batch = first_batch(start.demands[0], start.batch(share_prefix), policy.has_scalar_head).to(start.world.device)

    def together(mine: bool) -> bool:
        return all(start.world.gather_objects(mine))

    with Models(policy, None, start.autocast).precision(start.world.device):
        return verify_packed(policy, batch, on_mismatch, name, together=together)


def check_lengths(
    policy: Policy, demands: Sequence[Demand], max_length: int, name: str = "the model", *, warn: bool = True
) -> None:
    """Refuse sequences longer than a model computes exactly; warn of those beyond the positions it was made for.

    Args:
        policy: on any device.
        demands: what will be read.
        max_length: no sequence is longer.
        name: what messages call the model.
        warn: whether to.
    """
    limit, why = policy.max_length or (max_length, "")
    positions = (trained_positions(policy.config) if warn else None) or max_length
    if min(limit, positions) >= max_length:
        return
    for demand in demands:
        lengths = demand.dataset.lengths()[np.asarray(demand.indices)]
        longest = lengths.max(initial=0)
        told = "{} of {} {} are longer than {} (the longest has {} tokens): set data.max_length to {}"
        if longest > limit:
            text = f"{limit} tokens, {why.replace('the model', name)}"
            text = told.format((lengths > limit).sum(), len(lengths), demand.name, text, longest, limit)
            raise ValueError(f"{text}, which cuts completions there, or with data.truncation drop leaves these out")
        if longest > positions:
            text = f"the {positions} positions that {name} was made for"
            text = told.format((lengths > positions).sum(), len(lengths), demand.name, text, longest, positions)
            log.warning("%s unless it is meant so", text)


def first_batch(demand: Demand, batch: BatchConfig, own_rows: bool = False) -> PackedBatch:
    """A packed batch of the first examples, the one that shares deepest; the loader's position is left alone.

    Of kto's examples the two completions that a prompt is computed for: its own and the mismatched one. ``own_rows``
    for a scalar head, which a critic has beside a policy that reads other rows.
    """
    examples = demand.dataset.fetch(list(demand.indices[: batch.size]))
    examples = [replace(example, own_rows=own_rows or example.own_rows) for example in examples]
    batches = pack(examples, batch.budget, batch.share_prefix)
    every = [*batches, *(packed.companion for packed in batches if packed.companion is not None)]
    return max(every, key=lambda packed: packed.depth)
