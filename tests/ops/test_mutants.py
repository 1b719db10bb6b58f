"""The tests can fail: a function is broken on purpose, and the test beside it must turn red.

A fault replaces a function wherever the package holds it, so that it survives moves and new names: what is named here
is imported. What the kernels of every backend have in common, their ``forward`` and ``backward``, is broken for each.
"""

import sys
from dataclasses import replace

import pytest
import test_backends
import test_linear_loss
import test_policy_loss
import test_top1
import torch
from op_table import HERE, OPS, place

from fastalign.ops import dispatch, functors
from fastalign.ops.backends.torch import token_logps as torch_sweep
from fastalign.ops.head import head, units
from fastalign.ops.preference_loss import _pairs

pytestmark = pytest.mark.usefixtures("nan_memory")


def break_everywhere(patch, function, faulty):
    """Puts ``faulty(function)`` wherever the package holds ``function``: under a module's name or in a table."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0].startswith("fastalign")]
    tables = [vars(module) for module in modules]
    tables += [x for module in modules for x in vars(module).values() if type(x) is dict]
    places = [(table, name) for table in tables for name, x in table.items() if x is function]
    assert places, f"{function} is held nowhere"
    for table, name in places:
        patch.setitem(table, name, faulty(function))


def assert_caught(function, faulty, test, *arguments):
    """The test, which passes as things are, fails with the fault."""
    with pytest.MonkeyPatch.context() as patch:
        break_everywhere(patch, function, faulty)
        with pytest.raises(AssertionError):
            test(*arguments)


# --- the kernels of each backend --------------------------------------------------------------------------------------


def given(**changes):
    """A fault of a kernel that is as if it had been given other options."""
    return lambda f: lambda *tensors, **options: f(*tensors, **{**options, **changes})


def relabelled(place, change):
    """A fault of a kernel that takes its labels, argument number ``place``, for others."""
    return lambda f: lambda *x, **options: f(*x[:place], change(x[place]), *x[place + 1 :], **options)


def with_row(change):
    """A fault of a backward whose rows have other coefficients."""
    return lambda f: lambda *x, **options: f(*x[:5], change(x[5]), **options)


def unmasked(labels):
    return labels.where(labels != -100, 0)


def elsewhere(labels):
    return torch.full_like(labels, -1)


def any_tie(f):
    """A tie with an earlier column counts as a hit."""

    def faulty(logits, labels, **options):
        found = f(logits, labels, **options)
        if not options.get("top1"):
            return found
        target = logits.gather(1, labels.long().clamp(0)[:, None])
        return *found[:-1], (target == logits.amax(1, keepdim=True))[:, 0].to(found[0].dtype)

    return faulty


SWEEP = {
    "forward": {
        "drop 1/temperature": (given(temperature=1.0), "temperature"),
        "drop the softcap": (given(softcap=None), "softcap"),
        "drop the mask": (relabelled(1, unmasked), "masked"),
        "shift the labels": (relabelled(1, lambda labels: labels.roll(1)), "plain"),
    },
    "backward": {
        "drop 1/temperature": (given(temperature=1.0), "temperature"),
        "lose the softcap's slope": (given(softcap=None), "softcap"),
        "drop the mask": (relabelled(2, unmasked), "masked"),
        "drop the target term": (relabelled(2, elsewhere), "plain"),
        "flip the sign of the entropy": (with_row(lambda row: row._replace(beta=-row.beta)), "entropy"),
        "forget what smoothing adds": (with_row(lambda row: row._replace(delta=None)), "smoothing"),
    },
}


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in SWEEP.items() for fault in faults])
def test_faulty_sweeps_are_caught(backend, name, fault):
    kernels = dispatch.kernels("token_logps", backend, torch.device(place(backend)))
    faulty, case = SWEEP[name][fault]
    assert_caught(getattr(kernels, name), faulty, test_backends.test_token_logps, backend, case, torch.float32, 252)


@pytest.mark.parametrize("backend", HERE)
def test_a_wrong_tie_is_caught(backend):
    kernels = dispatch.kernels("token_logps", backend, torch.device(place(backend)))
    assert_caught(kernels.forward, any_tie, test_top1.test_ties_near_and_far, backend, torch.float32)


SWAPPED = {"forward_kl": "reverse_kl", "reverse_kl": "forward_kl", "jsd": "jsd"}
OTHER_OPS = {
    "divergence: the two KLs swapped": (
        *("divergence", "forward", "plain-forward_kl"),
        lambda f: lambda *x, kind, **options: f(*x, kind=SWAPPED[kind], **options),
    ),
    "divergence: one cap for both streams": (
        *("divergence", "forward", "softcap-reverse_kl"),
        lambda f: lambda *x, softcap, ref_softcap, **options: f(*x, softcap=softcap, ref_softcap=softcap, **options),
    ),
    "divergence: the gradient forgets the mean": (
        *("divergence", "backward", "plain-jsd"),
        lambda f: lambda *x, **options: f(*x[:4], x[4] * torch.tensor([[1], [1], [1], [1], [0]]), x[5], **options),
    ),
    "policy_loss: no lower clip": (
        *("policy_loss", "run", "ppo-plain"),
        lambda f: lambda *x, knobs, **options: f(*x, knobs=replace(knobs, ratio_low=0.0), **options),
    ),
    "policy_loss: k2 for k3": (*("policy_loss", "run", "pg-everything"), given(kl_estimator="k2")),
    "segment_scan: one sum across segments": (
        *("segment_scan", "scan", "discount"),
        lambda f: lambda x, offsets, decay, **options: f(x, offsets[[0, -1]], decay, **options),
    ),
    "segment_scan: the wrong token's decay": (
        *("segment_scan", "scan", "per_token"),
        lambda f: lambda x, offsets, decay, **options: f(x, offsets, decay.nan_to_num(0.9).roll(1), **options),
    ),
    "forest_decode: the last token is left out": (
        *("forest_decode", "decode", "grouped"),
        lambda f: lambda *x: f(*x[:5], replace(x[5], lengths=x[5].lengths - 1), *x[6:]),
    ),
    "forest_decode: a row reads another's blocks": (
        *("forest_decode", "decode", "grouped"),
        lambda f: lambda *x: f(*x[:5], replace(x[5], chains=x[5].chains.roll(1, 0)), *x[6:]),
    ),
    "forest_decode: drop the softcap": (
        *("forest_decode", "decode", "softcap"),
        lambda f: lambda *x: f(*x[:7], None, *x[8:]),
    ),
}


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("fault", OTHER_OPS)
def test_faulty_kernels_are_caught(backend, fault):
    if backend not in HERE:
        pytest.skip(f"{backend}: {dispatch.missing(backend)}")
    op, name, case, faulty = OTHER_OPS[fault]
    kernels = dispatch.kernels(op, backend, torch.device(place(backend)))
    assert_caught(getattr(kernels, name), faulty, test_backends.test_op, op, case, backend, torch.float32)


# --- functions of the package -----------------------------------------------------------------------------------------


def shifted_head(make_head):
    def faulty(*arguments, **options):
        made = make_head(*arguments, **options)
        return made._replace(labels=made.labels.roll(1))

    return faulty


PAIRS = list(OPS["preference_loss"].cases)
OURS = {
    "torch: form p - 1 in bf16": (
        torch_sweep.row_gradients,
        lambda f: lambda log_p, labels, row: f(log_p, labels, row._replace(g=row.g.bfloat16())),
        *(test_backends.test_token_logps, "torch", "plain", torch.float32, 252),
    ),
    "functors: clip the wrong side": (
        functors.clip,
        lambda f: lambda ratio, a, *bounds: f(ratio, -a, *bounds),
        *(test_policy_loss.test_clipped_tokens_get_exact_zeros_and_are_counted, "torch"),
    ),
    "functors: flip k3's slope": (
        functors.k3,
        lambda f: lambda y: (f(y)[0], -f(y)[1]),
        *(test_backends.test_op, "policy_loss", "pg-everything", "torch", torch.float32),
    ),
    "linear: shift the labels of the scored rows": (
        *(head.make_head, shifted_head),
        *(test_backends.test_linear_loss, "torch", "everything", torch.float32, "trainable"),
    ),
    "linear: forget the bias": (
        head.project,
        lambda f: lambda x, *rest: f(x._replace(bias=None), *rest),
        *(test_backends.test_linear_logps, "torch", "bias", torch.float32, "trainable"),
    ),
    "linear_loss: pairs off by one sequence": (
        units._unit_offsets,
        lambda f: lambda count, *rest: [0, *range(1, count, 2), count],
        *(test_linear_loss.test_units_are_whole_and_each_sequence_comes_once, "pair"),
        *(test_linear_loss.CU_PAIRS, (0, 2, 4, 6), 60_000),
    ),
    "preference_loss: chosen and rejected swapped": (
        _pairs,
        lambda f: lambda *x: replace(pair := f(*x), chosen=pair.rejected, rejected=pair.chosen),
        *(test_backends.test_op, "preference_loss", PAIRS[0], "torch", torch.float32),
    ),
}


@pytest.mark.parametrize("fault", OURS)
def test_faulty_functions_are_caught(fault):
    assert_caught(*OURS[fault])
