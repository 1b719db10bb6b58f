"""``batch_invariant=True``: the same bits in every run too, or a ValueError where nobody can promise them."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastalign.ops import dispatch, linear_logps, linear_loss
from fastalign.ops.checks import check_deterministic
from fastalign.testing import linear_example

N, D, V = 123, 37, 503
TIGHT = {"torch": 1_800_000, "cpp": 300_000}
CUDA = torch.device("cuda")


def promised(x):
    check_deterministic(CUDA, None)
    return x * 1


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    was = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(was)


def run(x, backend, memory):
    inputs = list(x.tensors.values())
    options = {**x.options, "backend": backend, "memory": memory, "batch_invariant": True}
    logps, entropy = linear_logps(**x.tensors, labels=x.labels, **options)
    loss, stats = linear_loss(**x.tensors, labels=x.labels, loss_fn=lambda s: (s.logps * s.entropy).sum(), **options)
    made = torch.autograd.grad(loss + (logps * entropy).sum(), inputs)
    return loss.detach(), logps.detach(), entropy.detach(), stats.logps, *made


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in dispatch.available("linear_loss") if name != "triton"])
def test_every_run_gives_the_same_bits(backend, dtype, tight, threads):
    memory = TIGHT[backend] if tight else None
    x = linear_example("everything", N, D, V, dtype)
    for count in (1, 2):
        threads(count)
        first, second = run(x, backend, memory), run(x, backend, memory)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_our_kernels_give_the_same_bits_whatever_the_threads(threads):
    """Small integers make the products exact, so that what is left are the sweeps."""
    x = linear_example("masked", N, D, V, torch.float32)
    tensors = {name: (y.detach().nan_to_num() * 4).round() / 8 for name, y in x.tensors.items()}
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(torch.stack(linear_logps(**tensors, labels=x.labels, entropy=True, batch_invariant=True)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_cuda_needs_the_deterministic_mode_of_torch():
    was = torch.get_deterministic_debug_mode()
    try:
        torch.use_deterministic_algorithms(True)
        check_deterministic(CUDA, None)
        compiled = torch.compile(promised, fullgraph=True, backend="aot_eager")
        assert compiled(torch.ones(2)).sum() == 2
        for mode in ("warn", "default"):
            torch.set_deterministic_debug_mode(mode)
            with pytest.raises(ValueError, match="outside torch's deterministic mode"):
                check_deterministic(CUDA, None)
    finally:
        torch.set_deterministic_debug_mode(was)


@pytest.mark.usefixtures("nan_memory")
def test_gemms_must_not_be_picked_by_their_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda: True)
    with pytest.raises(ValueError, match="TunableOp"):
        check_deterministic(CUDA, None)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("backend", "size", "settings", "kept"),
    [
        ("nccl", 4, {}, False),
        ("nccl", 4, {"NCCL_ALGO": "Ring,NVLS"}, False),
        ("nccl", 4, {"NCCL_ALGO": "^Tree"}, False),
        ("nccl", 4, {"NCCL_ALGO": "^NVLS"}, True),
        ("nccl", 4, {"NCCL_ALGO": "Ring"}, True),
        ("nccl", 4, {"NCCL_NVLS_ENABLE": "0"}, True),
        ("nccl", 2, {}, True),  # one addition has no order
        ("gloo", 4, {}, True),
    ],
)
def test_sums_over_ranks_need_an_order(backend, size, settings, kept, monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda _: backend)
    for name in ("NCCL_ALGO", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    group = SimpleNamespace(size=lambda: size)
    if kept:
        check_deterministic(CUDA, group)
    else:
        with pytest.raises(ValueError, match=r"NCCL_ALGO=\^NVLS"):
            check_deterministic(CUDA, group)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="cannot be kept on meta"):
        linear_logps(
            torch.zeros(2, 3, device="meta"),
            torch.zeros(5, 3, device="meta"),
            torch.zeros(2, device="meta").long(),
            batch_invariant=True,
        )


@pytest.mark.gpu
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", dispatch.available("linear_loss"))
def test_every_run_on_cuda_gives_the_same_bits(backend, dtype):
    x = linear_example("everything", N, 4 * D, 32 * V, dtype, device="cuda")
    results = [run(x, backend, None) for _ in range(3)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
