"""``divergence_ranks.py SIZE``: two streams split over SIZE forked gloo ranks give what one rank gives: values,
gradients, number of collectives."""

import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from vocab_ranks import SHARDS, V, close, counted, counts, own, same_bits_everywhere, tight

from fastalign.ops import dispatch, divergence, linear_divergence
from fastalign.ops.divergence import reference
from fastalign.ops.divergence_shards import measure
from fastalign.ops.linear_divergence import reference as linear_reference
from fastalign.ops.parallel import Shard, localise
from fastalign.testing import assert_matches

N, D, DR = 61, 19, 7
KINDS = ["forward_kl", "reverse_kl", "jsd"]
HEAD, REF_HEAD = ("weight", "bias"), ("ref_weight", "ref_bias")
OPTIONS = {"mix": 0.3, "softcap": 6.0, "ref_softcap": 9.0}


def streams(dtype, seed=3):
    """Both models' tensors, whole; labels, temperatures per row, an upstream gradient. Masked hidden states are NaN."""
    new = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N,), generator=new)
    labels[torch.rand(N, generator=new) < 0.4] = -100
    made = {"hidden": torch.randn(N, D, generator=new), "ref_hidden": torch.randn(N, DR, generator=new)}
    made["hidden"][labels == -100], made["ref_hidden"][labels == -100] = torch.nan, torch.nan
    made |= {"weight": torch.randn(V, D, generator=new) / 2, "bias": torch.randn(V, generator=new)}
    made |= {"ref_weight": torch.randn(V, DR, generator=new) / 2, "ref_bias": torch.randn(V, generator=new)}
    tau, g = 0.5 + torch.rand(N, generator=new), torch.randn(N, generator=new)
    return {name: x.to(dtype) for name, x in made.items()}, {"labels": labels, "temperature": tau}, g


def little(sizes):
    """Memory for some eight scored rows of both logits at a time."""
    scored = int((streams(torch.float32)[1]["labels"] >= 0).sum())
    return 2 * tight(sizes, scored, temporaries=4)


def run(op, tensors, g, trained=("hidden", *HEAD), **options):
    """The value, and the gradients by name."""
    leaves = {name: x.detach().clone().requires_grad_(name in trained) for name, x in tensors.items()}
    value = op(**leaves, **options)
    grads = torch.autograd.grad((value * g.to(value.dtype)).sum(), [leaves[name] for name in trained])
    return {"value": value.detach(), **dict(zip(trained, grads, strict=True))}


def sliced(tensors, columns):
    return {name: x if name in ("hidden", "ref_hidden") else x[columns] for name, x in tensors.items()}


def part(name, whole, columns):
    return whole[columns] if name in HEAD else whole


def check_hidden(kind, sizes, memory, trained, backend=None):
    tensors, rows, g = streams(torch.float64)
    options, columns = {**rows, **OPTIONS, "kind": kind}, own(sizes)
    single = run(linear_divergence, tensors, g, trained, **options)
    settings = {"process_group": dist.group.WORLD, "memory": memory, "backend": backend}
    found = run(linear_divergence, sliced(tensors, columns), g, trained, **options, **settings)
    for name, x in found.items():
        if x.numel():
            close(x, part(name, single[name], columns), f"{kind} {sizes} {name}")
        if name not in HEAD:
            same_bits_everywhere(x)
    assert not found["value"][rows["labels"] == -100].any()
    counts()


def check_narrow(kind, dtype, sizes):
    """Errors within twice those of eager code on one rank, both against float64."""
    tensors, rows, g = streams(dtype)
    options, columns = {**rows, **OPTIONS, "kind": kind}, own(sizes)
    rival = run(linear_reference, tensors, g, **options)
    exact = run(linear_reference, {name: x.double() for name, x in tensors.items()}, g, **options)
    group = dist.group.WORLD
    found = run(linear_divergence, sliced(tensors, columns), g, **options, process_group=group, memory=30_000)
    for name, x in found.items():
        assert_matches(x, part(name, rival[name], columns), part(name, exact[name], columns), name=f"{kind} {name}")
    counts()


def check_logits(kind, dtype, sizes):
    tensors, rows, g = streams(torch.float32)
    logits = (tensors["hidden"] @ tensors["weight"].T + tensors["bias"]).to(dtype)
    ref_logits = (tensors["ref_hidden"] @ tensors["ref_weight"].T + tensors["ref_bias"]).to(dtype)
    options, columns, group = {**rows, **OPTIONS, "kind": kind}, own(sizes), dist.group.WORLD
    results = []
    for op, x, q, more in (
        (divergence, logits[:, columns], ref_logits[:, columns], {"process_group": group}),
        (reference, logits, ref_logits, {}),
        (reference, logits.double(), ref_logits.double(), {}),
    ):
        results.append(run(op, {"logits": x, "ref_logits": q}, g, ("logits",), **options, **more))
    found, rival, exact = results
    assert_matches(found["value"], rival["value"], exact["value"], name=f"{kind} value")
    assert_matches(found["logits"], rival["logits"][:, columns], exact["logits"][:, columns], name=f"{kind} logits")
    same_bits_everywhere(found["value"])
    tables = 1 + (2 if kind == "jsd" else 1)
    assert counts() == ((tables, 0) if dist.get_world_size() > 1 else (0, 0))


def check_tokens(kind, dtype, sizes):
    """The label's log-probs under both streams and the policy's entropy come by the same exchange."""
    tensors, rows, _ = streams(torch.float32)
    pair = [(tensors[f"{w}hidden"] @ tensors[f"{w}weight"].T + tensors[f"{w}bias"]).to(dtype) for w in ("", "ref_")]
    kernels, labels = dispatch.kernels("divergence", None, torch.device("cpu"), dtype), rows["labels"].clone()
    options = {"kind": kind, "mix": 0.3, "softcap": 6.0, "tokens": True, "entropy": True}
    single = kernels.forward(*pair, labels, **options)
    shard = Shard(dist.group.WORLD.group_name, sizes, dist.get_rank()) if len(sizes) > 1 else None
    local, owners = (labels, None) if shard is None else localise(shard, labels)
    found = measure(kernels, shard, owners, *(x[:, own(sizes)] for x in pair), local, **options)
    for name, x, whole in zip(found._fields, found, single, strict=True):
        assert torch.allclose(x, whole, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5), f"{kind} {name}"
        same_bits_everywhere(x)
    assert counts() == ((2 if kind == "jsd" else 1, 0) if len(sizes) > 1 else (0, 0))


def check_banned(kind, sizes):
    """A shard that is -inf in both streams has no share; in one alone the KL over the other is infinite. No NaN."""
    _, rows, g = streams(torch.float64)
    whole = [torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    columns, group = own(sizes), dist.group.WORLD
    for banned in ((0, 1), (0,), (1,)):
        pair = [x.clone() for x in whole]
        for k in banned:
            pair[k][:, : sizes[0]] = -torch.inf
        options, results = {"kind": kind, "mix": 0.3, "labels": rows["labels"].clamp(min=-100)}, []
        for cut, more in ((columns, {"process_group": group}), (slice(None), {})):
            made = {"logits": pair[0][:, cut], "ref_logits": pair[1][:, cut]}
            results.append(run(divergence, made, g, ("logits",), **options, **more))
        found, single = results
        infinite = (kind, banned) in (("forward_kl", (0,)), ("reverse_kl", (1,)))
        scored = rows["labels"] != -100
        if infinite:
            assert (found["value"][scored] == torch.inf).all() and not found["value"][~scored].any()
        else:
            close(found["value"], single["value"], f"banned {kind} {banned}")
            assert found["logits"].isfinite().all()
        if found["logits"].numel() and not (infinite and kind == "reverse_kl"):
            close(found["logits"], single["logits"][:, columns], f"banned {kind} {banned} gradient")
    counts()


def check_cut_off(kind, sizes):
    """Whether a banned column has a share, its probability over the columns of all ranks decides."""
    if kind == "jsd":
        return
    for dtype in (torch.float32, torch.float64):
        logits, columns = [torch.zeros(4, V, dtype=dtype) for _ in range(2)], own(sizes)
        first, second = logits if kind == "reverse_kl" else logits[::-1]
        first[:, : sizes[0]] = torch.tensor([-50.0, -86.0, -95.0, -torch.inf])[:, None]
        first[1:3, 0] = torch.tensor([-80.0, -90.0])
        second[:, 0] = second[0, : sizes[0]] = -torch.inf
        pair = [x[:, columns] for x in logits]
        found, exact = divergence(*pair, kind=kind, process_group=dist.group.WORLD), reference(*logits, kind=kind)
        assert exact.isinf().tolist() == [True, True, False, False]
        assert found[:2].tolist() == [torch.inf] * 2 and torch.allclose(found[2:], exact[2:], rtol=1e-5), (kind, sizes)
        same_bits_everywhere(found)
    counts()


def check_padding(kind, sizes):
    """Columns beyond the vocabulary have a bias of -inf in both streams: no share, no gradient."""
    tensors, rows, g = streams(torch.float64)
    for name in ("bias", "ref_bias"):
        tensors[name][-5:] = -torch.inf
    labels = rows["labels"].clamp(max=V - 6)
    options, columns = {**rows, "labels": labels, "kind": kind, "process_group": dist.group.WORLD}, own(sizes)
    found = run(linear_divergence, sliced(tensors, columns), g, **options, memory=little(sizes))
    kept = {name: x if "hidden" in name else x[: V - 5] for name, x in tensors.items()}
    single = run(linear_divergence, kept, g, **{**options, "process_group": None})
    for name, x in found.items():
        whole = single[name]
        if name in HEAD:
            whole = torch.cat([whole, whole.new_zeros(5, *whole.shape[1:])])[columns]
        if x.numel():
            close(x, whole, f"padded {kind} {name}")
    counts()


def check_dtensors(kind):
    """Heads placed Shard(0) bring their group; gradients are placed like their inputs."""
    tensors, rows, g = streams(torch.float64)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placed = {name: [Replicate() if "hidden" in name else Split(0)] for name in tensors}
    mine = {name: distribute_tensor(x, mesh, placed[name]) for name, x in tensors.items()}
    found, single = (run(linear_divergence, given, g, **rows, kind=kind) for given in (mine, tensors))
    for name, x in found.items():
        if name in mine:
            assert isinstance(x, DTensor) and list(x.placements) == placed[name]
            x = x.full_tensor()
        close(x, single[name], f"dtensor {kind} {name}")
    counts()


def check_equal(kind, sizes):
    """Equal streams: exactly 0, in value and gradient."""
    tensors, rows, g = streams(torch.float32)
    tensors |= {f"ref_{name}": tensors[name] for name in ("hidden", "weight", "bias")}
    mine = sliced(tensors, own(sizes))
    found = run(linear_divergence, mine, g, **rows, kind=kind, process_group=dist.group.WORLD)
    assert not any(x.any() for x in found.values())
    counts()


def check_counts(kind, sizes):
    """One exchange of sizes per call, one table per chunk (two for "jsd"), one sum of the hidden gradient."""
    tensors, rows, g = streams(torch.float32)
    split, tables = dist.get_world_size() > 1, 2 if kind == "jsd" else 1
    mine, options = sliced(tensors, own(sizes)), {**rows, "kind": kind, "process_group": dist.group.WORLD}
    some = ("hidden",) if dist.get_rank() == 0 else ("hidden", *HEAD)
    for trained in (("hidden", *HEAD), ("hidden",), some, HEAD):
        run(linear_divergence, mine, g, trained, **options)
        sums = 0 if trained == HEAD else 1
        assert counts() == ((1 + tables, sums) if split else (0, 0)), trained
    with torch.no_grad():
        linear_divergence(**mine, **options)
    assert counts() == ((1 + tables, 0) if split else (0, 0))
    run(linear_divergence, mine, g, **{**options, "labels": torch.full((N,), -100)})
    assert counts() == ((1, 0) if split else (0, 0))


def refused(message, op, *args, **options):
    try:
        op(*args, **options)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"taken: {message}")


def check_refusals(sizes):
    tensors, rows, _ = streams(torch.float32)
    mine, group, rank = sliced(tensors, own(sizes)), dist.group.WORLD, dist.get_rank()
    wrong = rows["labels"].clone()
    wrong[3] = V
    message = f"label {V} at row 3 is neither in [0, {V})"
    refused(message, linear_divergence, **mine, labels=wrong, process_group=group)
    pair = {"logits": tensors["hidden"] @ mine["weight"].T, "ref_logits": tensors["ref_hidden"] @ mine["ref_weight"].T}
    refused(message, divergence, **pair, labels=wrong, process_group=group)
    if len(sizes) > 1:
        short = {name: x[: N - rank % 2] for name, x in pair.items()}
        refused("the same number of rows of logits", divergence, **short, process_group=group)
        shuffled = rows["labels"].roll(rank)
        refused("their labels differ", linear_divergence, **mine, labels=shuffled, process_group=group)
        mine["hidden"] = mine["hidden"].clone().requires_grad_(rank == 0)
        refused("the same requires_grad of hidden", linear_divergence, **mine, process_group=group)
    counts()


def check_all(sizes):
    for kind in KINDS:
        for memory in (None, little(sizes)):
            check_hidden(kind, sizes, memory, ("hidden", *HEAD))
        check_hidden(kind, sizes, little(sizes), ("hidden",))
        check_hidden(kind, sizes, None, ("hidden", "bias"), "torch")
        check_narrow(kind, torch.bfloat16 if kind == "jsd" else torch.float32, sizes)
        for dtype in (torch.float64, torch.float32):
            check_logits(kind, dtype, sizes)
            check_tokens(kind, dtype, sizes)
        check_padding(kind, sizes)
        check_equal(kind, sizes)
        check_counts(kind, sizes)
        if len(sizes) > 1 and 0 < sizes[0] < V:
            check_banned(kind, sizes)
            check_cut_off(kind, sizes)
    check_refusals(sizes)


def work(rank, size, store):
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for name in ("all_gather", "all_reduce"):
        counted(name)
    for kind in KINDS:
        check_dtensors(kind)
    for sizes in SHARDS[size]:
        check_all(sizes)
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (size, f"{folder}/store"), nprocs=size, start_method="fork")
    print("agreed")
