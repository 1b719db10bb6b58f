"""Fifteen requirements learned from public failures, each as named tests through the public ops: here the first nine.

The threads cited are public; a docstring says what broke there. Ranks are in ``pitfall_ranks.py``, the other six
requirements in ``test_pitfalls_of_use.py``.
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import forks
import pytest
import torch
from op_table import HERE, OPS, example_of, given, place

from fastalign.losses.pairs import pair_logps
from fastalign.losses.preference import dpo
from fastalign.ops import linear_logps, linear_loss, policy_loss, preference_loss, token_logps
from fastalign.ops.linear_logps import reference as linear_reference
from fastalign.ops.token_logps import reference as token_reference
from fastalign.testing import (
    assert_matches,
    linear_example,
    logits_example,
    outputs_and_grads,
    pairs_example,
    policy_example,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("nan_memory")

forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its ranks")
ANYWHERE = [*HERE, "sdpa"]  # attention's other backends want 16 bits on CUDA, which the matrix gives them
on_backends = pytest.mark.parametrize("backend", HERE)
TIGHT = {"torch": 900_000, "cpp": 60_000, "triton": 60_000}


def ours_eager_exact(op, reference, x, **options):
    """Outputs and gradients of the op, of its definition in the same dtype, and in float64."""
    wide = x.to(torch.float64)
    made = outputs_and_grads(op(**x.tensors, labels=x.labels, **x.options, **options), x)
    return made, *(outputs_and_grads(strip(reference(**y.tensors, labels=y.labels, **y.options)), y) for y in (x, wide))


def strip(result):
    return result if result[1] is not None else result[0]


def check(op, reference, x, factor=2.0, **options):
    made, eager, exact = ours_eager_exact(op, reference, x, **options)
    for name, value in made.items():
        assert_matches(value, eager[name], exact[name], name=name, factor=factor)
    return made


# --- 1. per-token upstream gradients ----------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("memory", ["ample", "tight"])
@pytest.mark.parametrize("first", [0.0, 1e4])
def test_01_the_upstream_gradient_of_each_token_is_its_own(backend, memory, first):
    """With ``reduction="none"`` dW and db were scaled by the first row's gradient (Liger-Kernel #968, #488,
    PR #1298)."""
    x = linear_example("bias", 23, 19, 131, torch.float32, place(backend))
    x.grad_logps[0] = first
    made = check(
        linear_logps, linear_reference, x, backend=backend, memory=TIGHT[backend] if memory == "tight" else None
    )
    assert made["d_weight"].abs().max() > 0.1 and made["d_bias"].abs().max() > 0.1


# --- 2. any vocabulary, any level -------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("vocab", [1, 2, 17, 127, 129, 1025, 2049])
@pytest.mark.parametrize("level", [0.0, -3000.0, 3000.0])
def test_02_padding_of_a_tile_never_enters_a_statistic(backend, vocab, level):
    """Tile padding entered lse and entropy, and a running maximum from 0 lost very negative logits (verl #2899,
    #2656)."""
    x = logits_example("entropy", 5, vocab, torch.float32, place(backend))
    x.tensors["logits"].data.add_(level)
    logps, entropy, *_ = token_logps(**x.tensors, labels=x.labels, entropy=True, backend=backend)
    check(token_logps, token_reference, x, backend=backend)
    # A uniform row knows its answer: whatever is padded would change the count.
    flat = torch.full((1, vocab), level, device=place(backend))
    logps, entropy = token_logps(flat, torch.zeros_like(flat[:, 0]).long(), entropy=True, backend=backend)
    expected = torch.tensor([float(vocab)]).log()
    torch.testing.assert_close(-logps.cpu(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.cpu(), expected, atol=1e-6, rtol=1e-6)


@on_backends
@pytest.mark.parametrize("vocab", [131, 2049])
def test_02_a_banned_column_has_no_share_and_no_gradient(backend, vocab):
    """A product of probability 0 and log-prob -inf is NaN; tokens are banned by -inf in constrained sampling."""
    x = logits_example("entropy", 4, vocab, torch.float32, place(backend))
    banned = torch.arange(vocab, device=place(backend)) % 3 == 1
    labels = x.labels // 3 * 3
    logits = x.tensors["logits"].detach().masked_fill(banned, -torch.inf).requires_grad_()
    kept = x.tensors["logits"].detach()[:, ~banned].requires_grad_()
    place_among_kept = (~banned).cumsum(0)[labels] - 1
    upstream = torch.stack([x.grad_logps, x.grad_entropy])
    results = []
    for z, y in ((logits, labels), (kept, place_among_kept)):
        both = torch.stack(token_logps(z, y, entropy=True, backend=backend))
        results.append((both.detach(), torch.autograd.grad((both * upstream).sum(), z)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(results[0][1][:, ~banned], results[1][1], rtol=1e-5, atol=1e-6)
    assert (results[0][1][:, banned] == 0).all()


# --- 3. every output is written ---------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_03_every_output_is_written_when_no_row_is_scored(backend, compiled, num_rows):
    """An early return for ignored rows left outputs unwritten, compiled or not (Liger-Kernel PR #1338;
    kernels-community #906)."""
    labels = torch.full((num_rows,), -100, device=place(backend))
    hidden, weight = torch.full((num_rows, 7), torch.nan), torch.randn(33, 7)
    leaves = [
        x.to(place(backend)).requires_grad_() for x in (hidden, weight, hidden.new_full((num_rows, 33), torch.nan))
    ]

    def everything(hidden, weight, logits):
        linear = linear_logps(hidden, weight, labels, entropy=True, backend=backend)
        return *linear, *token_logps(logits, labels, entropy=True, backend=backend)

    run = torch.compile(everything, fullgraph=True, backend="aot_eager") if compiled else everything
    outputs = run(*leaves)
    grads = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    for value, shape in zip((*outputs, *grads), [(num_rows,)] * len(outputs) + [x.shape for x in leaves], strict=True):
        assert value.shape == shape and torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize(
    ("name", "backend"), [(name, b) for name, op in OPS.items() for b in op.backends if b in ANYWHERE]
)
def test_03_fresh_memory_never_shows(name, backend):
    """What an op returns and hands back is finite although all fresh memory is NaN, and so is what is masked."""
    example = example_of(name, torch.float32, backend)
    for key, value in with_gradients(OPS[name].run(example, backend), example).items():
        assert value.isfinite().all(), key


@on_backends
def test_03_a_row_without_a_coefficient_is_zero_whatever_it_holds(backend):
    """Eager code multiplies 0 by NaN there; a clipped or padded row must not spoil dW."""
    x = logits_example("plain", 4, 131, torch.float32, place(backend))
    leaf = x.tensors["logits"]
    logps = token_logps(leaf, x.labels, backend=backend)
    leaf.data[[0, 2]] = torch.nan  # after the forward: the backward must not read them
    upstream = torch.tensor([0.0, 1.0, -0.0, 2.0], device=leaf.device)
    (grad,) = torch.autograd.grad(logps, leaf, upstream)
    assert (grad[[0, 2]] == 0).all() and (grad[[1, 3]] != 0).all() and grad.isfinite().all()


# --- 4. fused and composed are the same function ----------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("loss", ["ppo", "cispo", "sapo", "pg"])
def test_04_fused_composed_and_accumulated_losses_are_one_function(backend, loss):
    """A fused loss had another normaliser, importance ratio or KL than the composed one, seen only with KL weight or
    gradient accumulation (Liger-Kernel #1082, PR #1088; TRL #5890, #6024, #6814)."""
    x = policy_example("everything", 26, 131, torch.float64).on(place(backend))
    settings = {"loss": loss, "kl_coef": 0.3, "entropy_coef": 0.1, "backend": backend}
    whole = with_gradients({"loss": policy_loss(**given(x), **settings)[0]}, x)

    def composed(y):
        scaling = {name: y.options[name] for name in ("temperature", "softcap")}
        logps, entropy = token_logps(**y.tensors, labels=y.labels, entropy=True, backend=backend, **scaling)
        ratio = (logps - y.options["old_logps"]).exp()
        a, clipped = y.options["advantages"], ratio.clamp(0.8, 1.2)
        tau = torch.where(a > 0, 1.0, 1.05 + torch.zeros_like(logps))
        value = {
            "ppo": torch.minimum(a * ratio, a * clipped),
            "cispo": a * clipped.detach() * logps,
            "sapo": a * torch.sigmoid(tau * (ratio - 1)) * 4 / tau,
            "pg": a * logps,
        }[loss]
        gap = y.options["ref_logps"] - logps
        losses = -value + 0.3 * (gap.exp() - 1 - gap) - 0.1 * entropy
        return (y.options["weights"] * losses)[y.labels != -100].sum()

    expected = with_gradients({"loss": composed(x)}, x)
    for key, value in whole.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-11)
    accumulated = [policy_loss(**given(rows_of(x, rows)), **settings)[0] for rows in (slice(0, 7), slice(7, 26))]
    torch.testing.assert_close(sum(accumulated).detach(), whole["loss"], rtol=1e-9, atol=1e-11)
    plain = policy_loss(**given(x) | {"weights": None, "old_logps": None}, loss=loss, backend=backend)[1]
    assert plain.metrics["ratio"].tolist() == [(x.labels != -100).sum()] * 2, "on-policy every ratio is exactly 1"


def rows_of(x, rows):
    """Some rows of a logits example."""
    cut = {name: v[rows] if isinstance(v, torch.Tensor) else v for name, v in x.options.items()}
    return replace(x, tensors={"logits": x.tensors["logits"].detach()[rows]}, options=cut, labels=x.labels[rows])


@on_backends
def test_04_a_pair_loss_is_the_same_from_logits_from_hidden_states_and_by_hand(backend):
    """One copy of the loss: the mean over pairs, with lengths and reference of their own."""
    x = pairs_example("masked", 67, torch.float64).on(place(backend))
    logits, labels, ref, cu = x.tensors["logits"], x.labels, x.options["ref_logps"], x.options["cu_seqlens"]
    scored = labels != -100
    loss, _ = preference_loss(logits, labels, cu, ref, loss_fn=partial(dpo, beta=0.3), backend=backend)
    eye = torch.eye(67, dtype=torch.float64, device=logits.device)  # hidden @ eye.T: the hidden states are the logits

    def loss_fn(stats):
        return dpo(pair_logps(stats.logps, stats.cu_seqlens, ref[stats.rows]), beta=0.3).sum() / 4

    fused, _ = linear_loss(logits, eye, labels, loss_fn, align="pair", cu_seqlens=cu, backend=backend)
    offsets = torch.nn.functional.pad(scored.cumsum(0), (1, 0))[cu]
    logps = token_reference(logits, labels)[0][scored]
    by_hand = dpo(pair_logps(logps, offsets, ref[scored]), beta=0.3).mean()
    for other in (loss, fused):
        torch.testing.assert_close(other, by_hand, rtol=1e-6, atol=0)
        grads = [torch.autograd.grad(y, logits, retain_graph=True)[0] for y in (other, by_hand)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


# --- 5, 6, 9. sharded heads, DTensors, vocabulary parallelism ---------------------------------------------------------


def on_two_ranks(check):
    """A function of ``pitfall_ranks.py`` on two forked gloo ranks."""
    assert forks.run(Path(__file__).with_name("pitfall_ranks.py"), check).endswith("agreed\n")


@forked
@pytest.mark.parametrize("check", ["gathered", "split"])
def test_05_a_sharded_head_trains_and_evaluates(check):
    """A head sharded by FSDP was an empty or flattened parameter in training or in evaluation, or its hooks were passed
    by and ranks drifted (TRL #3368, #5891, #6372, #6384, #3260; Liger-Kernel #332)."""
    on_two_ranks(f"sharded_head_{check}")


@forked
def test_06_dtensors_and_plain_tensors_mix():
    """Mixing them raised, or lost a parameter's placement (cut-cross-entropy #31; TRL #6065; torchtune #2898;
    Megatron-LM #4888)."""
    on_two_ranks("mixed_dtensors")


@forked
def test_09_a_split_vocabulary_is_exact():
    """A sentinel matched a padded column, the hidden gradient was not reduced, a collective had no gradient
    (cut-cross-entropy PR #59, PR #42; ms-swift #9947; Megatron-LM #7452)."""
    on_two_ranks("split_vocabulary")


# --- 7. large biases --------------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("scale", [30.0, 1e3, 1e5])
def test_07_a_large_bias_gives_no_negative_cross_entropy(backend, scale):
    """With a large bias a cross-entropy fell below zero (cut-cross-entropy #52, #53)."""
    x = linear_example("bias", 29, 37, 131, torch.float32, place(backend))
    x.tensors["bias"].data.mul_(scale / 100)
    made = check(linear_logps, linear_reference, x, factor=3, backend=backend)
    assert (made["logps"] <= 0).all() and made["logps"].min() < -1


# --- 8. no silent approximation ---------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_08_the_tiniest_probability_keeps_its_gradient(backend, dtype):
    """Gradients of tiny probabilities were filtered out by default (cut-cross-entropy #14, PR #18)."""
    logits = torch.zeros(1, 131)
    logits[0, 5:] = -torch.linspace(10, 60, 126)  # down to 1e-26, far below any filter's threshold
    logits = logits.to(place(backend), dtype).requires_grad_()
    logps = token_logps(logits, torch.zeros_like(logits[:, 0]).long(), backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    exact = -logits.detach().double().softmax(-1)
    assert ((grad.double() - exact).abs()[0, 1:] <= 1.5e-2 * exact.abs()[0, 1:]).all() and (grad != 0).all()


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_08_a_confident_row_still_learns(backend, dtype):
    """``p - 1`` formed in bf16 is 0 from p = 0.998 on; the sum of exponentials, in fp32, knows it to 1e-7."""
    logits, labels = torch.randn(5, 131, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    logits[labels, labels] = torch.tensor([8.0, 11.0, 12.0, 15.0, 18.0])
    x = logits.to(place(backend), dtype).requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(x, labels.to(x.device), backend=backend).sum(), x)
    exact = 1 - x.detach().cpu().double().softmax(-1)[labels, labels]
    error = (grad.cpu()[labels, labels].double() - exact).abs()
    assert exact.max() > 0.01 and exact.min() < 1e-5
    assert (error <= 2 * torch.finfo(dtype).eps * exact + 2.5e-7).all(), error / exact


@on_backends
def test_08_more_chunks_do_not_add_error(backend):
    """dW was accumulated in bf16: its error grew with the number of chunks (Liger-Kernel #512, #827)."""
    errors, rows = [], {"triton": 64}.get(backend, 512)
    x = linear_example("plain", rows, 37, 131, torch.bfloat16, place(backend))
    wide = x.to(torch.float64)
    exact = outputs_and_grads(strip(linear_reference(**wide.tensors, labels=wide.labels)), wide)["d_weight"]
    for memory in (None, 120_000 + (2_000_000 if backend == "torch" else 0)):
        loss_fn = lambda stats: (stats.logps * x.grad_logps[stats.rows]).sum()  # noqa: E731
        loss, _ = linear_loss(**x.tensors, labels=x.labels, loss_fn=loss_fn, memory=memory, backend=backend)
        (grad,) = torch.autograd.grad(loss, [x.tensors["weight"]])
        errors.append(((grad.double() - exact).norm() / exact.norm()).item())
    assert errors[1] <= 1.2 * errors[0] + 1e-4 and errors[0] < 6e-3, errors
