"""What holds for every input: sizes, dtypes, strides, temperatures, caps, masks and offsets are drawn by hypothesis.

Draws are the same in every run. The planner's properties are in ``test_plan.py``, the attention layout's in
``test_attention.py``.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_table import HERE, place

from fastalign.ops import divergence, gae, linear_logps, linear_loss, policy_loss, segment_scan, token_logps

pytestmark = pytest.mark.usefixtures("nan_memory")

PROFILE = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EPS = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-13}
on_backends = pytest.mark.parametrize("backend", HERE)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
lengths = st.lists(st.sampled_from([0, 0, 1, 2, 5, 33, 40]), max_size=6)


def strided(x, layout):
    """The same values with other strides, NaN between them."""
    rows, columns = x.shape
    room = torch.full((rows + 2, 2 * columns + 3), torch.nan, dtype=x.dtype)
    view = {
        "contiguous": lambda: torch.empty_like(x),
        "column-major": lambda: torch.empty_strided(x.shape, (1, max(rows, 1)), dtype=x.dtype),
        "padded": lambda: room[1:-1, 1 : columns + 1],
        "every other": lambda: room[1:-1, 2 : 2 * columns + 1 : 2],
    }[layout]()
    return view.copy_(x)


@st.composite
def logits_cases(draw, most_rows=5, softcap=True):
    """Logits, labels of which some mask their row, and the options of ``token_logps``."""
    new = torch.Generator().manual_seed(draw(seeds))
    rows, vocab = draw(st.integers(1, most_rows)), draw(st.sampled_from([1, 2, 7, 31, 64, 65, 300]))
    spread, level = draw(st.sampled_from([0.1, 3.0, 30.0])), draw(st.sampled_from([-500.0, 0.0, 200.0]))
    logits = (spread * torch.randn(rows, vocab, generator=new) + level).to(draw(dtypes))
    labels = torch.randint(vocab, (rows,), generator=new)
    labels[torch.rand(rows, generator=new) < draw(st.sampled_from([0.0, 0.4]))] = -100
    logits[labels == -100] = torch.nan
    temperature = draw(st.sampled_from([1.0, 0.7, 2.0, "rows"]))
    options = {"temperature": 0.5 + torch.rand(rows, generator=new) if temperature == "rows" else temperature}
    if softcap and draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([3.0, 30.0]))
    return (
        strided(logits, draw(st.sampled_from(["contiguous", "column-major", "padded", "every other"]))),
        labels,
        options,
    )


def run(logits, labels, backend, upstream, **options):
    """logps, entropy and the gradient of the logits under a row's upstream gradients of both."""
    where = place(backend)
    x = logits.detach().to(where).requires_grad_()
    options = {name: v.to(where) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    logps, entropy = token_logps(x, labels.to(where), entropy=True, backend=backend, **options)
    score = (torch.stack([logps, entropy]) * upstream.to(logps)).sum()
    return logps.detach().cpu(), entropy.detach().cpu(), torch.autograd.grad(score, x)[0].cpu()


def upstream_of(labels, seed=0):
    return torch.randn(2, len(labels), generator=torch.Generator().manual_seed(seed))


@on_backends
@PROFILE
@given(logits_cases(most_rows=1))
def test_probabilities_sum_to_one(backend, case):
    """One row, read once per label through a stride of 0."""
    logits, _, options = case
    row, vocab = logits.nan_to_num(0.5)[:1], logits.shape[1]
    if isinstance(options["temperature"], torch.Tensor):
        options["temperature"] = options["temperature"].repeat(vocab)
    logps, entropy, _ = run(row.expand(vocab, vocab), torch.arange(vocab), backend, torch.zeros(2, vocab), **options)
    assert (logps <= 0).all()
    total = logps.double().exp().sum().item()
    # An error of a log-prob is one of its largest logit's places, and all labels may share it.
    scale = max(1.0, row.double().abs().max().item())
    assert total == pytest.approx(1, abs=EPS[logits.dtype] * scale)
    assert (entropy == entropy[0]).all()


@on_backends
@PROFILE
@given(logits_cases())
def test_entropy_lies_between_zero_and_that_of_the_uniform_distribution(backend, case):
    logits, labels, options = case
    _, entropy, _ = run(logits, labels, backend, upstream_of(labels), **options)
    slack = 10 * EPS[logits.dtype] * max(1.0, logits.nan_to_num(0).double().abs().max().item())
    assert (entropy >= -slack).all() and (entropy <= math.log(logits.shape[1]) + slack).all()


@on_backends
@PROFILE
@given(logits_cases(softcap=False))
def test_a_gradient_row_sums_to_zero(backend, case):
    """Moving all logits of a row together changes nothing, so the gradient has no component there."""
    logits, labels, options = case
    _, _, grad = run(logits, labels, backend, upstream_of(labels), **options)
    assert (grad[labels == -100] == 0).all()
    rounding = torch.finfo(grad.dtype).eps * grad.double().abs().sum(1) + 20 * EPS[logits.dtype] * 500
    assert (grad.double().sum(1).abs() <= rounding).all()


@on_backends
@PROFILE
@given(logits_cases(), seeds)
def test_permuting_rows_permutes_bits(backend, case, seed):
    logits, labels, options = case
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    upstream = upstream_of(labels)
    before = run(logits, labels, backend, upstream, **options)
    options = {name: v[order] if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    after = run(logits[order], labels[order], backend, upstream[:, order], **options)
    exact = backend != "torch"  # whose sums follow the strides
    for one, other in zip(before, after, strict=True):
        if exact:
            assert torch.equal(one[order], other)
        torch.testing.assert_close(one[order], other, rtol=1e-2 if logits.dtype == torch.bfloat16 else 1e-4, atol=2e-4)


@on_backends
@PROFILE
@given(logits_cases())
def test_rows_that_are_not_scored_do_not_matter(backend, case):
    logits, labels, options = case
    scored, upstream = labels != -100, upstream_of(labels)
    whole = run(logits.contiguous(), labels, backend, upstream, **options)
    options = {name: v[scored] if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    part = run(logits[scored], labels[scored], backend, upstream[:, scored], **options)
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[scored], other) and not one[~scored].any()


@on_backends
@PROFILE
@given(st.integers(1, 4), st.sampled_from([1, 5, 64, 257]), seeds, st.sampled_from([-512.0, 64.0, 1000.0]))
def test_shifting_a_row_changes_no_bit(backend, rows, vocab, seed, shift):
    """Multiples of 1/64 below 2048 are exact in fp32, and so are their differences."""
    new = torch.Generator().manual_seed(seed)
    logits = torch.randint(-512, 512, (rows, vocab), generator=new) / 64
    labels = torch.randint(vocab, (rows,), generator=new)
    upstream = upstream_of(labels)
    for one, other in zip(*(run(x, labels, backend, upstream) for x in (logits, logits + shift)), strict=True):
        assert torch.equal(one, other)


@on_backends
@PROFILE
@given(seeds, st.integers(1, 30), st.sampled_from([1, 33, 1300]), st.integers(1, 40_000), st.booleans())
def test_chunks_and_slabs_change_nothing(backend, seed, rows, vocab, memory, frozen):
    new = torch.Generator().manual_seed(seed)
    rows = rows if backend != "triton" else min(rows, 6)
    hidden, weight = (torch.randn(n, 5, generator=new, dtype=torch.float64).to(place(backend)) for n in (rows, vocab))
    labels = torch.randint(-1, vocab, (rows,), generator=new).to(hidden.device)
    labels[labels < 0] = -100
    leaves = [hidden.requires_grad_(), weight.requires_grad_(not frozen)][: 1 if frozen else 2]
    upstream = torch.randn(rows, generator=new, dtype=torch.float64).to(hidden.device)

    def both(memory):
        options = {"backend": backend, "memory": memory}
        logps = linear_logps(hidden, weight, labels, **options)
        loss, stats = linear_loss(
            hidden, weight, labels, lambda s: (s.logps.square() * upstream[s.rows]).sum(), **options
        )
        grads = [torch.autograd.grad(y, leaves) for y in ((logps * upstream).sum(), loss)]
        return [logps, loss, stats.logps, *grads[0], *grads[1]]

    for ample, tight in zip(both(None), both(memory), strict=True):
        torch.testing.assert_close(tight, ample, rtol=1e-10, atol=1e-10)


@on_backends
@PROFILE
@given(seeds, st.integers(1, 6), st.sampled_from([1, 33, 300]), st.sampled_from([0.0, 0.1]), st.booleans())
def test_a_gradient_row_sums_to_that_of_the_log_sum_exp(backend, seed, rows, vocab, smoothing, masked):
    """Of all statistics only the log-sum-exp moves when a row's logits move together: the bias feels just that."""
    new, where = torch.Generator().manual_seed(seed), place(backend)
    hidden, weight = (torch.randn(n, 5, generator=new, dtype=torch.float64).to(where) for n in (rows, vocab))
    bias = torch.randn(vocab, generator=new, dtype=torch.float64).to(where).requires_grad_()
    labels = torch.randint(-100 if masked else 0, vocab, (rows,), generator=new).clamp(min=-1)
    labels = torch.where(labels == -1, -100, labels).to(where)
    upstream = torch.randn(3, rows, generator=new, dtype=torch.float64).to(where)
    options = {"label_smoothing": smoothing, "entropy": True, "lse": True, "temperature": 0.5, "backend": backend}
    found = torch.stack(linear_logps(hidden, weight, labels, bias=bias, logit_scale=3.0, **options))
    (grad,) = torch.autograd.grad((found * upstream).sum(), bias)
    expected = upstream[2][labels != -100].sum() * 3.0 / 0.5
    torch.testing.assert_close(grad.sum(), expected, rtol=1e-10, atol=1e-10)


@on_backends
@PROFILE
@given(lengths, seeds, st.sampled_from([1.0, 0.9, 0.0, None]))
def test_a_scan_is_the_loop(backend, lengths, seed, decay):
    new, where = torch.Generator().manual_seed(seed), place(backend)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x, decays = torch.randn(2, int(offsets[-1]), generator=new, dtype=torch.float64)
    factor = decays if decay is None else torch.full_like(x, decay)
    expected = x.clone()
    for start, stop in pairwise(offsets.tolist()):
        for t in range(stop - 2, start - 1, -1):
            expected[t] = x[t] + factor[t] * expected[t + 1]
    given_decay = decays.to(where) if decay is None else decay
    found = segment_scan(x.to(where), offsets.to(where), given_decay, backend=backend)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-12)


@on_backends
@PROFILE
@given(lengths, seeds)
def test_undiscounted_advantages_are_suffix_sums_and_one_step_ones_are_differences(backend, lengths, seed):
    new, where = torch.Generator().manual_seed(seed), place(backend)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(where)
    rewards, values = torch.randn(2, int(offsets[-1]), generator=new, dtype=torch.float64).to(where)
    advantages, returns = gae(rewards, values, offsets, 1.0, 1.0, backend=backend)
    torch.testing.assert_close(returns, segment_scan(rewards, offsets, backend=backend), rtol=0, atol=1e-11)
    torch.testing.assert_close(advantages + values, returns, rtol=0, atol=1e-12)
    one_step, _ = gae(rewards, values, offsets, 0.9, 0.0, backend=backend)
    following = torch.cat([values[1:], values[:1]])
    following[offsets[1:][offsets.diff() > 0] - 1] = 0
    torch.testing.assert_close(one_step, rewards + 0.9 * following - values, rtol=0, atol=1e-12)


@st.composite
def two_streams(draw):
    logits, labels, options = draw(logits_cases(most_rows=3))
    ref = torch.randn(logits.shape, generator=torch.Generator().manual_seed(draw(seeds))).to(logits.dtype)
    options |= {"ref_softcap": options["softcap"]} if "softcap" in options else {}
    return logits, ref * draw(st.sampled_from([0.1, 5.0])), labels, options


def value_of(backend, logits, ref, labels, **options):
    where = place(backend)
    options = {name: v.to(where) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    return divergence(logits.to(where), ref.to(where), labels=labels.to(where), backend=backend, **options).cpu()


@on_backends
@PROFILE
@given(two_streams())
def test_divergences_are_nonnegative_and_zero_where_the_streams_agree(backend, case):
    logits, ref, labels, options = case
    slack = 50 * EPS[logits.dtype]
    for kind, most in (("forward_kl", math.inf), ("reverse_kl", math.inf), ("jsd", math.log(2))):
        value = value_of(backend, logits, ref, labels, kind=kind, **options)
        assert (value >= -slack).all() and (value <= most + slack).all() and not value[labels == -100].any()
        same = {**options, "kind": kind}
        assert not value_of(backend, ref, ref, labels, **same).any()


@on_backends
@PROFILE
@given(two_streams())
def test_an_even_mixture_is_symmetric(backend, case):
    logits, ref, labels, options = case
    one = value_of(backend, logits, ref, labels, kind="jsd", mix=0.5, **options)
    ref = ref.clone()
    ref[labels == -100] = torch.nan
    other = value_of(backend, ref, logits, labels, kind="jsd", mix=0.5, **options)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=50 * EPS[logits.dtype])
    for kind, mirrored in (("forward_kl", "reverse_kl"), ("reverse_kl", "forward_kl")):
        values = value_of(backend, logits, ref, labels, kind=kind, **options)
        swapped = value_of(backend, ref, logits, labels, kind=mirrored, **options)
        torch.testing.assert_close(values, swapped, rtol=1e-4, atol=50 * EPS[logits.dtype])


@on_backends
@PROFILE
@given(logits_cases(), seeds, st.sampled_from(["ppo", "cispo", "sapo"]))
def test_at_ratio_one_every_surrogate_has_the_policy_gradient(backend, case, seed, loss):
    """Given the log-probs as the old ones, or none at all, which says the same."""
    logits, labels, options = case
    where = place(backend)
    options = {name: v.to(where) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    x, labels = logits.detach().to(where).requires_grad_(), labels.to(where)
    advantages = torch.randn(len(labels), generator=torch.Generator().manual_seed(seed)).to(where)
    old = token_logps(x, labels, backend=backend, **options).detach()

    def grad(old_logps, loss):
        total, stats = policy_loss(x, labels, old_logps, advantages, loss=loss, backend=backend, **options)
        return torch.autograd.grad(total, x)[0], stats

    expected, _ = grad(None, "pg")
    for old_logps in (None, old):
        found, stats = grad(old_logps, loss)
        tolerance = 1e-2 if x.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 1e-2)
        torch.testing.assert_close(stats.metrics["ratio"][0], stats.metrics["ratio"][1], rtol=1e-6, atol=0)


@on_backends
@PROFILE
@given(logits_cases(), seeds, st.sampled_from(["ppo", "cispo", "sapo", "pg"]), st.sampled_from([0.0, 0.2]))
def test_one_pass_equals_two_phases(backend, case, seed, loss, coef):
    """The gradient made in the sweep is the backward sweep's, from the coefficients that autograd finds."""
    logits, labels, options = case
    new, where = torch.Generator().manual_seed(seed), place(backend)
    options = {name: v.to(where) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    x, labels = logits.detach().to(where).requires_grad_(), labels.to(where)
    logps, entropy = token_logps(x, labels, entropy=True, backend=backend, **options)
    rows = torch.randn(3, len(labels), generator=new).to(logps)
    old, ref, a = logps.detach() + 0.5 * rows[0], logps.detach() + 0.5 * rows[1], rows[2]
    settings = {"ref_logps": ref, "kl_coef": coef, "entropy_coef": coef, "weights": torch.ones_like(a)}
    total, _ = policy_loss(x, labels, old, a, loss=loss, backend=backend, **settings, **options)
    ratio, gap = (logps - old).exp(), ref - logps
    tau = torch.where(a > 0, 1.0, 1.05 + torch.zeros_like(a))
    value = {
        "ppo": torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2)),
        "cispo": a * ratio.clamp(0.8, 1.2).detach() * logps,
        "sapo": a * 4 / tau * torch.sigmoid(tau * (ratio - 1)),
        "pg": a * logps,
    }[loss]
    losses = -value + coef * (gap.exp() - 1 - gap) - coef * entropy
    two_phases = losses[labels != -100].sum()
    torch.testing.assert_close(total, two_phases, rtol=1e-4, atol=1e-4)
    one, two = (torch.autograd.grad(y, x)[0] for y in (total, two_phases))
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance / 10)
