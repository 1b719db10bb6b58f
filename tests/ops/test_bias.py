"""A bias joins the logits before they are rounded to bf16 or fp16, as it does in ``torch.nn.functional.linear``.

Added to a rounded product it would cost a second rounding, of logits that it may have made large.
"""

import pytest
import torch

from fastalign.ops import linear_divergence, linear_logps, linear_loss
from fastalign.ops.linear_divergence import reference as divergence_reference
from fastalign.ops.linear_logps import reference

# Rows, width, vocabulary: one row, sizes of no tile, a usual head.
SHAPES = [(1, 64, 512), (61, 37, 507), (64, 64, 512), (256, 512, 4096)]
HALVES = [torch.bfloat16, torch.float16]
WAYS = {
    "log-probs": {},
    "chunks": {"memory": 400_000},
    "invariant": {"batch_invariant": True},
    "adapter": {"rank": 4},
}


def head(shape, dtype, cancels, seed=0):
    """Where it ``cancels``, the bias takes back what one direction of the weight adds: the logits are small."""
    num_rows, width, vocab = shape
    new = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(num_rows, width, generator=new), torch.randn(vocab, width, generator=new) / width**0.5
    bias = 10 * torch.randn(vocab, generator=new)
    if cancels:
        bias = (5 * bias).bfloat16().float()
        hidden[:, 0], weight[:, 0] = 8, -bias / 8
    return [x.to(dtype) for x in (hidden, weight, bias)], torch.randint(vocab, (num_rows,), generator=new)


def rms(x, exact):
    return (x.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cancels", [False, True])
def test_log_probs_err_like_those_of_a_linear_layer(shape, dtype, cancels, way):
    """Within 1.2 of its norm, as everywhere; of a single row, whose error is chance, over many draws."""
    draws = [log_probs(shape, dtype, cancels, way, seed) for seed in range(64 if shape[0] == 1 else 1)]
    found, eager, exact = (torch.cat(each) for each in zip(*draws, strict=True))
    assert rms(found, exact) <= 1.2 * rms(eager, exact) + 1e-6


def log_probs(shape, dtype, cancels, way, seed):
    """The op's, those of its definition in the same dtype, and in float64."""
    (hidden, weight, bias), labels = head(shape, dtype, cancels, seed)
    options, wide = dict(WAYS[way]), {}
    if rank := options.pop("rank", 0):
        new = torch.Generator().manual_seed(seed + 1)
        sizes = (rank, shape[1]), (shape[2], rank)
        small = [torch.randn(size, generator=new).to(dtype) / 8 for size in sizes]
        small[0][:, 0] = 0
        options["lora"], wide["lora"] = (*small, 0.5), (*(x.double() for x in small), 0.5)
    adapter = {"lora": options["lora"]} if rank else {}
    eager, _ = reference(hidden, weight, labels, bias=bias, **adapter)
    exact, _ = reference(hidden.double(), weight.double(), labels, bias=bias.double(), **wide)
    found = linear_logps(hidden, weight, labels, bias=bias, **options)
    _, stats = linear_loss(hidden, weight, labels, lambda stats: stats.logps.sum(), bias=bias, **options)
    assert torch.equal(stats.logps, found)
    return found, eager, exact


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("cancels", [False, True])
def test_divergences_err_like_those_of_linear_layers(shape, dtype, cancels):
    (hidden, weight, bias), labels = head(shape, dtype, cancels)
    (ref_hidden, ref_weight, ref_bias), _ = head(shape, dtype, cancels, seed=1)
    options = {"labels": labels, "kind": "reverse_kl"}
    given = (hidden, weight, ref_hidden, ref_weight)
    eager = divergence_reference(*given, bias=bias, ref_bias=ref_bias, **options)
    biases = {"bias": bias.double(), "ref_bias": ref_bias.double()}
    exact = divergence_reference(*(x.double() for x in given), **biases, **options)
    found = linear_divergence(*given, bias=bias, ref_bias=ref_bias, **options)
    assert rms(found, exact) <= 1.2 * rms(eager, exact) + 1e-6
