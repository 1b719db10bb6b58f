"""The native CPU layers: against their definition in float64, and in place of a Hugging Face model's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from packed_cases import PAIRS, logps_head, make_batch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, LlamaForCausalLM

from fastalign.models import native
from fastalign.models.policy import Policy
from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp import layers, product

if cpp.unavailable():
    pytest.skip(cpp.unavailable(), allow_module_level=True)

from fastalign import _C

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(131, 64), (2, 3, 37), (1, 5), (0, 8)]
"""More and fewer rows than are summed together, whole and broken vectors, no row."""


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def level(request):
    before = _C.cpu_level()
    try:
        _C.set_cpu_level(request.param)
    except ValueError as reason:
        pytest.skip(str(reason))
    yield
    _C.set_cpu_level(before)


def draw(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def assert_right(f, exact, inputs, upstream):
    """Within two roundings of the result's dtype, and sums of 131 fp32 terms, of the largest value."""
    out, wide = f(*inputs), [x.detach().double().requires_grad_() for x in inputs]
    got = (out, *torch.autograd.grad(out, inputs, upstream.detach().to(out.dtype)))
    truth = exact(*wide)
    want = (truth, *torch.autograd.grad(truth, wide, upstream.detach().to(out.dtype).double()))
    for mine, true in zip(got, want, strict=True):
        scale = true.abs().max() if true.numel() else 1.0
        assert torch.all((mine - true).abs() <= (2 * torch.finfo(mine.dtype).eps + 1e-6) * scale)


def norm64(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_norm_and_gate(shape, dtype, level):
    x, y, upstream = draw(shape, shape, shape, dtype=dtype)
    (weight,) = draw(shape[-1:], dtype=torch.float32)
    assert_right(lambda a, w: layers.rms_norm(a, w, 1e-5, dtype), norm64, [x, weight], upstream.detach())
    assert_right(layers.silu_mul, lambda a, b: F.silu(a) * b, [x, y], upstream.detach())


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("shape", [(131, 64), (2, 3, 37), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_product(shape, dtype, always, level, monkeypatch):
    """As two layers, to the bit, since the same kernels run; and nothing of the product of gate and up is kept."""
    monkeypatch.setattr(product, "preferred", lambda: always and product.available())
    gate, up, weight = draw(shape, shape, (21, shape[-1]), dtype=dtype)
    (upstream,) = draw((*shape[:-1], 21), dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        mine = layers.silu_mul_linear(gate, up, weight)
    assert set(kept) == {gate.data_ptr(), up.data_ptr(), weight.data_ptr()}
    both = layers.silu_mul(gate, up)
    served = product.multiplies(both, weight)
    theirs = product.linear(both, weight, None, dtype) if served else F.linear(both, weight)
    inputs = (gate, up, weight)
    results = [(out, *torch.autograd.grad(out, inputs, upstream)) for out in (mine, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def rotate64(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


@pytest.mark.parametrize("size", [2, 20, 64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rotation(size, dtype, level):
    x, upstream = draw((70, 3, size), (70, 3, size), dtype=dtype)
    cos, sin = (y.detach() for y in draw((70, size), (70, size), dtype=torch.float32))  # no angle is repeated
    assert_right(lambda x: layers.rotate(x, cos, sin), lambda x: rotate64(x, cos.double(), sin.double()), [x], upstream)
    by_head = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(layers.rotate(by_head, cos, sin), layers.rotate(x, cos, sin))


def test_gates_far_from_zero(level):
    x = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4, 0.0, torch.nan]], requires_grad=True)
    ones = torch.ones_like(x)
    y = layers.silu_mul(x, ones)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, F.silu(x.detach()), equal_nan=True, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(slope[0, :7], torch.tensor([0.0, 0, 0, 1, 1, 1, 0.5]), rtol=1e-6, atol=1e-30)
    assert slope[0, 7].isnan()


def test_bits_do_not_depend_on_threads():
    x, upstream = draw((1000, 48), (1000, 48), dtype=torch.float32)
    (weight,) = draw((48,), dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            y = layers.rms_norm(x, weight, 1e-5, torch.float32)
            results.append((y, *torch.autograd.grad(y, (x, weight), upstream)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 33), (1, 40, 33)])
def test_linear(bias, shape):
    x, weight, b, upstream = draw(shape, (21, 33), (21,), (*shape[:-1], 21), dtype=torch.float32)
    inputs = [x, weight, b] if bias else [x, weight]
    f = lambda x, w, b=None: product.linear(x, w, b, torch.float32)  # noqa: E731
    out, wide = f(*inputs), [v.detach().double().requires_grad_() for v in inputs]
    truth = F.linear(*wide)
    want = (truth, *torch.autograd.grad(truth, wide, upstream.double()))
    got = (out, *torch.autograd.grad(out, inputs, upstream))
    for mine, true in zip(got, want, strict=True):
        assert (mine - true).abs().max() <= 40 * torch.finfo(torch.float32).eps * true.abs().max()  # sums of 40 terms


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def make(kind, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **HEADS, **more))


def native_policy(model):
    native.use_native_layers(model)
    return Policy(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("always", [True, False])
def test_a_model_computes_the_same(kind, always, monkeypatch):
    monkeypatch.setattr(product, "preferred", lambda: always and product.available())
    rotate, rotated = layers.rotate, []
    monkeypatch.setattr(layers, "rotate", lambda *args: rotated.append(args) or rotate(*args))
    batch, _ = make_batch(*PAIRS)
    ours, theirs = native_policy(make(kind)), Policy(make(kind))
    assert any(isinstance(m, native.Norm) for m in ours.modules())
    assert not any(isinstance(m, native.Norm | native.Linear) for m in theirs.modules())
    results = []
    for policy in (ours, theirs):
        logps = policy(batch, logps_head)
        logps.sum().backward()
        results.append((logps.detach(), {name: p.grad for name, p in policy.named_parameters()}))
    assert len(rotated) == 2 * SIZES["num_hidden_layers"]  # queries and keys of our layers, and of no other
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=2e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[1][1].items():
        assert (results[0][1][name] - grad).abs().max() <= 1e-5 * max(grad.abs().max(), 1.0), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_to_the_layers_own_code(kind):
    """Whatever name transformers gives the cache: a token after three cached ones, as in a row of four."""
    torch.manual_seed(1)
    model, ids = make(kind), torch.tensor([[5, 7, 11, 13]])
    native.use_native_layers(model)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :3], use_cache=True)
        (cache,) = (name for name, value in first.items() if isinstance(value, Cache))
        then = model(ids[:, 3:], **{cache: first[cache]})
    torch.testing.assert_close(torch.cat([first.logits, then.logits], 1), whole, rtol=0, atol=2e-6)


def test_autocast_agrees_within_its_rounding():
    batch, _ = make_batch(*PAIRS)
    model = make("llama")
    want = Policy(copy.deepcopy(model).double())(batch, logps_head)
    with torch.autocast("cpu", torch.bfloat16):
        got = native_policy(model)(batch, logps_head)
    assert 0 < (got - want).abs().max() < 3e-2


def test_a_changed_model_is_copied_and_saved_as_before(tmp_path):
    model = make("llama")
    names = {name: value.clone() for name, value in model.state_dict().items()}
    policy = native_policy(model)
    twin = copy.deepcopy(policy)
    batch, _ = make_batch(*PAIRS)
    assert torch.equal(twin(batch, logps_head), policy(batch, logps_head))
    assert next(twin.parameters()) is not next(policy.parameters())
    assert {type(m).__name__ for m in policy.modules()} == {type(m).__name__ for m in twin.modules()}
    policy.model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == names.keys() and all(torch.equal(loaded[name], names[name]) for name in names)


def test_other_activations_and_wide_weights_keep_their_own_code():
    batch, _ = make_batch(*PAIRS)
    for model in (make("llama", hidden_act="gelu"), make("llama").double()):
        assert native_policy(model)(batch, logps_head).isfinite().all()


def test_layers_of_other_classes_stay():
    class LlamaRMSNorm(nn.Module):
        """Not the one of transformers."""

    holder = nn.ModuleList([LlamaRMSNorm(), nn.Identity()])
    native.use_native_layers(holder)
    assert type(holder[0]) is LlamaRMSNorm


NATIVE = {
    "rms_norm": (lambda x, w: layers.rms_norm(x, w[0], 1e-5, torch.float32), (6, 16), (3, 16)),
    "silu_mul": (layers.silu_mul, (6, 16), (6, 16)),
    "silu_mul_linear": (lambda x, w: layers.silu_mul_linear(x, x * 2, w), (6, 16), (8, 16)),
    "rotate": (lambda x, w: layers.rotate(x, w[:, 0], w[:, 0]) * w.sum(), (6, 2, 16), (6, 1, 16)),
    "linear": (lambda x, w: product.linear(x, w, None, torch.float32), (6, 16), (8, 16)),
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", NATIVE)
def test_a_second_derivative_is_refused(name, strided):
    """Of a sum, whose upstream gradient is a constant, it would look like zero."""
    f, *shapes = NATIVE[name]
    x, w = draw(*shapes, dtype=torch.float32)
    given = x.mT.contiguous().mT if strided else x
    (grad,) = torch.autograd.grad(f(given, w).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        grad.square().sum().backward()
