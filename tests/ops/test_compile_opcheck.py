"""Every custom op passes opcheck and traces into one graph, with the values and gradients of eager."""

import pytest
import torch

from fastalign.ops import linear_logps, linear_loss, token_logps
from fastalign.ops.head.options import Call
from fastalign.ops.linear_logps import _backward_op as linear_backward
from fastalign.ops.linear_logps import _op as linear_op
from fastalign.ops.linear_logps import scale_directions_op
from fastalign.ops.rows import coefficients
from fastalign.ops.token_logps import _backward_op as token_backward
from fastalign.ops.token_logps import _op as token_op

N, D, V = 9, 17, 35
LABELS = torch.tensor([3, -100, 34, 0, 7, 7, -100, 12, 30])
ROWS = torch.linspace(0.5, 1.5, N)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("temperatures", [None, ROWS])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize(("label_smoothing", "lse"), [(0.0, False), (0.1, True)])
def test_token_op(temperatures, entropy, label_smoothing, lse):
    logits = torch.randn(N, V, requires_grad=True)
    call = (LABELS, temperatures, 1.5, 5.0, None, None, None)
    args = (logits, *call, entropy, label_smoothing, lse, False)
    torch.library.opcheck(token_op, args, test_utils=CHECKS)
    _, entropies, _, maximum, logsum = token_op(*args)
    e, zeta = (torch.randn(N) if wanted else None for wanted in (entropy, lse))
    smoothing = {"label_smoothing": label_smoothing, "vocab": V}
    row = coefficients(torch.randn(N), entropy=entropies.detach(), grad_entropy=e, grad_lse=zeta, **smoothing)
    torch.library.opcheck(token_backward, (logits.detach(), *call, maximum, logsum, *row), test_utils=CHECKS)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_linear_op(trainable, entropy, rank):
    """Without an adapter and with one; then labels are smoothed, their number is known, and lse is asked for."""
    hidden, weight = torch.randn(N, D + rank, requires_grad=True), torch.randn(V, D, requires_grad=trainable)
    up = torch.randn(V, rank, requires_grad=trainable) if rank else None
    bias = torch.randn(V, requires_grad=trainable)
    tensors, lse = (hidden, weight, up, bias, LABELS, ROWS), rank > 0 and trainable
    scaling = (1.0, None, 0.5, 0.1 if rank else 0.0, torch.float32, torch.float32)
    call = Call(*tensors, *scaling, None, None, False, 7 if rank else None, None, None)
    args = (*call, entropy, lse, True, trainable)
    torch.library.opcheck(linear_op, args, test_utils=CHECKS)
    _, entropies, _, _, maximum, logsum, directions = linear_op(*args)
    saved = (entropies.detach() if entropy else None, maximum, logsum)
    inputs = (None if x is None else x.detach() for x in tensors)
    upstream = (torch.randn(N), torch.randn(N) if entropy else None, torch.randn(N) if lse else None)
    needs = [True, trainable, trainable and rank > 0, trainable]
    backward = (*inputs, *call[len(tensors) :], *saved, *upstream, needs)
    torch.library.opcheck(linear_backward, backward, test_utils=CHECKS)
    if not trainable and not entropy:
        torch.library.opcheck(
            scale_directions_op, (hidden.detach(), LABELS, directions, upstream[0]), test_utils=CHECKS
        )


def from_logits(hidden, weight, labels):
    logps, entropy = token_logps(hidden @ weight.T, labels, temperature=0.7, softcap=5.0, entropy=True)
    return (logps * ROWS).sum() + entropy.sum()


def with_every_objective(hidden, weight, labels):
    options = {"entropy": True, "label_smoothing": 0.1, "lse": True}
    logps, entropy, lse = token_logps(hidden @ weight.T, labels, temperature=ROWS, **options)
    return (logps * ROWS).sum() + entropy.sum() + lse.pow(2).sum()


def from_hidden(hidden, weight, labels):
    logps, entropy = linear_logps(hidden, weight, labels, temperature=ROWS, entropy=True)
    return (logps * ROWS).sum() + entropy.sum()


def one_pass(hidden, weight, labels):
    def loss_fn(stats):
        sums = torch.stack([part.sum() for part in stats.logps.split([4, 5])])
        return torch.nn.functional.softplus(sums[1] - sums[0]), {"top": stats.is_top1.sum()}

    cu_seqlens = torch.tensor([0, 4, 9])
    loss, stats = linear_loss(hidden, weight, labels, loss_fn, align="pair", cu_seqlens=cu_seqlens)
    return loss + 0 * stats.metrics["top"]


@pytest.mark.parametrize("function", [from_logits, with_every_objective, from_hidden, one_pass])
def test_one_graph(function):
    labels = LABELS.clamp(min=0) if function is one_pass else LABELS
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        loss = run(hidden, weight, labels)
        results.append((loss, *torch.autograd.grad(loss, [hidden, weight])))
    for eager, traced in zip(*results, strict=True):
        assert torch.allclose(eager, traced, rtol=1e-5, atol=1e-5) and traced.abs().max() > 0


def test_a_compiled_loss_refuses_rows_it_cannot_leave_out():
    compiled = torch.compile(one_pass, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="select the scored rows"):
        compiled(torch.randn(N, D), torch.randn(V, D), LABELS)


def test_autocast_and_varying_lengths_do_not_break_the_graph():
    compiled = torch.compile(
        lambda h, w, y: linear_logps(h, w, y).sum(), fullgraph=True, backend="aot_eager", dynamic=True
    )
    weight = torch.randn(V, D, requires_grad=True)
    for rows in (5, 9, 7):
        hidden = torch.randn(rows, D, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            traced, eager = compiled(hidden, weight, LABELS[:rows]), linear_logps(hidden, weight, LABELS[:rows]).sum()
        assert torch.equal(traced, eager)
        traced.backward()
        assert hidden.grad.dtype == torch.float32
