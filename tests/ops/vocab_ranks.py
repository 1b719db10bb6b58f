"""``vocab_ranks.py SIZE``: a head split over SIZE forked gloo ranks equals the head of one rank, in values, gradients
and number of collectives."""

import sys
import tempfile
from collections import Counter

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ties import few_values
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastalign.ops import linear_logps, linear_loss, policy_loss
from fastalign.ops.linear_logps import reference
from fastalign.testing import assert_matches, linear_example, outputs_and_grads

N, D, V = 61, 19, 53
SHARDS = {
    1: [(53,)],
    2: [(30, 23), (53, 0)],
    3: [(20, 0, 33), (0, 52, 1)],
    4: [(13, 14, 13, 13), (0, 26, 0, 27)],
}
CU_PAIRS = torch.tensor([0, 9, 9, 20, 33, 50, 61])
REFERENCE = torch.linspace(-30, 10, 6)
COUNTS = Counter()


def counted(name):
    """Counts what the package asks of ``torch.distributed``; the checks below go around it."""
    original = getattr(dist, name)

    def collective(*args, **kwargs):
        COUNTS[name] += 1
        return original(*args, **kwargs)

    setattr(dist, name, collective)


def counts():
    """Collectives since the last call, asserted to be the same on every rank."""
    mine = COUNTS["all_gather"], COUNTS["all_reduce"]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    assert everyone == [mine] * len(everyone), everyone
    COUNTS.clear()
    return mine


def own(sizes):
    """The columns of this rank."""
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def tight(sizes, rows=N, temporaries=5):
    """Memory for some eight rows of logits at a time, beside what is granted in float64 to the sweep over ``rows``."""
    row = 8 * max(sizes)
    return rows * (temporaries * row + 64) + 8 * (row + 16 * D)


def sliced(tensors, columns, frozen=()):
    """The rank's leaves: hidden whole, weight and bias its columns."""
    parts = {name: x.detach() if name == "hidden" else x.detach()[columns].clone() for name, x in tensors.items()}
    return {name: x.clone().requires_grad_(name not in frozen) for name, x in parts.items()}


def same_bits_everywhere(*tensors):
    for x in tensors:
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        distributed_c10d.all_gather(everyone, x.detach().contiguous())
        assert all(torch.equal(x.detach().nan_to_num(7), other.nan_to_num(7)) for other in everyone)


def close(actual, expected, name):
    assert (actual - expected).abs().max().item() <= 1e-12 * max(1, expected.abs().max().item()), name


def check_logps(case, sizes, memory):
    x = linear_example(case, N, D, V, torch.float64)
    columns = own(sizes)
    single = outputs_and_grads(linear_logps(**x.tensors, labels=x.labels, **x.options), x)
    mine = sliced(x.tensors, columns)
    run = {**x.options, "process_group": dist.group.WORLD, "memory": memory}
    result = linear_logps(**mine, labels=x.labels, **run)
    for name, found in outputs_and_grads(result, type(x)(mine, x.labels, {}, x.grad_logps, x.grad_entropy)).items():
        whole = name not in ("d_weight", "d_bias")
        if found.numel():
            close(found, single[name] if whole else single[name][columns], f"{case} {sizes} {name}")
        if whole:
            same_bits_everywhere(found)
    frozen = sliced(x.tensors, columns, frozen=("weight", "bias"))
    logps = linear_logps(**frozen, labels=x.labels, **{**run, "entropy": False})
    plain = linear_logps(
        x.tensors["hidden"], x.tensors["weight"].detach(), x.labels, **{**bias(x), **x.options, "entropy": False}
    )
    grads = [
        torch.autograd.grad((y * x.grad_logps).sum(), [h])[0]
        for y, h in ((logps, frozen["hidden"]), (plain, x.tensors["hidden"]))
    ]
    close(grads[0], grads[1], f"frozen {case}")
    counts()


def bias(x):
    return {"bias": x.tensors["bias"].detach()} if "bias" in x.tensors else {}


def check_narrow(dtype, sizes):
    """Errors within twice those of eager code on one rank, both against float64."""
    x = linear_example("everything", N, D, V, dtype)
    columns, wide, results = own(sizes), x.to(torch.float64), []
    for y in (x, wide):
        results.append(outputs_and_grads(reference(**y.tensors, labels=y.labels, **y.options), y))
    mine = sliced(x.tensors, columns)
    found = linear_logps(**mine, labels=x.labels, **x.options, process_group=dist.group.WORLD, memory=30_000)
    for name, ours in outputs_and_grads(found, type(x)(mine, x.labels, {}, x.grad_logps, x.grad_entropy)).items():
        eager, oracle = (r[name][columns] if name in ("d_weight", "d_bias") else r[name] for r in results)
        assert_matches(ours, eager, oracle, name=name)


def dpo(stats):
    sums = torch.zeros(len(stats.sequences), dtype=stats.logps.dtype)
    owner = torch.repeat_interleave(torch.arange(len(sums)), stats.cu_seqlens.diff())
    scores = sums.index_add(0, owner, stats.logps) - REFERENCE[stats.sequences]
    losses = -torch.nn.functional.logsigmoid(0.1 * (scores[::2] - scores[1::2]))
    return losses.sum() / 3 - 0.01 * stats.entropy.sum(), {"top1": stats.is_top1.sum()}


def check_loss(case, sizes, memory):
    x = linear_example(case, N, D, V, torch.float64)
    columns = own(sizes)
    mine = sliced(x.tensors, columns)
    options = {**x.options, "entropy": True, "align": "pair", "cu_seqlens": CU_PAIRS}
    single, single_stats = linear_loss(**x.tensors, labels=x.labels, loss_fn=dpo, **options)
    calls = []

    def loss_fn(stats):
        calls.append(len(stats.rows))
        return dpo(stats)

    options |= {"process_group": dist.group.WORLD, "memory": memory}
    loss, stats = linear_loss(**mine, labels=x.labels, loss_fn=loss_fn, **options)
    grads = torch.autograd.grad(loss, list(mine.values()), retain_graph=True)
    seen, split = counts(), dist.get_world_size() > 1  # all ranks agree, however the chunks are cut
    if memory is None:
        assert seen == ((2, 1) if split else (0, 0)) and len(calls) == 1
    elif split:
        assert seen[0] > 4, "a single chunk"
    again = torch.autograd.grad(loss, list(mine.values()))
    expected = torch.autograd.grad(single, list(x.tensors.values()))
    for name, g, second, oracle in zip(mine, grads, again, expected, strict=True):
        part = oracle if name == "hidden" else oracle[columns]
        if part.numel():
            close(g, part, f"{case} {sizes} {name}")
            close(second, part, f"second {case} {sizes} {name}")
    close(loss.detach(), single.detach(), "loss")
    close(stats.logps, single_stats.logps, "logps")
    assert torch.equal(stats.is_top1, single_stats.is_top1)
    assert stats.metrics["top1"] == single_stats.metrics["top1"]
    same_bits_everywhere(loss, stats.logps, stats.entropy, grads[0])
    counts()


def check_adapter(sizes, frozen=()):
    """B is cut like the weight, A is whole everywhere; its gradient costs no collective of its own."""
    x, new = linear_example("everything", N, D, V, torch.float64), torch.Generator().manual_seed(2)
    adapter = {"A": torch.randn(3, D, generator=new).double(), "B": torch.randn(V, 3, generator=new).double()}
    columns, labels, results = own(sizes), x.labels, []
    whole = {name: y.detach().requires_grad_(name not in frozen) for name, y in {**x.tensors, **adapter}.items()}
    mine = {**sliced(x.tensors, columns, frozen), "A": whole["A"].detach().clone().requires_grad_()}
    mine["B"] = whole["B"].detach()[columns].clone().requires_grad_("B" not in frozen)
    for given, group in ((mine, dist.group.WORLD), (whole, None)):
        memory = tight(sizes if group else (V,)) + 8 * N * (D + 3)
        run = {"labels": labels, "lora": (given["A"], given["B"], 0.7), "process_group": group, "memory": memory}
        run |= {name: given[name] for name in x.tensors} | x.options
        trained = [y for y in given.values() if y.requires_grad]
        loss, _ = linear_loss(**run, loss_fn=dpo, align="pair", cu_seqlens=CU_PAIRS)
        logps = linear_logps(**{**run, "entropy": False})
        made = [torch.autograd.grad(y, trained) for y in (loss, (logps * x.grad_logps).sum())]
        results.append([loss.detach(), logps.detach(), *made[0], *made[1]])
    names = [name for name, y in mine.items() if y.requires_grad]
    for name, ours, single in zip(["loss", "logps", *names, *names], *results, strict=True):
        part = single[columns] if name in ("weight", "bias", "B") else single
        if part.numel():
            close(ours, part, f"adapter {sizes} {name}")
        if name not in ("weight", "bias", "B"):
            same_bits_everywhere(ours)
    counts()


def check_objectives(sizes, memory):
    """Smoothing over the vocabulary of all ranks, and the log-sum-exp: the sum of z joins the one table per chunk."""
    x = linear_example("everything", N, D, V, torch.float64)
    upstream, columns = torch.randn(3, N, generator=torch.Generator().manual_seed(6)).double(), own(sizes)
    asked = {**x.options, "labels": x.labels, "lse": True, "label_smoothing": 0.2}
    mine, results = sliced(x.tensors, columns), []
    for given, group in ((mine, dist.group.WORLD), (x.tensors, None)):
        found = linear_logps(**given, **asked, process_group=group, memory=memory)
        if memory is None and group is not None:
            assert counts() == ((2, 0) if len(sizes) > 1 else (0, 0))
        score = (torch.stack(found) * upstream).sum()
        run = {**asked, "align": "pair", "cu_seqlens": CU_PAIRS, "process_group": group, "memory": memory}
        loss, stats = linear_loss(**given, **run, loss_fn=lambda s: (dpo(s)[0] + 0.01 * s.lse.square().sum(), {}))
        made = [torch.autograd.grad(y, list(given.values())) for y in (score, loss)]
        results.append([torch.stack(found).detach(), loss.detach(), stats.lse, *made[0], *made[1]])
    for name, ours, single in zip(["found", "loss", "lse", *mine, *mine], *results, strict=True):
        part = single[columns] if name in ("weight", "bias") else single
        if part.numel():
            close(ours, part, f"objectives {sizes} {name}")
        if name not in ("weight", "bias"):
            same_bits_everywhere(ours)
    frozen = sliced(x.tensors, columns, ("weight", "bias"))
    smooth = {**asked, "lse": False, "entropy": False}
    logps = linear_logps(**frozen, **smooth, process_group=dist.group.WORLD)
    single = linear_logps(x.tensors["hidden"], x.tensors["weight"].detach(), **bias(x), **smooth)
    grads = [
        torch.autograd.grad((y * upstream[0]).sum(), [h])[0]
        for y, h in ((logps, frozen["hidden"]), (single, x.tensors["hidden"]))
    ]
    close(*grads, "frozen, smoothed")
    counts()


def check_banned(sizes):
    """A shard that is -inf everywhere has weight 0 and makes no NaN."""
    x = linear_example("bias", N, D, V, torch.float64)
    x.tensors["bias"].data[: sizes[0]] = -torch.inf
    labels = torch.where(x.labels < sizes[0], sizes[0], x.labels).clamp(max=V - 1)
    mine, columns = sliced(x.tensors, own(sizes)), own(sizes)
    result = linear_logps(**mine, labels=labels, entropy=True, process_group=dist.group.WORLD)
    single = linear_logps(**x.tensors, labels=labels, entropy=True)
    banned = torch.zeros_like(labels)
    for ours, one in zip(result, single, strict=True):
        close(ours, one, "banned shard")
    grads = torch.autograd.grad(sum(r.sum() for r in result), list(mine.values()))
    expected = torch.autograd.grad(sum(r.sum() for r in single), list(x.tensors.values()))
    for name, g, oracle in zip(mine, grads, expected, strict=True):
        part = oracle if name == "hidden" else oracle[columns]
        if part.numel():
            close(g, part, f"banned {name}")
    with torch.no_grad():
        assert (linear_logps(**mine, labels=banned, process_group=dist.group.WORLD) == -torch.inf).all()
    counts()


def check_ties(sizes):
    """Equal logits, within a shard and across shards: the first column wins; a row of NaN or -inf has no choice."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits, labels = few_values(dtype, N, V)
        logits[5], labels[5], labels[8] = 0, V - 1, -100
        hits = (logits.argmax(-1) == labels) & (labels != -100)
        run, columns = {"labels": labels, "process_group": dist.group.WORLD}, own(sizes)
        for memory in (None, 12_000):
            head = torch.eye(N, dtype=dtype), logits.t()[columns]
            _, stats = linear_loss(*head, loss_fn=lambda s: s.logps.sum(), memory=memory, **run)
            assert torch.equal(stats.is_top1, hits), (sizes, dtype)
        logits[6, 0], logits[7], hits[6:8] = torch.nan, -torch.inf, False
        _, stats = policy_loss(logits[:, columns], loss="sft", **run)
        assert torch.equal(stats.is_top1, hits), (sizes, dtype)
    counts()


def check_dtensors(memory):
    """A sharded weight brings its group, a replicated one is whole; gradients are placed like their inputs."""
    size, x = dist.get_world_size(), linear_example("everything", N, D, V, torch.float64)
    mesh = init_device_mesh("cpu", (size // 2, 2) if size == 4 else (size,))
    others = (Replicate(),) * (mesh.ndim - 1)
    adapter = {
        "A": torch.ones(3, D).double(),
        "B": torch.randn(V, 3, generator=torch.Generator().manual_seed(2)).double(),
    }
    whole = {name: y.detach().requires_grad_() for name, y in {**x.tensors, **adapter}.items()}
    for head in ((*others, Shard(0)), (*others, Replicate())):
        placed = {name: head if name in ("weight", "bias", "B") else (*others, Replicate()) for name in whole}
        mine = {name: distribute_tensor(y.detach(), mesh, placed[name]).requires_grad_() for name, y in whole.items()}
        counts()
        results = []
        for given in (mine, whole):
            run = {name: given[name] for name in x.tensors} | x.options | {"labels": x.labels, "memory": memory}
            loss, _ = linear_loss(
                **run, lora=(given["A"], given["B"], 0.7), loss_fn=dpo, align="pair", cu_seqlens=CU_PAIRS
            )
            logps, entropy = linear_logps(**run)
            made = torch.autograd.grad(loss + (logps * x.grad_logps).sum() + entropy.sum(), list(given.values()))
            results.append([loss.detach(), logps.detach(), *made])
        assert (counts() != (0, 0)) == (head[-1] == Shard(0) and size > 1)
        for name, ours, single in zip(["loss", "logps", *mine], *results, strict=True):
            if name in mine:
                assert isinstance(ours, DTensor) and ours.placements == placed[name] and ours.shape == single.shape
                ours = ours.full_tensor()
            close(ours, single, f"dtensor {head} {name}")
    counts()


def check_dtensor_refusals():
    x, mesh = linear_example("bias", N, D, V, torch.float32), init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight, bias = (y.detach() for y in x.tensors.values())
    split, spread = distribute_tensor(weight, mesh, [Shard(0)]), distribute_tensor(weight, mesh, [Replicate()])
    partial = DTensor.from_local(weight, mesh, [Partial()])
    for message, given in {
        "weight is a DTensor placed": {"weight": distribute_tensor(weight, mesh, [Shard(1)])},
        "expected Shard(0)": {"weight": partial},
        "hidden is a DTensor placed": {"hidden": distribute_tensor(hidden, mesh, [Shard(0)]), "weight": split},
        "bias and weight disagree": {"weight": split, "bias": distribute_tensor(bias, mesh, [Replicate()])},
        "weight and process_group disagree": {"weight": spread, "process_group": dist.group.WORLD},
        "their labels differ": {"weight": split, "labels": x.labels.roll(dist.get_rank())},
    }.items():
        try:
            linear_logps(**{"hidden": hidden, "labels": x.labels, **given})
            raise AssertionError(f"taken: {message}")
        except ValueError as error:
            assert message in str(error), error
    counts()


def check_counts(sizes):
    """One exchange of sizes per call, one table per chunk, one sum of the hidden gradient."""
    x = linear_example("masked", N, D, V, torch.float32)
    group, split = dist.group.WORLD, dist.get_world_size() > 1
    for frozen, first, second in (((), (2, 0), (0, 1)), (("weight",), (2, 1), (0, 0))):
        mine = sliced(x.tensors, own(sizes), frozen)
        logps = linear_logps(**mine, labels=x.labels, process_group=group)
        assert counts() == (first if split else (0, 0))
        logps.sum().backward()
        assert counts() == (second if split else (0, 0))
    mine = sliced(x.tensors, own(sizes), ("weight",) if dist.get_rank() == 0 else ())  # trained on some ranks only
    linear_logps(**mine, labels=x.labels, process_group=group).sum().backward()
    assert counts() == ((2, 1) if split else (0, 0)) and (mine["weight"].grad is None) == (dist.get_rank() == 0)
    nothing = torch.full_like(x.labels, -100)
    mine = sliced(x.tensors, own(sizes))
    linear_logps(**mine, labels=nothing, process_group=group).sum().backward()
    linear_loss(**mine, labels=nothing, loss_fn=lambda s: s.logps.sum(), process_group=group)[0].backward()
    assert counts() == ((2, 0) if split else (0, 0)) and not mine["hidden"].grad.any()


def check_refusals(sizes):
    x = linear_example("plain", N, D, V, torch.float32)
    mine = sliced(x.tensors, own(sizes))
    for label in (V, -1):
        labels = x.labels.clone()
        labels[3] = label
        for op in (linear_logps, lambda *args, **kwargs: linear_loss(*args, lambda s: s.logps.sum(), **kwargs)):
            try:
                op(mine["hidden"], mine["weight"], labels, process_group=dist.group.WORLD)
                raise AssertionError("a label outside the vocabulary was taken")
            except ValueError as error:
                assert f"label {label} at row 3 is neither in [0, {V})" in str(error), error
    if len(sizes) > 1:
        rows = N - dist.get_rank() % 2
        try:
            linear_logps(mine["hidden"][:rows], mine["weight"], x.labels[:rows], process_group=dist.group.WORLD)
            raise AssertionError("different numbers of rows were taken")
        except ValueError as error:
            assert "the same number of rows of hidden" in str(error), error
    counts()


def work(rank, size, store):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for name in ("all_gather", "all_reduce"):
        counted(name)
    for memory in (None, tight(((V + 1) // 2,))):
        check_dtensors(memory)
    if size > 1:
        check_dtensor_refusals()
    for sizes in SHARDS[size]:
        for case in ("plain", "softcap", "bias", "everything"):
            for memory in (None, tight(sizes)):
                check_logps(case, sizes, memory)
        for case in ("masked", "everything"):
            for memory in (None, tight(sizes)):
                check_loss(case, sizes, memory)
        for dtype in (torch.float32, torch.bfloat16):
            check_narrow(dtype, sizes)
        counts()
        for memory in (None, tight(sizes)):
            check_objectives(sizes, memory)
        check_ties(sizes)
        check_adapter(sizes)
        check_adapter(sizes, ("weight", "bias"))
        check_adapter(sizes, ("weight", "bias", "B"))
        check_counts(sizes)
        check_refusals(sizes)
        if size > 1 and 0 < sizes[0] < V:
            check_banned(sizes)
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, f"{folder}/store"), nprocs=size, start_method="fork")
    print("agreed")
