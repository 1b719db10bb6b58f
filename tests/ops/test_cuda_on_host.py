"""The CUDA kernels' own source, run on the CPU, against the torch backend; see ``cuda_host.py`` for what that proves.

Sizes are odd on purpose: 507 columns start most rows unaligned, 33001 are four segments, the last of them short.
"""

import os
import shutil

import cuda_host
import pytest
import torch
from filelock import FileLock
from test_functors import assert_defined
from ties import few_values, wide_rows

from fastalign.ops.backends import cpp
from fastalign.ops.backends.cpp.policy_loss import describe
from fastalign.ops.backends.cuda import policy_loss as cuda_policy
from fastalign.ops.backends.cuda import token_logps as cuda_sweep
from fastalign.ops.backends.torch.policy_loss import run as run_in_torch
from fastalign.ops.backends.torch.token_logps import backward as backward_in_torch
from fastalign.ops.backends.torch.token_logps import forward as forward_in_torch
from fastalign.ops.functors import COLUMNS, FUNCTORS, Knobs
from fastalign.ops.rows import Coefficients
from fastalign.testing import assert_matches

CXX = next(filter(shutil.which, [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++"]), None)
if reason := cpp.unavailable() or (None if CXX else "no C++ compiler"):
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("nan_memory")

N = 7
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "rows": {"temperature": 0.5 + torch.arange(N) / 8},
    "capped": {"softcap": 5.0, "logit_scale": 0.5, "temperature": 1.3},
}
KNOBS = Knobs(0.8, 1.2, 2.0, 1.0, 1.05, 0.1, 0.05)
in_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Compiled once, also when several processes share the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "cuda_on_host"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        path = folder / "cuda_on_host.so"
        return path if path.exists() else cuda_host.build(CXX, folder)


@pytest.fixture
def kernels(library, monkeypatch):
    kernels = cuda_host.HostKernels(library)
    cuda_host.serve(kernels, monkeypatch)
    return kernels


def case(vocab, dtype, rows=N):
    """Logits of every kind of row, labels, and coefficients of both signs: row 1 is masked, row 2 has none."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1], labels[3] = -100, -1
    logits[[1, 2]] = torch.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g, alpha, beta, delta = torch.randn(4, rows, generator=generator, dtype=wide)
    delta /= vocab
    for x in (g, alpha, beta, delta):
        x[1], x[2] = torch.nan, -0.0
    return logits, labels, Coefficients(g, alpha, beta, delta)


LAYOUTS = {
    "dense": lambda n, v, dtype: torch.empty(n, v, dtype=dtype),
    "pitched": lambda n, v, dtype: torch.empty(n, v + 24 - v % 8, dtype=dtype)[:, :v],
    "odd pitch": lambda n, v, dtype: torch.empty(n, v + 3, dtype=dtype)[:, 2 : v + 2],
    "columns": lambda n, v, dtype: torch.empty(v, n, dtype=dtype).T,
}


def laid_out(x, layout):
    return LAYOUTS[layout](*x.shape, x.dtype).copy_(x)


def both(x, labels, coefficients, out=None, **options):
    """Statistics, and the gradient in NaN-filled memory."""
    outputs = cuda_sweep.forward(x, labels, entropy=True, total=True, **options)[:5]
    out = torch.empty_like(x) if out is None else out
    cuda_sweep.backward(out, x, labels, outputs[2], outputs[3], coefficients, **options)
    return *outputs, out


def both_in_torch(x, labels, coefficients, **options):
    outputs = forward_in_torch(x, labels, entropy=True, total=True, **options)[:5]
    out = torch.empty_like(x)
    backward_in_torch(out, x, labels, outputs[2], outputs[3], coefficients, **options)
    return *outputs, out


def check(actual, eager, oracle, vocab, skipped=2):
    """Within twice the torch backend's own error; row ``skipped`` has statistics of NaN logits."""
    names = ("logps", "entropy", "max", "logsum", "total", "gradient")
    keep = [i for i in range(len(oracle[0])) if i != skipped]
    for name, *values in zip(names, actual, eager, oracle, strict=True):
        ours, theirs, exact = (x[keep] / (vocab if name == "total" else 1) for x in values)
        assert_matches(ours, theirs, exact, name=name)
    assert actual[-1][[1, 2]].eq(0).all() and actual[0][skipped].isnan()


def same_bits(x, y):
    return all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in zip(x, y, strict=True))


@in_dtypes
@pytest.mark.parametrize("vocab", [4, 7, 507, 4099, 33001])
@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_torch(kernels, dtype, vocab, options):
    logits, labels, coefficients = case(vocab, dtype)
    options = OPTIONS[options]
    wide = Coefficients(*(x.double() for x in coefficients))
    widened = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    oracle = both_in_torch(logits.double(), labels, wide, **widened)
    eager = both_in_torch(logits, labels, coefficients, **(widened if dtype == torch.float64 else options))
    check(both(logits, labels.int(), coefficients, **options), eager, oracle, vocab)


WIDTHS = [(507, dtype) for dtype in DTYPES] + [(33001, torch.bfloat16), (33001, torch.float32)]
in_widths = pytest.mark.parametrize(("vocab", "dtype"), WIDTHS, ids=str)


@in_widths
def test_bits_do_not_depend_on_layout_order_or_company(kernels, vocab, dtype):
    logits, labels, coefficients = case(vocab, dtype)
    expected = both(logits, labels, coefficients, softcap=9.0)
    for order, layout in enumerate(LAYOUTS):
        kernels.set_device(order=order)
        for outputs in LAYOUTS if vocab == 507 else ["odd pitch"]:
            out = LAYOUTS[outputs](N, vocab, dtype)
            assert same_bits(both(laid_out(logits, layout), labels, coefficients, out, softcap=9.0), expected)
        place = laid_out(logits, layout)
        assert same_bits(both(place, labels, coefficients, place, softcap=9.0), expected)
    alone = both(logits[4:5], labels[4:5], Coefficients(*(x[4:5] for x in coefficients)), softcap=9.0)
    assert same_bits(alone, [x[4:5] for x in expected])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_blocks_that_share_rows_change_no_bit(kernels, dtype):
    logits, labels, coefficients = case(33001, dtype)
    kernels.blocks = 1
    expected = both(logits, labels, coefficients)
    assert kernels.last_launch()[0] == N
    for kernels.blocks in (2, 4):
        for order in (0, 1, 5):
            kernels.set_device(order=order)
            assert same_bits(both(logits, labels, coefficients), expected)
            assert kernels.last_launch()[0] == N * kernels.blocks


def test_few_rows_are_shared_by_as_many_blocks_as_fill_the_device(kernels):
    kernels.set_device(multiprocessors=132)
    shares = [kernels.blocks_per_row(rows, 151936) for rows in (1, 33, 66, 100, 263, 264, 8192)]
    assert shares == [16, 16, 8, 8, 4, 1, 1]
    assert [kernels.blocks_per_row(1, vocab) for vocab in (16384, 16385, 128256, 262144)] == [1, 2, 8, 16]


@pytest.mark.parametrize("beta", [False, True])
def test_absent_coefficients_are_zero(kernels, beta):
    logits, labels, coefficients = case(507, torch.float32)
    some = Coefficients(coefficients.g, beta=coefficients.beta if beta else None)
    zeros = torch.zeros(N)
    filled = Coefficients(some.g, zeros, some.beta if beta else zeros, zeros)
    assert same_bits(both(logits, labels, some), both(logits, labels, filled))
    statistics = cuda_sweep.forward(logits, labels)
    assert statistics.entropy is None and statistics.total is None
    full = cuda_sweep.forward(logits, labels, entropy=True, total=True)
    assert same_bits((statistics.logps, statistics.max, statistics.logsum), (full.logps, full.max, full.logsum))


@in_dtypes
def test_special_rows(kernels, dtype):
    """A label outside the vocabulary, banned columns, infinite logits, a NaN coefficient: each row by itself."""
    logits, labels, coefficients = case(507, dtype)
    usual = both(logits, labels, coefficients)
    labels[0], labels[6] = 507, -2
    logits[3, 5:] = -torch.inf
    logits[4, 17] = torch.inf
    coefficients.g[2] = torch.nan
    logps, entropy, top, logsum, total, out = both(logits, labels, coefficients)
    assert logps[[0, 2, 4, 6]].isnan().all() and out[[0, 2, 4, 6]].isnan().all()
    assert same_bits([x[[0, 6]] for x in (entropy, top, logsum, total)], [x[[0, 6]] for x in usual[1:5]])
    assert same_bits([x[[1, 5]] for x in (logps, entropy, top, logsum, total, out)], [x[[1, 5]] for x in usual])
    assert logps[3] == 0 and entropy[3].isfinite() and total[3] == -torch.inf
    delta = coefficients.delta[3].to(dtype)
    assert out[3, 5:].eq(delta).all(), "a column without probability has the plain share alone"
    assert out[3, :5].isfinite().all()
    top_label = logits[5].argmax()
    labels[5] = top_label
    again = cuda_sweep.forward(logits, labels)
    assert again.logps[5] + again.logsum[5] == 0, "the label is the maximum, exactly"


@pytest.mark.parametrize("vocab", [3, 507, 16385, 33001])
def test_nothing_beside_a_row_is_read(kernels, vocab):
    """Wherever it begins; 16385 columns end one behind a segment."""
    _, labels, coefficients = case(vocab, torch.bfloat16, rows=4)
    row = [x[3:].abs() + 1 for x in coefficients]
    inputs = labels[3:].abs(), *(torch.ones(1) for _ in range(4))
    for start in range(0, 8, 1 if vocab < 1000 else 3):
        x = torch.randn(1, vocab + 16).bfloat16()[:, start : start + vocab]
        kernels.set_device(order=start)
        kernels.set_readable(x.data_ptr(), x.data_ptr() + 2 * vocab)
        both(x, inputs[0], Coefficients(*row), LAYOUTS["odd pitch"](1, vocab, x.dtype))
        for cluster in (0, 1, 2)[: 3 if vocab > 16384 else 2]:
            cuda_policy.run(LAYOUTS["odd pitch"](1, vocab, x.dtype), x, *inputs, **settings(), cluster=cluster)


def first_choice(logits, labels, **options):
    top1 = cuda_sweep.forward(logits, labels, top1=True, **options).top1
    assert ((top1 == 0) | (top1 == 1)).all()
    return top1 == 1


@in_dtypes
def test_the_first_of_equal_logits_is_the_choice(kernels, dtype):
    """In any layout, whatever thread comes first and however many blocks share a row; NaN rows choose nothing."""
    logits, labels = few_values(dtype)
    labels[3:6] = torch.tensor([-100, -1, 507])
    hits = logits.argmax(-1) == labels
    for order, layout in enumerate(LAYOUTS):
        kernels.set_device(order=order)
        for options in ({}, {"softcap": 9.0, "temperature": 0.7}):
            assert torch.equal(first_choice(laid_out(logits, layout), labels, **options), hits)
    logits, labels, hits = wide_rows(dtype)
    for kernels.blocks in (1, 4):
        assert torch.equal(first_choice(logits, labels), hits)
    logits[4, 9], logits[6], labels[6], logits[10, 0] = torch.nan, -torch.inf, 0, torch.inf
    assert not first_choice(logits, labels)[[4, 6, 10]].any()


@in_dtypes
@pytest.mark.parametrize("cluster", [0, 1, 4])
def test_policy_loss_knows_the_choice_before_the_gradient_takes_its_place(kernels, dtype, cluster):
    for logits, labels, hits in (wide_rows(dtype), (*few_values(dtype), None))[: 1 if cluster == 4 else 2]:
        hits = logits.argmax(-1) == labels if hits is None else hits
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = logits, labels, *torch.ones(4, len(labels), dtype=wide)
        if dtype != torch.float64 or cluster == 0:
            table, _ = run(inputs, inplace=True, **settings(softcap=9.0), cluster=cluster)
            assert torch.equal(table[COLUMNS.index("top1")] == 1, hits)


def test_no_rows(kernels):
    logits, labels, before = torch.empty(0, 507), torch.empty(0, dtype=torch.int64), kernels.last_launch()
    outputs = cuda_sweep.forward(logits, labels, entropy=True)
    cuda_sweep.backward(logits, logits, labels, outputs.max, outputs.logsum, Coefficients(outputs.logps))
    assert outputs.logps.shape == (0,) and kernels.last_launch() == before


# --- policy_loss ------------------------------------------------------------------------------------------------------


def policy_case(vocab, dtype, softcap=None, rows=N):
    """Row 1 is masked and NaN, row 2 has no weight, row 3 a label outside the vocabulary."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1], labels[3] = -100, vocab
    logits[1] = torch.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights, advantages, old, ref = torch.randn(4, rows, generator=generator, dtype=wide)
    weights = weights.abs()
    weights[2] = 0
    logps = cuda_sweep.forward(logits, labels, temperature=0.5, softcap=softcap).logps
    return logits, labels, weights, advantages, logps + old, logps + 0.3 * ref


def settings(loss="ppo", kl_estimator="k3", knobs=KNOBS, softcap=None):
    scaling = {"temperature": 0.5, "softcap": softcap}
    return {"loss": loss, "kl_estimator": kl_estimator, "knobs": knobs, "entropy": True, **scaling}


def run(inputs, inplace=False, layout="dense", gradient=True, **options):
    logits = laid_out(inputs[0], layout)
    out = logits if inplace else LAYOUTS[layout](*logits.shape, logits.dtype)
    table = cuda_policy.run(out if gradient else None, logits, *inputs[1:], **options)
    return table, out if gradient else table


@in_dtypes
@pytest.mark.parametrize("loss", FUNCTORS)
@pytest.mark.parametrize("cluster", [0, 1])
def test_policy_loss_agrees_with_torch(kernels, dtype, loss, cluster):
    for kl_estimator, softcap, vocab in (("k3", None, 507), ("k2", 6.0, 16500 if loss == "ppo" else 250)):
        inputs = policy_case(vocab, dtype, softcap)
        options = settings(loss, kl_estimator, softcap=softcap)
        wide = [x if x is inputs[1] else x.double() for x in inputs]
        outs = [torch.empty_like(inputs[0]), torch.empty_like(wide[0])]
        eager, oracle = (run_in_torch(out, *x, **options) for out, x in zip(outs, (inputs, wide), strict=True))
        table, out = run(inputs, **options, cluster=0 if dtype == torch.float64 else cluster)
        assert table[:, 1].eq(0).all() and out[1].eq(0).all() and out[2].eq(0).all() and out[3].isnan().all()
        keep = [0, 2, 4, 5, 6]
        for name, *values in zip(COLUMNS, table, eager, oracle, strict=True):
            assert_matches(*(x[keep] for x in values), name=name, factor=4.0)
        assert_matches(out[keep], outs[0][keep], outs[1][keep], name="gradient", factor=4.0)


@pytest.mark.parametrize("loss", ["pg", "ppo", "cispo", "sapo"])
@pytest.mark.parametrize("kl_estimator", ["k2", "k3"])
def test_every_functor_is_the_defined_one(kernels, loss, kl_estimator):
    assert_defined(cuda_policy.run, "cpu", loss, kl_estimator)


@pytest.mark.parametrize("loss", ["pg", "ppo"])
@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_what_is_not_given_to_policy_loss(kernels, given, loss):
    """Advantages, old log-probs and reference, from none to all, without KL and bonus."""
    inputs = policy_case(507, torch.float32)
    inputs = (*inputs[: 3 + given], *(None,) * (3 - given))
    options = settings(loss, knobs=Knobs(0.8, 1.2, 2.0, 1.0, 1.05, 0.0, 0.0))
    gradient = torch.empty_like(inputs[0])
    expected = run_in_torch(gradient, *inputs, **options), gradient
    for found in (run(inputs, **options, cluster=1), (run(inputs, gradient=False, **options)[0], gradient)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@in_widths
def test_a_row_has_the_same_bits_in_any_cluster(kernels, vocab, dtype):
    """And in place, in any layout, whatever thread comes first, and the same statistics as token_logps."""
    inputs, expected = policy_case(vocab, dtype), None
    clusters = [0] if dtype == torch.float64 else [0, 1] if vocab == 507 else [0, 1, 2, 4]
    for order, cluster in enumerate(clusters * 2):  # the order of threads is drawn from the third on
        kernels.set_device(order=order, multiprocessors=4)  # fewer clusters than rows
        for inplace, layout in ((False, "dense"), (True, ("pitched", "odd pitch")[order % 2])):
            found = run(inputs, inplace, layout, **settings(), cluster=cluster)
            expected = expected or found
            assert same_bits(found, expected), (cluster, order, inplace, layout)
        assert kernels.last_launch()[2] == cluster
    statistics = cuda_sweep.forward(*inputs[:2], entropy=True, temperature=0.5)
    keep = [0, 1, 2, 4, 5, 6]
    assert same_bits([x[keep] for x in expected[0][1:5]], [statistics[i][keep] for i in (0, 2, 3, 1)])


def test_masked_rows_between_copies(kernels):
    """Copies of following rows are under way while rows are worked on: every pattern of skipped rows."""
    kernels.set_device(multiprocessors=2)
    logits, zeros = torch.randn(5, 16400).bfloat16(), torch.zeros(5)
    for pattern in range(16):
        masked = torch.tensor([bool(pattern >> row & 1) for row in range(5)])
        labels = torch.where(masked, -100, 3)
        weights = torch.where(masked, torch.nan, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))  # one row needs no gradient
        inputs = (torch.where(masked[:, None], torch.nan, logits), labels, weights, zeros + 1, zeros - 9, zeros - 9)
        options = {"gradient": pattern % 3 > 0, **settings()}
        plain, in_cluster = (run(inputs, **options, cluster=cluster) for cluster in (0, 2))
        assert same_bits(plain, in_cluster) and all(x.isfinite().all() for x in plain)


def test_the_cluster_is_the_smallest_that_holds_a_row(kernels):
    def size(vocab, dtype, rows=8192, logits=None, **device):
        kernels.set_device(**{"multiprocessors": 132} | device)
        logits = torch.empty(1, vocab, dtype=dtype).expand(rows, vocab) if logits is None else logits
        labels, vectors = torch.zeros(rows, dtype=torch.int64), {"weights": torch.zeros(rows)}
        op, _, _alive = describe(None, logits, labels, vectors, **settings())
        return kernels.policy_loss_cluster(op)

    assert [size(vocab, torch.bfloat16) for vocab in (507, 32000, 128256, 151936, 262144)] == [1, 1, 2, 2, 4]
    assert [size(vocab, torch.float32) for vocab in (507, 50257, 151936, 262144)] == [1, 1, 4, 8]
    assert [size(151936, torch.bfloat16, shared=kib << 10) for kib in (99, 48, 32, 16)] == [4, 8, 0, 0]
    assert size(151936, torch.bfloat16, shared=32 << 10, largest_cluster=16) == 16
    assert size(151936, torch.bfloat16, largest_cluster=0) == size(507, torch.float64) == 0
    assert size(507, torch.bfloat16, rows=3, logits=torch.empty(507, 3, dtype=torch.bfloat16).T) == 0
    with pytest.raises(RuntimeError, match="invalid configuration"):
        run(policy_case(507, torch.float32), **settings(), cluster=2)  # a row of one segment
    assert [size(151936, torch.bfloat16, rows=rows) for rows in (1, 16, 17, 33, 34)] == [8, 8, 4, 4, 2]
