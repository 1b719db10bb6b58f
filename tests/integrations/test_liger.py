"""Liger's chunked losses, eager on the CPU, against the classes of the same names: all results and gradients."""

import inspect

import pytest
import torch
from wanted import require

require("liger-kernel", "0.8")

from liger_kernel import chunked_loss as theirs  # noqa: E402
from liger_kernel import transformers as layers  # noqa: E402

from fastalign.integrations import liger as ours  # noqa: E402

SEQUENCES, LENGTH, WIDTH, VOCAB = 6, 7, 8, 31
RAGGED = torch.tensor([7, 3, 5, 1, 6, 7])
"""Scored tokens of each sequence, at its end."""


def tensors(seed=0, width=WIDTH):
    """Hidden states, weight and bias of a head whose distributions are far from uniform, all trainable."""
    torch.manual_seed(seed)
    made = torch.randn(SEQUENCES, LENGTH, width), torch.randn(VOCAB, width), torch.randn(VOCAB)
    return [x.requires_grad_() for x in made]


def labels(ignore=-100):
    torch.manual_seed(7)
    scored = torch.arange(LENGTH) >= LENGTH - RAGGED[:, None]
    return torch.randint(VOCAB, (SEQUENCES, LENGTH)).masked_fill(~scored, ignore)


def outcome(loss, *leaves):
    """A call's results, flat, and the gradients of three times its loss."""
    first, rest = loss if isinstance(loss, tuple) else (loss, ())
    grads = torch.autograd.grad(3 * first, leaves)
    return [first, *(x for x in rest)], grads


def assert_same(call, other):
    for found, expected in zip(call[0], other[0], strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=2e-5, atol=2e-5)
    for found, expected in zip(call[1], other[1], strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(scale, 1e-3))
    assert max(grad.abs().max() for grad in other[1]) > 1e-4


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name.startswith("Liger")])
def test_arguments_are_ligers(name):
    whose = theirs if name in vars(theirs) else layers
    for ask in (lambda module: getattr(module, name), lambda module: getattr(module, name).forward):
        mine, wanted = inspect.signature(ask(ours)).parameters, inspect.signature(ask(whose)).parameters
        assert list(mine) == list(wanted)
        assert [p.default for p in mine.values()] == [p.default for p in wanted.values()]


def test_every_chunked_loss_that_we_have_mathematics_for_is_there():
    assert {name for name in vars(theirs) if name.startswith("Liger")} - set(ours.__all__) == {
        "LigerFusedLinearCosineSimilarityLoss"
    }


PAIRS = {
    "LigerFusedLinearDPOLoss": [
        *({"loss_type": name} for name in ("sigmoid", "hinge", "nca_pair", "bco_pair", "apo_zero", "apo_down")),
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"loss_type": "sppo_hard", "beta": 0.5},
        {"compute_nll_loss": True, "alpha": 0.7, "ignore_index": -7},
        {"average_log_prob": True, "beta": 2.0},
        {"use_ref_model": False},
    ],
    "LigerFusedLinearCPOLoss": [{}, {"label_smoothing": 0.1, "alpha": 0.3}, {"compute_nll_loss": False}],
    "LigerFusedLinearSimPOLoss": [{}, {"gamma": 1.5, "beta": 2.0, "label_smoothing": 0.2, "compute_nll_loss": False}],
    "LigerFusedLinearORPOLoss": [{}, {"beta": 0.7, "compute_nll_loss": False, "ignore_index": -7}],
}


@pytest.mark.parametrize("name, options", [(name, options) for name, cases in PAIRS.items() for options in cases])
def test_pair_losses(name, options):
    hidden, weight, bias = tensors()
    target = labels(options.get("ignore_index", -100))
    ref = [x.detach() for x in tensors(1)] if "DPO" in name and options.get("use_ref_model", True) else ()
    calls = []
    for module in (ours, theirs):
        loss = getattr(module, name)(compiled=False, **options)
        calls.append(outcome(loss(weight, hidden, target, bias, *ref), hidden, weight, bias))
    assert_same(*calls)


def test_a_frozen_head_without_bias_and_a_reference_of_other_width():
    hidden, weight, _ = tensors()
    wide = [x.detach() for x in tensors(1, width=12)]
    weight.requires_grad_(False)
    calls = [
        outcome(m.LigerFusedLinearDPOLoss(compiled=False)(weight, hidden, labels(), None, *wide[:2]), hidden)
        for m in (ours, theirs)
    ]
    assert_same(*calls)


def test_other_labels_for_the_imitation_term():
    hidden, weight, bias = tensors()
    whole = torch.where(labels() == -100, 3, labels())
    calls = [
        outcome(m.LigerFusedLinearORPOLoss(compiled=False)(weight, hidden, labels(), bias, whole), hidden, weight, bias)
        for m in (ours, theirs)
    ]
    assert_same(*calls)


@pytest.mark.parametrize("options", [{}, {"use_ref_model": True, "beta": 0.5}, {"average_log_prob": True}])
@pytest.mark.parametrize("kl", [None, torch.tensor(0.3)])
def test_kto(options, kl):
    hidden, weight, bias = tensors()
    good = torch.tensor([True, False, True, True, False, False])
    ref = [x.detach() for x in tensors(1)] if options.get("use_ref_model") else [None] * 3
    calls = []
    for module in (ours, theirs):
        loss = module.LigerFusedLinearKTOLoss(compiled=False, **options)
        calls.append(outcome(loss(hidden, weight, labels(), bias, good, *ref, kl=kl), hidden, weight, bias))
    assert_same(*calls)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("told", [False, True])
def test_distillation(beta, told):
    hidden, weight, bias = tensors()
    wide, teacher, teacher_bias = (x.detach() for x in tensors(1, width=12))
    target, options = labels().flatten(), {"beta": beta, "temperature": 1.7, "return_soft_hard_loss": told}
    calls = []
    for module in (ours, theirs):
        loss = module.LigerFusedLinearJSDLoss(0.3, 0.6, compiled=False, **options)
        arguments = (hidden.flatten(0, 1), weight, wide.flatten(0, 1), teacher, target, bias, teacher_bias)
        result = loss(*arguments)
        calls.append(outcome((result[0], result[1:]) if told else result, hidden, weight, bias))
    assert_same(*calls)


def test_the_divergence_alone():
    # Liger's own needs a GPU; its formula in float64
    hidden, weight, _ = (x.detach().double().requires_grad_() for x in tensors())
    wide, teacher, _ = (x.detach().double() for x in tensors(1, width=12))
    target = labels().flatten()
    p, q = ((h.flatten(0, 1) @ w.T / 1.7).log_softmax(-1) for h, w in ((hidden, weight), (wide, teacher)))
    mean = torch.logaddexp(p + torch.tensor(0.7).log(), q + torch.tensor(0.3).log())
    jsd = 0.3 * (q.exp() * (q - mean)).sum(-1) + 0.7 * (p.exp() * (p - mean)).sum(-1)
    for shift, exact in ((target, jsd[target != -100].mean()), (None, jsd.mean())):
        loss = ours.LigerFusedLinearJSD(0.3, temperature=1.7, accum_dtype=torch.float32)
        found = loss(hidden.flatten(0, 1), weight, wide.flatten(0, 1), teacher, shift)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
        made, true = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (found, exact))
        torch.testing.assert_close(made, true, rtol=1e-6, atol=1e-7)


GRPO = [
    {},
    {"loss_type": "grpo", "beta": 0.3},
    {"loss_type": "bnpo", "temperature": 0.7},
    {"loss_type": "dr_grpo", "max_completion_length": 9, "beta": 0.0},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.8},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.01},
    {"delta": 1.3},
    {"use_ref_model": False},
]


@pytest.mark.parametrize("options", GRPO)
@pytest.mark.parametrize("given", ["everything", "reference model", "nothing"])
def test_grpo(options, given):
    hidden, weight, bias = tensors()
    target, advantages = labels(0), torch.tensor([1.0, -0.7, 0.4, -1.2, 0.9, -0.3])
    mask = (labels() != -100).float()
    torch.manual_seed(5)
    near = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1).gather(-1, target[..., None])[..., 0]
    old, ref = (near.detach() + 0.3 * torch.randn(mask.shape) for _ in range(2))
    extra = {}
    if given == "everything":
        extra = {"old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": 11}
        extra["vllm_is_ratio"] = torch.rand(mask.shape) + 0.5
    elif options.get("use_ref_model", True):
        names = ("ref_input", "ref_weight", "ref_bias")
        extra = dict(zip(names, (x.detach() for x in tensors(1)), strict=True))
    calls = []
    for module in (ours, theirs):
        loss = module.LigerFusedLinearGRPOLoss(compiled=False, **options)
        result = loss(hidden, weight, target, mask, advantages, bias, **extra)
        calls.append(outcome(result, hidden, weight, bias))
    assert_same(*calls)


# --- cross-entropies, whose own kernels need a GPU: PyTorch's formulas in float64 -------------------------------------

CLASS_WEIGHTS = torch.linspace(0.5, 2.0, VOCAB)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "ignore_index": -7}, {"weight": CLASS_WEIGHTS}])
@pytest.mark.parametrize("fused", [True, False])
def test_cross_entropies(fused, options, reduction):
    hidden, weight, bias = tensors()
    target, cap = labels(options.get("ignore_index", -100)).flatten(), options.get("softcap")
    logits = torch.nn.functional.linear(hidden.flatten(0, 1), weight, bias)
    leaves = (hidden, weight, bias)
    if fused:
        given = {"ce_weight" if key == "weight" else key: value for key, value in options.items()}
        loss = ours.LigerFusedLinearCrossEntropyLoss(reduction=reduction, return_token_accuracy=True, **given)
        found = loss(weight, hidden.flatten(0, 1), target, bias)
    else:
        both = {"return_token_accuracy": True, "return_predicted_tokens": True}
        found = ours.LigerCrossEntropyLoss(reduction=reduction, **both, **options)(logits, target)
    exact = logits.double() if cap is None else cap * torch.tanh(logits.double() / cap)
    classes = options["weight"].double() if "weight" in options else None
    ignore = options.get("ignore_index", -100)
    true = torch.nn.functional.cross_entropy(exact, target, classes, reduction=reduction, ignore_index=ignore)
    torch.testing.assert_close(found.loss.double(), true, rtol=1e-5, atol=1e-5)
    made, wanted = (torch.autograd.grad(x.sum() * 3, leaves, retain_graph=True) for x in (found.loss, true))
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    scored, right = target != ignore, logits.argmax(-1) == target
    share = (right & scored).float() if reduction == "none" else right[scored].float().mean()
    assert torch.equal(found.token_accuracy, share) and found.z_loss is None
    if not fused:
        assert torch.equal(found.predicted_tokens, logits.argmax(-1).masked_fill(~scored, -1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_untrained_head_is_right_one_time_in_v(reduction):
    loss = ours.LigerFusedLinearCrossEntropyLoss(reduction=reduction, return_token_accuracy=True)
    found = loss(torch.zeros(16, 5), torch.randn(16, 5), torch.arange(16))
    assert found.token_accuracy.sum() == (1 / 16 if reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.2},
        {"lse_square_scale": 1e-2},
        {"softcap": 3.0, "label_smoothing": 0.1, "lse_square_scale": 0.1},
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_smoothed_labels_and_the_z_loss(fused, options, reduction):
    hidden, weight, bias = tensors()
    target, cap = labels().flatten(), options.get("softcap")
    logits = torch.nn.functional.linear(hidden.flatten(0, 1), weight, bias)
    given = (weight, hidden.flatten(0, 1), target, bias) if fused else (logits, target)
    cls = ours.LigerFusedLinearCrossEntropyLoss if fused else ours.LigerCrossEntropyLoss
    found = cls(reduction=reduction, return_z_loss=True, **options)(*given)
    exact = logits.double() if cap is None else cap * torch.tanh(logits.double() / cap)
    smoothing = {"label_smoothing": options.get("label_smoothing", 0.0)}
    true = torch.nn.functional.cross_entropy(exact, target, reduction=reduction, **smoothing)
    z = options.get("lse_square_scale", 0.0) * exact.logsumexp(-1).square() * (target != -100)
    z = {"mean": z.sum() / (target != -100).sum(), "sum": z.sum(), "none": z}[reduction]
    torch.testing.assert_close(found.loss.double(), true + z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.z_loss.double(), z, rtol=1e-5, atol=1e-6)
    leaves = (hidden, weight, bias)
    made, wanted = (torch.autograd.grad(x.sum() * 3, leaves, retain_graph=True) for x in (found.loss, true + z))
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    assert not found.z_loss.requires_grad and found.token_accuracy is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_scaled_by_their_own_probability(reduction):
    hidden, weight, bias = tensors()
    target = labels().flatten()
    logps = torch.nn.functional.linear(hidden.flatten(0, 1), weight, bias).log_softmax(-1)
    nll = -logps.gather(1, target.clamp(min=0)[:, None])[:, 0] * (target != -100)
    true = nll * (-nll.detach()).exp()
    true = true if reduction == "none" else true.sum() / (target != -100).sum()
    loss = ours.LigerFusedLinearCrossEntropyLoss(use_token_scaling=True, reduction=reduction)
    found = loss(weight, hidden.flatten(0, 1), target, bias)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
    for x, y in zip(*(torch.autograd.grad(v.sum(), (hidden, weight)) for v in (found, true)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_batches_without_scored_tokens_give_zero():
    hidden, weight, bias = tensors()
    nothing = torch.full((SEQUENCES * LENGTH,), -100)
    assert ours.LigerFusedLinearCrossEntropyLoss()(weight, hidden.flatten(0, 1), nothing, bias) == 0
    assert ours.LigerCrossEntropyLoss()(torch.randn(len(nothing), VOCAB), nothing) == 0


# --- beside Liger, and what is refused -------------------------------------------------------------------------------


def test_losses_that_liger_does_not_have():
    hidden, weight, bias = tensors()
    ref = [x.detach() for x in tensors(1)]
    for name in ("ipo", "cdpo", "dpop"):
        loss, _ = ours.LigerFusedLinearDPOLoss(loss_type=name, label_smoothing=0.1)(
            weight, hidden, labels(), bias, *ref
        )
        assert loss.isfinite()


def test_an_empty_completion_counts_as_a_pair_and_gives_no_nan():
    hidden, weight, bias = tensors()
    target = labels()
    target[1] = -100
    for name in ("LigerFusedLinearCPOLoss", "LigerFusedLinearSimPOLoss", "LigerFusedLinearORPOLoss"):
        found = outcome(getattr(ours, name)()(weight, hidden, target, bias), hidden, weight, bias)
        assert all(x.isfinite().all() for part in found for x in part)


REFUSED = [
    (
        "LigerFusedLinearDPOLoss",
        {"loss_type": "discopop"},
        "loss_type='discopop' is not served: choose one of apo_down",
    ),
    ("LigerFusedLinearDPOLoss", {"loss_type": "aot"}, "is not served"),
    ("LigerFusedLinearDPOLoss", {"loss_type": "exo_pair"}, r"label_smoothing must be in"),
    ("LigerFusedLinearDPOLoss", {"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in"),
    ("LigerFusedLinearCrossEntropyLoss", {"label_smoothing": 0.1, "use_token_scaling": True}, "has another meaning"),
    ("LigerFusedLinearCrossEntropyLoss", {"label_smoothing": 0.1, "ce_weight": torch.ones(2)}, "has another meaning"),
    (
        "LigerFusedLinearCrossEntropyLoss",
        {"return_predicted_tokens": True},
        "return_predicted_tokens=True is not served",
    ),
    ("LigerCrossEntropyLoss", {"label_smoothing": 0.1, "weight": torch.ones(2)}, "has another meaning"),
    ("LigerCrossEntropyLoss", {"reduction": "max"}, "reduction must be"),
    ("LigerFusedLinearGRPOLoss", {"loss_type": "vespo"}, "loss_type='vespo' is not served: choose one of grpo"),
    ("LigerFusedLinearGRPOLoss", {"loss_type": "dr_grpo"}, "needs max_completion_length"),
    ("LigerFusedLinearGRPOLoss", {"use_bias_correction_kl": True}, "is not served"),
    ("LigerFusedLinearGRPOLoss", {"loss_type": "sapo", "importance_sampling_level": "sequence"}, "takes 'token'"),
    ("LigerFusedLinearGRPOLoss", {"importance_sampling_level": "pair"}, "is not served"),
    ("LigerFusedLinearGRPOLoss", {"delta": 1.1}, r"at 1 \+ epsilon_high or more"),
    ("LigerFusedLinearGRPOLoss", {"delta": 2.0, "loss_type": "cispo"}, "token ratios of the clipped losses"),
]


@pytest.mark.parametrize("name, options, words", REFUSED)
def test_options_that_are_not_served_are_refused_when_the_loss_is_made(name, options, words):
    with pytest.raises(ValueError, match=words):
        getattr(ours, name)(**options)


def test_calls_that_cannot_be_right_are_refused():
    hidden, weight, bias = tensors()
    with pytest.raises(ValueError, match="use_ref_model=True needs ref_input"):
        ours.LigerFusedLinearDPOLoss()(weight, hidden, labels(), bias)
    with pytest.raises(ValueError, match="got 5 sequences"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden[:5], labels()[:5], bias)
    with pytest.raises(ValueError, match=r"target must be \[B, S\]"):
        ours.LigerFusedLinearCPOLoss()(weight, hidden, labels().flatten(), bias)
    with pytest.raises(ValueError, match="kl must be one number"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, labels(), bias, torch.ones(6).bool(), kl=torch.ones(6))
    with pytest.raises(ValueError, match="preference_labels must be"):
        ours.LigerFusedLinearKTOLoss()(hidden, weight, labels(), bias)
    with pytest.raises(ValueError, match="one vocabulary"):
        flat = hidden.flatten(0, 1)
        ours.LigerFusedLinearJSDLoss()(flat, weight[:9], flat, weight, labels().flatten())
    with pytest.raises(ValueError, match=r"expected \[B, S\], \[B, 1\] or \[B\]"):
        mask = torch.ones(6, 7)
        ours.LigerFusedLinearGRPOLoss()(hidden, weight, labels(0), mask, torch.ones(6), vllm_is_ratio=torch.ones(6, 3))
