"""What the tests of divergences share: two streams with every kind of row, and a value with its gradient."""

import json

import pytest
import torch

from fastalign.ops import dispatch

INTERPRETED = not torch.cuda.is_available()
BACKENDS = [*dispatch.available("divergence")]
on_backends = pytest.mark.parametrize("backend", BACKENDS)
KINDS = ["forward_kl", "reverse_kl", "jsd"]
of_kinds = pytest.mark.parametrize("kind", KINDS)
N = 9
LABELS = torch.tensor([3, -100, 34, 0, 7, 7, -100, 12, 30])
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7, "mix": 0.1},
    "all": {"temperature": torch.linspace(0.5, 2, N), "softcap": 5.0, "ref_softcap": 8.0, "mix": 0.8},
}


def place(backend):
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def affordable(backend, dtype=torch.float32, vocab=507, name="all"):
    """The interpreter takes its time: each kind, dtype and width once there."""
    narrow = dtype != torch.float16 and name == "all" and (vocab <= 507 or dtype != torch.float64)
    return backend != "triton" or not INTERPRETED or narrow


def make_case(vocab, dtype, ref_dtype=None, seed=0):
    """Rows: level -200, masked (NaN in both streams), plain, banned columns, confident; and upstream gradients."""
    new = torch.Generator().manual_seed(seed + vocab)
    logits, ref_logits = 3 * torch.randn(2, N, vocab, generator=new)
    logits[0] -= 200
    logits[4, 0] += 30
    if vocab > 1:
        logits[3, : vocab // 2] = ref_logits[3, : vocab // 2] = -torch.inf
    logits[LABELS == -100] = ref_logits[LABELS == -100] = torch.nan
    return logits.to(dtype), ref_logits.to(ref_dtype or dtype), torch.randn(N, generator=new)


def run(op, logits, ref_logits, g, device="cpu", **options):
    """Value and gradient."""
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    labels = options.pop("labels", LABELS[: len(g)].clamp(max=logits.shape[1] - 1)).to(device)
    x = logits.detach().to(device).requires_grad_()
    value = op(x, ref_logits.to(device), labels=labels, **options)
    (grad,) = torch.autograd.grad((value * g.to(value)).sum(), [x])
    return value.detach().cpu(), grad.cpu()


def kernel_case(backend, vocab, dtype):
    device = torch.device(place(backend))
    kernels = dispatch.kernels("divergence", backend, device, dtype)
    return kernels, [x.to(device) for x in (*make_case(vocab, dtype), LABELS.clamp(max=vocab - 1))]


def vector(shared_file, name):
    return next(x for x in json.loads(shared_file("vectors/vectors.json").read_text()) if x["name"] == name)
