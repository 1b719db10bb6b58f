"""Moments of AdamW in 8 bits: a code for every number, and for every 64 of them the largest as a scale.

Codes are the dynamic 8-bit numbers of Dettmers et al. (8-bit Optimizers via Block-wise Quantization, 2022), which
bitsandbytes and torchao use: seven decades, dense near the scale. The first 8 bits of a number decide its code. Of the
second moment the root is kept, which has as many decades as the first moment: otherwise a small one would round to 0
where the first does not, and eps alone would divide it.

Blocks lie within rows, so that codes and scales are cut as the weight is, whatever shards it has. A scale has the sign
of its largest number, which is code 1 exactly: to encode what was decoded changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastalign.parallel.clip import local

BLOCK = 64
"""Numbers with one scale: widths of the models in use are multiples of it."""
LEAST = 4096
"""Smaller weights keep moments in fp32, as in bitsandbytes."""
SUFFIX = "_scale"
"""Behind the name of a moment, in the optimizer's state and in checkpoints."""
DECADES = 7


BYTES = 1 + 4 / BLOCK
"""Of a number in 8 bits with its share of a scale."""


def can_be_coded(weight: Tensor) -> bool:
    """Whether the moments of a weight, as far as this rank has it, are made of blocks."""
    return makes_blocks(local(weight).shape, weight.numel())


def makes_blocks(shape: Sequence[int], elements: int) -> bool:
    """Whether a weight of that shape on this rank, and so many elements, is."""
    return len(shape) > 1 and elements >= LEAST and shape[-1] % BLOCK == 0


@cache
def levels(signed: bool, device: torch.device) -> Tensor:
    """``[256]`` what the codes stand for: from -1, or 0, to 1."""
    values = [0.0, 1.0]
    for decade in range(DECADES):
        count, power = 2 ** (decade + (not signed)), 10.0 ** (decade + 1 - DECADES)
        found = [power * (0.1 + 0.9 * (i + 0.5) / count) for i in range(count)]
        values += found + ([-x for x in found] if signed else [])
    return torch.tensor(sorted(values), device=device)


@cache
def nearest(signed: bool, device: torch.device) -> Tensor:
    """``[65536]`` uint8, the code of an fp32 number by the first half of its bits: far faster than a search."""
    table, halves = levels(signed, torch.device("cpu")), torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = (table[1:] + table[:-1]) / 2
    if not signed:
        ends[0] = 0  # nothing above 0 becomes 0
    middles = (halves | 1 << 15).view(torch.float32).nan_to_num()
    codes = torch.bucketize(middles, ends, out_int32=True)
    codes[[0, 1 << 15]] = int(table.eq(0).nonzero())
    return codes.to(device, torch.uint8)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of fp32 numbers.

    Args:
        x: ``[..., n]``, n a multiple of `BLOCK`.
        signed: a first moment; otherwise none is below 0.

    Returns:
        ``[..., n]`` uint8 and ``[..., n / BLOCK]`` fp32.

    Example:
        >>> codes, scales = encode(torch.linspace(-1, 2, 64)[None], signed=True)
        >>> codes.dtype, scales, decode(codes, scales, signed=True)[0, -1]
        (torch.uint8, tensor([[2.]]), tensor(2.))
    """
    blocks = x.unflatten(-1, (-1, BLOCK))
    most, least = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    scales = torch.where(most >= -least, most, least)
    halves = (blocks / scales.where(scales != 0, 1)).view(torch.int32) >> 16 & 0xFFFF
    codes = nearest(signed, x.device).index_select(0, halves.flatten())
    return codes.view(x.shape), scales.squeeze(-1)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """``[..., n]`` fp32 numbers of codes and scales."""
    values = levels(signed, codes.device).index_select(0, codes.flatten().int()).view(*scales.shape, BLOCK)
    return values.mul_(scales.unsqueeze(-1)).view(codes.shape)


def zeros(weight: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a moment that is 0, sharded as the weight is."""
    part = local(weight)
    zero = int(levels(signed, torch.device("cpu")).eq(0).nonzero())
    codes = torch.full_like(part, zero, dtype=torch.uint8)
    scales = torch.zeros(*part.shape[:-1], part.shape[-1] // BLOCK, device=part.device)
    return like(codes, weight, weight.shape), like(scales, weight, (*weight.shape[:-1], weight.shape[-1] // BLOCK))


def like(part: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A rank's part of a tensor that is placed as a weight is."""
    if not isinstance(weight, DTensor):
        return part
    stride = torch.empty(shape, device="meta").stride()
    known = {"shape": torch.Size(shape), "stride": stride}
    return DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False, **known)
