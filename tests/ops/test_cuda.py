"""The CUDA C++ backend: its place in the dispatch everywhere; where a device is, its results on it.

What its kernels compute is proven without one in ``test_cuda_on_host.py``, that they compile in ``test_compile.py``.
"""

import pytest
import torch

from fastalign.ops import dispatch, policy_loss, token_logps
from fastalign.ops.backends import cpp
from fastalign.ops.backends.cuda import token_logps as cuda_sweep
from fastalign.ops.backends.cuda.policy_loss import run
from fastalign.ops.backends.torch.policy_loss import run as run_in_torch
from fastalign.ops.backends.torch.token_logps import backward as backward_in_torch
from fastalign.ops.backends.torch.token_logps import forward as forward_in_torch
from fastalign.ops.functors import Knobs
from fastalign.ops.rows import Coefficients
from fastalign.testing import assert_matches

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# --- everywhere -------------------------------------------------------------------------------------------------------


def test_what_has_cuda_kernels():
    served = {op for op in dispatch.OPS if "cuda" in dispatch.backends(op)}
    assert served == {"token_logps", "linear_logps", "linear_loss", "policy_loss", "preference_loss"}


def test_it_is_chosen_on_request_and_where_triton_is_not(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda backend: None)
    monkeypatch.setattr(dispatch, "level", lambda backend: "as told")
    dispatch.choose.cache_clear()
    assert dispatch.choose("token_logps", None, "cuda") == "triton"
    assert dispatch.choose("token_logps", "cuda", "cuda") == "cuda"
    with pytest.raises(ValueError, match="it serves another device"):
        dispatch.choose("token_logps", "cuda", "cpu")
    with pytest.raises(ValueError, match="no such backend"):
        dispatch.choose("gae", "cuda", "cuda")
    monkeypatch.setattr(dispatch, "missing", lambda backend: "it is gone" if backend == "triton" else None)
    dispatch.choose.cache_clear()
    assert dispatch.choose("policy_loss", None, "cuda") == "cuda"
    dispatch.choose.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_its_absence_has_a_reason():
    reason = dispatch.reasons("token_logps")["cuda"]
    assert reason in (cpp.unavailable(), "no CUDA device") or "built without CUDA" in reason
    with pytest.raises(ValueError, match="backend 'cuda' is not available for cpu tensors"):
        token_logps(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), backend="cuda")


def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match="the cuda backend computes on cuda tensors"):
        cuda_sweep.forward(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def device():
    if why := dispatch.missing("cuda"):
        pytest.skip(why)
    return torch.device("cuda")


def case(vocab, dtype, device, rows=9):
    generator = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(device, dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[:3] = torch.tensor([-100, -1, -100])
    logits[0] = torch.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = torch.randn(4, rows, generator=generator, dtype=wide).to(device)
    return logits, labels.to(device), vectors


def both(forward, backward, x, labels, vectors, out=None, **options):
    outputs = forward(x, labels, entropy=True, total=True, **options)[:5]
    out = torch.full_like(x, torch.nan) if out is None else out
    g, alpha, beta, delta = vectors
    backward(out, x, labels, outputs[2], outputs[3], Coefficients(g, alpha, beta, delta / x.shape[1]), **options)
    return *outputs, out


CUDA = (cuda_sweep.forward, cuda_sweep.backward)
eager = (forward_in_torch, backward_in_torch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 507, 32000, 50257, 151936])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_agrees_with_torch(device, dtype, vocab, softcap):
    inputs = case(vocab, dtype, device)
    wide = (inputs[0].double(), inputs[1], inputs[2].double())
    names = ("logps", "entropy", "max", "logsum", "total", "gradient")
    results = [both(*CUDA, *inputs, softcap=softcap, temperature=0.7)]
    results += [both(*eager, *x, softcap=softcap, temperature=0.7) for x in (inputs, wide)]
    for name, *values in zip(names, *results, strict=True):
        assert_matches(*(x / vocab if name == "total" else x for x in values), name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [507, 50257, 151936])
def test_bits_do_not_depend_on_company_layout_or_stream(device, dtype, vocab):
    """Few rows are shared by blocks, many are not; a row of odd width starts anywhere."""
    few = case(vocab, dtype, device)
    times = 1 + 4 * torch.cuda.get_device_properties(device).multi_processor_count // 9
    many = (few[0].repeat(times, 1), few[1].repeat(times), few[2].repeat(1, times))
    expected = both(*CUDA, *few)
    company = both(*CUDA, *many)
    odd = torch.empty(9, vocab + 3, dtype=dtype, device=device)[:, 1 : vocab + 1].copy_(few[0])
    with torch.cuda.stream(torch.cuda.Stream()):
        elsewhere = both(*CUDA, odd, *few[1:], out=odd)
        torch.cuda.current_stream().synchronize()
    for x, y, z in zip(expected, company, elsewhere, strict=True):
        assert torch.equal(x.nan_to_num(), y[-9:].nan_to_num()) and torch.equal(x.nan_to_num(), z.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [507, 32000, 50257, 151936, 262144])
@pytest.mark.parametrize("loss", ["pg", "ppo", "cispo", "sapo"])
def test_policy_loss_has_the_same_bits_in_any_cluster(device, dtype, vocab, loss):
    """And agrees with torch. More rows than clusters, so that rows follow each other through shared memory."""
    logits, labels, vectors = case(vocab, dtype, device, rows=300)
    weights, advantages, old, ref = vectors
    logps = forward_in_torch(logits, labels, temperature=0.7)[0]
    knobs = Knobs(0.8, 1.2, 2.0, 1.0, 1.05, 0.1, 0.05)
    settings = {
        "loss": loss,
        "kl_estimator": "k3",
        "knobs": knobs,
        "entropy": True,
        "temperature": 0.7,
        "softcap": None,
    }
    rows = (labels, weights.abs(), advantages, logps + 0.3 * old, logps + 0.3 * ref)
    expected = None
    for cluster in (None, 0, 1, 2, 4, 8):
        for inplace in (False, True):
            x = logits.clone()
            out = x if inplace else torch.full_like(x, torch.nan)
            try:
                found = run(out, x, *rows, **settings, cluster=cluster), out
            except RuntimeError as error:  # the row does not fit, or has fewer segments
                assert cluster and "invalid" in str(error)
                continue
            expected = expected or found
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))
    outs = [torch.empty_like(logits), torch.empty_like(logits, dtype=torch.float64)]
    wide = (logits.double(), labels, *(x.double() for x in rows[1:]))
    usual, oracle = (run_in_torch(out, *x, **settings) for out, x in zip(outs, ((logits, *rows), wide), strict=True))
    assert_matches(expected[0][:, 3:], usual[:, 3:], oracle[:, 3:], name="table", factor=4.0)
    assert_matches(expected[1][3:], outs[0][3:], outs[1][3:], name="gradient", factor=4.0)


@pytest.mark.gpu
def test_beyond_every_limit(device):
    """Rows beyond 65535, elements beyond 2^31: only the last rows differ, and they are looked at."""
    rows, vocab = 70000, 32768
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=device)
    logits[-1, 7] = 5
    labels = torch.full((rows,), 7, device=device)
    outputs = cuda_sweep.forward(logits, labels)
    expected = forward_in_torch(logits[-2:], labels[-2:])
    torch.testing.assert_close(outputs.logps[-2:], expected[0])
    assert outputs.logps[:-1].eq(outputs.logps[0]).all()
    cuda_sweep.backward(
        logits, logits, labels, outputs.max, outputs.logsum, Coefficients(torch.ones(rows, device=device))
    )
    assert logits[:-1].eq(logits[0]).all() and logits[-1].ne(logits[0]).any()


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_launches(device):
    logits, labels, vectors = case(151936, torch.bfloat16, device)
    advantages = vectors[0].contiguous()
    calls = {
        "statistics and gradient": lambda: both(*CUDA, logits, labels, vectors)[-1],
        "policy_loss": lambda: policy_loss(
            logits.requires_grad_(), labels, advantages=advantages, loss="pg", weights=advantages.abs(), backend="cuda"
        )[0],
    }
    for name, call in calls.items():
        expected = call().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        captured.zero_()
        graph.replay()
        torch.testing.assert_close(captured.nan_to_num(), expected.nan_to_num(), rtol=0, atol=0, msg=name)
