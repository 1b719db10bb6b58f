"""A call whose number of scored rows is known never waits for the device: nothing it does depends on data.

Tensors of the meta device have no data: whoever asks for some (``item``, ``tolist``, ``nonzero``, a copy to the host)
fails. On a CUDA device the same is held by torch's own check, and by capturing the call in a CUDA graph.
"""

import pytest
import torch

from fastalign.ops import linear_logps, linear_loss
from fastalign.ops.head.options import Call
from fastalign.ops.linear_logps import _backward_op, _op
from fastalign.testing import linear_example

N, D, V, R = 61, 37, 252, 5
CU_PAIRS = torch.tensor([0, 9, 9, 20, 33, 50, 61])


@pytest.fixture
def no_autocast(monkeypatch):
    """Autocast knows no meta device and does not survive the question."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def example(device, case="everything"):
    """All rows are scored, whatever the case says."""
    x = linear_example(case, N, D, V, torch.float32)
    tensors = {name: y.detach().nan_to_num(0.5).to(device).requires_grad_() for name, y in x.tensors.items()}
    options = {name: y.to(device) if isinstance(y, torch.Tensor) else y for name, y in x.options.items()}
    adapter = [torch.full(shape, 0.1, device=device, requires_grad=True) for shape in ((R, D), (V, R))]
    return tensors, x.labels.clamp(min=0).to(device), {**options, "lora": (*adapter, 0.7)}


def pairs(stats):
    """A loss of pairs as a matrix product: it reads no offsets on the host."""
    ends = stats.cu_seqlens[1:, None] > torch.arange(len(stats.logps), device=stats.logps.device)
    sums = ends.to(stats.logps.dtype) @ stats.logps
    return torch.nn.functional.softplus(sums[1::2] - sums[::2]).sum() + stats.entropy.sum(), {
        "top": stats.is_top1.sum()
    }


def tokens(stats):
    return stats.logps.square().sum() + stats.entropy.sum()


LOSSES = {"token": (tokens, {}), "pair": (pairs, {"align": "pair", "cu_seqlens": CU_PAIRS})}


@pytest.mark.parametrize("memory", [None, 360_000, 1], ids=["ample", "chunks", "one row"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("no_autocast")
def test_a_loss_reads_no_data(name, memory):
    tensors, labels, options = example("meta")
    loss_fn, cut = LOSSES[name]
    run = {**tensors, **options, **cut, "labels": labels, "backend": "torch", "memory": memory}
    loss, stats = linear_loss(**run, loss_fn=loss_fn, num_scored=N)
    inputs = [*tensors.values(), *options["lora"][:2]]
    for _ in range(2):
        made = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert [g.shape for g in made] == [x.shape for x in inputs]
    assert stats.logps.shape == (N,) and loss.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        linear_loss(**run, loss_fn=loss_fn)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("num_scored", [N, N - 20])
def test_log_probs_read_no_data(num_scored, frozen):
    """The op's own functions, where a traced call would only ask for shapes."""
    tensors, labels, _ = example("meta", "bias")
    inputs = (tensors["hidden"], tensors["weight"], None, tensors["bias"])
    scaling = (None, 1.0, None, 1.0, 0.1 * frozen, torch.float32, torch.float32)
    call = Call(*inputs, labels, *scaling, None, "torch", False, num_scored, None, None)
    asked = (not frozen, not frozen)
    with torch.no_grad():
        *_, lse, top1, maximum, logsum, directions = _op._init_fn(*call, *asked, True, not frozen)
        assert top1.shape == (N,) and len(directions) == (N if frozen else 0) and len(lse) == (0 if frozen else N)
        upstream, needs = (maximum, None, logsum), [True, True, False, True]
        made = _backward_op._init_fn(*call, None, maximum, logsum, *upstream, needs)
        assert [list(g.shape) for g in made] == [[N, D], [V, D], [0], [V]]


def test_the_number_is_checked_where_it_costs_nothing():
    tensors, labels, options = example("cpu")
    labels[:5] = -100
    for op in (linear_logps, lambda **run: linear_loss(**run, loss_fn=tokens)):
        whole, told = (op(**tensors, labels=labels, **options, **n) for n in ({}, {"num_scored": N - 5}))
        assert torch.equal(whole[0], told[0])
        for wrong in (N, N - 6):
            with pytest.raises(ValueError, match=f"num_scored is {wrong}, but {N - 5} labels are not -100"):
                op(**tensors, labels=labels, **options, num_scored=wrong)
        with pytest.raises(ValueError, match=f"num_scored must lie between 0 and N = {N}"):
            op(**tensors, labels=labels, **options, num_scored=N + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [None, 360_000])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_synchronise(name, memory):
    tensors, labels, options = example("cuda")
    loss_fn, cut = LOSSES[name]
    run = {**tensors, **options, **cut, "labels": labels, "memory": memory, "num_scored": N}
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, _ = linear_loss(**run, loss_fn=loss_fn)
            logps, entropy = linear_logps(**{k: v for k, v in run.items() if k not in cut})
            (loss + logps.sum() + entropy.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_replays_forward_and_backward(name):
    tensors, labels, options = example("cuda")
    loss_fn, cut = LOSSES[name]
    run = {**tensors, **options, **cut, "labels": labels, "num_scored": N}
    inputs = [*tensors.values(), *options["lora"][:2]]

    def step():
        loss, _ = linear_loss(**run, loss_fn=loss_fn)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        tensors["hidden"].mul_(-0.5)
        labels.copy_((labels + 7) % V)
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        torch.testing.assert_close(ours, eager)
