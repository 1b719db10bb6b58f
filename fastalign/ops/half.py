"""Gradients in fp16: scaled by a power of two before they meet a logit, unscaled in fp32 behind the products.

fp16 rounds numbers below 6e-8 to 0. A gradient for an upstream of 1 has elements of ``p_v / N`` and less, which would
be 0 before a loss scaler multiplies them. Scaled, the largest element lies just below 2^14: nothing overflows, and only
elements below 2^-38 of the largest are lost. A power of two changes no digit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops.rows import Coefficients

CEILING = 14
"""The scaled elements stay below 2^14; fp16 ends at 2^16."""
LARGEST_EXPONENT = 100
"""So that a scale and its inverse are ordinary fp32 numbers."""


def power_of_two(bound: Tensor) -> Tensor:
    """The factor that brings ``bound`` just below 2^14, per element; 1 where it is 0 or not finite. No host sync."""
    exponent = (CEILING - torch.frexp(bound.float()).exponent).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    scale = ((exponent.int() + 127) << 23).view(torch.float32)  # its bits: exp2 need not be exact
    return torch.where((bound > 0) & bound.isfinite(), scale, 1.0)


def row_bound(row: Coefficients, chain: float | Tensor) -> Tensor:
    """``[n]`` an upper bound of the elements of a row's gradient; ``chain`` is ``logit_scale / temperature``.

    ``|g (1 - p)|``, ``|p alpha|`` and ``|p ln p beta|`` are at most the coefficient's absolute value.
    """
    total = row.g.abs()
    for x in row[1:]:
        total = total if x is None else total + x.abs()
    return total * abs(chain)


def one_for_all(bound: Tensor) -> Tensor:
    """One power of two for rows whose products are summed; rows that are not finite are ignored."""
    if not len(bound):
        return bound.new_ones(())
    return power_of_two(torch.where(bound.isfinite(), bound, 0.0).amax())


def times(row: Coefficients, scale: Tensor) -> Coefficients:
    """The coefficients, scaled."""
    g, *rest = row
    return Coefficients(g * scale, *(None if x is None else x * scale for x in rest))
