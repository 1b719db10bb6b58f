"""``policy_ranks.py SIZE``: losses straight from logits split by columns over SIZE forked gloo ranks give what one rank
gives: loss, statistics, gradient, number of collectives."""

import sys
import tempfile
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vocab_ranks import SHARDS, V, close, counted, counts, own, same_bits_everywhere

from fastalign.losses.preference import dpo
from fastalign.ops import policy_loss, preference_loss

N = 60
CU_SEQLENS = torch.tensor([0, 9, 9, 20, 33, 50, 60])
CHOICES = {
    "sft": {"loss": "sft"},
    "ppo": {"loss": "ppo", "dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.01},
    "cispo": {"loss": "cispo", "clip_low": None, "kl_coef": 0.1, "kl_estimator": "k2"},
    "sapo": {"loss": "sapo", "entropy": True},
}


def rows(dtype):
    """logits, labels, and what is given per row; masked logits are NaN."""
    new = torch.Generator().manual_seed(5)
    logits, labels = 3 * torch.randn(N, V, generator=new), torch.randint(V, (N,), generator=new)
    labels[torch.rand(N, generator=new) < 0.3] = -100
    logits[labels == -100] = torch.nan
    old, ref = -3 - torch.rand(2, N, generator=new)
    given = {"old_logps": old, "advantages": torch.randn(N, generator=new), "ref_logps": ref}
    return logits.to(dtype), labels, {name: x.to(dtype) for name, x in given.items()}


def close_in(dtype, actual, expected, name):
    if dtype == torch.float64:
        return close(actual, expected, name)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6), name


def compare(op, logits, sizes, dtype, name, inplace=None):
    """The loss, its other outputs, and twice its gradient, from this rank's columns and from all."""
    results = []
    for columns, group in ((own(sizes), dist.group.WORLD), (slice(None), None)):
        x = logits[:, columns].clone().requires_grad_()
        y = x if inplace is None or group is None else x * 1
        loss, others = op(y, process_group=group, **({} if y is x else {inplace: True}))
        grads = [torch.autograd.grad(loss * 3, [x], retain_graph=y is x)[0]]
        if y is x:
            grads.append(torch.autograd.grad(loss * 3, [x])[0])
        results.append((loss.detach(), grads, others))
    (loss, grads, others), (whole, (expected, _), single) = results
    close_in(dtype, loss, whole, name)
    for grad in grads:
        if grad.numel():
            close_in(dtype, grad, expected[:, own(sizes)], f"{name} gradient")
    same_bits_everywhere(loss)
    return others, single


def check_policy(name, dtype, sizes, **options):
    logits, labels, given = rows(dtype)
    settings = {**CHOICES[name], "softcap": 9.0, "temperature": 0.5 + torch.arange(N) / N}
    given = {k: x for k, x in given.items() if k != "ref_logps" or "kl_coef" in settings}
    given = {} if name == "sft" else given
    op = partial(policy_loss, labels=labels, **given, **settings)
    stats, single = compare(op, logits, sizes, dtype, f"{name} {sizes}", **options)
    close_in(dtype, stats.logps, single.logps, "logps")
    assert torch.equal(stats.is_top1, single.is_top1) and stats.metrics.keys() == single.metrics.keys()
    for key, sums in stats.metrics.items():
        close_in(dtype, sums, single.metrics[key], key)
    if single.entropy is not None:
        close_in(dtype, stats.entropy, single.entropy, "entropy")
    same_bits_everywhere(stats.logps)
    assert counts() == ((2, 0) if len(sizes) > 1 else (0, 0))


def check_preference(dtype, sizes, **options):
    logits, labels, given = rows(dtype)
    op = partial(preference_loss, labels=labels, cu_seqlens=CU_SEQLENS, ref_logps=given["ref_logps"], loss_fn=dpo)
    metrics, single = compare(op, logits, sizes, dtype, f"dpo {sizes}", **options)
    assert metrics.keys() == single.keys()
    assert counts() == ((2, 0) if len(sizes) > 1 else (0, 0))


def check_refusals(sizes):
    logits, labels, _ = rows(torch.float32)
    mine, labels[0] = logits[:, own(sizes)], V
    for op in (
        partial(policy_loss, loss="sft"),
        partial(preference_loss, cu_seqlens=CU_SEQLENS, ref_logps=None, loss_fn=dpo),
    ):
        try:
            op(mine, labels, process_group=dist.group.WORLD)
            raise AssertionError("a label outside the vocabulary was taken")
        except ValueError as error:
            assert f"label {V} at row 0 is neither in [0, {V})" in str(error), error
    counts()


def work(rank, size, store):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for name in ("all_gather", "all_reduce"):
        counted(name)
    for sizes in SHARDS[size]:
        for dtype in (torch.float64, torch.float32):
            for name in CHOICES:
                check_policy(name, dtype, sizes)
            check_policy("ppo", dtype, sizes, inplace="inplace")
            check_preference(dtype, sizes)
            check_preference(dtype, sizes, inplace="inplace_backward")
        check_refusals(sizes)
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, f"{folder}/store"), nprocs=size, start_method="fork")
    print("agreed")
