"""Whether a token is the model's first choice: the label is a hit where ``torch.argmax`` of the logits would name it.

Of equal logits the first column wins, as in ``argmax``: a tie with an earlier one is no hit, one with a later one is.
"""

import pytest
import torch
from op_table import HERE, INTERPRETED, place
from ties import TIES, few_values, wide_rows

from fastalign.ops import dispatch, linear_loss, policy_loss
from fastalign.ops.head.head import Wanted
from fastalign.ops.head.options import make_call
from fastalign.ops.linear_logps import row_stats

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = 16
SCALINGS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "capped": {"softcap": 9.0, "logit_scale": 1.3, "temperature": 0.5 + torch.arange(ROWS) / ROWS},
}
on_backends = pytest.mark.parametrize("backend", HERE)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def first_choice(backend, logits, labels, **scaling):
    """What the backend's sweep says, as bool."""
    kernels = dispatch.kernels("token_logps", backend, torch.device(place(backend)), logits.dtype)
    scaling = {k: x.to(place(backend)) if isinstance(x, torch.Tensor) else x for k, x in scaling.items()}
    *_, top1 = kernels.forward(logits.to(place(backend)), labels.to(place(backend)), top1=True, **scaling)
    assert ((top1 == 0) | (top1 == 1)).all()
    return top1.cpu() == 1


@on_backends
@in_dtypes
@pytest.mark.parametrize("scaling", SCALINGS)
def test_it_is_the_argmax(backend, dtype, scaling):
    logits, labels = few_values(dtype)
    labels[3:6] = torch.tensor([-100, -1, 507])
    expected = logits.argmax(-1) == labels
    assert torch.equal(first_choice(backend, logits, labels, **SCALINGS[scaling]), expected)
    if backend != "triton":  # which copies them
        columns = logits.T.contiguous().T
        assert torch.equal(first_choice(backend, columns, labels, **SCALINGS[scaling]), expected)


@on_backends
@in_dtypes
def test_ties_near_and_far(backend, dtype):
    logits, labels, hits = wide_rows(dtype)
    found = first_choice(backend, logits, labels)
    assert dict(zip(TIES, found.tolist(), strict=True)) == dict(zip(TIES, hits.tolist(), strict=True))


@on_backends
@in_dtypes
def test_almost_the_largest_is_not_the_largest(backend, dtype):
    """One step below it, where the difference is lost beside the log-sum-exp of 507 columns."""
    logits = torch.zeros(2, 507, dtype=dtype)
    logits[:, 9] = torch.nextafter(torch.zeros((), dtype=dtype) + 1, torch.zeros((), dtype=dtype))
    logits[:, 400] = 1
    assert first_choice(backend, logits, torch.tensor([9, 400])).tolist() == [False, True]


@on_backends
@in_dtypes
def test_a_softcap_ties_what_it_saturates(backend, dtype):
    """The logits that count are those after scaling: 50 and 60 are one value under a softcap of 1."""
    logits = torch.zeros(2, 507, dtype=dtype)
    logits[:, 30], logits[:, 40] = 50, 60
    labels = torch.tensor([30, 40])
    assert first_choice(backend, logits, labels).tolist() == [False, True]
    assert first_choice(backend, logits, labels, softcap=1.0).tolist() == [True, False]


@on_backends
@in_dtypes
def test_a_row_without_a_distribution_has_no_first_choice(backend, dtype):
    """NaN, nothing but -inf, +inf: their log-prob is NaN. Banned columns beside a finite one are no reason."""
    logits = torch.zeros(4, 507, dtype=dtype)
    logits[0, 9], logits[1], logits[2, 5] = torch.nan, -torch.inf, torch.inf
    logits[3, 1:] = -torch.inf
    assert first_choice(backend, logits, torch.tensor([0, 0, 5, 0])).tolist() == [False, False, False, True]


def of_linear_loss(x, labels, backend, **options):
    eye, given = torch.eye(x.shape[1], dtype=x.dtype, device=x.device), {"backend": backend, **options}
    _, stats = linear_loss(x, eye, labels, lambda s: (s.logps.sum(), {"hits": s.is_top1.sum()}), **given)
    assert stats.metrics["hits"] == stats.is_top1.sum()
    return stats.is_top1


def of_linear_logps(x, labels, backend, **options):
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    call, trainable = make_call("linear_logps", x, eye, labels, {"backend": backend, **options}, {})
    return row_stats(call, Wanted(False, False), trainable)[-1]


def of_policy_loss(x, labels, backend, **options):
    """In place: the answer must not come from the gradient that takes the logits' place."""
    logits = x.clone().requires_grad_() * 1
    return policy_loss(logits, labels, loss="sft", backend=backend, inplace=True, **options)[1].is_top1


OPS = {"linear_loss": of_linear_loss, "linear_logps": of_linear_logps, "policy_loss": of_policy_loss}


@on_backends
@in_dtypes
@pytest.mark.parametrize("op", OPS)
def test_every_op_that_tells_it(op, backend, dtype):
    rows = slice(0, 8 if backend == "triton" and INTERPRETED else ROWS)
    logits, labels = (x[rows] for x in few_values(dtype))
    labels[3] = -100
    found = OPS[op](logits.to(place(backend)), labels.to(place(backend)), backend, softcap=9.0, temperature=0.7)
    assert found.dtype == torch.bool and torch.equal(found.cpu(), logits.argmax(-1) == labels)


@pytest.mark.parametrize("op", OPS)
def test_an_untrained_head_is_right_one_time_in_v(op):
    """Equal logits, 64 columns, every label once."""
    assert OPS[op](torch.zeros(64, 64), torch.arange(64), None).sum() == 1
