"""Scans over packed tokens: every backend against the recurrence in float64 and the golden vectors."""

import json

import pytest
import torch

from fastalign.ops import dispatch, gae, segment_scan
from fastalign.ops.scan import _gae_op, _op, gae_reference, reference
from fastalign.testing import assert_matches

pytestmark = pytest.mark.usefixtures("nan_memory")

BLOCK = 32
if not dispatch.missing("triton"):
    from fastalign_kernels import scan as triton_scan

    if torch.cuda.is_available():
        BLOCK = triton_scan.BLOCK
    triton_scan.BLOCK = BLOCK  # the interpreter takes its time over every step
LENGTHS = [0, 5, 1, BLOCK + 27, 0, 17, BLOCK, 2, 2 * BLOCK + 1, 0]
"""Empty segments at both ends; one, two and three of the Triton kernel's blocks, full and not."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DECAYS = {"sums": 1.0, "discount": 0.93, "per token": None}


@pytest.fixture(params=["torch", "cpp", "triton"])
def place(request):
    """Backend and device; where there is a GPU, torch and Triton run there."""
    if request.param not in dispatch.available("segment_scan"):
        pytest.skip(f"{request.param}: {dispatch.missing(request.param)}")
    return request.param, "cuda" if request.param != "cpp" and torch.cuda.is_available() else "cpu"


def packed(lengths, device="cpu", dtype=torch.int32):
    return torch.tensor([0, *lengths], dtype=dtype, device=device).cumsum(0, dtype=dtype)


def vectors(number, lengths, dtype, device="cpu", seed=0):
    return torch.randn(number, sum(lengths), generator=torch.Generator().manual_seed(seed)).to(device, dtype).unbind()


def decay_of(name, lengths, device="cpu", dtype=torch.float32):
    """A number, or one per token with NaN where a segment ends: that one must not be read."""
    if DECAYS[name] is not None:
        return DECAYS[name]
    decay = 0.8 + 0.2 * torch.rand(sum(lengths), generator=torch.Generator().manual_seed(1))
    decay[packed([n for n in lengths if n])[1:].long() - 1] = torch.nan
    return decay.to(device, dtype)


def value_and_gradient(function, x, cu_seqlens, decay, upstream):
    x = x.detach().clone().requires_grad_()
    y = function(x, cu_seqlens, decay)
    return y.detach(), torch.autograd.grad(y, x, upstream.to(y.dtype))[0]


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_match_float64(place, dtype, name):
    backend, device = place
    x, upstream = vectors(2, LENGTHS, dtype)
    decay, cu_seqlens = decay_of(name, LENGTHS), packed(LENGTHS)
    wide = decay.double() if name == "per token" else decay
    exact = value_and_gradient(reference, x.double(), cu_seqlens, wide, upstream)
    eager = value_and_gradient(reference, x, cu_seqlens, decay, upstream)
    there = (t.to(device) if isinstance(t, torch.Tensor) else t for t in (x, cu_seqlens, decay, upstream))
    actual = value_and_gradient(lambda *args: segment_scan(*args, backend=backend), *there)
    assert exact[1].abs().max() > 1 and eager[1].dtype == dtype
    for what, ours, theirs, oracle in zip(("y", "dx"), actual, eager, exact, strict=True):
        assert_matches(ours.cpu(), theirs, oracle, name=what)


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gae_matches_float64(place, dtype, bootstrap):
    backend, device = place
    rewards, values = vectors(2, LENGTHS, dtype)
    last_values = vectors(1, [1] * len(LENGTHS), dtype, seed=2)[0] if bootstrap else None
    settings = packed(LENGTHS), 0.99, 0.95
    eager = gae_reference(rewards, values, *settings, last_values)
    exact = gae_reference(rewards.double(), values.double(), *settings, last_values)
    there = [None if x is None else x.to(device) for x in (rewards, values, settings[0], last_values)]
    actual = gae(*there[:3], 0.99, 0.95, last_values=there[3], backend=backend)
    for what, ours, theirs, oracle in zip(("advantages", "returns"), actual, eager, exact, strict=True):
        assert_matches(ours.cpu(), theirs, oracle, name=what)


def test_undiscounted_returns_are_suffix_sums(place):
    backend, device = place
    rewards, values = vectors(2, LENGTHS, torch.float32, device)
    cu_seqlens = packed(LENGTHS, device)
    advantages, returns = gae(rewards, values, cu_seqlens, 1.0, 1.0, backend=backend)
    sums = segment_scan(rewards, cu_seqlens, backend=backend)
    # What cancels is a walk of up to 2 BLOCK + 1 terms of size 1: its fp32 rounding is some units of its largest value.
    scale = 8 * torch.finfo(torch.float32).eps * sums.abs().max().item()
    torch.testing.assert_close(returns, sums, rtol=0, atol=scale)
    torch.testing.assert_close(advantages, sums - values, rtol=0, atol=scale)
    assert sums.abs().max() > 5


@pytest.mark.parametrize("case", ["seed_gamma1_lambda1", "gae", "gae_truncated_bootstrap"])
def test_golden_rollouts(place, case, shared_file):
    backend, device = place
    entries = {entry["name"]: entry for entry in json.loads(shared_file("vectors/vectors.json").read_text())}
    entry = entries[f"ppo_rollout/{case}"]
    rewards, values, last_values, keep = rollout(entry["inputs"], entry["params"]["kl_coef"])
    tensors = rewards.to(device), values.to(device), packed(keep.sum(1).tolist(), device)
    settings = entry["params"]["gamma"], entry["params"]["lam"]
    advantages, returns = gae(*tensors, *settings, last_values=last_values.to(device), backend=backend)
    found = {"advantages": advantages.cpu(), "returns": returns.cpu()}
    expected = {what: torch.tensor(x, dtype=torch.float64)[keep] for what, x in entry["expected"].items()}
    for what in found.keys() & expected.keys():
        torch.testing.assert_close(found[what], expected[what])
    if "returns" in expected and settings == (1.0, 1.0):
        sums = segment_scan(tensors[0], tensors[2], backend=backend).cpu()
        torch.testing.assert_close(sums, expected["returns"])


def rollout(inputs, kl_coef):
    """Packed token rewards and values, the values to bootstrap from, the mask; what was cut short earns no score."""
    keep = torch.tensor(inputs["mask"]).bool()
    old, ref, values = (torch.tensor(inputs[k], dtype=torch.float64)[keep] for k in ("old", "ref", "old_values"))
    none = [0.0] * len(keep)
    cut, score = torch.tensor(inputs.get("truncated", none)).bool(), torch.tensor(inputs["score"], dtype=torch.float64)
    rewards = kl_coef * (ref - old)
    rewards[packed(keep.sum(1).tolist())[1:].long() - 1] += score.masked_fill(cut, 0)
    return rewards, values, cut * torch.tensor(inputs.get("bootstrap_value", none), dtype=torch.float64), keep


@pytest.mark.parametrize("name", DECAYS)
def test_a_segment_has_the_same_bits_alone_and_anywhere(place, name):
    backend, device = place
    rewards, values = vectors(2, LENGTHS, torch.float32, device)
    decay, cu_seqlens = decay_of(name, LENGTHS, device), packed(LENGTHS, device)

    def everything(span, cu_seqlens, last_values):
        part = decay[span] if isinstance(decay, torch.Tensor) else decay
        run = lambda *args: segment_scan(*args, backend=backend)  # noqa: E731
        scans = value_and_gradient(run, rewards[span], cu_seqlens, part, values[span])
        estimates = gae(rewards[span], values[span], cu_seqlens, 0.9, 0.8, last_values=last_values, backend=backend)
        return torch.stack([*scans, *estimates])

    last_values = torch.linspace(-1, 1, len(LENGTHS), device=device)
    together = everything(slice(None), cu_seqlens, last_values)
    for i, (start, stop) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        alone = everything(slice(start, stop), packed([stop - start], device), last_values[i : i + 1])
        assert torch.equal(alone, together[:, start:stop])


def test_nothing_crosses_a_boundary(place):
    backend, device = place
    lengths = [3, 4, 2]
    rewards, values = vectors(2, lengths, torch.float32, device)
    cu_seqlens = packed(lengths, device)
    for poison in (torch.nan, torch.inf):
        spoilt = rewards.clone()
        spoilt[4] = poison
        x = spoilt.clone().requires_grad_()
        y = segment_scan(x, cu_seqlens, 0.5, backend=backend)
        reached = (~y.isfinite()).nonzero().flatten().tolist()
        assert reached == [3, 4], "it reaches the tokens before it, in its own segment"
        upstream = torch.autograd.grad(y, x, spoilt)[0]
        assert (~upstream.isfinite()).nonzero().flatten().tolist() == [4, 5, 6]
        advantages, _ = gae(spoilt, values, cu_seqlens, 0.9, 0.9, backend=backend)
        assert (~advantages.isfinite()).nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1, 0]], ids=str)
def test_little_or_nothing(place, lengths):
    backend, device = place
    x, values = vectors(2, lengths, torch.float32, device)
    x.requires_grad_()
    y = segment_scan(x, packed(lengths, device), 0.5, backend=backend)
    y.sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, torch.ones_like(x))
    advantages, returns = gae(x, values, packed(lengths, device), 0.9, 0.9, backend=backend)
    torch.testing.assert_close(advantages, x.detach() - values)
    torch.testing.assert_close(returns, x.detach())


def test_offsets_of_64_bits_any_stride_and_no_gradient_into_advantages(place):
    backend, device = place
    rewards, values = vectors(2, LENGTHS, torch.float32, device)
    wide = torch.stack([rewards, values], 1).requires_grad_()
    settings = packed(LENGTHS, device), 0.9, 0.7
    expected = gae(rewards, values, *settings, backend=backend)
    actual = gae(wide[:, 0], wide[:, 1], settings[0].long(), *settings[1:], backend=backend)
    assert all(torch.equal(a, e) and not a.requires_grad for a, e in zip(actual, expected, strict=True))
    scanned = segment_scan(wide[:, 0], settings[0].long(), wide.detach()[:, 1], backend=backend)
    assert torch.equal(scanned, segment_scan(rewards, settings[0], values, backend=backend))


def test_it_is_differentiable_twice(place):
    backend, device = place
    lengths = [3, 0, 2]
    cu_seqlens, decay = packed(lengths, device), torch.tensor([0.5, 2.0, 9.0, 0.25, 9.0], device=device).double()
    x = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: segment_scan(x, cu_seqlens, decay, backend=backend).square(), x)


@pytest.mark.parametrize("place", ["torch", "cpp"], indirect=True)
def test_threads_do_not_change_a_bit(place):
    x, values = vectors(2, LENGTHS * 9, torch.float32, place[1])
    cu_seqlens, before, results = packed(LENGTHS * 9, place[1]), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            estimates = gae(x, values, cu_seqlens, 0.99, 0.95, backend=place[0])
            results.append(torch.stack([*estimates, segment_scan(x, cu_seqlens, 0.9, backend=place[0])]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("place", ["triton"], indirect=True)
def test_wrong_offsets_do_not_leave_the_tensors(place):
    """On CUDA offsets are not checked; the kernels themselves stay inside, here between guards."""
    backend, device = place
    kernels = dispatch.kernels("segment_scan", backend, torch.device(device))
    guarded = torch.full((3, 8), 7.0, device=device)
    for offsets in ([-5, 2, 40], [3, 1, 5], [2, 4]):
        out = kernels.scan(guarded[1], torch.tensor(offsets, device=device), 1.0, reverse=True)
        assert out.shape == (8,)
    assert torch.equal(out.isnan().nonzero().flatten().cpu(), torch.tensor([0, 1, 4, 5, 6, 7]))


X, OFFSETS = torch.ones(4), torch.tensor([0, 3, 4])
WRONG = [
    (lambda: segment_scan(X[None], OFFSETS), r"x must be a floating \[N\], got torch.float32 of shape \[1, 4\]"),
    (lambda: segment_scan(X.int(), OFFSETS), r"x must be a floating \[N\], got torch.int32"),
    (lambda: segment_scan(X, OFFSETS.float()), r"cu_seqlens must be int32 or int64 \[B\+1\], got torch.float32"),
    (lambda: segment_scan(X, OFFSETS[:0]), r"cu_seqlens must be int32 or int64 \[B\+1\], got torch.int64 of shape"),
    (lambda: segment_scan(X, OFFSETS[:2]), r"cu_seqlens must rise from 0 to 4, the number of tokens; got 0 ... 3"),
    (lambda: segment_scan(X, OFFSETS[1:]), r"cu_seqlens must rise from 0 to 4"),
    (lambda: segment_scan(X, torch.tensor([0, 3, 2, 4])), r"not in order"),
    (lambda: segment_scan(X, OFFSETS, X[:3]), r"decay must be a number or a floating \[N\] with N = 4"),
    (lambda: segment_scan(X, OFFSETS, X.clone().requires_grad_()), r"decay gets no gradient; pass decay.detach\(\)"),
    (lambda: segment_scan(X, OFFSETS, backend="fpga"), r"backend 'fpga' is not available"),
    (lambda: gae(X, X[:3], OFFSETS, 1.0, 1.0), r"values must be a floating \[N\] like the rewards \(4\)"),
    (lambda: gae(X, X, OFFSETS, 1.0, 1.0, last_values=X), r"last_values must be a floating \[B\], one per segm"),
    (lambda: gae(X, X, OFFSETS[:2], 1.0, 1.0), r"cu_seqlens must rise from 0 to 4"),
    (lambda: gae(X, X.to("meta"), OFFSETS, 1.0, 1.0), r"values is on meta but the rewards on cpu"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words[:40] for _, words in WRONG])
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("backend", ["torch", None])
def test_the_ops_pass_opcheck(backend):
    x, values = vectors(2, [3, 0, 2], torch.float32)
    cu_seqlens = packed([3, 0, 2])
    for decays, reverse in ((None, True), (values, False)):
        args = (x.clone().requires_grad_(), cu_seqlens, decays, 0.9, reverse, backend)
        torch.library.opcheck(_op, args, test_utils=CHECKS)
    for last_values in (None, torch.ones(3)):
        torch.library.opcheck(_gae_op, (x, values, cu_seqlens, last_values, 0.9, 0.8, backend), test_utils=CHECKS)


def test_one_graph():
    rewards, values = vectors(2, LENGTHS, torch.float32)
    cu_seqlens = packed(LENGTHS)

    def function(x):
        advantages, returns = gae(x, values, cu_seqlens, 0.99, 0.95, last_values=torch.ones(len(LENGTHS)))
        return (segment_scan(x, cu_seqlens, 0.9) * advantages + returns).sum()

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        x = rewards.clone().requires_grad_()
        y = run(x)
        results.append((y.detach(), *torch.autograd.grad(y, x)))
    assert all(torch.equal(eager, traced) and traced.abs().max() > 0 for eager, traced in zip(*results, strict=True))
