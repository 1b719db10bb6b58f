"""Packed attention: every backend against separate sequences, and every way a packed row can silently go wrong."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops import dispatch
from fastalign.ops.attention import dense_mask, layout, packed_attention, reference
from fastalign.types import Segments

EXACT = 1e-12  # float64, a few hundred terms of order one

LAYOUTS = {
    "one sequence": ([7], [-1]),
    "one token": ([1], [-1]),
    "unshared": ([5, 1, 8], [-1, -1, -1]),
    "pair": ([6, 5, 3], [-1, 0, 0]),
    "group of four and a pair": ([4, 3, 1, 6, 2, 5, 2, 3], [-1, 0, 0, 0, 0, -1, 5, 5]),
    "equal responses": ([4, 3, 3], [-1, 0, 0]),
    "one-token prompt": ([1, 4, 2], [-1, 0, 0]),
    "empty prompt": ([0, 4, 2], [-1, 0, 0]),
    "empty first response": ([4, 0, 3], [-1, 0, 0]),
    "grandparents": ([3, 2, 4, 3, 2, 5], [-1, 0, 1, 1, 0, -1]),
    "parent far away": ([3, 2, 2, 4], [-1, -1, 1, 0]),
    "prefix over two calls": ([3, 2, 3, 4, 2], [-1, 0, 0, 2, 2]),
}


def segments_of(name):
    lengths, parents = LAYOUTS[name]
    return Segments([0, *torch.tensor(lengths).cumsum(0).tolist()], parents)


def tensors(num_tokens, heads=4, kv_heads=2, size=8, dtype=torch.float64):
    torch.manual_seed(num_tokens)
    shapes = [(num_tokens, heads, size), (num_tokens, kv_heads, size), (num_tokens, kv_heads, size)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def separate(q, k, v, segments, scale, softcap=None):
    """Each segment's chain as an ordinary sequence of its own, by explicit loops over what a token sees."""
    outs = []
    for s, parent in enumerate(segments.parents):
        chain = [s]
        while parent >= 0:
            chain.append(parent)
            parent = segments.parents[parent]
        rows = [t for i in reversed(chain) for t in range(segments.offsets[i], segments.offsets[i + 1])]
        kk, vv = (x[rows].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        own = segments.offsets[s + 1] - segments.offsets[s]
        for t in range(own):
            seen = len(rows) - own + t + 1
            scores = torch.einsum("hd,jhd->hj", q[segments.offsets[s] + t], kk[:seen]) * scale
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            outs.append(torch.einsum("hj,jhd->hd", scores.softmax(-1), vv[:seen]))
    return torch.stack(outs)


def values_and_gradients(f, inputs):
    out = f(*inputs)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, inputs, torch.randn(out.shape, dtype=out.dtype).to(out.device))]


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, scale, enable_gqa=False, num_splits=None):
    """What a variable-length kernel computes: causal, aligned at the bottom right."""
    assert window_size == (-1, 0) and max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    outs = []
    for i in range(len(cu_q) - 1):
        qi, ki, vi = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        ki, vi = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (ki, vi))
        mask = torch.ones(len(qi), len(ki), dtype=torch.bool).tril(len(ki) - len(qi))
        scores = torch.einsum("ihd,jhd->hij", qi, ki) * scale
        outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), vi))
    return torch.cat(outs)


@pytest.fixture
def cuda_kernels_in_python(monkeypatch):
    """The two CUDA kernels replaced by their definition: what surrounds them runs as it is."""
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = plain_varlen
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_varlen_func = lambda *args, softmax_scale, causal, deterministic: plain_varlen(
        *args, window_size=(-1, 0) if causal else None, scale=softmax_scale
    )
    monkeypatch.setitem(sys.modules, "flash_attn", flash)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "varlen", "flash"])
def test_equals_separate_sequences(name, backend, cuda_kernels_in_python):
    segments = segments_of(name)
    inputs = tensors(segments.offsets[-1])
    if backend == "reference":
        packed = values_and_gradients(lambda *x: reference(*x, segments, scale=0.3), inputs)
    else:
        call = dispatch.attention(backend).attend
        packed = values_and_gradients(lambda *x: call(*x, layout(segments), 0.3, None), inputs)
    expected = values_and_gradients(lambda *x: separate(*x, segments, 0.3), inputs)
    for got, want in zip(packed, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["pair", "grandparents"])
def test_softcap_equals_separate_sequences(name):
    segments = segments_of(name)
    inputs = tensors(segments.offsets[-1])
    expected = values_and_gradients(lambda *x: separate(*x, segments, 0.5, softcap=2.0), inputs)
    for f in (packed_attention, reference):
        packed = values_and_gradients(lambda *x, f=f: f(*x, segments, scale=0.5, softcap=2.0), inputs)
        for got, want in zip(packed, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 3), (6, 6, 5), (6, 3, 16), (8, 1, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_shapes_and_dtypes(heads, kv_heads, size, dtype):
    # PyTorch's own error in the dtype sets the tolerance: the dense definition in the same dtype
    segments = segments_of("group of four and a pair")
    inputs = tensors(segments.offsets[-1], heads, kv_heads, size, dtype)
    exact = values_and_gradients(
        lambda *x: reference(*x, segments), [x.detach().double().requires_grad_() for x in inputs]
    )
    dense = values_and_gradients(lambda *x: reference(*x, segments), inputs)
    packed = values_and_gradients(lambda *x: packed_attention(*x, segments), inputs)
    for got, plain, want in zip(packed, dense, exact, strict=True):
        assert got.dtype == dtype
        assert (got - want).abs().max() <= 2 * (plain - want).abs().max() + 4 * torch.finfo(dtype).eps


@st.composite
def forests(draw):
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=7))
    parents = [draw(st.integers(-1, s - 1)) for s in range(len(lengths))]
    return Segments([0, *torch.tensor(lengths).cumsum(0).tolist()], parents)


@settings(max_examples=60, deadline=None)
@given(forests())
def test_layout_covers_each_row_once_and_sees_what_the_mask_sees(segments):
    plan = layout(segments)
    seen = torch.zeros(plan.num_tokens, plan.num_tokens, dtype=torch.int)
    row = 0
    for call in plan.calls:
        assert call.start == row
        row = call.stop
        for span in call.prefix:
            home = plan.calls[span.call]
            assert home.start <= span.start < span.stop <= home.stop
            seen[call.start : call.stop, span.start : span.stop] += 1
        seen[call.start : call.stop, call.start : call.stop] += torch.ones(call.length, call.length).tril().int()
    assert row == plan.num_tokens
    assert torch.equal(seen, dense_mask(segments).int())
    assert plan.longest == dense_mask(segments).sum(1).amax().item() if plan.num_tokens else plan.longest == 0


def test_first_response_is_fused_with_its_prompt():
    assert [call.length for call in layout(segments_of("pair")).calls] == [11, 3]


def test_one_layout_serves_many_layers():
    segments = segments_of("pair")
    plan = layout(segments)
    for _ in range(2):
        q, k, v = tensors(plan.num_tokens)
        assert torch.equal(packed_attention(q, k, v, plan), packed_attention(q, k, v, segments))


def test_no_row_reads_another_group():
    """A group full of NaN spoils itself alone, in values and in gradients."""
    segments = segments_of("group of four and a pair")
    inputs = tensors(segments.offsets[-1], dtype=torch.float32)
    bad = segments.offsets[5]
    spoiled = [torch.cat([x[:bad], torch.full_like(x[bad:], torch.nan)]).detach().requires_grad_() for x in inputs]
    for got, want in zip(
        values_and_gradients(lambda *x: packed_attention(*x, segments), spoiled),
        values_and_gradients(lambda *x: packed_attention(*x, segments), inputs),
        strict=True,
    ):
        assert torch.equal(got[:bad], want[:bad])


def test_trap_is_causal_on_a_rectangle_is_aligned_top_left():
    """Why a response after its prefix never uses `is_causal`: PyTorch hides the last P keys and says nothing."""
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (3, 9, 9))
    wrong = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    plan = layout(Segments([0, 9], [-1]))
    right = dispatch.attention("sdpa").causal(q, k, v, plan, 8**-0.5, None)
    mask = torch.ones(3, 9, dtype=torch.bool).tril(6)
    torch.testing.assert_close(right, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), rtol=0, atol=EXACT)
    assert (wrong - right).abs().max() > 0.1


def test_autocast_narrows_all_three():
    segments = segments_of("pair")
    q, k, v = tensors(segments.offsets[-1], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(q, k, v.bfloat16(), segments).dtype == torch.bfloat16


def test_empty_row():
    q, k, v = tensors(0)
    out = packed_attention(q, k, v, Segments([0, 0], [-1]))
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize(
    ("offsets", "parents", "message"),
    [
        ([0, 3], [-1, 0], "one offset more"),
        ([1, 3], [-1], "starting at 0"),
        ([0, 3, 2], [-1, -1], "must not decrease"),
        ([0, 3, 5], [1, -1], "must precede"),
        ([0, 3, 5], [-1, -2], "must precede"),
    ],
)
def test_malformed_segments_are_refused(offsets, parents, message):
    with pytest.raises(ValueError, match=message):
        layout(Segments(offsets, parents))


def test_wrong_arguments_are_refused():
    segments = segments_of("pair")
    q, k, v = tensors(segments.offsets[-1])
    with pytest.raises(ValueError, match="segments cover 14 rows; q has 13"):
        packed_attention(q[:-1], k[:-1], v[:-1], segments)
    with pytest.raises(ValueError, match="expected q"):
        packed_attention(q[None], k, v, segments)
    with pytest.raises(ValueError, match="cannot share"):
        packed_attention(q[:, :3], k, v, segments)
    with pytest.raises(ValueError, match="unknown attention backend"):
        packed_attention(q, k, v, segments, backend="magic")


@pytest.mark.parametrize("backend", ["varlen", "flash"])
def test_a_backend_that_cannot_serve_says_why(backend):
    q, k, v = tensors(14)
    with pytest.raises(ValueError, match=f"{backend}.*needs CUDA"):
        packed_attention(q, k, v, segments_of("pair"), backend=backend)
    assert "needs float16 or bfloat16" in dispatch.without_attention(backend, "cuda", torch.float32)


@pytest.mark.parametrize(
    ("installed", "softcap", "refused"),
    [("2.0.9", False, True), ("2.1.0", False, False), ("2.5.9", True, True), ("2.8.3.post1", True, False)],
)
def test_trap_old_flash_attention_is_aligned_top_left(monkeypatch, installed, softcap, refused):
    flash = dispatch.attention("flash")
    monkeypatch.setattr(flash, "find_spec", lambda name: object())
    monkeypatch.setattr(flash, "version", lambda name: installed)
    reason = flash.unavailable("cuda", torch.bfloat16, softcap)
    assert (reason is not None) == refused


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_on_cuda(name, backend):
    segments = segments_of(name)
    if reason := dispatch.without_attention(backend, "cuda", torch.bfloat16):
        pytest.skip(reason)
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in tensors(segments.offsets[-1], size=32)]
    exact = values_and_gradients(
        lambda *x: reference(*x, segments), [x.detach().double().requires_grad_() for x in inputs]
    )
    packed = values_and_gradients(lambda *x: packed_attention(*x, segments, backend=backend), inputs)
    for got, want in zip(packed, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-2, atol=3e-2)
