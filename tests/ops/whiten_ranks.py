"""Run under torchrun with three ranks: uneven shares, one empty, are whitened as one process would whiten them all."""

import sys

import torch
import torch.distributed as dist

from fastalign.ops import whiten
from fastalign.ops.whiten import moments


def main() -> None:
    dist.init_process_group("gloo")
    world = dist.group.WORLD
    new = torch.Generator().manual_seed(0)
    x, mask = torch.randn(50, generator=new) + 7, torch.rand(50, generator=new) < 0.6
    x[~mask] = torch.nan
    shares = [11, 0, 39]
    mine = [whole.split(shares)[dist.get_rank()] for whole in (x, mask)]
    gathered = [torch.empty(3, dtype=torch.float64) for _ in shares]
    dist.all_gather(gathered, moments(*mine, process_group=world))
    assert all(torch.equal(gathered[0], other) for other in gathered), "every rank has the same bits"
    torch.testing.assert_close(gathered[0], moments(x, mask), rtol=1e-12, atol=0)
    for settings in ({}, {"unbiased": True, "eps": 1e-8, "eps_in": "variance"}):
        expected = whiten(x, mask, **settings).split(shares)[dist.get_rank()]
        torch.testing.assert_close(whiten(*mine, **settings, process_group=world), expected)
        if mine[0].numel():
            assert not torch.allclose(whiten(*mine, **settings), expected), "alone, a share has other statistics"
    print("agreed", file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
