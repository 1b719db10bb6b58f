"""Log-probs under the frozen reference: the same packed batch, attention and head as the policy's pass.

They are data: computed before the first step when that is less work than with every batch, kept in a cache that later
runs read, after which no reference need be in memory.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastalign.config import BatchConfig, Config
from fastalign.data.loader import Examples
from fastalign.data.ref_cache import Referenced
from fastalign.engine.forward import Models, chunks, wants_autocast
from fastalign.engine.methods import Objective
from fastalign.engine.reference.cache import TEMPERATURE, Demand, Filling, Score, check_agreement, fill, open_cache
from fastalign.engine.reference.fingerprint import hash_weights
from fastalign.models.lora import WithoutAdapter, why_not_its_own_reference
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.parallel.mesh import World
from fastalign.parallel.shard import reshard, shard
from fastalign.types import PackedBatch, TokenStats

log = logging.getLogger(__name__)


def starting_reference(policy: Policy, objective: Objective, *, share: bool) -> Policy | WithoutAdapter:
    """The policy as it is now, before it is sharded or trained: itself without its adapter where that is exact.

    Args:
        policy: plain; trained later.
        objective: of whole distributions, which two models make at once, needs a copy.
        share: see `frozen_copy`.
    """
    reason = why_not_its_own_reference(policy)
    if reason is None and objective.head == "distributions":
        reason = "the loss compares both models' whole distributions at once"
    if reason is None:
        log.info("reference: the policy without its adapter (nothing else trains, and it starts at zero)")
        return WithoutAdapter(policy)
    shared = " of what trains; the frozen weights are shared" if share and policy.adapted is not None else ""
    log.info("reference: a frozen copy%s (%s)", shared, reason)
    return frozen_copy(policy, share=share)


def frozen_copy(policy: Policy, *, share: bool = False) -> Policy:
    """The policy as it is now, for reading only; taken before it is sharded or trained.

    It stays in the policy's mode: quantised layers compute otherwise, and repack their weights, in evaluation. With
    ``share`` its frozen parameters are the policy's own, which sharding would tear apart.
    """
    shared = {id(p): p for p in policy.parameters() if share and not p.requires_grad}
    reference = copy.deepcopy(policy, shared)
    return reference.requires_grad_(False)


@torch.no_grad()
def reference_logps(reference: Policy | WithoutAdapter, batch: PackedBatch, objective: Objective) -> Tensor:
    """``[N]`` fp32 log-probs of the batch's labels.

    The head is cut into the chunks of the policy's pass, so that equal weights give equal bits and the first margins
    are exactly 0.
    """

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> TokenStats:
        return linear_loss(
            hidden, weight, labels, sum_logps, temperature=TEMPERATURE, **chunks(batch, objective), **options
        )[1]

    return reference(batch, head).logps


def sum_logps(stats: TokenStats) -> Tensor:
    """A loss that nobody reads: the reference pass is made for its statistics."""
    return stats.logps.sum()


def with_reference(
    config: Config, objective: Objective, policy: Policy, source: Policy | None, demands: Sequence[Demand], world: World
) -> tuple[Models, list[Examples]]:
    """Policy and reference, sharded, and the data; or the policy alone, and data that bring the reference's log-probs.

    Args:
        config: budget, prefix sharing and where the cache is.
        objective: what the loss reads; whole distributions are never kept.
        policy: on this rank's device, not yet sharded.
        source: the reference's weights, alike; the policy itself when it is the policy as it starts; None without one.
        demands: the data, and how often each example will be read.
        world: the ranks, all of which call this.
    """
    autocast = wants_autocast(config.model, world.device)
    from_disk = config.reference.path is not None or config.model.path is not None
    filling, digest = None, hash_weights(source, world) if source is not None and from_disk else None
    if source is not None and objective.head == "logps":
        filling = open_cache(config, source, demands, world, autocast=autocast, weights=digest)
    reference: Policy | WithoutAdapter | None = source
    if source is policy and filling is None:
        reference = starting_reference(policy, objective, share=world.mesh is None)
    if isinstance(reference, Policy) and reference is not policy:
        shard(reference, world, bf16=autocast)
    models = Models(shard(policy, world, bf16=autocast), None, autocast, digest)
    if filling is None or source is None:
        return replace(models, reference=reference), [demand.dataset for demand in demands]
    return models, fill_cache(filling, replace(models, policy=source), objective, config.batch, world)


def fill_cache(
    filling: Filling, models: Models, objective: Objective, batch: BatchConfig, world: World
) -> list[Examples]:
    """The data with log-probs under ``models.policy``, computed now as far as the cache lacks them."""
    score = scorer(models, objective, world)
    fill(filling, score, batch, world)
    referenced = [Referenced(demand.dataset, filling.store) for demand in filling.demands]
    first = referenced[0].fetch(list(filling.demands[0].indices[: batch.size]))
    rounding = models.policy.rounding
    assert rounding is not None, "verify_packed measures what the cached log-probs are held to"
    check_agreement(first, score, batch, world, rounding)
    reshard(models.policy)
    return [*referenced]


def scorer(models: Models, objective: Objective, world: World) -> Score:
    """Log-probs under ``models.policy``, as the training pass of an objective computes them."""

    def score(batch: PackedBatch) -> Tensor:
        with models.precision(world.device):
            return reference_logps(models.policy, batch, objective)

    return score
