"""Divergences of logits on every backend against float64 autograd."""

import pytest
import torch
from divergence_cases import (
    BACKENDS,
    INTERPRETED,
    KINDS,
    LABELS,
    OPTIONS,
    N,
    affordable,
    kernel_case,
    make_case,
    of_kinds,
    on_backends,
    place,
    run,
)

from fastalign.ops import dispatch, divergence
from fastalign.ops.divergence import reference as eager
from fastalign.testing import assert_matches

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def native_level():
    """``native_level("avx2")``: the native kernels use it for this test; None leaves them as they are."""
    from fastalign import _C

    before = _C.cpu_level()

    def use(level):
        try:
            _C.set_cpu_level(level or before)
        except ValueError as error:
            pytest.skip(str(error))

    yield use
    _C.set_cpu_level(before)


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
    """KL over the other stream is infinite; the mixture is not."""
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


AT = {"-86": -86.0, "-95": -95.0, "-110": -110.0, "-inf": -torch.inf}
LEVELS = [(backend, None) for backend in BACKENDS] + [
    ("cpp", level) for level in ("avx2", "scalar") if "cpp" in BACKENDS
]


@pytest.mark.parametrize(("backend", "level"), LEVELS, ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_cut_off_says_whether_a_banned_column_has_a_share(backend, level, kind, dtype, native_level):
    """Not what the smallest number of an instruction set is; the order of the columns has no say either."""
    native_level(level)
    ours, theirs = torch.zeros(2, len(AT), 5001, dtype=dtype)
    first, second = (ours, theirs) if kind == "reverse_kl" else (theirs, ours)
    for row, logit in enumerate(AT.values()):
        first[row, :4999] = -200.0  # so that the largest, 0, comes last, and its share is the whole
        first[row, 7], second[row, 7] = logit, -torch.inf
        second[row, 9] = -1.0
        first[row, 5000] = -300.0
    g = torch.ones(len(AT))
    labels = torch.zeros(len(AT), dtype=torch.int64)
    value, grad = run(divergence, ours, theirs, g, place(backend), labels=labels, kind=kind, backend=backend)
    exact, right = run(eager, ours.double(), theirs.double(), g, labels=labels, kind=kind)
    assert exact.tolist()[0] == torch.inf and exact[1:].isfinite().all()
    assert value[0] == torch.inf and torch.allclose(value[1:].double(), exact[1:], rtol=1e-6)
    assert torch.allclose(grad[1:].double(), right[1:], atol=1e-6)


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
def test_lower_instruction_sets(kind, level, native_level):
    logits, ref_logits, g = make_case(20011, torch.bfloat16)
    options = {"kind": kind, **OPTIONS["all"]}
    _, exact = run(eager, logits.double(), ref_logits.double(), g, **options)
    _, rival = run(eager, logits, ref_logits, g, **options)
    native_level(level)
    _, gradient = run(divergence, logits, ref_logits, g, backend="cpp", **options)
    assert_errs_like_eager("cpp", torch.bfloat16, 20011, options, 4 * N)
    assert_matches(gradient, rival, exact)
