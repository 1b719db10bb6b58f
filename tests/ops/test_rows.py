"""The row algebra: each coefficient alone and all together, on every backend, and what objectives make of it.

``dz_v = g (1[v=y] - p_v) + p_v (alpha + beta ln p_v) + delta``; nine rows: far below 0, masked, of another slab, far
above 0, confident, with banned columns, a label outside the vocabulary, two plain ones.
"""

from itertools import product

import pytest
import torch
from op_table import HERE, INTERPRETED, place

from fastalign.ops import dispatch, token_logps
from fastalign.ops.rows import Coefficients, coefficients, zero_rows

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ALONE = [{name} for name in Coefficients._fields]
PAIRS = [{"g", "beta"}, {"alpha", "delta"}, {"g", "alpha", "delta"}]
GIVEN = {"+".join(sorted(names)): names for names in [*ALONE, *PAIRS, set(Coefficients._fields)]}
SCALINGS = {"plain": {}, "temperature": {"temperature": 0.7}, "capped": {"softcap": 9.0, "logit_scale": 1.3}}
ROWS = torch.arange(9)
MASKED, ELSEWHERE, CONFIDENT, BANNED, WRONG = 1, 2, 4, 5, 6
VALID = [0, 2, 3, 4, 5, 7, 8]

on_backends = pytest.mark.parametrize("backend", HERE)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def case(vocab, dtype, device):
    new = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(9, vocab, generator=new)
    labels = torch.randint(vocab, (9,), generator=new)
    logits[0] -= 200
    logits[3] += 80
    logits[MASKED], labels[MASKED], labels[ELSEWHERE], labels[WRONG] = torch.nan, -100, -1, vocab + 3
    logits[CONFIDENT, labels[CONFIDENT]] += 30
    banned = torch.rand(vocab, generator=new) < 0.5
    banned[labels[BANNED]] = False
    logits[BANNED, banned] = -torch.inf
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    four = torch.randn(4, 9, generator=new).to(device, wide)
    return logits.to(device, dtype), labels.to(device), Coefficients(*four)


def chosen(four, names):
    """Those named; g is always there."""
    kept = {name: x if name in names else None for name, x in four._asdict().items()}
    return Coefficients(**{**kept, "g": four.g if "g" in names else torch.zeros_like(four.g)})


def scaled(logits, dtype, temperature=1.0, softcap=None, logit_scale=1.0):
    z = logits.to(dtype) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / temperature


def definition(logits, labels, four, dtype, **scaling):
    """``d logits`` of the valid rows: the formula, then autograd through the scaling."""
    x = logits[VALID].to(dtype, copy=True).requires_grad_()
    z = scaled(x, dtype, **scaling)
    log_p = z.detach().log_softmax(-1)
    g, alpha, beta, delta = (0 if c is None else c[VALID, None].to(dtype) for c in four)
    hot = torch.zeros_like(log_p).scatter_(1, labels[VALID, None].clamp(min=0), 1.0)
    hot[VALID.index(ELSEWHERE)] = 0
    p_log_p = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p.clamp(min=-1e30))
    (dx,) = torch.autograd.grad(z, x, g * (hot - log_p.exp()) + alpha * log_p.exp() + beta * p_log_p + delta)
    return dx


def sweep(backend, logits, labels, four, **scaling):
    kernels = dispatch.kernels("token_logps", backend, logits.device, logits.dtype)
    _, _, top, logsum, total, _ = kernels.forward(logits, labels, total=True, **scaling)
    out = torch.empty_like(logits)
    kernels.backward(out, logits, labels, top, logsum, four, **scaling)
    return out, total


def error(actual, exact):
    return (actual.double() - exact).abs().max().item()


def worthwhile(backend, dtype, names):
    """Interpreted, the other dtypes, which are those of what is read and written, are tried with all coefficients."""
    interpreted = backend == "triton" and INTERPRETED
    return not interpreted or dtype == torch.float32 or GIVEN[names] == set(Coefficients._fields)


@pytest.mark.parametrize(
    ("backend", "dtype", "names"), [x for x in product(HERE, DTYPES, GIVEN) if worthwhile(*x)], ids=str
)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_coefficients_alone_and_together(backend, dtype, names, scaling):
    logits, labels, four = case(507, dtype, place(backend))
    four, scaling = chosen(four, GIVEN[names]), SCALINGS[scaling]
    out, _ = sweep(backend, logits, labels, four, **scaling)
    exact = definition(logits, labels, four, torch.float64, **scaling)
    eager = definition(logits, labels, four, torch.float64 if dtype == torch.float64 else torch.float32, **scaling)
    # Twice eager's error after rounding, and a few ulp of an lse near 200; the interpreter rounds bf16 towards zero.
    unit = 1e-13 if dtype == torch.float64 else 4e-5
    unit += torch.finfo(dtype).eps if backend == "triton" and INTERPRETED and dtype == torch.bfloat16 else 0
    assert exact.abs().max() > 0
    assert error(out[VALID], exact) <= 2 * error(eager.to(dtype), exact) + unit * max(1.0, exact.abs().max().item())
    assert (out[MASKED] == 0).all() and out[WRONG].isnan().all()
    if not scaling.get("softcap"):
        beyond = 0 if four.delta is None else (four.delta[BANNED] / scaling.get("temperature", 1.0)).to(dtype)
        banned = out[BANNED][logits[BANNED] == -torch.inf]
        assert torch.allclose(banned, torch.as_tensor(beyond).to(banned), rtol=1e-2, atol=0), (
            "p = 0 contributes delta alone"
        )


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 252, 1025, 9001])
@pytest.mark.parametrize("scaling", ["plain", "capped"])
def test_total(backend, dtype, vocab, scaling):
    logits, labels, _ = case(vocab, dtype, place(backend))
    kernels, options = dispatch.kernels("token_logps", backend, logits.device, logits.dtype), SCALINGS[scaling]
    plain = kernels.forward(logits, labels, entropy=True, **options)
    *others, total, _ = kernels.forward(logits, labels, entropy=True, total=True, **options)
    assert plain[4] is None and all(torch.equal(x, y) or x.isnan().any() for x, y in zip(plain, others, strict=False))
    z = scaled(logits, torch.float64, **options)
    exact, eager = ((x - x.amax(-1, keepdim=True)).sum(-1) / vocab for x in (z, z.to(total.dtype)))
    finite = [row for row in VALID if row != BANNED or options.get("softcap")]
    # Relative to the level of the logits: what a fp32 z has lost before anything is added up.
    slack = (1e-13 if dtype == torch.float64 else 2e-6) * z[finite].abs().max().item()
    assert error((total / vocab)[finite], exact[finite]) <= 2 * error(eager[finite], exact[finite]) + slack
    assert total[MASKED] == 0
    if (logits[BANNED] == -torch.inf).any() and not options.get("softcap"):
        assert total[BANNED] == -torch.inf


@on_backends
@in_dtypes
@pytest.mark.parametrize("names", ["g", "alpha+beta+delta+g"])
def test_what_is_zero_is_not_read_and_nan_is_not_zero(backend, dtype, names):
    logits, labels, four = case(507, dtype, place(backend))
    expected, _ = sweep(backend, logits, labels, chosen(four, GIVEN[names]))
    kernels = dispatch.kernels("token_logps", backend, logits.device, logits.dtype)
    _, _, top, logsum, *_ = kernels.forward(logits, labels)
    four = chosen(four, GIVEN[names])
    for x in four:
        if x is not None:
            x[[0, MASKED, 7]] = x.new_tensor([-0.0, torch.nan, 0.0])
    last = [x for x in four if x is not None][-1]
    last[8] = torch.nan
    logits[[0, 7]] = torch.nan
    out = torch.empty_like(logits)
    kernels.backward(out, logits, labels, top, logsum, four)
    assert (out[[0, MASKED, 7]] == 0).all() and out[8].isnan().all()
    assert torch.equal(out[2:6], expected[2:6])
    assert zero_rows(four).tolist() == [row in (0, 7) for row in range(9)]


@on_backends
@pytest.mark.parametrize("names", ["g", "alpha+beta+delta+g"])
def test_in_place_in_strides_and_alone_without_a_change_of_bit(backend, names):
    logits, labels, four = case(2176, torch.float32, place(backend))
    four = chosen(four, GIVEN[names])
    expected, totals = sweep(backend, logits, labels, four, temperature=0.7)
    kernels = dispatch.kernels("token_logps", backend, logits.device, logits.dtype)
    _, _, top, logsum, *_ = kernels.forward(logits, labels, temperature=0.7)
    wide, tall = torch.empty(9, 2 * 2176 + 1, device=logits.device), torch.empty(2176, 9, device=logits.device)
    for view in (logits.clone(), wide[:, 1::2].copy_(logits), tall.T.copy_(logits)):
        kernels.backward(view, view, labels, top, logsum, four, temperature=0.7)
        assert torch.equal(view.nan_to_num(9), expected.nan_to_num(9))
    for row in (0, CONFIDENT, BANNED, 8):
        only = slice(row, row + 1)
        part = Coefficients(*(None if x is None else x[only] for x in four))  # pyright: ignore[reportArgumentType]
        out, total = sweep(backend, logits[only], labels[only], part, temperature=0.7)
        assert torch.equal(out[0], expected[row]) and torch.equal(total[0], totals[row])


@on_backends
def test_a_confident_label_keeps_the_digits_of_one_minus_p(backend):
    logits = torch.zeros(1, 507, device=place(backend))
    logits[0, 11] = 22.0
    labels, one = torch.tensor([11], device=logits.device), torch.ones(1, device=logits.device)
    kernels = dispatch.kernels("token_logps", backend, logits.device, logits.dtype)
    for rest in (1e-2, 1e-5, 1e-9):  # 1 - exp(ln p) would have 5, 2 and no digits
        out = torch.empty_like(logits)
        kernels.backward(out, logits, labels, 22 * one, rest * one, Coefficients(one))
        exact = -torch.expm1(-(rest * one).double())
        assert abs(out[0, 11].double() / exact - 1) < 1e-6


# --- objectives -------------------------------------------------------------------------------------------------------


def test_objectives_add_up():
    g, h, e, zeta = torch.randn(4, 5, dtype=torch.float64)
    four = coefficients(g, entropy=h, grad_entropy=e, grad_lse=zeta, label_smoothing=0.2, vocab=10)
    expected = (0.8 * g, zeta - e * h - 0.2 * g, -e, 0.02 * g)
    for x, y in zip(four, expected, strict=True):
        assert torch.allclose(x, y, rtol=1e-14, atol=0)
    assert coefficients(g) == Coefficients(g)


def test_a_row_that_asks_for_nothing_is_free_of_its_entropy():
    zero, bad = torch.zeros(1), torch.tensor([torch.nan])
    assert zero_rows(coefficients(zero, entropy=bad, grad_entropy=zero)).all()


@on_backends
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("banned", [False, True])
def test_smoothed_sums_are_cross_entropy(backend, smoothing, banned):
    new = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(13, 507, generator=new, dtype=torch.float64)).to(place(backend))
    labels = torch.randint(507, (13,), generator=new).to(logits.device)
    labels[[2, 9]] = -100
    if banned:
        logits[:, 100:200] = -torch.inf
        labels[(labels >= 100) & (labels < 200)] = 7
    results = []
    for ours in (True, False):
        x = logits.clone().requires_grad_()
        if ours:
            loss = -token_logps(x, labels, label_smoothing=smoothing, backend=backend).sum() / 11
        else:
            loss = torch.nn.functional.cross_entropy(x, labels, label_smoothing=smoothing)
        results.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    (mine, grad), (theirs, expected) = results
    if smoothing == 0 or not banned:
        assert torch.allclose(mine, theirs, rtol=1e-12)
    else:
        assert mine == torch.inf
    assert torch.allclose(grad, expected, rtol=1e-10, atol=1e-15) and not grad[2].any()


@on_backends
@pytest.mark.parametrize("cap", [None, 6.0])
def test_z_loss(backend, cap):
    new = torch.Generator().manual_seed(4)
    logits = (3 * torch.randn(7, 123, generator=new, dtype=torch.float64)).to(place(backend))
    labels = torch.randint(123, (7,), generator=new).to(logits.device)
    labels[5] = -100
    logits[5] = torch.nan
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logps, lse = token_logps(x, labels, softcap=cap, temperature=0.8, lse=True, backend=backend)
    z = scaled(y[labels >= 0], torch.float64, 0.8, cap)
    expected = (
        torch.nn.functional.cross_entropy(z, labels[labels >= 0], reduction="sum") + 0.1 * z.logsumexp(-1).pow(2).sum()
    )
    loss = 0.1 * lse.pow(2).sum() - logps.sum()
    assert torch.allclose(loss, expected, rtol=1e-12) and lse[5] == 0
    grads = torch.autograd.grad(loss, x)[0], torch.autograd.grad(expected, y)[0]
    assert (
        torch.allclose(grads[0][labels >= 0], grads[1][labels >= 0], rtol=1e-10, atol=1e-14) and not grads[0][5].any()
    )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("lse", [False, True])
def test_results_come_as_asked_for(entropy, lse):
    logits, labels = torch.randn(3, 7, requires_grad=True), torch.tensor([1, 2, -100])
    found = token_logps(logits, labels, entropy=entropy, lse=lse)
    everything = token_logps(logits, labels, entropy=True, lse=True)
    wanted = [everything[0], *([everything[1]] if entropy else []), *([everything[2]] if lse else [])]
    for x, y in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        assert torch.equal(x, y) and x.requires_grad


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_a_share_is_between_nothing_and_everything(smoothing):
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        token_logps(torch.zeros(1, 3), torch.tensor([1]), label_smoothing=smoothing)
