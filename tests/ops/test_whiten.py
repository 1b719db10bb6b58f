"""Whitening against PyTorch's own variance in float64, the golden vectors, and ranks against one process."""

import json
from pathlib import Path

import forks
import pytest
import torch

from fastalign.ops import whiten
from fastalign.ops.whiten import EPS_IN, merge, moments, reference
from fastalign.testing import assert_matches

MASK = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1]).bool()


def entries(dtype=torch.float32, level=0.0):
    x = torch.randn(len(MASK), generator=torch.Generator().manual_seed(0)) * 3 + level
    return x.masked_fill(~MASK, torch.nan).to(dtype)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("eps_in", EPS_IN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("level", [0.0, 1000.0])  # far from 0, sums of squares would lose what the variance needs
def test_matches_float64(dtype, eps_in, unbiased, level):
    x = entries(dtype, level)
    settings = {"eps": 0.05, "eps_in": eps_in, "unbiased": unbiased}
    exact = reference(x.double(), MASK, **settings)
    for mask in (MASK, MASK.float(), MASK.long()):
        out = whiten(x.clone().requires_grad_(), mask, **settings)
        assert_matches(out, reference(x, MASK, **settings), exact, factor=1.0)
        assert not out.requires_grad
    assert (out[~MASK] == 0).all() and out.abs().max() > 0.5
    torch.testing.assert_close(whiten(x[MASK], **settings), out[MASK])


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("population_eps1e-5", {}),
        ("bessel_rsqrt1e-8", {"unbiased": True, "eps": 1e-8, "eps_in": "variance"}),
    ],
)
def test_golden_vectors(case, settings, shared_file):
    entries = {entry["name"]: entry for entry in json.loads(shared_file("vectors/vectors.json").read_text())}
    entry = entries[f"adv_normalise/{case}"]
    x, mask = (torch.tensor(entry["inputs"][k], dtype=torch.float64) for k in ("advantages", "mask"))
    expected = torch.tensor(entry["expected"]["out"], dtype=torch.float64)
    x[mask == 0] = torch.nan
    torch.testing.assert_close(whiten(x, mask, **settings), expected)


@pytest.mark.parametrize("unbiased", [False, True])
def test_few_entries(unbiased):
    assert whiten(torch.tensor([5.0]), unbiased=unbiased).tolist() == [0.0]
    assert whiten(torch.tensor([5.0, torch.nan]), torch.tensor([1, 0]), unbiased=unbiased).tolist() == [0.0, 0.0]
    assert whiten(torch.full((2,), torch.nan), torch.zeros(2), unbiased=unbiased).tolist() == [0.0, 0.0]
    assert whiten(torch.empty(0), unbiased=unbiased).shape == (0,)


def test_moments_of_parts_merge_into_those_of_the_whole():
    x = torch.randn(40, generator=torch.Generator().manual_seed(1)) + 100
    parts = [moments(part) for part in x.split([3, 1, 0, 36])]
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    torch.testing.assert_close(merged, moments(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(merge(parts[2], parts[2]), torch.zeros(3, dtype=torch.float64))
    kept = x.double()
    torch.testing.assert_close(merged[2], (kept - kept.mean()).square().sum(), rtol=1e-12, atol=0)


def test_ranks_have_the_result_of_one_process():
    assert forks.run(Path(__file__).with_name("whiten_ranks.py"), ranks=3).count("agreed") == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: whiten(torch.arange(3)), "x must be float32, bfloat16, float16 or float64, got torch.int64"),
        (lambda: whiten(torch.ones(3), torch.ones(2)), r"mask must have the shape of x, \[3\], got \[2\]"),
        (lambda: whiten(torch.ones(3), eps_in="sigma"), "eps_in must be one of std, variance, got 'sigma'"),
        (lambda: whiten(torch.ones(3), torch.ones(3, device="meta")), "mask is on meta but x on cpu"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_one_graph():
    x = entries()
    assert torch.equal(torch.compile(whiten, fullgraph=True, backend="aot_eager")(x, MASK), whiten(x, MASK))
