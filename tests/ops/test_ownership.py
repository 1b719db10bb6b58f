"""What the ops keep alive, and where they write."""

import weakref

import pytest
import torch

from fastalign.ops import (
    divergence,
    linear_divergence,
    linear_logps,
    linear_loss,
    policy_loss,
    preference_loss,
    token_logps,
)

N, D, V = 6, 5, 11
CU_SEQLENS = torch.tensor([0, 3, 6])


def logistic(pair):
    return torch.nn.functional.softplus(pair.rejected - pair.chosen)  # its gradient is nowhere 0


def sft(stats):
    return -stats.logps.sum()


def head(trainable=True):
    return torch.arange(V * D).sin().view(V, D).requires_grad_(trainable)


OF_HIDDEN = {
    "linear_loss": lambda x, y: linear_loss(x, head(), y, sft)[0],
    "linear_loss, frozen": lambda x, y: linear_loss(x, head(False), y, sft, memory=400)[0],
    "linear_loss, long units": lambda x, y: linear_loss(
        x, head(), y, sft, align="sequence", cu_seqlens=CU_SEQLENS, memory=400
    )[0],
    "linear_logps": lambda x, y: linear_logps(x, head(), y).sum(),
    "linear_logps, frozen": lambda x, y: linear_logps(x, head(False), y).sum(),
    "linear_divergence": lambda x, y: linear_divergence(x, head(), x.detach() * 2, head(False), labels=y).sum(),
}
OF_LOGITS = {
    "policy_loss": lambda x, y: policy_loss(x, y, loss="sft")[0],
    "policy_loss, in place": lambda x, y: policy_loss(x, y, loss="sft", inplace=True)[0],
    "preference_loss": lambda x, y: preference_loss(x, y, CU_SEQLENS, None, loss_fn=logistic)[0],
    "token_logps": lambda x, y: token_logps(x, y).sum(),
    "divergence": lambda x, y: divergence(x, x.detach() * 2, labels=y).sum(),
}


class Activations(torch.autograd.Function):
    """A result of ``leaf`` whose memory is NumPy's: that knows when the last tensor of it is gone."""

    @staticmethod
    def forward(ctx, leaf, array):
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


@pytest.mark.parametrize("name", [*OF_HIDDEN, *OF_LOGITS])
def test_a_loss_lets_go_of_its_inputs_behind_its_backward(name):
    """A training loop that keeps its losses for a log must not keep the activations."""
    leaf = torch.randn(N, D if name in OF_HIDDEN else V, requires_grad=True)
    array = leaf.detach().numpy().copy()
    memory, rows = weakref.ref(array), Activations.apply(leaf, array)
    loss = {**OF_HIDDEN, **OF_LOGITS}[name](rows, torch.arange(N))
    del rows, array
    loss.backward()
    assert leaf.grad.abs().max() > 0 and loss.isfinite()
    leaf.grad = None  # which in place is the memory itself
    assert memory() is None


SHARED = {
    "rows": lambda x: x[:1].expand(N, V),
    "columns": lambda x: x[:, :1].expand(N, V),
    "windows": lambda x: x.flatten().as_strided((N, V), (1, 2)),
}
APART = {
    "contiguous": lambda x: x,
    "columns first": lambda x: x.T.contiguous().T,
    "every second": lambda x: torch.cat([x, x])[::2],
    "a row": lambda x: x[:1].expand(1, V),
    "of a column": lambda x: x[:, :1],
}
IN_PLACE = {
    "token_logps": (lambda x, y: token_logps(x, y, inplace_backward=True).sum(), "inplace_backward"),
    "policy_loss": (lambda x, y: policy_loss(x, y, loss="sft", inplace=True)[0], "inplace"),
    "preference_loss": (
        lambda x, y: preference_loss(x, y, CU_SEQLENS, None, loss_fn=logistic, inplace_backward=True)[0],
        "inplace_backward",
    ),
}


@pytest.mark.parametrize("op", IN_PLACE)
@pytest.mark.parametrize("shape", SHARED)
def test_a_gradient_needs_a_place_for_each_element(op, shape):
    run, name = IN_PLACE[op]
    logits, labels = torch.randn(N, V, requires_grad=True), torch.arange(N)
    with pytest.raises(
        ValueError, match=rf"^{name}=True .* share memory .*pass logits.contiguous\(\) or {name}=False$"
    ):
        run(SHARED[shape](logits * 1), labels)
    with torch.no_grad():  # nothing is written
        run(SHARED[shape](logits * 1), labels)


@pytest.mark.parametrize("shape", APART)
def test_other_layouts_are_written_in_place(shape):
    logits = torch.randn(N, V, requires_grad=True)
    view = APART[shape](logits * 1)
    labels = torch.arange(len(view)) % view.shape[1]
    (expected,) = torch.autograd.grad(token_logps(APART[shape](logits * 1), labels).sum(), [logits])
    (found,) = torch.autograd.grad(token_logps(view, labels, inplace_backward=True).sum(), [logits])
    assert torch.equal(found, expected)
