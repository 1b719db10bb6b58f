"""The native product of bf16 matrices into fp32 sums."""

import pytest
import torch

from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp import product

if reason := cpp.unavailable():
    pytest.skip(reason, allow_module_level=True)

from fastalign import _C

if not _C.has_bf16_product():
    pytest.skip("the processor has no AVX512-BF16", allow_module_level=True)

SHAPES = [(1, 1, 1), (5, 63, 2), (6, 64, 7), (49, 65, 33), (131, 200, 1), (97, 130, 1025), (50, 70, 2051)]


def operands(m: int, n: int, k: int, layout: str):
    """bf16 matrices between NaN-filled margins, that a read outside would find."""
    generator = torch.Generator().manual_seed(m + n + k)
    a_shape, b_shape = (k, m) if layout == "columns" else (m, k), (n, k) if layout == "weight" else (k, n)
    rooms = [torch.full((rows + 2, columns + 3), torch.nan).bfloat16() for rows, columns in (a_shape, b_shape)]
    a, b = (room[1:-1, 1:-2].copy_(torch.randn(room[1:-1, 1:-2].shape, generator=generator)) for room in rooms)
    return a.t() if layout == "columns" else a, b.t() if layout == "weight" else b


@pytest.mark.parametrize("layout", ["columns", "rows", "weight"])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_sums_are_those_of_fp32(m, n, k, layout):
    a, b = operands(m, n, k, layout)
    room = torch.full((m + 2, n + 5), torch.nan)
    acc = room[1:-1, 2:-3]
    assert product.serves(acc, a, b)
    product.add_product(acc, a, b, first=True)
    product.add_product(acc, a, b, first=False)
    exact = 2 * (a.double() @ b.double())
    magnitude = 2 * (a.double().abs() @ b.double().abs())
    # every product is exact; k roundings of 2^-24 of the running sum, and few of the instruction's pairs
    assert ((acc - exact).abs() <= 2**-23 * (k + 4) * magnitude).all()
    assert room.isnan().sum() == room.numel() - acc.numel()  # nothing around it is touched


def test_the_sum_is_kept_in_fp32():
    a, b = operands(70, 90, 3000, "columns")
    acc, exact = torch.empty(70, 90), a.double() @ b.double()
    product.add_product(acc, a, b, first=True)
    # a random walk of k / 2 roundings; a bf16 sum would be four orders of magnitude worse
    assert (acc - exact).norm() <= 2**-24 * (3000 / 2) ** 0.5 * exact.norm()


def test_the_bits_do_not_depend_on_threads():
    a, b = operands(300, 130, 1100, "columns")
    made, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(torch.empty(300, 130))
        product.add_product(made[-1], a, b, first=True)
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_an_empty_sum_is_zero():
    acc = torch.full((3, 5), torch.nan)
    product.add_product(acc, torch.empty(3, 0).bfloat16(), torch.empty(0, 5).bfloat16(), first=True)
    assert torch.equal(acc, torch.zeros(3, 5))


def test_other_operands_are_left_to_torch():
    acc, a, b = torch.empty(4, 6), torch.empty(4, 8).bfloat16(), torch.empty(8, 6).bfloat16()
    assert not product.serves(acc, a.float(), b)
    assert not product.serves(acc.double(), a, b)
    assert not product.serves(acc, a, torch.empty(8, 12).bfloat16()[:, ::2])
