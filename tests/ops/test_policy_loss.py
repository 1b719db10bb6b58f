"""One-pass token losses on every backend against the composed definition in float64 and against the shared vectors."""

import json
import math

import pytest
import torch

from fastalign.ops import dispatch, policy_loss, token_logps
from fastalign.ops.backends import cpp
from fastalign.ops.functors import Knobs, make_knobs
from fastalign.ops.policy_loss import _op, reference
from fastalign.testing import assert_matches

pytestmark = pytest.mark.usefixtures("nan_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LOSSES = ["ppo", "cispo", "sapo", "pg", "sft"]
RATIOS = [0.5, 0.9, 1.1, 1.5, 4.0]
OPTIONS = {
    "plain": {},
    "k3": {"kl_coef": 0.3},
    "k2_entropy": {"kl_coef": 0.3, "kl_estimator": "k2", "entropy_coef": 0.2},
    "scaled": {"temperature": 0.7, "kl_coef": 0.3},
    "capped_rows": {"temperature": "rows", "softcap": 8.0, "entropy": True},
    "capped_entropy": {"softcap": 8.0, "entropy_coef": 0.2},
    "on_policy": {"old": False, "weights": False},
    "unbounded": {"clip_low": None, "clip_high": None},
    "wide": {"clip_low": 0.3, "clip_high": 0.6, "dual": True},
}
N = 2 * len(RATIOS) + 4


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request):
    if why := dispatch.missing(request.param):
        pytest.skip(f"{request.param}: {why}")
    return request.param


def make_case(vocab, dtype, loss, *, old=True, weights=True, dual=False, **options):
    """Every ratio under both signs of the advantage, a zero advantage, an extreme reference; NaN on two masked rows."""
    new = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(N, vocab, generator=new)).to(dtype)
    labels = torch.randint(vocab, (N,), generator=new)
    if options.get("temperature") == "rows":
        options["temperature"] = torch.linspace(0.5, 2, N)
    scaling = {name: options[name] for name in ("temperature", "softcap") if name in options}
    logps = token_logps(logits.double(), labels, backend="torch", **scaling)
    ratios, signs = torch.tensor([*RATIOS * 2, 1.5, 1.5, 1.5, 1.1]), torch.ones(N)
    signs[len(RATIOS) : 2 * len(RATIOS)] = -1
    signs[-2] = 0
    rows = {
        "old_logps": logps - ratios.log() if old else None,
        "advantages": None if loss == "sft" else signs * (0.5 + torch.rand(N, generator=new)),
        "ref_logps": logps + torch.randn(N, generator=new) if options.get("kl_coef") else None,
        "weights": torch.rand(N, generator=new) if weights else None,
    }
    masked = [1, N - 1]
    labels[masked], logits[masked] = -100, torch.nan
    for values in rows.values():
        if values is not None:
            values[masked] = torch.nan
    if dual and loss == "ppo":
        options["dual_clip"] = 2.0
    return logits, labels, rows, options


def definition(logits, labels, rows, loss, *, dtype=torch.float64, entropy=False, **options):
    """Loss and gradient of the reference under autograd, from the same rounded inputs."""
    settings = [options.pop(name, default) for name, default in DEFAULTS.items()]
    weights = rows["weights"]
    if weights is None:
        weights = torch.full((N,), 1 / (labels != -100).sum().item(), dtype=torch.float64)
    x = logits.to(dtype).requires_grad_()
    vectors = (weights, rows["advantages"], rows["old_logps"], rows["ref_logps"])
    estimator = options.pop("kl_estimator", "k3")
    total = reference(
        x, labels, *vectors, loss=loss, kl_estimator=estimator, knobs=Knobs(*make_knobs(*settings)), **options
    )
    return total.detach(), torch.autograd.grad(total, x)[0]


DEFAULTS = {
    **{"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "tau_pos": 1.0, "tau_neg": 1.05},
    **{"kl_coef": 0.0, "entropy_coef": 0.0},
}


def run(logits, labels, rows, loss, backend, inplace=False, **options):
    x = logits.clone().requires_grad_()
    total, stats = policy_loss(x.view_as(x), labels, **rows, loss=loss, backend=backend, inplace=inplace, **options)
    return total.detach(), torch.autograd.grad(total, x)[0], stats


CASES = [(507, dtype, loss, options) for dtype in DTYPES for loss in LOSSES for options in ("plain", "k2_entropy")]
CASES += [(252, torch.float32, loss, options) for loss in LOSSES for options in OPTIONS]
CASES += [(vocab, torch.bfloat16, "ppo", "wide") for vocab in (1, 7, 2176, 9001)]
CASES += [(9001, torch.float32, "ppo", options) for options in OPTIONS] + [(507, torch.float16, "ppo", "k3")]
CASES = [(backend, *case) for backend in ("torch", "cpp") for case in CASES]
# The interpreter runs a Triton program at a time: each loss, dtype, option and width once or twice there.
CASES += [("triton", 252, torch.float32, loss, options) for loss in LOSSES for options in ("k3", "unbounded")]
CASES += [("triton", 252, torch.float32, "ppo", options) for options in OPTIONS if options not in ("k3", "unbounded")]
CASES += [("triton", 252, dtype, "ppo", "k2_entropy") for dtype in (torch.float64, torch.float16)]
CASES += [("triton", vocab, torch.bfloat16, "ppo", "wide") for vocab in (1, 7, 2176)]


@pytest.mark.parametrize(("backend", "vocab", "dtype", "loss", "options"), CASES, ids=str, indirect=["backend"])
def test_matches_float64(backend, vocab, dtype, loss, options):
    logits, labels, rows, options = make_case(vocab, dtype, loss, **OPTIONS[options])
    total, grad, _ = run(logits, labels, rows, loss, backend, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact, eager = (definition(logits, labels, rows, loss, dtype=d, **options) for d in (torch.float64, wide))
    # Eager's total may be right by luck; what its terms lose is a few ulp of the largest.
    assert total.dtype == wide and abs(total - exact[0]) <= 2 * abs(eager[0] - exact[0]) + 64 * torch.finfo(wide).eps
    interpreted_bf16 = backend == "triton" and dtype == torch.bfloat16  # rounds towards zero: twice the error
    assert_matches(grad, eager[1].to(dtype), exact[1], name="d_logits", factor=4.0 if interpreted_bf16 else 2.0)
    assert (grad[labels == -100] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_log_ratios_are_clamped_without_gradient_outside(backend, loss):
    logits, labels, rows, _ = make_case(507, torch.float64, loss, kl_coef=1e-3)
    labels, logits = labels.clamp(min=0), logits.nan_to_num(0.0)
    logps = token_logps(logits, labels, backend="torch")
    log_ratios = torch.tensor([25.0, -25.0, 19.0, -19.0, 1.0, 25.0, -25.0, 19.0, -19.0, 0.0, 20.5, -20.5, 0.0, 0.0])
    rows["old_logps"] = logps - log_ratios
    rows["ref_logps"] = logps + torch.tensor([0.0, 25.0, -25.0, 0.1, 1e-4] + [0.5] * 9)
    rows["weights"] = torch.ones(N)
    if loss != "sft":
        rows["advantages"] = torch.where(torch.arange(N) < 5, 1.0, -1.0)
    options = {"kl_coef": 1e-3, "clip_low": None, "clip_high": None}
    for row in range(N):
        one = {name: None if x is None else x[row : row + 1] for name, x in rows.items()}
        case = (logits[row : row + 1], labels[row : row + 1], one, loss)
        exact = definition(*case, **options)
        total, grad, _ = run(*case, backend, **options)
        # Without the clamp the third digit would differ: exp(20.5) is 1.6 exp(20).
        torch.testing.assert_close(total, exact[0], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(grad, exact[1], rtol=1e-6, atol=1e-9)


def test_a_clip_is_inactive_on_its_boundary(backend):
    """With both clips 0 a ratio of exactly 1 lies on both bounds."""
    logits, labels, rows, _ = make_case(507, torch.float32, "ppo")
    rows["old_logps"] = token_logps(logits, labels, backend=backend) if backend != "triton" else None
    _, grad, stats = run(logits, labels, rows, "ppo", backend, clip_low=0.0, clip_high=0.0)
    _, free, _ = run(logits, labels, rows, "ppo", backend, clip_low=None, clip_high=None)
    assert torch.equal(grad, free) and (grad[rows["advantages"].abs() > 0] != 0).any(1).all()
    assert stats.metrics["ratio"].tolist() == [N - 2, N - 2]
    assert stats.metrics["clip_ratio/low"][0] == stats.metrics["clip_ratio/high"][0] == 0


def test_clipped_tokens_get_exact_zeros_and_are_counted(backend):
    logits, labels, rows, options = make_case(507, torch.float32, "ppo", **OPTIONS["wide"])
    _, grad, stats = run(logits, labels, rows, "ppo", backend, **options)
    # Bounds 0.7 and 1.6 with a cap of 2: the ratio 4 is clipped under both signs, 0.5 under the negative, 1.5 never.
    zero = (grad == 0).all(1).nonzero().squeeze(1).tolist()
    assert zero == [1, 4, 5, 9, N - 2, N - 1]
    assert stats.metrics["clip_ratio/low"].tolist() == [1, N - 2]
    assert stats.metrics["clip_ratio/high"].tolist() == [2, N - 2]


def test_cispo_counts_ratios_outside_its_bounds(backend):
    logits, labels, rows, options = make_case(507, torch.float32, "cispo")
    _, grad, stats = run(logits, labels, rows, "cispo", backend, **options)
    outside = torch.tensor([r for i, r in enumerate([*RATIOS * 2, 1.5, 1.5, 1.5]) if i != 1])
    assert stats.metrics["clip_ratio/low"][0] == (outside < 0.8).sum()
    assert stats.metrics["clip_ratio/high"][0] == (outside > 1.2).sum()
    assert (grad[[0, 4, 5, 9]] != 0).any(1).all()


def test_statistics_and_metrics(backend):
    logits, labels, rows, options = make_case(507, torch.float32, "ppo", kl_coef=0.3, entropy=True)
    stats = run(logits, labels, rows, "ppo", backend, **options)[2]
    logps, entropy = token_logps(logits, labels, entropy=True, backend="torch")
    scored = labels != -100
    torch.testing.assert_close(stats.logps, logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy, entropy, atol=1e-5, rtol=1e-5)
    assert torch.equal(stats.is_top1, scored & (logits.argmax(-1) == labels))
    y = (rows["ref_logps"] - logps)[scored].double()
    ratio = (logps - rows["old_logps"])[scored].double().exp()
    torch.testing.assert_close(stats.metrics["kl"][0], (y.exp() - 1 - y).sum(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(stats.metrics["ratio"][0], ratio.sum(), atol=1e-4, rtol=1e-5)
    assert {value[1].item() for value in stats.metrics.values()} == {N - 2}
    without = run(logits, labels, {**rows, "ref_logps": None}, "ppo", backend)[2]
    assert without.entropy is None and "kl" not in without.metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["k3", "k2_entropy"])
def test_in_place_is_bitwise_the_same(backend, dtype, options):
    logits, labels, rows, options = make_case(1031, dtype, "ppo", **OPTIONS[options])
    expected = run(logits, labels, rows, "ppo", backend, **options)
    views = [logits.clone(), logits.repeat(1, 2)[:, : logits.shape[1]], logits.T.contiguous().T]
    for x in views[:2] if backend == "torch" else views:  # torch sums another layout in another order
        buffer = x.detach().requires_grad_()
        total, _ = policy_loss(buffer, labels, **rows, inplace=True, backend=backend, **options)
        (grad,) = torch.autograd.grad(total, buffer)
        assert grad.data_ptr() == x.data_ptr() and torch.equal(grad, expected[1]) and torch.equal(total, expected[0])


def test_in_place_fails_loudly_for_other_users_of_the_logits(backend):
    logits, labels, rows, _ = make_case(507, torch.float32, "ppo")
    x = logits.requires_grad_() * 1
    before = token_logps(x, labels).sum()
    total, _ = policy_loss(x, labels, **rows, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()


def test_in_place_is_ignored_without_gradient(backend):
    logits, labels, rows, _ = make_case(507, torch.float32, "ppo")
    copy = logits.clone()
    with torch.no_grad():
        total, _ = policy_loss(logits.requires_grad_(), labels, **rows, inplace=True, backend=backend)
    assert not total.requires_grad and torch.equal(logits[labels != -100], copy[labels != -100])
    assert torch.equal(total, run(copy, labels, rows, "ppo", backend)[0])


@pytest.mark.parametrize("options", ["k3", "k2_entropy", "capped_rows"])
def test_upstream_scales_and_a_second_backward_recomputes(backend, options):
    logits, labels, rows, options = make_case(507, torch.float64, "ppo", **OPTIONS[options])
    expected = definition(logits, labels, rows, "ppo", **options)[1]
    x = logits.requires_grad_()
    total, _ = policy_loss(x, labels, **rows, backend=backend, **options)
    for upstream in (-2.5, 1.0, 0.0):
        (grad,) = torch.autograd.grad(total * upstream, x, retain_graph=True)
        torch.testing.assert_close(grad, upstream * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward_raises(inplace):
    logits, labels, rows, _ = make_case(507, torch.float32, "ppo")
    x = logits.requires_grad_()
    total, _ = policy_loss(x * 1, labels, **rows, inplace=inplace)
    with pytest.raises(RuntimeError, match="double backward"):
        (grad,) = torch.autograd.grad(total, x, create_graph=True)
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_scored_is_a_zero_in_the_graph(backend, rows):
    logits = torch.full((rows, 7), torch.nan, requires_grad=True)
    none = torch.full((rows,), torch.nan)
    total, stats = policy_loss(logits, torch.full((rows,), -100), none, none, backend=backend)
    total.backward()
    assert total == 0 and logits.grad.shape == (rows, 7) and (logits.grad == 0).all()
    assert stats.metrics["ratio"].tolist() == [0, 0]


def test_a_non_finite_row_spoils_itself_alone(backend):
    logits, labels, rows, _ = make_case(507, torch.float32, "ppo")
    expected = run(logits, labels, rows, "ppo", backend)[1]
    logits[0, 5], rows["advantages"][2], rows["old_logps"][3] = torch.nan, torch.nan, torch.nan
    total, grad, _ = run(logits, labels, rows, "ppo", backend)
    assert total.isnan() and grad[[0, 2, 3]].isnan().all()
    kept = [row for row in range(N) if row not in (0, 2, 3)]
    assert torch.equal(grad[kept], expected[kept])


def test_banned_columns_and_low_levels(backend):
    """A slab of banned columns first, and rows far below 0: nothing overflows on the way."""
    logits, labels, rows, _ = make_case(20011, torch.float32, "pg")
    logits[:, :17003], labels = -torch.inf, torch.where(labels == -100, -100, 17003 + labels % 900)
    logits[2, 17003:] -= 300
    rows["weights"][:] = 1.0
    _, grad, _ = run(logits, labels, rows, "pg", backend)
    exact = definition(logits[:, 17003:], torch.where(labels == -100, -100, labels - 17003), rows, "pg")[1]
    assert (grad[:, :17003] == 0).all()
    torch.testing.assert_close(grad[:, 17003:].double(), exact, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_programs_that_take_several_rows_change_no_bit(backend, monkeypatch):
    from fastalign_kernels import policy_loss as kernels

    logits, labels, rows, _ = make_case(252, torch.float32, "ppo")
    expected = run(logits, labels, rows, "ppo", backend)
    monkeypatch.setattr(kernels, "rows_in_flight", lambda *_: 3)
    actual = run(logits, labels, rows, "ppo", backend)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["k3", "capped_rows", "k2_entropy"])
@pytest.mark.parametrize("level", ["avx512", "avx2", "scalar"])
def test_native_levels_threads_and_company(level, options, dtype):
    """Every instruction set; more threads than rows, or other rows, change no bit; ascending logits move the base."""
    if why := cpp.unavailable():
        pytest.skip(why)
    from fastalign import _C

    logits, labels, rows, options = make_case(33000, dtype, "ppo", **OPTIONS[options])
    logits[3] = logits[3].sort()[0]
    exact = definition(logits, labels, rows, "ppo", **options)[1]
    threads, best = torch.get_num_threads(), _C.cpu_level()
    try:
        _C.set_cpu_level(level)
        results = []
        for count in (1, 3, N + 1):
            torch.set_num_threads(count)
            results.append(run(logits, labels, rows, "ppo", "cpp", **options)[:2])
        statistics = run(logits, labels, rows, "ppo", "cpp", **options)[2].logps
        scaling = {name: options[name] for name in ("temperature", "softcap") if name in options}
        assert torch.equal(statistics, token_logps(logits, labels, backend="cpp", **scaling))
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_level(best)
    for total, grad in results[1:]:
        assert torch.equal(total, results[0][0]) and torch.equal(grad, results[0][1])
    relative = (results[0][1].double() - exact).norm() / exact.norm()
    assert relative < (3e-3 if dtype == torch.bfloat16 else 1e-5)
    for i in (0, 2, 3):
        one = {name: None if x is None else x[i : i + 1] for name, x in rows.items()}
        options_one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        _C.set_cpu_level(level)
        try:
            grad = run(logits[i : i + 1], labels[i : i + 1], one, "ppo", "cpp", **options_one)[1]
        finally:
            _C.set_cpu_level(best)
        assert torch.equal(grad[0], results[0][1][i])


@pytest.mark.parametrize("loss", LOSSES)
def test_traces_into_one_graph_and_passes_opcheck(loss):
    logits, labels, rows, _ = make_case(35, torch.float32, loss, kl_coef=0.3)
    x = logits.requires_grad_()

    def function(x):
        total, stats = policy_loss(x * 2, labels, **rows, loss=loss, kl_coef=0.3, dual_clip=None, inplace=True)
        return total * 3 + 0 * stats.metrics["kl"][0].float()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for total in (first := function(x), second := compiled(x)):
        assert total.isfinite()
    assert torch.equal(first, second)
    assert torch.equal(*(torch.autograd.grad(total, x)[0] for total in (first, second)))
    knobs = make_knobs(0.2, 0.2, None, 1.0, 1.05, 0.3, 0.1)
    vectors = [None if v is None else v.float().nan_to_num() for v in (rows["weights"], rows["advantages"])]
    args = (x.detach().nan_to_num().requires_grad_(), labels, None, *vectors, None, None)
    args = (*args, loss, "k3", knobs, 1.5, 5.0, True, None, None, None, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_op, args, test_utils=checks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "grpo"}, "loss must be one of pg, sft, ppo"),
        ({"advantages": None}, "needs advantages"),
        ({"loss": "sft"}, "takes no advantages"),
        ({"advantages": torch.zeros(3)}, r"advantages must be \[N\] with N = 2"),
        ({"old_logps": torch.zeros(2, requires_grad=True)}, "old_logps gets no gradient"),
        ({"kl_coef": 0.1}, "needs ref_logps"),
        ({"kl_estimator": "k1"}, "k2 or k3"),
        ({"clip_low": -0.1}, "clip_low is a distance"),
        ({"dual_clip": 0.5}, "dual_clip must be larger"),
        ({"dual_clip": 3.0, "loss": "cispo"}, 'belongs to loss "ppo"'),
        ({"tau_neg": 0.0}, "must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"labels": torch.tensor([0, 5])}, "label 5 at row 1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options, message):
    given = {"labels": torch.tensor([0, 1]), "advantages": torch.ones(2), **options}
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(2, 5), **given)


# --- shared vectors --------------------------------------------------------------------------------------------------

VECTORS = [
    *("ppo_clip/token_mean", "ppo_clip/all_positive_adv", "ppo_noclip_seed/token_mean", "ppo_dual_clip/token_mean"),
    *("grpo/seq_mean_token_mean", "dr_grpo/constant", "dapo/token_mean"),
    *("cispo/minimax_1_plus_eps", "cispo/two_sided", "pg_reinforce_baseline"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_shared_vectors(backend, name, dtype, shared_file):
    vector = next(v for v in json.loads(shared_file("vectors/vectors.json").read_text()) if v["name"] == name)
    inputs = {key: torch.tensor(value, dtype=torch.float64) for key, value in vector["inputs"].items()}
    params, mask, expected = vector["params"], inputs["mask"], vector["expected"]
    advantages = torch.tensor(expected.get("advantages") or vector["inputs"]["advantages"], dtype=torch.float64)
    logps = torch.where(mask > 0, inputs["logp"], -1.0).flatten()
    # Of two columns the first has the given log-prob, and its gradient is g (1 - p).
    logits = torch.stack([logps, torch.log(-torch.expm1(logps))], 1).to(dtype).requires_grad_()
    labels = torch.where(mask.flatten() > 0, 0, -100)
    rows = {
        key: inputs[old].flatten() for key, old in {"old_logps": "old", "ref_logps": "ref"}.items() if old in inputs
    }
    total, stats = policy_loss(
        logits,
        labels,
        advantages=advantages.view(len(mask), -1).expand(mask.shape).flatten(),
        weights=weights_of(mask, params).flatten(),
        backend=backend,
        **rows,
        **settings_of(name, params),
    )
    total.backward()
    exactly = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(total.double(), torch.tensor(expected["loss"], dtype=torch.float64), **exactly)
    g = (logits.grad[:, 0] / -torch.expm1(logps)).double() * mask.flatten()
    torch.testing.assert_close(g, torch.tensor(expected["d_logp"], dtype=torch.float64).flatten(), **exactly)
    known = expected.get("metrics", {})
    if (clipped := expected.get("clipfrac", known.get("policy/clipfrac"))) is not None and "dual" not in name:
        counted = stats.metrics["clip_ratio/low"] + stats.metrics["clip_ratio/high"]
        assert (counted[0] / mask.sum()).item() == pytest.approx(clipped)
    if "policy/ratio_mean" in known:
        assert (stats.metrics["ratio"][0] / mask.sum()).item() == pytest.approx(known["policy/ratio_mean"], rel=1e-5)


def weights_of(mask, params):
    """The token weights of a named reduction."""
    lengths, sequences = mask.sum(1, keepdim=True), (mask.sum(1) > 0).sum()
    return {
        "token-mean": lambda: mask / mask.sum(),
        "seq-mean-token-mean": lambda: mask / (sequences * lengths),
        "constant": lambda: mask / (sequences * params["const"]),
    }[params.get("reduction", "token-mean")]()


def settings_of(name, params):
    if name.startswith("cispo"):
        low, high = params["ratio_min"], params["ratio_max"]
        return {"loss": "cispo", "clip_low": None if low is None else 1 - low, "clip_high": high - 1}
    if name.startswith("pg"):
        return {"loss": "pg"}
    clips = {key: params.get(key) for key in ("clip_low", "clip_high", "dual_clip")}
    clips = {key: None if value is None or math.isinf(value) else value for key, value in clips.items()}
    return {"loss": "ppo", "kl_coef": params.get("kl_coef", 0.0), **clips}
