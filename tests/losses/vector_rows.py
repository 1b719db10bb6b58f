"""Padded rows of the published cases as packed tokens."""

import torch
from torch import Tensor

from fastalign.losses.reduce import segment_sum


class Rows:
    """Padded rows ``[B, T]`` with a mask as packed tokens: masked entries are dropped, so nothing can read them."""

    def __init__(self, mask: Tensor):
        self.mask = mask.bool()
        self.cu_seqlens = torch.nn.functional.pad(self.mask.sum(1).cumsum(0), (1, 0))
        self.totals = {"tokens": int(self.mask.sum()), "sequences": len(mask)}

    def pack(self, x: Tensor) -> Tensor:
        return x.detach()[self.mask].clone()

    def leaf(self, x: Tensor) -> Tensor:
        return self.pack(x).requires_grad_()

    def pad(self, x: Tensor) -> Tensor:
        return x.detach().new_zeros(self.mask.shape).masked_scatter(self.mask, x.detach())

    def sums(self, x: Tensor) -> Tensor:
        return segment_sum(x, self.cu_seqlens)


def mean_metrics(sums):
    """Metrics from their (sum, count)."""
    return {name: total[0] / total[1] for name, total in sums.items()}
