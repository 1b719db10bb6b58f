"""Run under torchrun: ranks with shards of a policy sample what one process does, each other prompts and numbers."""

import copy
import sys

from sampling import in_order, make_policy, make_prompts, make_sampler, told

from fastalign.config import ParallelConfig
from fastalign.ops import linear_logps
from fastalign.parallel.mesh import world
from fastalign.parallel.shard import shard
from fastalign.rl.exact import batch_of, probe
from fastalign.rl.sampler import Stops

if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        alone = make_policy()
        expected = told(make_sampler(alone, Stops(frozenset(range(40)))).generate(make_prompts(3, 20, 7), 2, 5))
        sharded = shard(copy.deepcopy(alone), ranks)
        sampler = make_sampler(sharded, Stops(frozenset(range(40))))
        assert probe(sampler) is None
        mine = make_prompts(3, 20, 7)[ranks.rank :: 2]  # two prompts and one
        for _ in range(2):
            found = list(sampler.generate(mine, 2, 5))
            assert told(found) == {key: expected[key] for key in told(found)} and len(found) == 2 * len(mine)
            assert all(hasattr(p, "full_tensor") for p in sharded.parameters())  # shards again
        rollouts = in_order(sampler.generate(make_prompts(4, seed=1), 2, 0))
        sharded(batch_of(rollouts), linear_logps).sum().backward()  # and trains as before
        assert all(p.grad is not None for p in sharded.parameters())
    print("agreed", file=sys.stderr)
