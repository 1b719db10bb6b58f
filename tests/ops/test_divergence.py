"""Divergences on every backend against float64 autograd."""

import json

import pytest
import torch

from fastalign.ops import dispatch, divergence, linear_divergence, token_logps
from fastalign.ops._rows import coefficients
from fastalign.ops.divergence import _backward_op, _op
from fastalign.ops.divergence import reference as eager
from fastalign.ops.linear_divergence import _backward_op as linear_backward
from fastalign.ops.linear_divergence import _op as linear_op
from fastalign.ops.linear_divergence import _scale_rows
from fastalign.ops.linear_divergence import reference as linear_eager
from fastalign.ops.token_logps import reference as token_reference
from fastalign.testing import assert_matches

pytestmark = pytest.mark.usefixtures("nan_memory")

INTERPRETED = not torch.cuda.is_available()
BACKENDS = [*dispatch.available("divergence")]
on_backends = pytest.mark.parametrize("backend", BACKENDS)
KINDS = ["forward_kl", "reverse_kl", "jsd"]
of_kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
N = 9
LABELS = torch.tensor([3, -100, 34, 0, 7, 7, -100, 12, 30])
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7, "mix": 0.1},
    "all": {"temperature": torch.linspace(0.5, 2, N), "softcap": 5.0, "ref_softcap": 8.0, "mix": 0.8},
}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def place(backend):
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def affordable(backend, dtype=torch.float32, vocab=507, name="all"):
    """The interpreter takes its time: each kind, dtype and width once there."""
    narrow = dtype != torch.float16 and name == "all" and (vocab <= 507 or dtype != torch.float64)
    return backend != "triton" or not INTERPRETED or narrow


def make_case(vocab, dtype, ref_dtype=None, seed=0):
    """Rows: level -200, masked (NaN in both streams), plain, banned columns, confident; and upstream gradients."""
    new = torch.Generator().manual_seed(seed + vocab)
    logits, ref_logits = 3 * torch.randn(2, N, vocab, generator=new)
    logits[0] -= 200
    logits[4, 0] += 30
    if vocab > 1:
        logits[3, : vocab // 2] = ref_logits[3, : vocab // 2] = -torch.inf
    logits[LABELS == -100] = ref_logits[LABELS == -100] = torch.nan
    return logits.to(dtype), ref_logits.to(ref_dtype or dtype), torch.randn(N, generator=new)


def run(op, logits, ref_logits, g, device="cpu", **options):
    """Value and gradient."""
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    labels = options.pop("labels", LABELS[: len(g)].clamp(max=logits.shape[1] - 1)).to(device)
    x = logits.detach().to(device).requires_grad_()
    value = op(x, ref_logits.to(device), labels=labels, **options)
    (grad,) = torch.autograd.grad((value * g.to(value)).sum(), [x])
    return value.detach().cpu(), grad.cpu()


SIZES = [(507, name) for name in OPTIONS] + [(1, "all"), (35, "all"), (2500, "all")]
CASES = [(backend, dtype, *size) for backend in BACKENDS for dtype in DTYPES for size in SIZES]


@of_kinds
@pytest.mark.parametrize(("backend", "dtype", "vocab", "name"), [x for x in CASES if affordable(*x)], ids=str)
def test_matches_float64(backend, kind, dtype, vocab, name):
    logits, ref_logits, g = make_case(vocab, dtype)
    options = {"kind": kind, **OPTIONS[name]}
    actual = run(divergence, logits, ref_logits, g, place(backend), backend=backend, **options)
    exact = run(eager, logits.double(), ref_logits.double(), g, **options)
    value, grad = run(eager, logits, ref_logits, g, **options)
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        assert_matches(actual[0], value, exact[0], name="value")
    assert (actual[0] - exact[0]).abs().max() <= 1e-4  # few rows, where eager may be lucky: no comparison
    towards_zero = backend == "triton" and INTERPRETED and dtype == torch.bfloat16  # the interpreter's rounding
    assert_matches(actual[1], grad, exact[1], name="gradient", factor=4 if towards_zero else 2)
    assert exact[1].abs().max() > 0 or vocab == 1
    assert not actual[0][LABELS == -100].any() and not actual[1][LABELS == -100].any()
    if vocab > 1:  # under a soft-cap -inf is the lowest logit, not a ban
        assert actual[1][3, : vocab // 2].abs().max() <= (1e-35 if "softcap" in options else 0)


@on_backends
@of_kinds
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_err_like_eager_over_many_rows(backend, kind, name, dtype):
    if not affordable(backend, dtype, name=name):
        pytest.skip("slow in the interpreter")
    assert_errs_like_eager(backend, dtype, 507, {"kind": kind, **OPTIONS[name]})


def assert_errs_like_eager(backend, dtype, vocab, options, num_rows=14 * N):
    """The norms within 1.2 and the maxima within 2 of eager's, both against float64. One row in nine lies at -200."""
    new = torch.Generator().manual_seed(vocab)
    streams = (3 * torch.randn(2, num_rows, vocab, generator=new)).sub_(
        200 * (torch.arange(num_rows) % N == 0)[:, None]
    )
    logits, ref_logits = streams.to(dtype)
    if isinstance(options.get("temperature"), torch.Tensor):
        options = {**options, "temperature": options["temperature"].repeat(num_rows // N)}
    device = place(backend)
    on_device = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    actual = divergence(logits.to(device), ref_logits.to(device), backend=backend, **on_device).cpu()
    rival, exact = eager(logits, ref_logits, **options), eager(logits.double(), ref_logits.double(), **options)
    assert_matches(actual, rival, exact, budget=1e-4)
    ours, theirs = ((x.double() - exact).norm() for x in (actual, rival))
    assert ours <= 1.2 * theirs + 2**-26 * exact.norm(), f"{options['kind']}: {ours:.3g}, eager {theirs:.3g}"


@on_backends
@of_kinds
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_streams_of_different_dtypes(backend, kind, dtypes):
    logits, ref_logits, g = make_case(507, *dtypes)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    value, grad = run(divergence, logits, ref_logits, g, place(backend), kind=kind, backend=backend)
    exact = run(divergence, logits.to(wide), ref_logits.to(wide), g, place(backend), kind=kind, backend=backend)
    assert value.dtype == wide and grad.dtype == dtypes[0]
    assert torch.allclose(value, exact[0], atol=1e-5) and torch.allclose(grad.to(wide), exact[1], rtol=8e-3, atol=1e-6)


@on_backends
@of_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_streams_give_exact_zeros(backend, kind, dtype):
    logits, _, g = make_case(2500, dtype)
    options = {"mix": 0.3, "temperature": 0.7, "softcap": 30.0, "ref_softcap": 30.0}
    value, grad = run(divergence, logits, logits, g, place(backend), kind=kind, backend=backend, **options)
    assert not value.any() and not grad.any()


WIDTHS = [(backend, vocab) for backend in BACKENDS for vocab in (35, 2500, 40009)]
WIDTHS = [(backend, vocab) for backend, vocab in WIDTHS if vocab == 2500 or backend != "triton" or not INTERPRETED]


@of_kinds
@pytest.mark.parametrize(("backend", "vocab"), WIDTHS)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(backend, kind, vocab):
    if backend == "torch" and torch.get_num_threads() > 1:
        pytest.skip("torch cuts the sums of a lone row over its threads")
    logits, ref_logits, g = make_case(vocab, torch.float32)
    options = {"kind": kind, "backend": backend, "device": place(backend)}
    whole = run(divergence, logits, ref_logits, g, **options)
    for row in (0, 3, 8):
        one = slice(row, row + 1)
        alone = run(divergence, logits[one], ref_logits[one], g[one], labels=LABELS[one], **options)
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, whole, strict=True))
    if backend == "torch":
        return  # its sums depend on the layout
    columns = run(divergence, logits.T.contiguous().T, ref_logits.repeat(1, 2)[:, :vocab], g, **options)
    assert all(torch.equal(x, y) for x, y in zip(columns, whole, strict=True))


@on_backends
def test_a_column_banned_in_one_stream(backend):
    """KL over the other stream is honestly infinite; the mixture is not."""
    logits, ref_logits, g = torch.randn(1, 35), torch.randn(1, 35), torch.ones(1)
    banned = logits.clone()
    banned[0, 5] = -torch.inf
    for policy, ref, kind, infinite in (
        (banned, ref_logits, "forward_kl", True),
        (banned, ref_logits, "reverse_kl", False),
        (logits, banned, "forward_kl", False),
        (logits, banned, "reverse_kl", True),
        (logits, banned, "jsd", False),
        (banned, ref_logits, "jsd", False),
    ):
        value, grad = run(divergence, policy, ref, g, place(backend), kind=kind, backend=backend)
        assert value.item() == torch.inf if infinite else 0 < value.item() < 20
        if not infinite:
            exact = run(eager, policy.double(), ref.double(), g, kind=kind)
            assert torch.allclose(value.double(), exact[0], atol=1e-5)
            assert torch.allclose(grad.double(), exact[1].nan_to_num(), atol=1e-5)


@on_backends
@of_kinds
def test_a_spoiled_row_spoils_no_other_and_zero_coefficients_read_nothing(backend, kind):
    logits, ref_logits, g = make_case(507, torch.float32)
    clean = run(divergence, logits, ref_logits, g, place(backend), kind=kind, backend=backend)
    logits[0, 3], ref_logits[2, 5], logits[8] = torch.nan, torch.inf, -torch.inf
    g[2] = 0
    value, grad = run(divergence, logits, ref_logits, g, place(backend), kind=kind, backend=backend)
    assert value[[0, 2, 8]].isnan().all() and grad[[0, 8]].isnan().any(1).all() and not grad[2].any()
    others = [1, 3, 4, 5, 6, 7]
    assert torch.equal(value[others], clean[0][others]) and torch.equal(grad[others], clean[1][others])


def kernel_case(backend, vocab, dtype):
    device = torch.device(place(backend))
    kernels = dispatch.kernels("divergence", backend, device)
    return kernels, [x.to(device) for x in (*make_case(vocab, dtype), LABELS.clamp(max=vocab - 1))]


@on_backends
@of_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_invalid_label_makes_its_row_nan_and_an_elsewhere_one_does_not(backend, kind, dtype):
    kernels, (logits, ref_logits, g, labels) = kernel_case(backend, 507, dtype)
    expected, stats, *_ = kernels.forward(logits, ref_logits, labels, kind=kind)
    right, out = torch.empty_like(logits), torch.empty_like(logits)
    kernels.backward(right, logits, ref_logits, labels, stats, g.to(dtype), kind=kind)
    wrong = labels.clone()
    wrong[3], wrong[4], wrong[5], g[5] = 507, -1, -7, 0
    value, stats, *_ = kernels.forward(logits, ref_logits, wrong, kind=kind)
    kernels.backward(out, logits, ref_logits, wrong, stats, g.to(dtype), kind=kind)
    others = [row for row in range(N) if row not in (3, 5)]
    assert value[[3, 5]].isnan().all() and torch.equal(value[others], expected[others])
    assert out[3].isnan().all() and not out[5].any() and torch.equal(out[others], right[others])


@on_backends
@of_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_log_probs_and_entropy_leave_the_same_sweep(backend, kind, dtype):
    kernels, (logits, ref_logits, _, labels) = kernel_case(backend, 2500, dtype)
    labels[5], labels[8], scaling = -1, 2500, {"temperature": 0.7, "softcap": 5.0}
    plain = kernels.forward(logits, ref_logits, labels, kind=kind, **scaling)
    value, stats, logps, entropy = kernels.forward(
        logits, ref_logits, labels, kind=kind, tokens=True, entropy=True, **scaling
    )
    assert plain[2] is plain[3] is None
    assert torch.equal(value.nan_to_num(7), plain[0].nan_to_num(7)) and torch.equal(stats, plain[1])
    assert logps[:, 8].isnan().all() and not logps[:, [1, 5, 6]].any() and not entropy[[1, 6]].any()
    rows, tight = [0, 2, 3, 4, 5, 7, 8], 1e-12 if dtype == torch.float64 else 4e-5
    right = labels[rows].clamp(0, 2499)
    for row, (x, cap) in enumerate(((logits, 5.0), (ref_logits, None))):
        options = {"temperature": 0.7, "softcap": cap, "entropy": True}
        expected, h = token_reference(x[rows].double(), right, **options)
        assert torch.allclose(logps[row, rows][[0, 1, 2, 3, 5]].double(), expected[[0, 1, 2, 3, 5]], atol=tight)
        assert row or torch.allclose(entropy[rows].double(), h, atol=tight)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_five_coefficients_vector(backend, dtype, shared_file):
    """One sweep per divergence, the first of them with the coefficients of log-prob and entropy."""
    case = vector(shared_file, "logits_backward/five_coefficients")
    device = torch.device(place(backend))
    given = (case["inputs"] | case["expected"]).items()
    made = {name: torch.tensor(x, device=device, dtype=torch.int64 if name == "labels" else dtype) for name, x in given}
    kernels, tight = dispatch.kernels("divergence", backend, device), 1e-14 if dtype == torch.float64 else 4e-7
    streams, total = (made["logits"], made["ref_logits"], made["labels"]), 0
    for name, kind in (("fkl", "forward_kl"), ("rkl", "reverse_kl"), ("jsd", "jsd")):
        options = {"kind": kind, "mix": case["params"]["jsd_beta"]}
        value, stats, logps, entropy = kernels.forward(*streams, **options, tokens=True, entropy=True)
        assert torch.allclose(value, made[kind], rtol=0, atol=4 * tight)
        assert torch.allclose(logps[0], made["logp"], rtol=0, atol=4 * tight)
        assert torch.allclose(entropy, made["entropy"], rtol=0, atol=4 * tight)
        row = coefficients(made["coef_logp"], entropy=entropy, grad_entropy=made["coef_entropy"])
        out = torch.empty_like(made["logits"])
        kernels.backward(out, *streams, stats, made[f"coef_{name}"], row if kind == "forward_kl" else None, **options)
        total = total + out
    assert torch.allclose(total, made["d_logits"], rtol=0, atol=4 * tight)


UPSTREAM = {
    "logps": ("g",),
    "entropy": ("g", "e"),
    "lse and smoothing": ("g", "zeta", "eta"),
    "all": ("g", "e", "zeta", "eta"),
}


def with_coefficients(backend, logits, ref_logits, labels, d, given, eta, **options):
    """The gradient of ``d . value + g . smoothed logps + e . entropy + zeta . lse``, all in one sweep."""
    device = torch.device(place(backend))
    kernels = dispatch.kernels("divergence", backend, device)
    streams = [x.to(device) for x in (logits, ref_logits, labels)]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    options = {name: x.to(device, wide) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    _, stats, _, entropy = kernels.forward(*streams, **options, entropy=True)
    d, g, e, zeta = (None if x is None else x.to(stats) for x in (d, *(given.get(k) for k in ("g", "e", "zeta"))))
    vocab = logits.shape[1]
    row = coefficients(g, entropy=entropy, grad_entropy=e, grad_lse=zeta, label_smoothing=eta, vocab=vocab)
    out = torch.full_like(streams[0], torch.nan)
    kernels.backward(out, *streams, stats, d, row, **options)
    return out.cpu()


def with_autograd(logits, ref_logits, labels, d, given, eta, kind="forward_kl", mix=0.5, ref_softcap=None, **scaling):
    x = logits.clone().requires_grad_()
    value = eager(x, ref_logits, labels=labels, kind=kind, mix=mix, ref_softcap=ref_softcap, **scaling)
    rows = labels != -100
    z = scaled(x[rows], scaling["softcap"], scaling["temperature"][rows, None], value.dtype)
    log_p = z.log_softmax(-1)
    logps = (1 - eta) * log_p.gather(1, labels[rows, None]).squeeze(1) + (eta * log_p.mean(-1) if eta else 0)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)
    parts = {"g": logps, "e": entropy, "zeta": z.logsumexp(-1)}
    score = (value * d.to(value)).sum() + sum((parts[k] * w[rows].to(value)).sum() for k, w in given.items())
    return torch.autograd.grad(score, [x])[0]


def scaled(x, softcap, tau, dtype):
    return softcap * torch.tanh(x.to(dtype) / softcap) / tau


@on_backends
@of_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("which", UPSTREAM)
def test_the_row_algebra_joins_the_divergence(backend, kind, dtype, which):
    if not affordable(backend) or (backend == "triton" and INTERPRETED and which not in ("logps", "all")):
        pytest.skip("slow in the interpreter")
    logits, ref_logits, d = make_case(507, dtype)
    new, labels = torch.Generator().manual_seed(11), LABELS.clone()
    labels[4] = 0  # the confident row's own
    given = {name: torch.randn(N, generator=new) for name in ("g", "e", "zeta") if name in UPSTREAM[which]}
    d[2], given["g"][7] = 0, 0
    eta = 0.1 if "eta" in UPSTREAM[which] else 0.0
    options = {"kind": kind, **OPTIONS["all"]}
    actual = with_coefficients(backend, logits, ref_logits, labels, d, given, eta, **options)
    rival = with_autograd(logits, ref_logits, labels, d, given, eta, **options)
    exact = with_autograd(logits.double(), ref_logits.double(), labels, d, given, eta, **options)
    towards_zero = backend == "triton" and INTERPRETED and dtype == torch.bfloat16
    assert_matches(actual, rival, exact, name=which, factor=4 if towards_zero else 2)
    assert not actual[LABELS == -100].any() and actual[[2, 3, 4, 5, 7, 8]].any(1).all()


@on_backends
@of_kinds
def test_a_coefficient_of_zero_reads_nothing_of_what_it_weighs(backend, kind):
    kernels, (logits, ref_logits, d, labels) = kernel_case(backend, 507, torch.float32)
    options, given = {"kind": kind, "softcap": 5.0, "ref_softcap": 9.0}, torch.linspace(-1, 1, N, device=d.device)
    _, stats, *_ = kernels.forward(logits, ref_logits, labels, **options)
    d[[2, 5]], given[[3, 5]], labels[8] = 0, 0, -1
    row = coefficients(given, entropy=given.abs(), grad_entropy=given / 2)
    token, pair, both = (torch.full_like(logits, torch.nan) for _ in range(3))
    kernels.backward(both, logits, ref_logits, labels, stats, d, row, **options)
    kernels.backward(pair, logits, ref_logits, labels, stats, d, **options)
    kernels.backward(token, logits, ref_logits, labels, stats, torch.zeros_like(d), row, **options)
    assert torch.allclose(both, pair + token, atol=1e-6) and torch.equal(both[2], token[2])
    assert torch.equal(both[3], pair[3]) and not both[[1, 5, 6]].any() and not token[[3, 5]].any()
    ref_logits[2], stats[2:, 2], logits[5] = torch.nan, torch.nan, torch.nan
    again = torch.full_like(logits, torch.nan)
    kernels.backward(again, logits, ref_logits, labels, stats, d, row, **options)
    assert torch.equal(again, both)
    inplace = logits.clone()
    kernels.backward(inplace, inplace, ref_logits, labels, stats, d, row, **options)
    assert torch.equal(inplace, both)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_mixture_of_slabs_is_that_of_the_whole(backend, dtype):
    kernels, (logits, ref_logits, _, labels) = kernel_case(backend, 2500, dtype)
    options = {"mix": 0.3, "softcap": 5.0, "ref_softcap": 9.0, "temperature": 0.7}
    value, stats, *_ = kernels.forward(logits, ref_logits, labels, kind="jsd", **options)
    sums = 0
    for first, last in ((0, 1), (1, 1700), (1700, 2500)):
        sums += kernels.mixture(
            logits[:, first:last], ref_logits[:, first:last], labels.clamp(max=-1), stats, **options
        )
    assert torch.allclose(sums[1], stats[4], atol=1e-6)
    assert torch.allclose(0.3 * sums[0] + 0.7 * sums[1], value, atol=1e-6)
    assert value[LABELS.to(value.device) != -100].all() and not value[LABELS.to(value.device) == -100].any()


@on_backends
def test_in_place_is_bitwise_the_same(backend):
    device = place(backend)
    kernels = dispatch.kernels("divergence", backend, torch.device(device))
    logits, ref_logits, g = (x.to(device) for x in make_case(2500, torch.bfloat16))
    for kind in KINDS:
        labels, options = LABELS.to(device), {"kind": kind, "softcap": 5.0, "ref_softcap": 9.0, "logit_scale": 0.7}
        _, stats, *_ = kernels.forward(logits, ref_logits, labels, **options)
        out, buffer = torch.full_like(logits, torch.nan), logits.clone()
        kernels.backward(out, logits, ref_logits, labels, stats, g, **options)
        kernels.backward(buffer, buffer, ref_logits, labels, stats, g, **options)
        assert torch.equal(out, buffer) and out.isfinite().all()


@pytest.mark.skipif("cpp" not in BACKENDS, reason="no native kernels here")
@of_kinds
@pytest.mark.parametrize("level", ["avx2", "scalar"])
def test_lower_instruction_sets(kind, level):
    from fastalign import _C

    before = _C.cpu_level()
    logits, ref_logits, g = make_case(20011, torch.bfloat16)
    options = {"kind": kind, **OPTIONS["all"]}
    _, exact = run(eager, logits.double(), ref_logits.double(), g, **options)
    _, rival = run(eager, logits, ref_logits, g, **options)
    try:
        _C.set_cpu_level(level)
        _, gradient = run(divergence, logits, ref_logits, g, backend="cpp", **options)
        assert_errs_like_eager("cpp", torch.bfloat16, 20011, options, 4 * N)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        _C.set_cpu_level(before)
    assert_matches(gradient, rival, exact)


@on_backends
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd_0.5", "jsd_0.1"])
@pytest.mark.parametrize("tau", [1, 2])
def test_distillation_vectors(backend, name, tau, shared_file):
    case = vector(shared_file, f"gkd/{name}_tau{tau}")
    inputs, expected = case["inputs"], case["expected"]
    kind = name.split("_0")[0]
    options = {"temperature": tau, "kind": kind, "mix": case["params"]["beta"] if kind == "jsd" else 0.5}
    mask = torch.tensor(inputs["mask"], dtype=torch.float64)
    streams = [torch.tensor(inputs[f"{who}_logits"], dtype=torch.float64) for who in ("student", "teacher")]
    labels = torch.where(mask > 0, 0, -100)
    g = mask / mask.sum()
    value, grad = run(divergence, *streams, g, place(backend), labels=labels, backend=backend, **options)
    per_token = torch.tensor(expected["per_token"], dtype=torch.float64)
    assert torch.allclose(value, per_token * mask, atol=1e-12)
    assert torch.allclose((value * g).sum(), torch.tensor(expected["loss"], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(grad, torch.tensor(expected["d_logits"], dtype=torch.float64), atol=1e-12)


@on_backends
@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("side", ["w", "l"])
def test_token_dpo_vectors(backend, name, side, shared_file):
    """The gradient through log-probs and forward KL together, from the published coefficients."""
    case = vector(shared_file, f"{name}/ragged")
    made = {key: torch.tensor(x, dtype=torch.float64) for key, x in case["inputs"].items()}
    expected = {key: torch.tensor(x, dtype=torch.float64) for key, x in case["expected"].items() if key != "metrics"}
    device = place(backend)
    mask, logits = made[f"mask_{side}"].flatten().to(device), made[f"logits_{side}"].flatten(0, 1).to(device)
    labels = torch.where(mask > 0, made[f"labels_{side}"].flatten().long().to(device), -100)
    x = logits.requires_grad_()
    kl = divergence(x, made[f"ref_logits_{side}"].flatten(0, 1).to(device), labels=labels, backend=backend)
    score = (token_logps(x, labels, backend=backend) * expected[f"d_logp_{side}"].flatten().to(device)).sum()
    score = score + (kl * expected[f"d_fkl_{side}"].flatten().to(device)).sum()
    (grad,) = torch.autograd.grad(score, [x])
    assert torch.allclose(kl.detach().cpu().view(2, 4).sum(1), expected[f"seq_fkl_{side}"], atol=1e-12)
    assert torch.allclose(grad.cpu(), expected[f"d_logits_{side}"].flatten(0, 1), atol=1e-12)


def vector(shared_file, name):
    return next(x for x in json.loads(shared_file("vectors/vectors.json").read_text()) if x["name"] == name)


# --- from hidden states -----------------------------------------------------------------------------------------------


def linear_case(dtype, ref_dtype=None, rows=61, frozen=False):
    new = torch.Generator().manual_seed(7)
    labels = torch.zeros(rows, dtype=torch.int64)
    labels[torch.rand(rows, generator=new) < 0.4] = -100
    hidden, ref_hidden = torch.randn(rows, 37, generator=new), torch.randn(rows, 21, generator=new)
    hidden[labels == -100], ref_hidden[labels == -100] = torch.nan, torch.nan
    weight, bias = torch.randn(3001, 37, generator=new) / 3, torch.randn(3001, generator=new)
    ref_weight, ref_bias = torch.randn(3001, 21, generator=new) / 3, torch.randn(3001, generator=new)
    ours = {"hidden": hidden, "weight": weight, "bias": bias}
    ours = {k: x.to(dtype).requires_grad_(k == "hidden" or not frozen) for k, x in ours.items()}
    theirs = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    theirs = {k: x.to(ref_dtype or dtype) for k, x in theirs.items()}
    tau = 0.5 + torch.rand(rows, generator=new)
    return ours, theirs, {"labels": labels, "temperature": tau, "softcap": 5.0}, torch.randn(rows, generator=new)


def run_linear(op, ours, theirs, options, g, **more):
    value = op(**ours, **theirs, **options, **more)
    trained = [x for x in ours.values() if x.requires_grad]
    return value.detach(), *torch.autograd.grad((value * g.to(value.dtype)).sum(), trained)


@pytest.mark.parametrize("backend", dispatch.available("linear_divergence")[:2])
@of_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("setting", ["trainable", "tight", "frozen", "frozen-tight"])
def test_linear_matches_float64(backend, kind, dtype, setting):
    ours, theirs, options, g = linear_case(dtype, frozen="frozen" in setting)
    wide = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in ours.items()}
    more = {"kind": kind, "mix": 0.3}
    settings = {"backend": backend, "memory": 300_000 if "tight" in setting else None}
    actual = run_linear(linear_divergence, ours, theirs, options, g, **more, **settings)
    rival = run_linear(linear_eager, ours, theirs, options, g, **more)
    exact = run_linear(linear_eager, wide, {k: x.double() for k, x in theirs.items()}, options, g, **more)
    for name, *results in zip(["value", *ours], actual, rival, exact, strict=False):
        assert_matches(*results, name=name)
    masked = options["labels"] == -100
    assert not actual[0][masked].any() and not actual[1][masked].any()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str)
def test_linear_streams_keep_their_dtypes(dtypes):
    ours, theirs, options, g = linear_case(*dtypes)
    value, *grads = run_linear(linear_divergence, ours, theirs, options, g, kind="reverse_kl")
    logits = (ours["hidden"] @ ours["weight"].T + ours["bias"]).detach()
    ref_logits = theirs["ref_hidden"] @ theirs["ref_weight"].T + theirs["ref_bias"]
    expected = divergence(logits, ref_logits, kind="reverse_kl", **options)
    assert value.dtype == expected.dtype and torch.allclose(value, expected, rtol=2e-2)
    assert [x.dtype for x in grads] == [dtypes[0]] * 3


def test_linear_under_autocast():
    ours, theirs, options, g = linear_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, *grads = run_linear(linear_divergence, ours, theirs, options, g)
    narrow = [{k: x.detach().bfloat16() for k, x in part.items()} for part in (ours, theirs)]
    assert torch.equal(value, linear_divergence(**narrow[0], **narrow[1], **options))
    assert [x.dtype for x in grads] == [torch.float32] * 3


def test_nothing_scored_and_no_rows():
    weight = torch.randn(35, 5, requires_grad=True)
    for rows in (0, 3):
        hidden, labels = torch.full((rows, 5), torch.nan, requires_grad=True), torch.full((rows,), -100)
        value = linear_divergence(hidden, weight, hidden, weight, labels=labels)
        grads = torch.autograd.grad(value.sum(), [hidden, weight])
        assert value.shape == (rows,) and not value.any() and not any(x.any() for x in grads)
        assert not divergence(hidden, hidden, labels=labels.clone()).any()


def test_the_reference_gets_no_gradient_and_nothing_is_differentiated_twice():
    logits, ref_logits = torch.randn(2, N, 35, requires_grad=True).unbind()
    hidden, weight = torch.randn(N, 5, requires_grad=True), torch.randn(35, 5, requires_grad=True)
    for value, x in (
        (divergence(logits, ref_logits), logits),
        (linear_divergence(hidden, weight, hidden * 2, weight), hidden),
        (linear_divergence(hidden, weight.detach(), hidden * 2, weight), hidden),
    ):
        (grad,) = torch.autograd.grad(value.sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()
    assert torch.autograd.grad(divergence(logits, ref_logits).sum(), [ref_logits], allow_unused=True) == (None,)


@of_kinds
def test_custom_ops(kind):
    logits, ref_logits = torch.randn(N, 35, requires_grad=True), torch.randn(N, 35)
    args = (logits, ref_logits, LABELS, torch.linspace(0.5, 1.5, N), 1.0, kind, 0.3, 5.0, None, None, None, None)
    torch.library.opcheck(_op, args, test_utils=CHECKS)
    saved = (_op(*args)[1], torch.randn(N))
    torch.library.opcheck(_backward_op, (logits.detach(), *args[1:], *saved), test_utils=CHECKS)


@pytest.mark.parametrize("trainable", [True, False])
def test_linear_custom_ops(trainable):
    hidden, weight = torch.randn(N, 5, requires_grad=True), torch.randn(35, 5, requires_grad=trainable)
    ref = (torch.randn(N, 3), torch.randn(35, 3), None)
    options = (LABELS, None, 0.7, "jsd", 0.3, 5.0, None, 1.0, 1.0, torch.float32, torch.float32, None, None, None, None)
    args = (hidden, weight, None, *ref, *options)
    torch.library.opcheck(linear_op, (*args, True, trainable), test_utils=CHECKS)
    _, stats, directions = linear_op(*args, True, trainable)
    plain = (hidden.detach(), weight.detach(), *args[2:], stats, torch.randn(N), True, trainable, False)
    torch.library.opcheck(linear_backward, plain, test_utils=CHECKS)
    if not trainable:
        torch.library.opcheck(_scale_rows, (hidden.detach(), directions, torch.randn(N)), test_utils=CHECKS)


@pytest.mark.parametrize("op", ["logits", "hidden"])
def test_one_graph(op):
    ref_hidden, ref_weight = torch.randn(N, 3), torch.randn(35, 3)

    def function(hidden, weight):
        if op == "hidden":
            return linear_divergence(hidden, weight, ref_hidden, ref_weight, labels=LABELS, kind="jsd").sum()
        return divergence(hidden @ weight.T, ref_hidden @ ref_weight.T, labels=LABELS, temperature=0.7).square().sum()

    inputs = [torch.randn(N, 5, requires_grad=True), torch.randn(35, 5, requires_grad=True)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(loss := f(*inputs), *torch.autograd.grad(loss, inputs)) for f in (function, compiled)]
    for eagerly, traced in zip(*results, strict=True):
        assert torch.allclose(eagerly, traced, rtol=1e-5, atol=1e-6) and traced.abs().max() > 0


WRONG = {
    "logits must be": {"logits": torch.zeros(2, 3, 35)},
    "ref_logits must be": {"ref_logits": torch.zeros(N, 34)},
    "ref_logits is on meta": {"ref_logits": torch.zeros(N, 35, device="meta")},
    "ref_logits must be float32": {"ref_logits": torch.zeros(N, 35, dtype=torch.int64)},
    'kind must be "forward_kl", "reverse_kl" or "jsd", got \'kl\'': {"kind": "kl"},
    'mix must lie inside .*use kind="forward_kl"': {"kind": "jsd", "mix": 0.0},
    'mix must lie inside .*use kind="reverse_kl"': {"kind": "jsd", "mix": 1.0},
    "got 1.5": {"kind": "jsd", "mix": 1.5},
    "labels must be": {"labels": torch.zeros(N + 1, dtype=torch.int64)},
    "label 35 at row 0": {"labels": torch.full((N,), 35)},
    "temperature must be positive": {"temperature": 0.0},
    "temperature must be a number": {"temperature": torch.ones(N + 1)},
    "^softcap must be positive": {"softcap": -1.0},
    "ref_softcap must be positive": {"ref_softcap": 0.0},
    "available: ": {"backend": "cuda"},
}
WRONG_LINEAR = {
    "hidden must be": {"hidden": torch.zeros(1, N, 5)},
    r"ref_hidden must be \[N, Dr\]": {"ref_hidden": torch.zeros(N + 1, 3)},
    "of the reference: .*D = 3, got": {"ref_weight": torch.zeros(35, 4)},
    "ref_weight must have the V = 35": {"ref_weight": torch.zeros(36, 3)},
    "process_group": {"process_group": object()},
    "memory must be": {"memory": 0},
    'use kind="reverse_kl"': {"kind": "jsd", "mix": 1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises(ValueError, match=message):
        divergence(**{"logits": torch.zeros(N, 35), "ref_logits": torch.zeros(N, 35), **WRONG[message]})


@pytest.mark.parametrize("message", WRONG_LINEAR)
def test_wrong_linear_arguments_are_named(message):
    right = {"hidden": torch.zeros(N, 5), "weight": torch.zeros(35, 5)}
    right |= {"ref_hidden": torch.zeros(N, 3), "ref_weight": torch.zeros(35, 3)}
    with pytest.raises(ValueError, match=message):
        linear_divergence(**{**right, **WRONG_LINEAR[message]})
