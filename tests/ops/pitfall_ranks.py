"""``pitfall_ranks.py CHECK``: one of the checks below on two forked gloo ranks; see ``test_pitfalls.py``."""

import sys
import tempfile
from itertools import product

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastalign.ops import linear_logps, linear_loss
from fastalign.testing import linear_example, outputs_and_grads

N, D, V, SIZE = 24, 7, 53, 2


def close(actual, expected, name):
    assert (actual - expected).abs().max().item() <= 1e-11 * max(1, expected.abs().max().item()), name


def same_everywhere(x):
    everyone = [torch.empty_like(x) for _ in range(SIZE)]
    dist.all_gather(everyone, x.detach().contiguous())
    assert all(torch.equal(x, other) for other in everyone)


class Model(nn.Module):
    """A trunk and a head, whose weight the fused loss reads inside ``forward``, where the hooks have gathered it."""

    def __init__(self, vocab):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(D, D, dtype=torch.float64)
        self.head = nn.Linear(D, vocab, dtype=torch.float64)

    def forward(self, x, labels, op):
        return op(self.trunk(x).tanh(), self.head.weight, labels, bias=self.head.bias)


def nll(hidden, weight, labels, **options):
    return linear_loss(hidden, weight, labels, lambda stats: -stats.logps.sum() / N, **options)[0]


def sharded_head_gathered():
    """Three steps of SGD on shares of the rows, and an evaluation before and after each, as in one process."""
    for vocab in (V, 1):  # a head of one row leaves the second rank an empty shard
        new = torch.Generator().manual_seed(1)
        x, labels = torch.randn(N, D, dtype=torch.float64, generator=new), torch.randint(vocab, (N,), generator=new)
        share = slice(N // SIZE * dist.get_rank(), N // SIZE * (dist.get_rank() + 1))
        alone, sharded = Model(vocab), fully_shard(Model(vocab))
        descents = [torch.optim.SGD(model.parameters(), 0.5) for model in (alone, sharded)]
        for _ in range(3):
            with torch.no_grad():
                logps = sharded(x[share], labels[share], linear_logps)
                close(logps, alone(x, labels, linear_logps)[share], "evaluation")
            loss = sharded(x[share], labels[share], nll) * SIZE  # FSDP averages over the ranks
            for descent, total in zip(descents, (alone(x, labels, nll), loss), strict=True):
                total.backward()
                descent.step()
                descent.zero_grad()
        for (name, ours), theirs in zip(sharded.named_parameters(), alone.parameters(), strict=True):
            close(ours.full_tensor(), theirs, name)
            same_everywhere(ours.full_tensor())


def sharded_head_split():
    """The sharded parameter itself, a slice of the vocabulary, in training and in evaluation."""
    mesh = init_device_mesh("cpu", (SIZE,))
    for vocab in (V, 1):
        x = linear_example("plain", N, D, vocab, torch.float64)
        expected = outputs_and_grads(linear_logps(**x.tensors, labels=x.labels), x)
        weight = nn.Parameter(distribute_tensor(x.tensors["weight"].detach(), mesh, [Shard(0)]))
        hidden = x.tensors["hidden"].detach().requires_grad_()
        logps = linear_logps(hidden, weight, x.labels)
        close(logps, expected["logps"], "training")
        (logps * x.grad_logps).sum().backward()
        assert weight.grad.placements == (Shard(0),)
        close(weight.grad.full_tensor(), expected["d_weight"], "d weight")
        close(hidden.grad, expected["d_hidden"], "d hidden")
        same_everywhere(hidden.grad)
        with torch.no_grad():
            close(linear_logps(hidden, weight, x.labels), expected["logps"], "evaluation")


def mixed_dtensors():
    """Every input a plain tensor or a DTensor; gradients are placed like their inputs; contradictions are refused."""
    mesh = init_device_mesh("cpu", (SIZE,))
    x = linear_example("bias", N, D, V, torch.float64)
    expected = outputs_and_grads(linear_logps(**x.tensors, labels=x.labels), x)
    own = slice(27 * dist.get_rank(), 27 * (dist.get_rank() + 1))

    def placed(name, placement):
        whole = x.tensors[name].detach()
        return (distribute_tensor(whole, mesh, [placement]) if placement else whole.clone()).requires_grad_()

    for kinds in ((None, Shard(0)), (Replicate(), Shard(0)), (Replicate(), Replicate())):
        hidden, weight, bias = placed("hidden", kinds[0]), placed("weight", kinds[1]), placed("bias", kinds[1])
        logps = linear_logps(hidden, weight, x.labels, bias=bias)
        close(logps, expected["logps"], f"logps {kinds}")
        (logps * x.grad_logps).sum().backward()
        for name, leaf in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            assert type(leaf.grad) is type(leaf.detach()) and leaf.grad.shape == leaf.shape, name
            grad = leaf.grad.full_tensor() if hasattr(leaf.grad, "full_tensor") else leaf.grad
            close(grad, expected[f"d_{name}"], f"{name} {kinds}")
    plain_slice = x.tensors["bias"].detach()[own]
    logps = linear_logps(placed("hidden", None), placed("weight", Shard(0)), x.labels, bias=plain_slice)
    close(logps, expected["logps"], "a plain slice of the bias")
    for hidden, weight, bias in (
        (placed("hidden", None), placed("weight", Shard(1)), None),
        (placed("hidden", Shard(0)), placed("weight", Shard(0)), None),
        (placed("hidden", None), placed("weight", Shard(0)), placed("bias", Replicate())),
        (placed("hidden", None), placed("weight", Shard(0)), placed("bias", None)),
    ):
        try:
            linear_logps(hidden, weight, x.labels, bias=bias)
            raise AssertionError("placements that contradict each other were taken")
        except ValueError as error:
            assert "weight" in str(error) or "hidden" in str(error) or "bias" in str(error), error


def split_vocabulary():
    """Labels on both sides of every boundary, banned columns or smoothing, an empty shard: what one rank has."""
    upstream = torch.randn(3, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for sizes, smoothing in product(((30, 23), (53, 0), (0, 53), (1, 52)), (0.0, 0.1)):
        x = linear_example("bias", N, D, V, torch.float64)
        if not smoothing:  # which spreads over every column
            x.tensors["bias"].data[7] = x.tensors["bias"].data[40] = -torch.inf
        labels = torch.tensor([0, V - 1, max(sizes[0] - 1, 0), min(sizes[0], V - 1), 1, 41]).repeat(N // 6)
        own = slice(sum(sizes[: dist.get_rank()]), sum(sizes[: dist.get_rank() + 1]))
        mine = {name: y.detach()[own if name != "hidden" else slice(None)].clone() for name, y in x.tensors.items()}
        mine = {name: y.requires_grad_() for name, y in mine.items()}
        options = {"labels": labels, "temperature": 0.7, "label_smoothing": smoothing, "entropy": True, "lse": True}
        ours, whole = (
            torch.stack(linear_logps(**y, **options, process_group=group))
            for y, group in ((mine, dist.group.WORLD), (x.tensors, None))
        )
        close(ours, whole, f"statistics {sizes}")
        same_everywhere(ours)
        made, expected = (
            torch.autograd.grad((y * upstream).sum(), list(leaves.values()))
            for y, leaves in ((ours, mine), (whole, x.tensors))
        )
        for name, grad, oracle in zip(mine, made, expected, strict=True):
            part = oracle if name == "hidden" else oracle[own]
            if part.numel():
                close(grad, part, f"{name} {sizes}")
        same_everywhere(made[0])


def work(rank, check, store):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
    check()
    dist.destroy_process_group()


CHECKS = {f.__name__: f for f in (sharded_head_gathered, sharded_head_split, mixed_dtensors, split_vocabulary)}

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (CHECKS[sys.argv[1]], f"{folder}/store"), nprocs=SIZE, start_method="fork")
    print("agreed")
