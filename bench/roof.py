"""The GEMM roof: how fast this machine multiplies the matrices of the model that is trained, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.workload import Workload

ROWS = 1536
"""Rows of every product: the tokens of a usual step."""
ROUNDS = 7


def shapes(work: Workload) -> list[tuple[int, int, int]]:
    """(outputs, inputs, how many) of the model's weights, the head included."""
    d = work.hidden_size
    keys = max(1, max(1, d // 64) // 2) * 64
    layer = [(d, d, 2), (keys, d, 2), (3 * d, d, 2), (d, 3 * d, 1)]
    return [(n, k, count * work.layers) for n, k, count in layer] + [(work.vocab_size, d, 1)]


def products(work: Workload) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The libraries that PyTorch can multiply with here; the faster one is the roof."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": torch.mm}
    if work.device == "cpu" and work.dtype == "float32" and torch.backends.mkldnn.is_available():
        found["oneDNN"] = lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return found


def measure(work: Workload) -> dict[str, Any]:
    """GFLOP/s of each library over forward and both backward products of every weight; the best of the rounds."""
    torch.set_num_threads(work.threads)
    options = {"dtype": getattr(torch, work.dtype), "device": work.device}
    flops = sum(6 * ROWS * n * k * count for n, k, count in shapes(work))
    rates = {}
    for name, product in products(work).items():
        seconds = sum(count * time_weight(product, n, k, options) for n, k, count in shapes(work))
        rates[name] = flops / seconds / 1e9
    return rates


def time_weight(product: Callable[[Tensor, Tensor], Tensor], n: int, k: int, options: dict[str, Any]) -> float:
    """Seconds of ``x w^T``, ``g w`` and ``g^T x``."""
    x, w, g = torch.randn(ROWS, k, **options), torch.randn(n, k, **options), torch.randn(ROWS, n, **options)
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for a, b in ((x, w.t()), (g, w), (g.t(), x)):
            product(a, b)
        if x.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
