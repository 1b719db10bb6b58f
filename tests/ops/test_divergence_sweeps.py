"""What leaves the sweep of a divergence beside its value, and what joins its gradient; the published vectors."""

import pytest
import torch
from divergence_cases import (
    INTERPRETED,
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
    vector,
)

from fastalign.ops import dispatch, divergence, token_logps
from fastalign.ops.divergence import reference as eager
from fastalign.ops.rows import coefficients
from fastalign.ops.token_logps import reference as token_reference
from fastalign.testing import assert_matches

pytestmark = pytest.mark.usefixtures("nan_memory")


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
    kernels, tight = dispatch.kernels("divergence", backend, device, dtype), 1e-14 if dtype == torch.float64 else 4e-7
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
    kernels = dispatch.kernels("divergence", backend, device, logits.dtype)
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
