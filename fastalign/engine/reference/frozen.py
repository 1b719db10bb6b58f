"""The frozen reference, from the question whether there is one to its log-probs: `settle_reference` and what it calls.

    does the loss read one?  -- no --------------------------------------------------> none
      | yes: reference.path, or else the policy as it starts
    are log-probs kept (reference.cache)?
      | no                                    | yes: missing ones are computed now, then they are data,
      |                                       |      and no reference stays in memory. One of reference.path is not
      |                                       |      even loaded when none is missing
    reference.path?  -- yes ------------------+--------------------------------------> loaded from there, frozen
      | no
    does only an adapter train, that adds nothing yet?  -- yes ----------------------> the policy without its adapter
      | no --------------------------------------------------------------------------> a frozen copy of the policy

Log-probs come from the same packed batch, attention and head as those of the policy.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastalign.config import Config, ModelConfig
from fastalign.data import cache
from fastalign.data.loader import Examples
from fastalign.data.ref_cache import Referenced
from fastalign.engine.forward import Models, chunks
from fastalign.engine.loading import Start, load, sharded, verified, without_repeated_warnings
from fastalign.engine.methods import Objective
from fastalign.engine.reference.cache import Filling, check_agreement, fill, open_cache
from fastalign.engine.reference.fingerprint import computation, fingerprint, origin_of
from fastalign.models.head import head_of
from fastalign.models.hollow import Hollow, hollow_policy
from fastalign.models.lora import WithoutAdapter, identity, why_not_its_own_reference
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.parallel.shard import fill as fill_shards
from fastalign.parallel.shard import reshard
from fastalign.types import PackedBatch, TokenStats

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reference:
    """What the loss is compared with.

    Attributes:
        model: the frozen model; None without one, and where its log-probs come with the data.
        data: the examples that will be read, training's first.
        share_prefix: whether policy and reference both compute shared prefixes exactly.
        digest: a hash of the files that it comes from; None without one, or one that a seed made.
        filling: the cache that the log-probs are in, if they are kept.
    """

    model: Policy | WithoutAdapter | None
    data: Sequence[Examples]
    share_prefix: bool
    digest: str | None = None
    filling: Filling | None = None


def settle_reference(start: Start, policy: Policy, share_prefix: bool) -> Reference:
    """Decide what the loss is compared with, and load or compute no more than that takes.

    Args:
        start: settings, data and ranks; all ranks call this.
        policy: as it starts: loaded, sharded, verified.
        share_prefix: the verdict of that verification.

    Raises:
        ValueError: a reference that cannot be loaded or compared with the policy.
    """
    config, objective = start.config, start.objective
    if not objective.needs_reference:
        if config.reference.path is not None:
            log.warning("reference.path is ignored: %s is reference-free", objective.name)
        return Reference(None, start.examples, share_prefix)
    if objective.head == "distributions":
        refuse_adapted_head(objective, policy)
    section, hollow = describe(start)
    outline = hollow.policy if hollow else policy
    adapted = identity(outline) is not None
    origin = origin_of(section, config.run.seed, start.world, adapted=adapted)
    filling = kept(start, policy, outline, origin, share_prefix)
    model = None
    if hollow and (filling is None or filling.misses):
        model, shares = load_other(start, section, hollow, policy, share_prefix)
        if shares != share_prefix:  # the cache has a place for each
            share_prefix, filling = shares, kept(start, policy, outline, origin, shares)
    digest = origin if section.path is not None else None
    if filling is None:
        return Reference(model or as_it_starts(start, policy), start.examples, share_prefix, digest)
    data = fill_cache(start, filling, model or (None if hollow else policy), share_prefix)
    del model
    gc.collect()  # a sharded model is in cycles: its memory would be held until the collector comes by
    return Reference(None, data, share_prefix, digest, filling)


def describe(start: Start) -> tuple[ModelConfig, Hollow | None]:
    """The section of the reference; and that model before its weights are loaded, if it is another than the policy."""
    config = start.config
    if config.reference.path is None:
        return config.model, None
    section = reference_section(config)
    if start.objective.method.teacher:  # new rows would teach that a new token is an average one
        section = replace(section, resize_embeddings=False)
    return section, hollow_policy(section, tokenizer=start.tokenizer, setting="reference.path")


def reference_section(config: Config) -> ModelConfig:
    """The model section of the model that ``reference.path`` names."""
    dtype = config.reference.dtype or config.model.dtype
    plain: dict[str, Any] = {"config": None, "tokenizer": None, "lora": None, "gradient_checkpointing": False}
    return replace(config.model, path=config.reference.path, dtype=dtype, **plain)


def kept(start: Start, policy: Policy, reference: Policy, origin: str, share_prefix: bool) -> Filling | None:
    """The cache of a reference's log-probs, if they are kept; nothing of the reference but its outline is read."""
    if start.objective.head != "logps" or start.config.reference.cache == "off" or start.objective.on_policy:
        return None
    how = {"share_prefix": share_prefix, "temperature": start.objective.temperature, "autocast": start.autocast}
    space = cache.key(fingerprint(reference, origin), computation(reference, start.world, **how))
    return open_cache(start.config, space, start.demands, policy, start.world)


def load_other(
    start: Start, section: ModelConfig, hollow: Hollow, policy: Policy, share_prefix: bool
) -> tuple[Policy, bool]:
    """The model of ``reference.path``, verified, and whether prefixes are shared now that it has a say."""
    rests = start.config.reference.offload
    reference = load(start, section, "reference.path", hollow=hollow, rests=rests).requires_grad_(False)
    if start.objective.head == "distributions":
        refuse_sizes(start.objective, policy, reference)
    name = "the teacher" if start.objective.method.teacher else "the reference"
    shares = verified(start, reference, share_prefix, name)
    if shares != share_prefix:  # what the policy was checked on is not what it will read
        verified(start, policy, shares)
    return reference, shares


def as_it_starts(start: Start, policy: Policy) -> Policy | WithoutAdapter:
    """The policy as it is now, before it trains: itself without its adapter where that is exact."""
    reason = why_not_its_own_reference(policy)
    if reason is None and start.objective.head == "distributions":
        reason = "the loss compares both models' whole distributions at once"
    if reason is None:
        log.info("reference: the policy without its adapter (nothing else trains, and it starts at zero)")
        return WithoutAdapter(policy)
    alone = start.world.mesh is None
    shared = " of what trains; the frozen weights are shared" if alone and policy.adapted is not None else ""
    log.info("reference: a frozen copy%s (%s)", shared, reason)
    return frozen_copy(policy, share=True) if alone else sharded_copy(start, policy)


def frozen_copy(policy: Policy, *, share: bool = False) -> Policy:
    """The policy as it is now, for reading only; taken before it is sharded or trained.

    It stays in the policy's mode: quantised layers compute otherwise, and repack their weights, in evaluation. With
    ``share`` its frozen parameters are the policy's own, which sharding would tear apart.
    """
    shared = {id(p): p for p in policy.parameters() if share and not p.requires_grad}
    reference = copy.deepcopy(policy, shared)
    return reference.requires_grad_(False)


def sharded_copy(start: Start, policy: Policy) -> Policy:
    """`frozen_copy` of a sharded policy: the same model made anew, and each rank copies its parts of the weights."""
    known: dict[str, Any] = {"tokenizer": start.tokenizer, "seed": start.config.run.seed}
    scalar, rests = policy.has_scalar_head, start.config.reference.offload
    with without_repeated_warnings():
        reference = sharded(start, hollow_policy(start.config.model, scalar_head=scalar, **known), rests)
    ours: dict[str, Tensor] = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}

    def read(name: str, part: object, x: Tensor) -> Tensor:
        mine = ours[name].detach()
        return (mine.to_local() if isinstance(mine, DTensor) else mine).clone()

    fill_shards(reference, read, start.world, every=True, rests=rests)
    return reference.train(policy.training).requires_grad_(False)


def refuse_adapted_head(objective: Objective, model: Policy) -> None:
    """Refuse an adapter on a head, which the divergence of whole distributions leaves out."""
    if head_of(model.head).lora is not None:
        raise ValueError(
            f"loss {objective.name} serves no adapter on a head: leave it out of model.lora.target_modules"
        )


def refuse_sizes(objective: Objective, policy: Policy, reference: Policy) -> None:
    """Refuse two heads whose distributions cannot be compared."""
    refuse_adapted_head(objective, reference)
    ours, theirs = (model.num_tokens for model in (policy, reference))
    if ours != theirs:
        raise ValueError(
            f"loss {objective.name} compares distributions over one vocabulary, and the head of the model has {ours} "
            f"rows, that of reference.path {theirs}: choose two models with heads of one size"
        )


def fill_cache(start: Start, filling: Filling, reference: Policy | None, share_prefix: bool) -> list[Examples]:
    """The data with their log-probs, computed now where they are missing; no reference where none is."""
    batch, world = start.batch(share_prefix), start.world

    def score(micro: PackedBatch) -> Tensor:
        assert reference is not None
        with Models(reference, None, start.autocast).precision(world.device):
            return reference_logps(reference, micro, start.objective)

    fill(filling, score, batch, world)
    referenced = [Referenced(demand.dataset, filling.store) for demand in filling.demands]
    if reference is not None:
        assert reference.rounding is not None, "verify_packed measures what the cached log-probs are held to"
        first = referenced[0].fetch(list(filling.demands[0].indices[: batch.size]))
        check_agreement(first, score, batch, world, reference.rounding)
        reshard(reference)
    return [*referenced]


@torch.no_grad()
def reference_logps(reference: Policy | WithoutAdapter, batch: PackedBatch, objective: Objective) -> Tensor:
    """``[N]`` fp32 log-probs of the batch's labels.

    The head is cut into the chunks of the policy's pass, so that equal weights give equal bits and the first margins
    are exactly 0.
    """

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> TokenStats:
        return linear_loss(hidden, weight, labels, sum_logps, **chunks(batch, objective), **options)[1]

    return reference(batch, head).logps


def sum_logps(stats: TokenStats) -> Tensor:
    """A loss that nobody reads: the reference pass is made for its statistics."""
    return stats.logps.sum()
