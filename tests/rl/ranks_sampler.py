"""Run under torchrun: ranks with shards of a policy sample what one process does, each other prompts and numbers."""

import copy
import sys
from pathlib import Path

import torch
from sampling import in_order, make_policy, make_prompts, make_sampler, told

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from counting import Collectives

from fastalign.config import ParallelConfig
from fastalign.ops import linear_logps
from fastalign.parallel.mesh import world
from fastalign.parallel.shard import shard
from fastalign.rl import backends
from fastalign.rl.exact import batch_of, probe
from fastalign.rl.sampler import Stops

if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        alone = copy.deepcopy(make_policy())
        expected = told(make_sampler(alone, Stops(frozenset(range(40)))).generate(make_prompts(3, 20, 7), 2, 5))
        sharded = shard(copy.deepcopy(alone), ranks)
        sampler = make_sampler(sharded, Stops(frozenset(range(40))))
        assert probe(sampler) is None
        mine = make_prompts(3, 20, 7)[
            ranks.rank :: ranks.size
        ]  # of two: two prompts and one; of four: one each, and none
        for _ in range(2):
            found = list(sampler.generate(mine, 2, 5))
            assert told(found) == {key: expected[key] for key in told(found)} and len(found) == 2 * len(mine)
            assert all(hasattr(p, "full_tensor") for p in sharded.parameters())  # shards again
        lent = backends.make_sampler(sharded, sampler.settings, None, lent=copy.deepcopy(alone))
        lent.sampler.stops = sampler.stops
        assert lent.exact
        with torch.no_grad():
            for one in (alone, sharded):
                for parameter in one.parameters():
                    parameter.mul_(1.5)
        lent.sync(sharded, 1)
        now = told(make_sampler(alone, sampler.stops).generate(make_prompts(3, 20, 7), 2, 5))
        mine = make_prompts(3, 20, 7)[: 1 + ranks.rank]
        with Collectives() as counted:
            found = told(lent.generate(mine, 2, 5))
        assert found == {key: now[key] for key in found} != {key: expected[key] for key in found}
        assert len(found) == 2 * len(mine) and not counted.calls  # each rank by itself
        rollouts = in_order(sampler.generate(make_prompts(4, seed=1), 2, 0))
        sharded(batch_of(rollouts), linear_logps).sum().backward()  # and trains as before
        assert all(p.grad is not None for p in sharded.parameters())
    print("agreed", file=sys.stderr)
