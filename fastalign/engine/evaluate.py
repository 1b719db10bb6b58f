"""Held-out loss and metrics: every example exactly once, over all ranks.

Most losses of an example are its own. Some depend on its companions in an optimizer step: the ranks of aot, the
baselines of kto and bco, and imitation terms, which are means over the tokens of a step. A model scored on 256 examples
at a time would then have another loss than in steps of 8. Such losses are evaluated in steps as training takes them:
``batch.size`` examples drawn at random, the last step what is left, and bco's baseline carried from one to the next.
So ``eval_loss`` is what training would report of these examples if the weights stood still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from fastalign.config import BatchConfig, Config
from fastalign.data.loader import Examples, epoch_order, evaluation_steps
from fastalign.engine.forward import Models, run_head
from fastalign.engine.loading import Start
from fastalign.engine.methods import Objective, objective_of
from fastalign.engine.output.metrics import means
from fastalign.engine.output.progress import stage
from fastalign.engine.prepare import Carried, first_carried, prepare
from fastalign.engine.reference.cache import Demand
from fastalign.engine.settings import check_settings, settle
from fastalign.engine.setup import load_data, load_models, require_same_rows
from fastalign.engine.timing import Stopwatch
from fastalign.engine.update import add_sums, measure_work
from fastalign.models.costs import forward_cost
from fastalign.parallel.mesh import World, world
from fastalign.parallel.shard import reshard
from fastalign.types import ForwardCost, PackedBatch

ORDER_SEED = 0
"""Of the companions of an example: the same in all evaluations, so that these can be compared."""


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
        batch: budget and prefix sharing; and the size of a step, for losses that depend on it.
        world: the ranks; each takes its share and all get the same result.
        carried: what training has carried so far; it is left as it is.
        between: called on all ranks before every step; what it raises ends the evaluation.

    Returns:
        ``loss`` and the method's metrics, each the sum over the dataset divided by its count.
    """
    total = torch.zeros(len(objective.metric_names), 2, dtype=torch.float64, device=world.device)
    watch, carried, done = Stopwatch(torch.device("cpu")), dict(carried or first_carried()), 0
    try:
        with stage("evaluating", len(dataset), shown=world.is_main) as tell:
            for batches in steps_of(dataset, objective, batch, world, forward_cost(models.policy)):
                between()
                work, sums = measure_work(batches, world, 0), []
                for micro in prepare(models, batches, objective, work, world, watch, carried):
                    with models.precision(world.device):
                        sums.append(run_head(models, micro, objective)[1])
                    done += micro.num_examples * world.data.size  # the other ranks have about as many
                    tell(min(done, len(dataset)))
                total += add_sums(sums, objective.metric_names, world.device)
    finally:
        reshard(models.policy)
    return means(objective, world.data.sum(total))


def metrics_of(objective: Objective, rewards: Sequence[str] = ()) -> list[str]:
    """What an evaluation gives, ``rewards`` being the names of what scores completions."""
    if objective.on_policy:
        return ["reward", *(f"rewards/{name}/mean" for name in rewards)]
    return [*means(objective, torch.ones(len(objective.metric_names), 2))]


def steps_of(
    dataset: Examples, objective: Objective, batch: BatchConfig, world: World, cost: ForwardCost
) -> Iterator[list[PackedBatch]]:
    """This rank's micro-batches of every step: as training takes them where that matters, else packed more densely."""
    ours = batch.budget, batch.share_prefix, world.data.rank, world.data.size
    if not objective.depends_on_step:
        return evaluation_steps(dataset, *ours, cost=cost)
    order = epoch_order(len(dataset), ORDER_SEED, epoch=0)
    return evaluation_steps(dataset, *ours, size=batch.size, cost=cost, order=order)


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
    objective = objective_of(config)
    if objective.on_policy:
        raise ValueError(f"{config.method} is evaluated in its own run (data.eval_path and run.eval_every)")
    check_settings(config)
    tokenizer, dataset, held_out = load_data(config)
    with world(config.parallel) as ranks:
        config = settle(config, ranks.device)
        require_same_rows(ranks, dataset, held_out)
        examples = held_out or dataset
        demands = [Demand(examples, range(len(examples)), len(examples))]
        loaded = load_models(Start(config, objective, tokenizer, demands, ranks))
        return evaluate(loaded.models, loaded.data[0], objective, loaded.batch, ranks)
