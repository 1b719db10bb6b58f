"""Fifteen requirements learned from public failures: here the last six; ``test_pitfalls.py`` has the others."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from op_table import HERE, OPS, example_of, given, place
from test_pitfalls import ANYWHERE, TIGHT, on_backends
from torch.profiler import ProfilerActivity, profile

from fastalign.data.examples import TokenExample
from fastalign.data.pack import pack
from fastalign.losses.pairs import pair_logps
from fastalign.losses.preference import dpo
from fastalign.ops import (
    divergence,
    gae,
    linear_divergence,
    linear_logps,
    linear_loss,
    policy_loss,
    preference_loss,
    segment_scan,
    token_logps,
)
from fastalign.ops.linear_logps import reference as linear_reference
from fastalign.testing import linear_example, with_gradients

pytestmark = pytest.mark.usefixtures("nan_memory")

# --- 10. the caller's logits ------------------------------------------------------------------------------------------


@on_backends
@pytest.mark.parametrize("op", ["token_logps", "policy_loss", "preference_loss", "divergence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_10_the_callers_logits_are_left_alone_and_in_place_loses_nothing(backend, op, dtype):
    """Logits were overwritten without consent, or in-place gradients were less precise (verl #2484; Megatron-LM #1594;
    Megatron-Bridge #5947; TransformerEngine #2325, #3193)."""
    x = example_of(op, dtype, backend)
    before = [(y._version, y.detach().clone()) for y in (*x.tensors.values(), *x.constants.values())]
    plain = with_gradients(OPS[op].run(x, backend), x)
    for y, (version, copy) in zip((*x.tensors.values(), *x.constants.values()), before, strict=True):
        assert y._version == version and torch.equal(y.detach().nan_to_num(7), copy.nan_to_num(7))
    if op == "divergence":
        return  # it has no such option
    option = "inplace" if op == "policy_loss" else "inplace_backward"
    consented = replace(x, options={**x.options, option: True})
    for name, value in with_gradients(OPS[op].run(consented, backend), consented).items():
        assert torch.equal(value, plain[name]), name


@on_backends
@pytest.mark.parametrize("op", ["token_logps", "policy_loss", "preference_loss"])
def test_10_a_second_consumer_of_consented_logits_fails_loudly(backend, op):
    """It read gradients for logits."""
    x = example_of(op, torch.float32, backend)
    logits = x.tensors["logits"] * 1
    other = logits.square().sum()
    option = "inplace" if op == "policy_loss" else "inplace_backward"
    consented = replace(x, tensors={"logits": logits}, options={**x.options, option: True})
    outputs = OPS[op].run(consented, backend)
    sum(y.sum() for y in outputs.values() if y.requires_grad).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


# --- 11. no limit below memory size -----------------------------------------------------------------------------------


@on_backends
def test_11_rows_beyond_65535(backend):
    """Rows in a second grid dimension stop at 65535 (Liger-Kernel PR #1294; pytorch #90793; torchaudio #4215)."""
    if backend == "triton" and place(backend) == "cpu":
        pytest.skip("triton: 65539 interpreted programs take minutes; on a GPU this runs")
    logits = torch.randn(65539, 3, generator=torch.Generator().manual_seed(0)).to(place(backend)).requires_grad_()
    labels = torch.arange(65539, device=logits.device) % 3
    logps = token_logps(logits, labels, backend=backend)
    (grad,) = torch.autograd.grad((logps * torch.linspace(-1, 1, 65539, device=logits.device)).sum(), logits)
    exact = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(logps.double(), exact.gather(1, labels[:, None])[:, 0], atol=1e-6, rtol=1e-6)
    assert (grad[[0, 65535, 65538]].abs().sum(1) > 0.1).all()


@on_backends
def test_11_elements_beyond_two_to_the_31(backend):
    """32-bit offsets wrapped. The rows lie 2^31 elements apart in memory of which only they are ever touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # the fixture puts it back
    storage = torch.empty(2**31 + 131, dtype=torch.bfloat16, device=place(backend))
    logits = storage.as_strided((2, 131), (2**31, 1))
    drawn = torch.randn(2, 131, generator=torch.Generator().manual_seed(0)).to(logits)
    logits.copy_(drawn)
    labels = torch.tensor([3, 130], device=logits.device)
    far, near = (token_logps(x, labels, entropy=True, backend=backend) for x in (logits, drawn))
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])
    views = [x.detach().requires_grad_() for x in (logits, drawn)]
    grads = [torch.autograd.grad(policy_loss(x, labels, advantages=near[0], backend=backend)[0], x)[0] for x in views]
    assert torch.equal(*grads) and grads[0][1].abs().max() > 0


# --- 12. adapters and frozen heads ------------------------------------------------------------------------------------


def gemm_size(call):
    """Multiply-adds of all matrix products, by the profiler; what a product calls inside itself counts once."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        call()
    factors = {"aten::mm": slice(0, 2), "aten::addmm": slice(1, 3), "aten::addmm_": slice(1, 3)}
    outer = [e for e in prof.events() if e.name in factors and not any(up.name in factors for up in ancestors(e))]
    pairs = [event.input_shapes[factors[event.name]] for event in outer]
    return sum(a[0] * a[1] * b[1] for a, b in pairs)


def ancestors(event):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def test_12_a_frozen_head_costs_no_weight_gradient():
    """A frozen head paid for a weight gradient, thrown away afterwards (prime-rl #3011, #1685; Liger-Kernel #1441)."""
    n, d, v = 40, 16, 257
    x = linear_example("plain", n, d, v, torch.float32)
    x.tensors["weight"].requires_grad_(False)
    hidden, weight = x.tensors.values()

    def one_pass():
        linear_loss(hidden, weight, x.labels, lambda s: s.logps.square().sum())[0].backward()

    assert gemm_size(one_pass) == 2 * n * v * d
    assert gemm_size(lambda: linear_logps(hidden, weight, x.labels).square().sum().backward()) == 2 * n * v * d
    weight.requires_grad_()
    assert gemm_size(one_pass) == 3 * n * v * d


@on_backends
def test_12_an_adapter_on_the_head_trains(backend):
    """A LoRA on the head was silently ignored by the fused loss (prime-rl #3011; flash-linear-attention #1253)."""
    x = linear_example("plain", 23, 19, 131, torch.float64, place(backend))
    new = torch.Generator().manual_seed(1)
    down, up = (torch.randn(*shape, generator=new).double().to(place(backend)) for shape in ((4, 19), (131, 4)))
    leaves = [down.requires_grad_(), up.requires_grad_(), x.tensors["hidden"]]
    x.tensors["weight"].requires_grad_(False)
    merged = x.tensors["weight"] + 0.5 * up @ down
    expected = linear_reference(x.tensors["hidden"], merged, x.labels)[0]
    for logps in (
        linear_logps(**x.tensors, labels=x.labels, lora=(down, up, 0.5), backend=backend),
        linear_logps(**x.tensors, labels=x.labels, lora=(down, up, 0.5), backend=backend, memory=TIGHT[backend]),
    ):
        torch.testing.assert_close(logps, expected, rtol=1e-9, atol=1e-11)
        grads = [torch.autograd.grad((y * x.grad_logps).sum(), leaves, retain_graph=True) for y in (logps, expected)]
        for name, ours, theirs in zip(("A", "B", "hidden"), *grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=name)


# --- 13. mask, shift and labels ---------------------------------------------------------------------------------------


@on_backends
def test_13_policy_and_reference_agree_to_the_bit_where_the_weights_do(backend):
    """Masks or shifts differed between the two passes (TRL #3346, #7084)."""
    x = linear_example("everything", 45, 19, 131, torch.float32, place(backend))
    settings = {**given(x), "labels": x.labels, "backend": backend, "memory": TIGHT[backend]}
    loss_fn = lambda stats: stats.logps.sum() + stats.entropy.sum()  # noqa: E731
    passes = [linear_loss(**settings, loss_fn=loss_fn)[1].logps, linear_logps(**settings)[0]]
    with torch.no_grad():
        passes += [linear_loss(**settings, loss_fn=loss_fn)[1].logps, linear_logps(**settings)[0]]
    x.tensors["weight"].requires_grad_(False)
    passes.append(linear_loss(**settings, loss_fn=loss_fn)[1].logps)
    assert all(torch.equal(one, passes[0]) for one in (passes[2], passes[4])) and torch.equal(passes[1], passes[3])


def test_13_a_label_is_the_next_token_of_its_own_document():
    """The shift was done twice, or across documents (TRL #7059, #7063)."""
    new = np.random.default_rng(0)
    examples, wanted = [], []
    for i, (prompt, *responses) in enumerate([(5, 3, 4), (1, 6, 2), (7, 1, 1)]):
        head = new.integers(0, 1000, prompt)
        ids = [np.concatenate([head, new.integers(1000 * (r + 1), 1000 * (r + 2), n)]) for r, n in enumerate(responses)]
        scored = [np.arange(len(x)) >= prompt for x in ids]
        examples.append(TokenExample(tuple(zip(ids, scored, strict=True)), i))
        wanted += [(x[t - 1], x[t]) for x in ids for t in range(prompt, len(x))]
    for share_prefix in (True, False):
        (batch,) = pack(examples, 1000, share_prefix)
        rows = batch.input_ids[batch.rows].tolist()
        assert list(zip(rows, batch.labels.tolist(), strict=True)) == [(int(a), int(b)) for a, b in wanted]


LOGITS, HIDDEN, WEIGHT = torch.zeros(4, 7), torch.zeros(4, 3), torch.zeros(7, 3)
LABELS, ONES = torch.arange(4), torch.ones(4)
UNFIT = {
    "a column of labels": lambda: token_logps(LOGITS, LABELS[:, None]),
    "one label for all rows": lambda: token_logps(LOGITS, LABELS[:1]),
    "a mask for labels": lambda: token_logps(LOGITS, LABELS > 1),
    "labels in floating point": lambda: token_logps(LOGITS, LABELS.float()),
    "the reserved label": lambda: token_logps(LOGITS, LABELS - 1),
    "a label too many": lambda: linear_logps(HIDDEN, WEIGHT, LABELS + 4),
    "a batch dimension": lambda: linear_logps(HIDDEN[None], WEIGHT, LABELS[None]),
    "one temperature in a tensor": lambda: token_logps(LOGITS, LABELS, temperature=torch.ones(1)),
    "a column of temperatures": lambda: token_logps(LOGITS, LABELS, temperature=torch.ones(4, 1)),
    "a transposed weight": lambda: linear_logps(HIDDEN, WEIGHT.T, LABELS),
    "a column of biases": lambda: linear_logps(HIDDEN, WEIGHT, LABELS, bias=torch.zeros(7, 1)),
    "one advantage for all rows": lambda: policy_loss(LOGITS, LABELS, advantages=ONES[:1]),
    "a column of advantages": lambda: policy_loss(LOGITS, LABELS, advantages=ONES[:, None]),
    "one weight for all rows": lambda: policy_loss(LOGITS, LABELS, advantages=ONES, weights=ONES[:1]),
    "a KL without a reference": lambda: policy_loss(LOGITS, LABELS, advantages=ONES, kl_coef=0.1),
    "a dual clip that would be ignored": lambda: policy_loss(
        LOGITS, LABELS, advantages=ONES, dual_clip=3.0, loss="cispo"
    ),
    "half a pair": lambda: preference_loss(LOGITS, LABELS, torch.tensor([0, 4]), None, loss_fn=dpo),
    "pairs without sequences": lambda: linear_loss(HIDDEN, WEIGHT, LABELS, lambda s: s.logps.sum(), align="pair"),
    "a loss per row": lambda: linear_loss(HIDDEN, WEIGHT, LABELS, lambda s: s.logps),
    "offsets that leave rows out": lambda: segment_scan(ONES, torch.tensor([0, 3])),
    "one value for all tokens": lambda: gae(ONES, ONES[:1], torch.tensor([0, 4]), 1.0, 1.0),
}


@pytest.mark.parametrize("what", UNFIT)
def test_13_what_does_not_fit_is_refused_and_never_broadcast(what):
    """An option was ignored, or broadcast over the batch (TRL #6559)."""
    with pytest.raises(ValueError, match=r"must|neither|needs|belongs|got"):
        UNFIT[what]()


ROWS = torch.zeros(1, 1), torch.zeros(2, 1), torch.zeros(1, dtype=torch.int64)
GIVEN = {token_logps: (), linear_logps: ROWS, linear_loss: (*ROWS, torch.sum), linear_divergence: (), policy_loss: ()}
GIVEN |= {preference_loss: (), segment_scan: (), gae: ()}


@pytest.mark.parametrize("op", GIVEN)
def test_13_an_unknown_option_is_refused(op):
    """No op swallows keywords."""
    with pytest.raises(TypeError, match=rf"{op.__name__}\(\) got an unexpected keyword argument 'reduction'"):
        op(*GIVEN[op], reduction="mean")


# --- 14. no silent zero gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "backend"), [(name, b) for name, op in OPS.items() for b in op.backends if b in ANYWHERE]
)
def test_14_what_looks_differentiable_is(name, backend):
    """An entropy had the gradient zero, log-probs came in bf16 (TRL 1.10's chunked log-probs, prime-rl's fused head and
    verl's torch head, in their sources)."""
    x = example_of(name, torch.float32, backend)
    wide = x.to(torch.float64)
    outputs, exact = OPS[name].run(x, backend), OPS[name].define(wide)
    for key, value in outputs.items():
        if not value.requires_grad:
            continue
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value)
        grads = torch.autograd.grad(value, list(x.tensors.values()), upstream, retain_graph=True)
        oracles = torch.autograd.grad(exact[key], list(wide.tensors.values()), upstream.double(), retain_graph=True)
        for tensor, grad, oracle in zip(x.tensors, grads, oracles, strict=True):
            assert oracle.abs().max() > 1e-4, f"d {key} / d {tensor} is no test"
            error = (grad.double() - oracle).norm() / oracle.norm()
            assert error < 1e-4, f"d {key} / d {tensor}: relative error {error:.2g}"
    differentiable = {key for key, value in outputs.items() if value.requires_grad}
    assert differentiable or name in ("gae", "forest_decode"), "only estimates and inference are detached by contract"


@on_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_14_log_probs_are_fp32(backend, dtype):
    """A log-prob in bf16 is a 3.5 % error in a ratio."""
    x = linear_example("entropy", 7, 19, 131, dtype, place(backend))
    logits = (x.tensors["hidden"] @ x.tensors["weight"].T).detach()
    outputs = [*linear_logps(**x.tensors, labels=x.labels, entropy=True, backend=backend)]
    outputs += token_logps(logits, x.labels, entropy=True, backend=backend)
    outputs.append(policy_loss(logits, x.labels, advantages=x.grad_logps, backend=backend)[1].logps)
    assert {y.dtype for y in outputs} == {torch.float32}
    torch.testing.assert_close(outputs[0], outputs[2], atol=2e-2, rtol=0)


# --- 15. no performance cliffs ----------------------------------------------------------------------------------------


def calls(function):
    """How often each torch operator is called, in the op and in its backward."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        function()
    return Counter(event.name for event in prof.events() if event.name.startswith("aten::"))


def packed_calls(op, backend, num_sequences):
    """An op over that many sequences of four tokens."""
    new = torch.Generator().manual_seed(0)
    n, offsets = 4 * num_sequences, torch.arange(0, 4 * num_sequences + 1, 4)
    x, values = (torch.randn(n, generator=new, requires_grad=True) for _ in range(2))
    logits = torch.randn(n, 7, generator=new, requires_grad=True)
    labels = torch.randint(7, (n,), generator=new)
    # all from one seed: where no label is the likeliest, as of few rows by chance, there is nothing to allocate for
    hidden, weight = (torch.randn(size, 3, generator=new, requires_grad=True) for size in (n, 7))

    def by_pair(stats):
        return dpo(pair_logps(stats.logps, stats.cu_seqlens)).sum()

    run = {
        "segment_scan": lambda: segment_scan(x, offsets, 0.9, backend=backend),
        "gae": lambda: gae(x, values, offsets, 0.9, 0.9, backend=backend)[0],
        "preference_loss": lambda: preference_loss(logits, labels, offsets, None, loss_fn=dpo, backend=backend)[0],
        "policy_loss": lambda: policy_loss(logits, labels, advantages=x.detach(), backend=backend)[0],
        "linear_loss": lambda: linear_loss(
            hidden, weight, labels, by_pair, align="pair", cu_seqlens=offsets, backend=backend
        )[0],
    }[op]

    def forward_and_backward():
        result = run()
        if result.requires_grad:
            result.sum().backward()

    forward_and_backward()  # what is only done once
    return calls(forward_and_backward)


@pytest.mark.parametrize("backend", [name for name in HERE if name != "triton"])
@pytest.mark.parametrize("op", ["segment_scan", "gae", "preference_loss", "policy_loss", "linear_loss"])
def test_15_more_sequences_are_not_more_calls(backend, op):
    """A Python loop over sequences (TRL #7124, #7125)."""
    few, many = (packed_calls(op, backend, number) for number in (4, 64))
    assert few == many and sum(few.values()) > 0, many - few


def test_15_another_length_or_temperature_is_no_other_graph():
    """Recompilation per temperature or per length (cut-cross-entropy #34; quack #68). The Triton kernels' own keys are
    tested by the compile gates."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def everything(logits, ref_logits, hidden, weight, labels, temperature):
        settings = {"labels": labels, "temperature": temperature}
        total = token_logps(logits, **settings).sum() + linear_logps(hidden, weight, **settings).sum()
        total = total + divergence(logits, ref_logits, **settings).sum()
        return total + policy_loss(logits, advantages=labels.float(), **settings)[0]

    traced, weight = torch.compile(everything, fullgraph=True, backend=count, dynamic=True), torch.randn(33, 3)
    for num_rows, temperature in ((5, 0.7), (9, 0.9), (6, 1.3), (12, 2.0)):
        logits, ref_logits, hidden = (torch.randn(num_rows, n, requires_grad=True) for n in (33, 33, 3))
        arguments = (logits, ref_logits.detach(), hidden, weight, torch.arange(num_rows), temperature)
        torch.testing.assert_close(traced(*arguments), everything(*arguments))
    assert len(graphs) == 1


def test_15_a_call_that_knows_its_rows_waits_for_nothing(monkeypatch):
    """A host synchronisation per chunk stalled the device. Tensors of the meta device have no data to wait for: whoever
    asks for some fails. All modes are in ``test_linear_waits.py``."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    x = linear_example("everything", 45, 19, 131, torch.float32)
    x = replace(x, labels=x.labels.clamp(min=0)).on("meta")
    loss_fn = lambda stats: stats.logps.square().sum() - stats.entropy.sum()  # noqa: E731
    run = {**given(x), "labels": x.labels, "backend": "torch", "memory": TIGHT["torch"]}
    loss, _ = linear_loss(**run, loss_fn=loss_fn, num_scored=45)
    assert all(grad.is_meta for grad in torch.autograd.grad(loss, list(x.tensors.values())))
    with pytest.raises((RuntimeError, NotImplementedError)):
        linear_loss(**run, loss_fn=loss_fn)
