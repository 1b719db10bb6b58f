"""Held-out loss and metrics: every example exactly once, over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fastalign.config import BatchConfig, Config
from fastalign.data.loader import Examples, evaluation_steps
from fastalign.engine.filling import Demand
from fastalign.engine.heads import Models, run_head
from fastalign.engine.method import Objective, StepFacts
from fastalign.engine.methods import make_objective
from fastalign.engine.metrics import Stopwatch, means
from fastalign.engine.prelude import Carried, look_ahead, score_reference
from fastalign.engine.progress import stage
from fastalign.engine.setup import check_settings, load_data, load_models, require_same_rows, settle
from fastalign.engine.step import add_sums
from fastalign.models.costs import forward_cost
from fastalign.parallel.mesh import World, world
from fastalign.parallel.shard import reshard
from fastalign.types import PackedBatch


@torch.no_grad()
def evaluate(
    models: Models,
    dataset: Examples,
    objective: Objective,
    batch: BatchConfig,
    world: World,
    carried: Carried | None = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over a dataset of the metrics of a training step, weights unchanged.

    Args:
        models: policy and, if the loss needs one, reference.
        dataset: tokenised held-out examples.
        objective: the method and its loss.
        batch: budget and prefix sharing; the step size plays no part.
        world: the ranks; each takes its share and all get the same result.
        carried: what training has carried so far, left as it is; unpaired losses find their baseline per 256 examples.
        between: called on all ranks before every 256 examples; what it raises ends the evaluation.

    Returns:
        ``loss`` and the method's metrics, each the sum over the dataset divided by its count.
    """
    total = torch.zeros(len(objective.metric_names), 2, dtype=torch.float64, device=world.device)
    watch, per_unit = Stopwatch(torch.device("cpu")), imitated_per_unit(dataset, objective, batch)
    cost = forward_cost(models.policy)
    done = 0
    try:
        with stage("evaluating", len(dataset), shown=world.is_main) as tell:
            ours = batch.budget, batch.share_prefix, world.rank, world.size
            for batches in evaluation_steps(dataset, *ours, cost=cost):
                between()
                known = look_ahead(models, batches, objective, per_unit, world, watch, carried or Carried())
                sums = []
                for micro, facts in known:
                    sums.append(evaluate_batch(models, micro.to(world.device), objective, facts, world))
                    done += micro.num_examples * world.size  # the other ranks have about as many
                    tell(min(done, len(dataset)))
                total += add_sums(sums, objective.metric_names, world.device)
    finally:
        reshard(models.policy)
    return means(objective, world.sum(total))


def imitated_per_unit(dataset: Examples, objective: Objective, batch: BatchConfig) -> float | None:
    """Imitated tokens per unit over the whole dataset, counted without a model; None if the loss imitates nothing."""
    if not objective.imitates:
        return None
    method, steps = objective.method, evaluation_steps(dataset, batch.budget, batch.share_prefix)
    counts = [(method.imitated(micro), objective.count(micro)) for step in steps for micro in step]
    tokens, units = map(sum, zip(*counts, strict=True))
    return max(tokens, 1) / max(units, 1)


def evaluate_batch(
    models: Models, batch: PackedBatch, objective: Objective, facts: StepFacts, world: World
) -> dict[str, torch.Tensor]:
    """``[2]`` (sum, count) of each metric of one micro-batch."""
    watch = Stopwatch(torch.device("cpu"))
    batch = replace(batch, ref_logps=score_reference(models, batch, objective, world.device, watch))
    with models.precision(world.device):
        return run_head(models, batch, objective, 1.0, facts)[1]


def evaluate_model(config: Config) -> dict[str, float]:
    """Metrics of the model that ``config.model`` names, without training it.

    Args:
        config: the held-out rows of ``data`` are used, or all of them when none are held out; ``reference.path`` names
            the reference, by default the model itself, whose margins are then 0.

    Returns:
        as `evaluate`; for dpo among them ``rewards/accuracies``, ``rewards/margins`` and ``perplexity/chosen``.

    Raises:
        ValueError: settings, data or a model that cannot be used.
    """
    objective = make_objective(config.method, config.loss)
    check_settings(config)
    tokenizer, dataset, held_out = load_data(config)
    with world(config.parallel) as ranks:
        config = settle(config, ranks.device)
        require_same_rows(ranks, dataset, held_out)
        examples = held_out or dataset
        demands = [Demand(examples, range(len(examples)), len(examples))]
        models, (data,), config = load_models(config, objective, tokenizer, demands, ranks)
        return evaluate(models, data, objective, config.batch, ranks)
