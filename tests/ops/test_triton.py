"""The Triton kernels of token_logps against float64: compiled where there is a GPU, else interpreted on the CPU."""

import pytest
import torch

from fastalign.ops import dispatch

if reason := dispatch.missing("triton"):
    pytest.skip(f"triton: {reason}", allow_module_level=True)

from fastalign_kernels import token_logps

INTERPRETED = not torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("nan_memory")
on_device = pytest.mark.parametrize("device", ["cpu" if INTERPRETED else "cuda"])

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 30.0, "logit_scale": 1.3},
    "all": {"temperature": "per row", "softcap": 5.0, "logit_scale": 0.6},
}
CASES = [(507, dtype, options) for dtype in DTYPES for options in OPTIONS]
CASES += [(size, dtype, "all") for size in (1, 7, 252, 1025, 2176) for dtype in (torch.float32, torch.bfloat16)]
CASES += [(9001, dtype, "all") for dtype in DTYPES]  # fills whole tiles


def make_case(vocab_size, dtype, device, seed=0):
    """Eight rows: far below 0, masked, of another slab, far above 0, confident, with banned columns, two plain ones."""
    generator = torch.Generator().manual_seed(seed + vocab_size)
    logits = 3 * torch.randn(8, vocab_size, generator=generator)
    labels = torch.randint(vocab_size, (8,), generator=generator)
    logits[0] -= 200
    logits[1] = float("nan")
    labels[1] = -100
    labels[2] = -1
    logits[3] += 80
    logits[4, labels[4]] += 40
    banned = torch.rand(vocab_size, generator=generator) < 0.5
    banned[labels[5]] = False
    logits[5, banned] = float("-inf")
    coefficients = torch.randn(2, 8, generator=generator)
    coefficients = coefficients.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return logits.to(device, dtype), labels.to(device), *coefficients.to(device)


def make_options(name, device):
    options = dict(OPTIONS[name])
    if options.get("temperature") == "per row":
        options["temperature"] = torch.linspace(0.5, 2, 8, device=device)
    return options


def eager(logits, labels, g, e, dtype, *, temperature=1.0, softcap=None, logit_scale=1.0):
    """The formulas, differentiated by autograd, in ``dtype``; rows of another slab have no target term."""
    x = logits.to(dtype, copy=True).requires_grad_()
    z = logit_scale * x
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(-1)
    picked = torch.where(labels == -1, -z.logsumexp(-1), log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0])
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    (g * picked + e * entropy).sum().backward()
    logps = picked.masked_fill(labels == -1, 0)
    return logps.detach(), entropy.detach(), x.grad


def narrow(x, dtype):
    """``x`` in ``dtype``; rounded towards zero to bf16 as the interpreter does, which doubles the error."""
    if INTERPRETED and dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def four(g, e, entropy):
    """The coefficients of g logps + e entropy."""
    return (g, None, None, None) if e is None else (g, torch.where(e == 0, 0.0, -e * entropy), -e, None)


def run(logits, labels, g, e, out=None, **options):
    logps, entropy, top, logsum, *_ = token_logps.forward(logits, labels, entropy=e is not None, **options)
    out = torch.empty_like(logits) if out is None else out
    token_logps.backward(out, logits, labels, top, logsum, four(g, e, entropy), **options)
    return logps, entropy, out, top, logsum


def error(actual, oracle):
    return (actual.double() - oracle).abs().max().item()


@on_device
@pytest.mark.parametrize(("vocab_size", "dtype", "options"), CASES, ids=str)
def test_matches_float64(vocab_size, dtype, options, device):
    options = make_options(options, device)
    logits, labels, g, e = make_case(vocab_size, dtype, device)
    logps, entropy, out, top, logsum = run(logits, labels, g, e, **options)
    assert logps.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scored = labels != -100
    rows = {k: v[scored] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    case = logits[scored], labels[scored], g[scored], e[scored]
    exact = eager(*case, torch.float64, **rows)
    rival = eager(*case, logps.dtype, **rows)
    level = (top + logsum)[scored].abs().max().item()
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    for i, actual in enumerate((logps[scored], entropy[scored])):
        assert error(actual, exact[i]) <= 2 * error(rival[i], exact[i]) + floor
        assert error(actual, exact[i]) <= 1e-4 + 4 * level * 1.2e-7
    norm, rival_norm = ((x.double() - exact[2]).norm().item() for x in (out[scored], narrow(rival[2], dtype)))
    scale = exact[2].norm().item()
    assert norm <= 1.2 * rival_norm + 10 * floor * scale
    assert norm <= (8e-3 if INTERPRETED else 3e-3) * scale
    for stat in (logps, entropy, top, logsum):
        assert stat[1] == 0
    assert (out[1] == 0).all()


@on_device
def test_no_entropy_gives_the_same_logps(device):
    logits, labels, g, e = make_case(2176, torch.float32, device)
    logps, entropy, out, *_ = run(logits, labels, g, None, temperature=0.7)
    again, _, with_zero_e, *_ = run(logits, labels, g, torch.zeros_like(e), temperature=0.7)
    assert entropy is None
    assert torch.equal(logps, again) and torch.equal(out, with_zero_e)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [7, 507, 9001])
def test_a_row_has_the_same_bits_alone_and_at_any_alignment(vocab_size, dtype, device):
    logits, labels, g, e = make_case(vocab_size, dtype, device)
    together = run(logits, labels, g, e, temperature=0.7)
    pitch = (vocab_size + 63) // 64 * 64
    for offset, stride in ((0, pitch), (1, pitch), (3, vocab_size + 4)):
        storage = torch.full((offset + 8 * stride,), float("nan"), dtype=dtype, device=device)
        view = storage.as_strided((8, vocab_size), (stride, 1), offset).copy_(logits)
        for i in (0, 3, 4, 5):
            alone = run(view[i : i + 1], labels[i : i + 1], g[i : i + 1], e[i : i + 1], temperature=0.7)
            for one, many in zip(alone, together, strict=True):
                assert torch.equal(one[0], many[i])


@on_device
@pytest.mark.parametrize("vocab_size", [252, 9001])
def test_in_place_and_any_strides(vocab_size, device):
    logits, labels, g, e = make_case(vocab_size, torch.float16, device)
    expected = run(logits, labels, g, e, softcap=9.0)
    columns = logits.T.contiguous().T
    padded = torch.empty(8, vocab_size + 5, dtype=logits.dtype, device=device)[:, :vocab_size].copy_(logits)
    out = torch.empty_like(columns)
    assert out.stride() == columns.stride() == (1, 8)
    for actual in (
        run(logits.clone(), labels.int(), g, e, softcap=9.0),
        run(padded, labels, g, e, torch.empty_like(logits), softcap=9.0),
        run(logits, labels, g, e, torch.empty_like(logits.repeat(1, 2))[:, 1::2], softcap=9.0),
        run(columns, labels, g.repeat_interleave(2)[::2], e, out, softcap=9.0),
        run(buffer := logits.clone(), labels, g, e, buffer, softcap=9.0),
        run(padded, labels, g, e, padded, softcap=9.0),
        run(buffer := columns.clone(), labels, g, e, buffer, softcap=9.0),
    ):
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


@on_device
@pytest.mark.parametrize("vocab_size", [7, 9001])
def test_rows_without_a_coefficient_are_not_read(vocab_size, device):
    logits, labels, g, e = make_case(vocab_size, torch.float32, device)
    statistics = run(logits, labels, g, e)
    g[[0, 6]], e[[0, 6]] = 0.0, -0.0
    g[7] = float("nan")
    g[1], e[1] = float("nan"), float("nan")
    logits[[0, 6]] = float("nan")
    top, logsum = statistics[3:]
    out = torch.full_like(logits, float("nan"))
    token_logps.backward(out, logits, labels, top, logsum, four(g, e, statistics[1]))
    assert (out[[0, 1, 6]] == 0).all()
    assert out[7].isnan().all()
    assert torch.equal(out[2:6], statistics[2][2:6])


@on_device
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64], ids=str)
def test_a_bad_label_spoils_its_row_alone(label_dtype, device):
    logits, labels, g, e = make_case(507, torch.float32, device)
    before = run(logits, labels, g, e)
    bad = torch.tensor([507, -2, 2**31 - 1, -101], device=device)
    labels[[0, 3, 6, 7]] = bad
    logps, entropy, out, top, logsum = run(logits, labels.to(label_dtype), g, e)
    for i in range(8):
        if i in (0, 3, 6, 7):
            assert logps[i].isnan() and out[i].isnan().all()
        else:
            assert torch.equal(logps[i], before[0][i]) and torch.equal(out[i], before[2][i])
    assert torch.equal(entropy, before[1]) and torch.equal(top, before[3]) and torch.equal(logsum, before[4])


@on_device
@pytest.mark.parametrize("vocab_size", [507, 9001])
def test_a_non_finite_row_spoils_itself_alone(vocab_size, device):
    logits, labels, g, e = make_case(vocab_size, torch.float32, device)
    before = run(logits, labels, g, e)
    labels[[0, 6, 7]] = vocab_size - 1
    logits[0, 3] = float("nan")
    logits[6, 3] = float("inf")
    logits[7] = float("-inf")
    logps, entropy, out, *_ = run(logits, labels, g, e)
    assert logps[[0, 6, 7]].isnan().all() and entropy[[0, 6, 7]].isnan().all() and out[[0, 6, 7]].isnan().all()
    for after, old in ((logps, before[0]), (entropy, before[1]), (out, before[2])):
        assert torch.equal(after[1:6], old[1:6])


@on_device
def test_banned_columns_get_no_gradient(device):
    logits, labels, g, e = make_case(2176, torch.float32, device)
    _, _, out, *_ = run(logits, labels, g, e, temperature=0.5)
    assert (out[5][logits[5] == -torch.inf] == 0).all()
    assert out[5].isfinite().all() and out[5].any()


@on_device
def test_the_top_label_cancels_logsum_exactly(device):
    logits, labels, *_ = make_case(9001, torch.float32, device)
    is_max = torch.tensor([0, 3, 5, 7], device=device)
    labels[is_max] = logits[is_max].argmax(-1)
    labels[[4, 6]] = logits[[4, 6]].argmin(-1)
    for options in ({}, {"temperature": 0.7}, {"softcap": 100.0, "temperature": 1.3, "logit_scale": 0.9}):
        logps, _, _, logsum, *_ = token_logps.forward(logits, labels, **options)
        assert (logps + logsum == 0)[[0, 3, 5, 7, 4, 6]].tolist() == [True] * 4 + [False] * 2


@on_device
def test_no_rows(device):
    logits, labels, g, e = (x[:0] for x in make_case(7, torch.float32, device))
    for result in run(logits, labels, g, e):
        assert result.shape[0] == 0


@on_device
def test_a_tensor_of_equal_temperatures_is_that_temperature(device):
    logits, labels, g, e = make_case(507, torch.float32, device)
    one = run(logits, labels, g, e, temperature=0.7, softcap=30.0)
    for dtype in (torch.float32, torch.float64):
        many = run(logits, labels, g, e, temperature=torch.full((8,), 0.7, dtype=dtype, device=device), softcap=30.0)
        for x, y in zip(one, many, strict=True):
            assert torch.equal(x, y)


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements_and_65535_rows():
    torch.use_deterministic_algorithms(False)
    stride = 2**15 + 8
    logits = torch.zeros(2**16 + 3, stride, dtype=torch.bfloat16, device="cuda")[:, : 2**15]
    case, labels, g, e = make_case(2**15, torch.bfloat16, "cuda")
    labels = torch.full((len(logits),), -100, device="cuda").index_copy_(
        0, torch.arange(8, device="cuda") + 65531, labels
    )
    logits[-8:] = case
    g, e = (
        torch.zeros(len(logits), device="cuda").index_copy_(0, torch.arange(65531, 65539, device="cuda"), c)
        for c in (g, e)
    )
    expected = run(case, labels[-8:], g[-8:], e[-8:])
    actual = run(logits, labels, g, e, logits)
    for many, few in zip(actual, expected, strict=True):
        assert torch.equal(many[-8:], few)
