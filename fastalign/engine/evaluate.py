"""Held-out loss and metrics: every example exactly once, over all ranks."""

from __future__ import annotations

import torch

from fastalign.config import BatchConfig, Config, ModelConfig
from fastalign.data.loader import TokenDataset, evaluation_steps
from fastalign.engine.methods import Objective, StepFacts, make_objective
from fastalign.engine.metrics import Stopwatch, means
from fastalign.engine.reference import frozen_copy
from fastalign.engine.setup import load_data, verified, wants_autocast
from fastalign.engine.step import Models, add_sums, look_ahead, run_head, score_reference
from fastalign.models.load import load_policy
from fastalign.parallel.mesh import World, world
from fastalign.parallel.shard import reshard, shard
from fastalign.types import PackedBatch


@torch.no_grad()
def evaluate(
    models: Models, dataset: TokenDataset, objective: Objective, batch: BatchConfig, world: World
) -> dict[str, float]:
    """Means over a dataset of the metrics of a training step, weights unchanged.

    Args:
        models: policy and, if the loss needs one, reference.
        dataset: tokenised held-out examples.
        objective: the method and its loss.
        batch: budget and prefix sharing; the step size plays no part.
        world: the ranks; each takes its share and all get the same result.

    Returns:
        ``loss`` and the method's metrics, each the sum over the dataset divided by its count.
    """
    total = torch.zeros(len(objective.metric_names), 2, dtype=torch.float64, device=world.device)
    watch, per_unit = Stopwatch(torch.device("cpu")), imitated_per_unit(dataset, objective, batch)
    for batches in evaluation_steps(dataset, batch.tokens, batch.share_prefix, world.rank, world.size):
        known = look_ahead(models, batches, objective, per_unit, world, watch)
        sums = [evaluate_batch(models, micro.to(world.device), objective, facts, world) for micro, facts in known]
        total += add_sums(sums, objective.metric_names, world.device)
    reshard(models.policy)
    return means(objective, world.sum(total))


def imitated_per_unit(dataset: TokenDataset, objective: Objective, batch: BatchConfig) -> float | None:
    """Imitated tokens per unit over the whole dataset, counted without a model; None if the loss imitates nothing."""
    if not objective.imitates:
        return None
    method, steps = objective.method, evaluation_steps(dataset, batch.tokens, batch.share_prefix)
    counts = [(method.imitated(micro), method.count(micro)) for step in steps for micro in step]
    tokens, units = map(sum, zip(*counts, strict=True))
    return max(tokens, 1) / max(units, 1)


def evaluate_batch(
    models: Models, batch: PackedBatch, objective: Objective, facts: StepFacts, world: World
) -> dict[str, torch.Tensor]:
    """``[2]`` (sum, count) of each metric of one micro-batch."""
    ref_logps = score_reference(models, batch, objective, world.device, Stopwatch(torch.device("cpu")))
    with models.precision(world.device):
        _, stats = run_head(models.policy, batch, objective.loss_fn(ref_logps, 1.0, facts), objective.method.align)
    return stats.metrics


def evaluate_model(config: Config, reference: ModelConfig | None = None) -> dict[str, float]:
    """Metrics of the model that ``config.model`` names, without training it.

    Args:
        config: the held-out rows of ``data`` are used, or all of them when none are held out.
        reference: where the reference comes from; default: the model itself, whose margins are then 0.

    Returns:
        as `evaluate`; for dpo among them ``rewards/accuracies``, ``rewards/margins`` and ``perplexity/chosen``.

    Raises:
        ValueError: settings, data or a model that cannot be used.
    """
    objective = make_objective(config.method, config.loss)
    tokenizer, dataset, held_out = load_data(config)
    with world(config.parallel) as ranks:
        autocast = wants_autocast(config.model, ranks.device)
        policy = load_policy(config.model, tokenizer=tokenizer, seed=config.run.seed).to(ranks.device)
        other = load_policy(reference, tokenizer=tokenizer).to(ranks.device) if reference else policy
        batch = verified(config, Models(policy, None, autocast), dataset, ranks.device)
        ref = shard(frozen_copy(other), ranks, bf16=autocast) if objective.needs_reference else None
        models = Models(shard(policy, ranks, bf16=autocast), ref, autocast)
        return evaluate(models, held_out or dataset, objective, batch, ranks)
