"""``policy_loss`` and ``preference_loss``: whole losses from logits that exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.cases.logits import COPY, copier
from bench.field import BF16, FP32, OURS, Field, Inputs, Setting, draw, in64, integers
from bench.measure import Case

CLIP = 0.2
BETA = 0.1
SEQUENCES = 8
"""Sequences in a case's rows."""
LEAVES = ("logits",)


def clipped(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """The clipped surrogate of each token: ``-min(A r, A clip(r))``."""
    ratio = (logps - old_logps).exp()
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - CLIP, 1 + CLIP))


def old_logps(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Log-probs of a nearby policy."""
    now = torch.log_softmax(logits.detach().float(), -1).gather(-1, labels[:, None])[:, 0]
    return now - log_ratios(generator, len(labels))


def log_ratios(generator: torch.Generator, n: int) -> Tensor:
    """``[n]`` within 0.1 of 0, or between 0.4 and 0.6 on either side of it: a third each.

    None is so near a bound of the clip, -0.22 and 0.18, that a 16-bit logit's rounding could carry it across: there the
    gradient jumps, and errors would say nothing.
    """
    near, far = 0.1 * draw(generator, n).tanh(), 0.5 + 0.1 * draw(generator, n).tanh()
    side = integers(generator, 3, n) - 1
    return torch.where(side == 0, near, side * far)


def policy_inputs(generator: torch.Generator, *, n: int, v: int, dtype: torch.dtype) -> Inputs:
    """Logits of `SEQUENCES` sequences whose last row is not scored, their old log-probs, one advantage per sequence."""
    logits, labels = draw(generator, n, v, scale=2.0, dtype=dtype), integers(generator, v, n)
    old = old_logps(logits, labels, generator)
    labels.view(SEQUENCES, -1)[:, -1] = -100
    advantages = draw(generator, SEQUENCES).repeat_interleave(n // SEQUENCES)
    count = (labels != -100).sum()
    return {"logits": logits.requires_grad_(), "labels": labels, "old": old, "advantages": advantages, "count": count}


def eager_policy(x: Inputs, *, wide: bool = False) -> Tensor:
    """A log-softmax in full, the clip, the mean over scored rows."""
    logits, labels = x["logits"].float() if wide else x["logits"], x["labels"]
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    losses = clipped(logps, x["old"], x["advantages"])
    return torch.where(labels == -100, 0.0, losses).sum() / x["count"]


def compiled_policy() -> Callable[[Inputs], Tensor]:
    """`eager_policy` in one graph."""
    names = ("logits", "labels", "old", "advantages", "count")

    def loss(*values: Tensor) -> Tensor:
        return eager_policy(dict(zip(names, values, strict=True)), wide=True)

    compiled = torch.compile(loss, dynamic=False)
    return lambda x: compiled(*(x[name] for name in names))


def our_policy(x: Inputs, **options) -> Tensor:
    """One pass: the gradient is made in the read that makes the loss."""
    from fastalign.ops import policy_loss

    return policy_loss(x["logits"], x["labels"], x["old"], x["advantages"], **options)[0]


def our_two_phases(x: Inputs, *, inplace: bool) -> Tensor:
    """Statistics, the loss in torch, a second sweep for the gradient."""
    from fastalign.ops import token_logps

    logps = token_logps(x["logits"], x["labels"], inplace_backward=inplace)
    assert isinstance(logps, Tensor)
    losses = clipped(logps, x["old"], x["advantages"])
    return torch.where(x["labels"] == -100, 0.0, losses).sum() / x["count"]


def liger_policy(x: Inputs, *, inplace: bool) -> Tensor:
    """Liger's Triton loss of GRPO."""
    rows = (x["logits"], x["labels"], x["old"], x["advantages"])
    return peers.liger_grpo_logits(*rows, sequences=SEQUENCES, clip=CLIP, inplace=inplace)


def policy_loss(
    setting: Setting,
    *,
    n: int,
    v: int,
    dtype: torch.dtype,
    inplace: bool,
    model: str = "",
    targets: dict[str, float] | None = None,
) -> Case:
    """The clipped loss and the gradient of the logits, in memory of its own or in theirs."""
    size = setting.sizes(N=n, V=v)
    n, v = max(2, size["N"] // SEQUENCES) * SEQUENCES, size["V"]
    field = Field(setting)
    field.add_loss("eager", eager_policy, LEAVES)
    if dtype != FP32:
        field.add_loss("eager in fp32", partial(eager_policy, wide=True), LEAVES)
    field.add_loss("torch.compile", compiled_policy(), LEAVES, compiled=True)
    field.add_loss(OURS, partial(our_policy, inplace=inplace), LEAVES)
    native = partial(our_policy, inplace=inplace, backend="cuda")
    field.add_loss("fastalign, CUDA C++", native, LEAVES, gpu="its kernels are CUDA C++", backend="cuda")
    field.add_loss("fastalign, two-phase", partial(our_two_phases, inplace=inplace), LEAVES)
    liger = partial(liger_policy, inplace=inplace)
    field.add_loss("Liger GRPO from logits", liger, LEAVES, package="liger_kernel", gpu="its kernels are Triton")
    field.runs[COPY] = copier()
    return Case(
        "policy_loss in place" if inplace else "policy_loss",
        f"{n}x{v}" + (f" ({model})" if model else ""),
        dtype,
        partial(policy_inputs, n=n, v=v, dtype=dtype),
        lambda x: field.runs["eager"](in64(x)),
        field,
        targets=targets or {},
        roof=COPY,
        least=1.0,
    )


# --- preference_loss -------------------------------------------------------------------------------------------------


def pair_inputs(generator: torch.Generator, *, pairs: int, length: int, v: int, dtype: torch.dtype) -> Inputs:
    """Logits of pairs of equal lengths, and log-probs under a reference."""
    n = 2 * pairs * length
    logits, labels = draw(generator, n, v, scale=2.0, dtype=dtype), integers(generator, v, n)
    offsets = torch.arange(0, n + 1, length, device=labels.device)
    return {
        "logits": logits.requires_grad_(),
        "labels": labels,
        "ref": old_logps(logits, labels, generator),
        "cu_seqlens": offsets,
    }


def dpo(sequence_logps: Tensor) -> Tensor:
    """``mean_p -log sigmoid(beta (chosen_p - rejected_p))`` of log-ratios ``[B]``, sequences neighbours."""
    chosen, rejected = sequence_logps.view(-1, 2).T
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def eager_pairs(x: Inputs, *, length: int) -> Tensor:
    """A log-softmax in full and sums over rows of equal lengths."""
    logps = torch.log_softmax(x["logits"], -1).gather(-1, x["labels"][:, None])[:, 0]
    return dpo((logps - x["ref"]).view(-1, length).sum(1))


def our_pairs(x: Inputs, **options) -> Tensor:
    """The op, with DPO as its loss."""
    from fastalign.losses.preference import LOSSES
    from fastalign.ops import preference_loss

    loss_fn = partial(LOSSES["dpo"], beta=BETA)
    return preference_loss(x["logits"], x["labels"], x["cu_seqlens"], x["ref"], loss_fn=loss_fn, **options)[0]


def preference_loss(setting: Setting, *, pairs: int, length: int, v: int, dtype: torch.dtype) -> Case:
    """DPO and the gradient of the logits."""
    size = setting.sizes(P=pairs, L=length, V=v)
    pairs, length, v = size["P"], size["L"], size["V"]
    field = Field(setting)
    field.add_loss("eager", partial(eager_pairs, length=length), LEAVES)
    field.add_loss(OURS, our_pairs, LEAVES)
    field.add_loss("fastalign, in place", partial(our_pairs, inplace_backward=True), LEAVES)
    field.runs[COPY] = copier()
    return Case(
        "preference_loss DPO",
        f"P{pairs} L{length} V{v}",
        dtype,
        partial(pair_inputs, pairs=pairs, length=length, v=v, dtype=dtype),
        lambda x: field.runs["eager"](in64(x)),
        field,
        roof=COPY,
        least=1.5,
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Fresh and in place, both widths; one pair loss."""
    policy, pairs = partial(partial, policy_loss, setting), partial(partial, preference_loss, setting)
    if setting.gpu:
        copy = {COPY: 0.88, "Liger GRPO from logits": 1.5}
        big = {"n": 8192, "dtype": BF16}
        return {
            "policy_loss-131072": policy(**big, v=131072, inplace=True, targets=copy),
            "policy_loss-qwen3": policy(**big, v=151936, inplace=True, targets=copy, model="Qwen3"),
            "policy_loss-fresh-qwen3": policy(**big, v=151936, inplace=False, targets={COPY: 0.88}, model="Qwen3"),
            "preference_loss-bf16": pairs(pairs=8, length=512, v=128256, dtype=BF16),
        }
    base, ahead = {"n": 512, "v": 32000}, {"fastalign, two-phase": 1.3}
    return {
        "policy_loss-fp32": policy(**base, dtype=FP32, inplace=False, targets=ahead),
        "policy_loss-bf16": policy(**base, dtype=BF16, inplace=False, targets=ahead),
        "policy_loss-in-place-fp32": policy(**base, dtype=FP32, inplace=True, targets=ahead),
        "policy_loss-in-place-bf16": policy(**base, dtype=BF16, inplace=True, targets=ahead),
        "policy_loss-qwen3": policy(n=64, v=151936, dtype=BF16, inplace=True, model="Qwen3"),
        "policy_loss-small-vocabulary": policy(n=4096, v=64, dtype=FP32, inplace=True),
        "preference_loss-fp32": pairs(pairs=4, length=64, v=32000, dtype=FP32),
    }
