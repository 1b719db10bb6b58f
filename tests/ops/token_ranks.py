"""``token_ranks.py SIZE``: logits split by columns over SIZE forked gloo ranks give what one rank gives: values,
gradients, number of collectives."""

import sys
import tempfile

import disagreements
import draws_together
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from vocab_ranks import SHARDS, V, close, counted, counts, own, same_bits_everywhere

from fastalign.ops import dispatch, token_logps
from fastalign.ops.token_logps import reference
from fastalign.testing import CASES, HIDDEN_ONLY, assert_matches, logits_example, outputs_and_grads

N = 61
CHOSEN = [case for case, special in CASES.items() if not special.keys() & set(HIDDEN_ONLY)]
BACKENDS = [name for name in ("torch", "cpp") if not dispatch.missing(name)]


def slice_of(x, columns, pitch=0):
    """The rank's columns as leaves, in rows that NaN follows."""
    room = torch.full((N, columns.stop - columns.start + pitch), torch.nan, dtype=x.tensors["logits"].dtype)
    mine = room[:, : columns.stop - columns.start].copy_(x.tensors["logits"].detach()[:, columns])
    return type(x)({"logits": mine.requires_grad_()}, x.labels, x.options, x.grad_logps, x.grad_entropy)


def split(x, **options):
    result = token_logps(**x.tensors, labels=x.labels, **x.options, process_group=dist.group.WORLD, **options)
    return outputs_and_grads(result, x)


def whole(op, x):
    result = op(**x.tensors, labels=x.labels, **x.options)
    return outputs_and_grads(result, x)


def check_values(case, sizes, backend):
    x, columns = logits_example(case, N, V, torch.float64), own(sizes)
    single, found = whole(token_logps, x), split(slice_of(x, columns, pitch=3), backend=backend)
    assert single.keys() == found.keys()
    for name, value in found.items():
        if value.numel():
            close(value, single[name][:, columns] if name == "d_logits" else single[name], f"{case} {sizes} {name}")
        if name != "d_logits":
            same_bits_everywhere(value)
    counts()


def check_narrow(case, dtype, sizes):
    """Errors within twice those of eager code on one rank, both against float64."""
    x, columns = logits_example(case, N, V, dtype), own(sizes)
    rival, exact = (whole(reference, y) for y in (x, x.to(torch.float64)))
    for name, value in split(slice_of(x, columns)).items():
        eager, oracle = (found[name][:, columns] if name == "d_logits" else found[name] for found in (rival, exact))
        assert_matches(value, eager, oracle, name=f"{case} {name}")


def check_banned(sizes):
    """Padded columns are -inf; so may be a whole shard, and it makes no NaN."""
    x, columns = logits_example("objectives", N, V, torch.float64), own(sizes)
    x.options.pop("softcap")  # under which -inf is finite
    x.options.pop("label_smoothing")  # which makes every log-prob -inf
    for start, stop in ((0, sizes[0]), (V - 3, V)):
        y = type(x)({"logits": x.tensors["logits"].detach().clone()}, x.labels.clone(), x.options)
        y.tensors["logits"][:, start:stop] = -torch.inf
        y.labels[(y.labels >= start) & (y.labels < stop)] = stop % V
        y = type(x)({"logits": y.tensors["logits"].requires_grad_()}, y.labels, x.options, x.grad_logps, x.grad_entropy)
        single, found = whole(token_logps, y), split(slice_of(y, columns))
        for name, value in found.items():
            if value.numel():
                close(value, single[name][:, columns] if name == "d_logits" else single[name], f"banned {name}")
    smooth = token_logps(
        slice_of(y, columns).tensors["logits"], y.labels, label_smoothing=0.1, process_group=dist.group.WORLD
    )
    assert (smooth[y.labels >= 0] == -torch.inf).all() and not smooth[y.labels < 0].any()
    counts()


def check_counts(sizes):
    """One exchange of shapes and one table per call, whatever it returns; nothing in the backward."""
    x = slice_of(logits_example("objectives", N, V, torch.float32), own(sizes))
    for options in ({}, {"entropy": True, "lse": True, "label_smoothing": 0.1}):
        found = token_logps(**x.tensors, labels=x.labels, **options, process_group=dist.group.WORLD)
        assert counts() == ((2, 0) if len(sizes) > 1 else (0, 0))
        sum(value.sum() for value in (found if isinstance(found, tuple) else (found,))).backward()
        assert counts() == (0, 0)
    before = x.tensors["logits"].grad
    inplace = x.tensors["logits"].detach().clone().requires_grad_()
    held = inplace * 1
    found = token_logps(held, x.labels, **options, process_group=dist.group.WORLD, inplace_backward=True)
    sum(value.sum() for value in found).backward()
    assert inplace.grad.shape == before.shape
    counts()


def check_refusals(sizes):
    x = slice_of(logits_example("plain", N, V, torch.float32), own(sizes))
    logits, labels = x.tensors["logits"], x.labels.clone()
    labels[3] = V
    rows = N - dist.get_rank() % 2
    swapped = x.labels.roll(dist.get_rank())
    refused = {f"label {V} at row 3 is neither in [0, {V})": (logits, labels)}
    if len(sizes) > 1:
        refused |= {
            "same number of rows of logits": (logits[:rows], x.labels[:rows]),
            "labels differ": (logits, swapped),
        }
    for message, arguments in refused.items():
        try:
            token_logps(*arguments, process_group=dist.group.WORLD)
            raise AssertionError(f"taken, though {message}")
        except ValueError as error:
            assert message in str(error), error
    counts()


def work(rank, size, store):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for name in ("all_gather", "all_reduce"):
        counted(name)
    for sizes in SHARDS[size]:
        for case in CHOSEN:
            for backend in BACKENDS:
                check_values(case, sizes, backend)
        for dtype in (torch.float32, torch.bfloat16):
            for case in ("objectives", "smoothed_level"):
                check_narrow(case, dtype, sizes)
        counts()
        check_counts(sizes)
        check_refusals(sizes)
        draws_together.check(sizes)
        if size > 1 and 0 < sizes[0] < V:
            check_banned(sizes)
    if size == 2:
        disagreements.check()
        counts()
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, f"{folder}/store"), nprocs=size, start_method="fork")
    print("agreed")
