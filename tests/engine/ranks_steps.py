"""Run under torchrun: a sharded step over all ranks has the metrics and gradients of one process."""

import sys

import steps

from fastalign.config import ParallelConfig
from fastalign.data.loader import rank_share
from fastalign.engine.heads import Models
from fastalign.engine.methods import METHODS
from fastalign.parallel.mesh import World, world
from fastalign.parallel.shard import shard
from fastalign.types import ForwardCost

COST = ForwardCost(per_token=30.0, per_attended=1.0, per_scored=20.0)


def check(method: str, losses: list[str], ranks: World) -> None:
    alone, models = steps.make_models(method), steps.make_models(method)
    sharded = Models(shard(models.policy, ranks), shard(models.reference, ranks), models.autocast)
    for number, loss in enumerate(losses):
        examples = steps.make_examples(method, loss)
        examples = examples[:1] if number == 0 else examples  # once one rank has nothing to do
        want = steps.run_step(alone, steps.packed(examples, 10**6, False), method, loss)
        mine = rank_share(examples, 50, True, ranks.rank, ranks.size, COST)
        steps.assert_same_step(steps.run_step(sharded, mine, method, loss, ranks), want, f"{method} {loss}")
        print("agreed on", method, loss, file=sys.stderr)


if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        for method in METHODS:
            check(method, [loss for name, loss in steps.OBJECTIVES if name == method], ranks)
