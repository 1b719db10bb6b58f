"""The native products of fp32 and bf16 matrices, whose sums are fp32."""

import pytest
import torch

from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp import product

if reason := cpp.unavailable():
    pytest.skip(reason, allow_module_level=True)

if not product.available():
    pytest.skip("the processor has no AVX512-BF16", allow_module_level=True)

SHAPES = [(1, 1, 1), (5, 63, 2), (6, 64, 7), (49, 65, 33), (131, 200, 1), (97, 130, 1025), (50, 70, 2051)]
DTYPES = [torch.float32, torch.bfloat16]


def operands(m: int, n: int, k: int, layout: str, dtype: torch.dtype):
    """Matrices between NaN-filled margins, that a read outside would find."""
    generator = torch.Generator().manual_seed(m + n + k)
    a_shape, b_shape = (k, m) if layout == "columns" else (m, k), (n, k) if layout == "weight" else (k, n)
    rooms = [torch.full((rows + 2, columns + 3), torch.nan).to(dtype) for rows, columns in (a_shape, b_shape)]
    a, b = (room[1:-1, 1:-2].copy_(torch.randn(room[1:-1, 1:-2].shape, generator=generator)) for room in rooms)
    return a.t() if layout == "columns" else a, b.t() if layout == "weight" else b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["columns", "rows", "weight"])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_sums_are_those_of_fp32(m, n, k, layout, dtype):
    a, b = operands(m, n, k, layout, dtype)
    room = torch.full((m + 2, n + 5), torch.nan)
    acc = room[1:-1, 2:-3]
    assert product.serves(acc, a, b)
    product.add_product(acc, a, b, first=True)
    product.add_product(acc, a, b, first=False)
    exact = 2 * (a.double() @ b.double())
    magnitude = 2 * (a.double().abs() @ b.double().abs())
    # k roundings of 2^-24 of the running sum, and few of the pairs of bf16, whose products are exact
    assert ((acc - exact).abs() <= 2**-23 * (k + 4) * magnitude).all()
    assert room.isnan().sum() == room.numel() - acc.numel()  # nothing around it is touched


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_kept_in_fp32(dtype):
    a, b = operands(70, 90, 3000, "columns", dtype)
    acc, exact = torch.empty(70, 90), a.double() @ b.double()
    product.add_product(acc, a, b, first=True)
    # a random walk of k / 2 roundings; a bf16 sum would be four orders of magnitude worse
    assert (acc - exact).norm() <= 2**-24 * (3000 / 2) ** 0.5 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["columns", "rows", "weight"])
@pytest.mark.parametrize("k", [64, 1100, 1537])
def test_the_bits_do_not_depend_on_threads_rows_columns_or_packing(k, layout, dtype):
    a, b = operands(133, 130, k, layout, dtype)
    made, before = product.product(a, b), torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(product.product(a, b), made)
    torch.set_num_threads(before)
    assert torch.equal(product.product(a[7:8], b[:, 5:70]), made[7:8, 5:70])
    assert torch.equal(product.product(a, b, torch.float32).to(dtype), made)  # rounded once
    assert torch.equal(product.Packed(b.t())(a.contiguous(), dtype), made)


def test_an_empty_sum_is_zero():
    acc = torch.full((3, 5), torch.nan)
    product.add_product(acc, torch.empty(3, 0).bfloat16(), torch.empty(0, 5).bfloat16(), first=True)
    assert torch.equal(acc, torch.zeros(3, 5))


def test_other_operands_are_left_to_torch():
    acc, a, b = torch.empty(4, 6), torch.empty(4, 8).bfloat16(), torch.empty(8, 6).bfloat16()
    assert not product.serves(acc, a.float(), b)
    assert not product.serves(acc.double(), a, b)
    assert not product.serves(acc.bfloat16(), a, b) and product.serves(acc.bfloat16(), a, b, first=True)
    assert not product.serves(acc, a, torch.empty(8, 12).bfloat16()[:, ::2])
