"""The native attention: against the definition in float64 at every instruction set, bitwise where promised."""

import pytest
import torch
from test_attention import LAYOUTS, segments_of, tensors

from fastalign.ops import dispatch
from fastalign.ops.attention import packed_attention, reference
from fastalign.ops.backends import cpp
from fastalign.types import Segments

if cpp.unavailable():
    pytest.skip(cpp.unavailable(), allow_module_level=True)

from fastalign import _C

LONG = Segments([0, 300, 400, 433, 833, 840, 900], [-1, 0, 0, -1, 3, 3])
"""Queries in several blocks and tasks, none of a round size; prefixes longer and shorter than what follows."""


def run(f, inputs):
    """Output and gradients under an upstream gradient that is the same in every dtype."""
    out = f(*inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def native(segments, **options):
    return lambda *x: packed_attention(*x, segments, backend="cpp", **options)


def leaves(inputs, *dtypes):
    dtypes = dtypes * len(inputs) if len(dtypes) == 1 else dtypes
    return [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes, strict=True)]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def level(request):
    before = _C.cpu_level()
    try:
        _C.set_cpu_level(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))
    yield request.param
    _C.set_cpu_level(before)


def assert_right(segments, inputs, **options):
    # fp32 terms of order one: a few units in the last place per term of the largest value
    want = run(lambda *x: reference(*x, segments, **options), inputs)
    for got, exact in zip(run(native(segments, **options), leaves(inputs, torch.float32)), want, strict=True):
        assert (got - exact).abs().max() <= 4e-6 * exact.abs().max()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    segments = segments_of(name)
    assert_right(segments, tensors(segments.offsets[-1]), scale=0.3)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 3, 5), (6, 2, 80), (2, 1, 130)])
def test_long_segments_and_head_shapes(heads, kv_heads, size, level):
    assert_right(LONG, tensors(LONG.offsets[-1], heads, kv_heads, size))


def test_softcap(level):
    segments = segments_of("pair")
    assert_right(segments, tensors(14, size=16), scale=0.7, softcap=2.0)
    assert_right(LONG, tensors(LONG.offsets[-1], 4, 2, 24), scale=0.3, softcap=3.0)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,), (torch.float16,), (torch.float32, torch.float32, torch.bfloat16)]
)
def test_narrow_dtypes_lose_their_own_rounding_only(dtypes):
    inputs = leaves(tensors(LONG.offsets[-1], 4, 2, 64), *dtypes)
    want = run(lambda *x: reference(*x, LONG), leaves(inputs, torch.float64))
    got = run(native(LONG), inputs)
    assert [x.dtype for x in got[1:]] == [x.dtype for x in inputs] and got[0].dtype == inputs[0].dtype
    for mine, exact in zip(got, want, strict=True):
        # results are rounded once, the upstream gradient once before
        assert (mine - exact).abs().max() <= 2 * torch.finfo(dtypes[-1]).eps * exact.abs().max()


def test_autocast_keeps_what_is_wide():
    inputs = leaves(tensors(14, size=16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(*inputs, segments_of("pair"))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, packed_attention(*inputs, segments_of("pair")).bfloat16())


def test_strides_are_free():
    inputs = leaves(tensors(LONG.offsets[-1], size=16), torch.float32)
    want = run(native(LONG), inputs)
    by_head = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in inputs]
    last = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    for other in (by_head, last):
        assert all(torch.equal(a, b) for a, b in zip(run(native(LONG), other), want, strict=True))


def test_bits_depend_on_a_tokens_own_tree_alone(level):
    """Not on what else is packed, and not on the number of threads."""
    inputs = leaves(tensors(LONG.offsets[-1], 4, 2, 24), torch.float32)
    together, threads = run(native(LONG), inputs), torch.get_num_threads()
    cut = LONG.offsets[3]
    upstream = torch.randn(together[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    for rows, segments in (
        (slice(0, cut), Segments(LONG.offsets[:4], LONG.parents[:3])),
        (slice(cut, None), Segments([x - cut for x in LONG.offsets[3:]], [-1, 0, 0])),
    ):
        alone = [x.detach()[rows].requires_grad_() for x in inputs]
        out = native(segments)(*alone)
        grads = torch.autograd.grad(out, alone, upstream[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip((out, *grads), together, strict=True))
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(run(native(LONG), inputs), together, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_trees_may_lie_between_each_other():
    segments = Segments([0, 3, 7, 9, 14, 16], [-1, -1, 0, 1, 0])
    assert_right(segments, tensors(16))


def test_it_is_the_choice_on_a_cpu_where_it_serves():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.choose_attention(None, "cpu", dtype) == "cpp"
    assert dispatch.choose_attention(None, "cpu", torch.float64) == "sdpa"
    assert dispatch.choose_attention(None, "cpu", torch.float32, True) == "cpp"
    assert "CPU tensors" in dispatch.without_attention("cpp", "cuda", torch.float32)


def test_double_backward_is_refused():
    inputs = leaves(tensors(14), torch.float32)
    grad = torch.autograd.grad(native(segments_of("pair"))(*inputs).square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["cpp", "sdpa", None])
@pytest.mark.parametrize("dtypes", ["float32 float64 float64", "float64 float32 float32", "float32 float32 int64"])
def test_dtypes_that_do_not_go_together_are_refused(backend, dtypes):
    q, k, v = (x.to(getattr(torch, name)) for x, name in zip(tensors(14), dtypes.split(), strict=True))
    with pytest.raises(ValueError, match=f"fp64, or each in fp32.*got {', '.join(dtypes.split())}"):
        packed_attention(q, k, v, segments_of("pair"), backend=backend)


def test_autocast_leaves_fp64_alone():
    inputs = leaves(tensors(14), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_attention(*inputs, segments_of("pair"))
    torch.testing.assert_close(out, reference(*inputs, segments_of("pair")), rtol=1e-12, atol=1e-12)


def test_the_extension_knows_no_other_dtype():
    x = torch.ones(2, 1, 4, dtype=torch.float64)
    heads, rows = (x.data_ptr(), 3, 4, 4), (x.data_ptr(), 3, 4)
    with pytest.raises(ValueError, match="expected fp32, bf16 or fp16"):
        _C.rotate(x=heads, y=heads, cos=rows, sin=rows, shape=(2, 1, 4), adjoint=False, threads=1)


@pytest.mark.parametrize("strided", [False, True])
def test_a_second_derivative_through_a_sum_is_refused(strided):
    inputs = leaves(tensors(14), torch.float32)
    given = [x.mT.contiguous().mT if strided else x for x in inputs]
    out = native(segments_of("pair"))(*given)
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        (out.sum() + grad.square().sum()).backward()
