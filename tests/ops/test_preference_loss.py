"""Pair losses straight from logits against the definition in float64 and against the losses' own pair sums."""

from functools import partial

import pytest
import torch

from fastalign.losses import preference
from fastalign.losses.preference import dpo, ipo, pair_logps, simpo
from fastalign.ops import dispatch, preference_loss, token_logps
from fastalign.ops.preference_loss import reference
from fastalign.testing import assert_matches

pytestmark = pytest.mark.usefixtures("nan_memory")

OFFSETS = torch.tensor([0, 3, 7, 7, 9, 14, 21, 23, 24])  # the second pair's chosen sequence is empty
LOSSES = {"dpo": partial(dpo, beta=0.3), "ipo": partial(ipo, beta=0.4), "simpo": partial(simpo, beta=1.5)}


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    if why := dispatch.missing(request.param):
        pytest.skip(f"{request.param}: {why}")
    return request.param


def make_case(dtype, vocab=507):
    """24 rows of 4 pairs; two are not scored, and NaN."""
    new = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(24, vocab, generator=new)
    labels = torch.randint(vocab, (24,), generator=new)
    ref = token_logps(logits, labels, backend="torch") + 0.3 * torch.randn(24, generator=new)
    labels[[1, 8]], logits[[1, 8]], ref[[1, 8]] = -100, torch.nan, torch.nan
    return logits.to(dtype).requires_grad_(), labels, ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scaling", [{}, {"temperature": 0.7, "softcap": 8.0}], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", LOSSES)
def test_matches_float64(backend, name, scaling, dtype):
    logits, labels, ref = make_case(dtype)
    ref = None if not preference.LOSSES[name].reference else ref
    total, _ = preference_loss(logits, labels, OFFSETS, ref, loss_fn=LOSSES[name], backend=backend, **scaling)
    (grad,) = torch.autograd.grad(total * -2.5, logits)

    def definition(x):
        loss = reference(x, labels, OFFSETS, ref, loss_fn=LOSSES[name], **scaling)
        return loss.detach(), torch.autograd.grad(loss * -2.5, x)[0]

    exact, eager = definition(logits.detach().double().requires_grad_()), definition(logits)
    torch.testing.assert_close(total.double(), exact[0], rtol=1e-5, atol=1e-6)
    assert_matches(grad, eager[1], exact[1], name="d_logits")
    assert (grad[labels == -100] == 0).all() and (grad[labels != -100] != 0).any(1).all()


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_are_those_of_the_losses(name):
    """With the rows that are not scored left out, the losses' own sums give the same loss and the same metrics."""
    logits, labels, ref = make_case(torch.float32)
    scored = labels != -100
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), scored.cumsum(0)])[OFFSETS]
    pair = pair_logps(token_logps(logits[scored], labels[scored]), offsets, ref[scored])
    losses = LOSSES[name](pair)

    def with_metrics(pair):
        losses = LOSSES[name](pair)
        return losses, preference.metrics(pair, losses, [preference.LOSSES[name]], {"beta": 0.3})

    total, metrics = preference_loss(logits, labels, OFFSETS, ref, loss_fn=with_metrics)
    assert torch.equal(total, losses.sum() / 4)
    for key, value in preference.metrics(pair, losses, [preference.LOSSES[name]], {"beta": 0.3}).items():
        assert torch.equal(metrics[key], value) and not metrics[key].requires_grad


def test_num_pairs_shares_the_mean():
    logits, labels, ref = make_case(torch.float64)
    whole, _ = preference_loss(logits, labels, OFFSETS, ref, loss_fn=LOSSES["dpo"])
    parts = [(slice(0, 9), OFFSETS[:5]), (slice(9, 24), OFFSETS[4:] - 9)]
    shares = [
        preference_loss(logits[rows], labels[rows], offsets, ref[rows], loss_fn=LOSSES["dpo"], num_pairs=4)[0]
        for rows, offsets in parts
    ]
    torch.testing.assert_close(sum(shares), whole)


def test_in_place_backward(backend):
    logits, labels, ref = make_case(torch.float32)
    total, _ = preference_loss(logits, labels, OFFSETS, ref, loss_fn=LOSSES["dpo"], backend=backend)
    (expected,) = torch.autograd.grad(total, logits)
    buffer = logits.detach().clone().requires_grad_()
    settings = {"loss_fn": LOSSES["dpo"], "inplace_backward": True, "backend": backend}
    total, _ = preference_loss(buffer, labels, OFFSETS, ref, **settings)
    (grad,) = torch.autograd.grad(total, buffer)
    assert grad.data_ptr() == buffer.data_ptr() and torch.equal(grad, expected)


def test_the_policy_as_its_own_reference_has_no_margin():
    logits, labels, _ = make_case(torch.float32)
    margins = []

    def watch(pair):
        margins.append((pair.chosen - pair.ref_chosen) - (pair.rejected - pair.ref_rejected))
        return dpo(pair)

    preference_loss(logits, labels, OFFSETS, token_logps(logits, labels).detach(), loss_fn=watch)
    assert (margins[0] == 0).all()


def test_no_pairs_is_a_zero_in_the_graph():
    logits = torch.zeros(0, 7, requires_grad=True)
    none = torch.zeros(0)
    total, _ = preference_loss(logits, none.long(), torch.zeros(1, dtype=torch.int64), none, loss_fn=dpo)
    total.backward()
    assert total == 0 and logits.grad.shape == (0, 7)


def test_one_graph():
    logits, labels, ref = make_case(torch.float32)

    def function(x):
        return preference_loss(x * 2, labels, OFFSETS, ref, loss_fn=LOSSES["dpo"])[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(run(logits), torch.autograd.grad(run(logits), logits)[0]) for run in (function, compiled)]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 1])}, r"\[2P\+1\]"),
        ({"ref_logps": torch.zeros(3)}, "ref_logps must be"),
        ({"ref_logps": torch.zeros(2, requires_grad=True)}, "ref_logps gets no gradient"),
        ({"loss_fn": lambda pair: pair.chosen.sum()}, "one loss per pair"),
    ],
    ids=["cu_seqlens", "ref_logps", "ref_gradient", "loss_fn"],
)
def test_wrong_arguments_are_named(options, message):
    given = {"cu_seqlens": torch.tensor([0, 1, 2]), "ref_logps": None, "loss_fn": dpo, **options}
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(2, 5), torch.tensor([0, 1]), **given)
