"""The determinism contract: the same bits run to run, in any company, on any number of threads.

Sweeps, scans and combines are batch-invariant: a row alone has the bits it has in a batch. The linear ops, whose GEMMs
are a vendor's, promise that only with ``batch_invariant=True``. The number of threads changes no bit of our kernels.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from op_table import DEVICE, HERE, OPS, example_of, given, place

from fastalign import ops
from fastalign.ops import dispatch
from fastalign.testing import linear_example, with_gradients

pytestmark = pytest.mark.usefixtures("nan_memory")

N = 11  # rows of ``op_table.example_of``
NARROW = [torch.float32, torch.bfloat16]
LEVELS = ["avx512", "avx2", "scalar"]


@contextmanager
def settings(threads=None, level=None):
    """A number of threads, an instruction set; what was set before comes back."""
    before = torch.get_num_threads()
    if level is not None:
        from fastalign import _C

        best = _C.cpu_level()
        try:
            _C.set_cpu_level(level)
        except ValueError as error:
            pytest.skip(str(error))
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)
        if level is not None:
            _C.set_cpu_level(best)


def same(results):
    first, *others = results
    for other in others:
        assert first.keys() == other.keys()
        for key, value in first.items():
            assert torch.equal(value, other[key]), f"{key} differs in {(value != other[key]).sum()} places"
    assert any(value.abs().max() > 0 for value in first.values())


def run_again(name, backend, dtype):
    """The same op on the same values, made anew."""
    example = example_of(name, dtype, backend)
    return with_gradients(OPS[name].run(example, backend), example)


RUNS = [(name, backend) for name, op in OPS.items() for backend in op.backends]
RUNS = [
    (name, backend)
    for name, backend in RUNS
    if name != "packed_attention" or not dispatch.without_attention(backend, DEVICE, torch.bfloat16)
]


@pytest.mark.parametrize(("name", "backend"), RUNS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_run_to_run(name, backend, dtype):
    if name == "packed_attention" and dispatch.without_attention(backend, DEVICE, dtype):
        dtype = torch.float16
    same([run_again(name, backend, dtype) for _ in range(3)])


def test_whitening_run_to_run():
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.whiten(x), ops.whiten(x.clone()))


# --- a row alone ------------------------------------------------------------------------------------------------------


def rows_of(example, rows):
    """The example of some rows alone, cloned: what has one entry per row is cut, what belongs to the head is not."""
    num_rows = len(example.labels)

    def cut(values):
        return {
            name: x[rows].clone() if isinstance(x, torch.Tensor) and x.shape[:1] == (num_rows,) else x
            for name, x in values.items()
        }

    tensors = {name: x.detach().requires_grad_() for name, x in cut(example.tensors).items()}
    options, constants = cut(example.options), cut(example.constants)
    return replace(example, tensors=tensors, options=options, constants=constants, labels=example.labels[rows])


def per_row(run, x, upstream):
    """Outputs with one entry per row, and the gradients of inputs with one, under the rows' own upstream gradients."""
    outputs = {name: value for name, value in run(x).items() if value.dim()}
    total = [value for value in run(x).values() if not value.dim()]
    score = sum(total) if total else sum((value * upstream.to(value)).sum() for value in outputs.values())
    owners = {name: t for name, t in x.tensors.items() if t.shape[:1] == x.labels.shape}
    grads = torch.autograd.grad(score, list(owners.values()))
    return {
        **{name: value.detach() for name, value in outputs.items()},
        **{f"d_{name}": grad for name, grad in zip(owners, grads, strict=True)},
    }


def check_company(run, example):
    upstream = torch.randn(len(example.labels), generator=torch.Generator().manual_seed(5)).to(example.labels.device)
    together = per_row(run, example, upstream)
    scored = (example.labels != -100).nonzero().squeeze(1).tolist()
    parts = [slice(row, row + 1) for row in (scored[0], scored[-1])] + [slice(2, 7), slice(len(upstream) - 4, None)]
    for rows in parts:
        alone = per_row(run, rows_of(example, rows), upstream[rows])
        same([alone, {name: value[rows] for name, value in together.items()}])


SWEEPS = [(name, backend) for name in ("token_logps", "divergence", "policy_loss") for backend in OPS[name].backends]


@pytest.mark.parametrize(("name", "backend"), SWEEPS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(name, backend, dtype):
    with settings(threads=1):  # torch cuts the sums of a lone row over its threads
        check_company(partial(OPS[name].run, backend=backend), example_of(name, dtype, backend))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("op", ["linear_logps", "linear_loss"])
def test_a_row_alone_has_the_bits_it_has_in_a_batch_when_the_gemms_promise_it(op, backend, frozen):
    x = linear_example("everything", 45, 37, 252, torch.float32, place(backend))  # more than one block of 32 rows
    x = replace(x, options={**x.options, "labels": x.labels, "entropy": op == "linear_loss" or not frozen})
    for name in ("weight", "bias"):
        x.tensors[name].requires_grad_(not frozen)

    def run(y):
        head = {name: x.tensors[name] for name in ("weight", "bias")}
        arguments = {**given(y), **head, "backend": backend, "batch_invariant": True}
        if op == "linear_logps":
            result = ops.linear_logps(**arguments)
            return {"logps": result} if frozen else dict(zip(("logps", "entropy"), result, strict=True))
        loss, stats = ops.linear_loss(**arguments, loss_fn=lambda s: (s.logps.square() + s.entropy.sin()).sum())
        return {"loss": loss, "logps": stats.logps, "entropy": stats.entropy}

    with settings(threads=1):
        check_company(run, x)


@pytest.mark.parametrize("backend", OPS["gae"].backends)
def test_a_segment_alone_has_the_bits_it_has_in_a_batch(backend):
    example = example_of("gae", torch.float32, backend)
    cu_seqlens, values = example.options["cu_seqlens"], [x.detach() for x in example.tensors.values()]
    decay, last = 0.5 + torch.rand_like(values[0]), example.options["last_values"]

    def run(rewards, critic, offsets, decay, last):
        scanned = ops.segment_scan(rewards, offsets, decay, backend=backend)
        return torch.stack([scanned, *ops.gae(rewards, critic, offsets, 0.9, 0.8, last_values=last, backend=backend)])

    together = run(*values, cu_seqlens, decay, last)
    for i, (a, b) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        alone = run(*(x[a:b].clone() for x in values), cu_seqlens[i : i + 2] - a, decay[a:b].clone(), last[i : i + 1])
        assert torch.equal(alone, together[:, a:b])


@pytest.mark.parametrize("backend", HERE)
def test_a_pair_alone_has_the_bits_it_has_in_a_batch(backend):
    x = example_of("preference_loss", torch.float32, backend)
    offsets = x.options["cu_seqlens"]

    def grad(rows, offsets):
        y = rows_of(x, rows)
        loss, _ = ops.preference_loss(**{**given(y), "cu_seqlens": offsets, "backend": backend}, num_pairs=4)
        return torch.autograd.grad(loss, y.tensors["logits"])[0]

    with settings(threads=1):
        together = grad(slice(None), offsets)
        for pair in range(4):
            a, b = int(offsets[2 * pair]), int(offsets[2 * pair + 2])
            assert torch.equal(grad(slice(a, b), offsets[2 * pair : 2 * pair + 3] - a), together[a:b])


# --- threads and instruction sets -------------------------------------------------------------------------------------

NATIVE = ["token_logps", "divergence", "policy_loss", "preference_loss", "segment_scan", "gae", "forest_decode"]


def wide(name, dtype, num_rows):
    """An example whose rows are three slabs: with few rows threads share one."""
    from fastalign import testing

    if name == "token_logps":
        x = testing.logits_example("everything", num_rows, 40009, dtype)
        return replace(x, options={**x.options, "labels": x.labels})
    if name == "divergence":
        x = testing.two_stream_example("everything", num_rows, 40009, dtype)
        return replace(x, options={**x.options, "kind": "jsd"})
    if name == "policy_loss":
        x = testing.policy_example("everything", num_rows, 40009, dtype)
        return replace(x, options={**x.options, "loss": "ppo", "kl_coef": 0.3, "entropy_coef": 0.1})
    return example_of(name, dtype, "cpp")


@pytest.mark.skipif("cpp" not in HERE, reason=f"cpp: {dispatch.missing('cpp')}")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_threads_change_no_bit_at_any_level(name, level, dtype):
    for num_rows in (3, N):
        example, results = wide(name, dtype, num_rows), []
        for threads in (1, 2, 4, 4):
            with settings(threads, level):
                results.append(with_gradients(OPS[name].run(example, "cpp"), example))
        same(results)


def test_the_contract_covers_every_backend():
    """No backend is left out of the contract unless it is not usable here."""
    assert {backend for _, backend in SWEEPS} == set(dispatch.available("token_logps"))
