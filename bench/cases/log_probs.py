"""``linear_logps``, and losses of several tokens from hidden states: DPO on pairs, the clipped policy loss of GRPO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.cases.head import BARE, gemms, inputs, token_head_name
from bench.cases.policy import BETA, CLIP, clipped, dpo, log_ratios
from bench.field import BF16, FP16, FP32, OURS, ROOF, Field, Inputs, Loss, Outputs, Setting, draw, in64
from bench.measure import Case

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- log-probs -------------------------------------------------------------------------------------------------------


def eager_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits in full."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def our_logps(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
    from fastalign.ops import linear_logps

    logps = linear_logps(hidden, weight, labels, num_scored=len(labels), **options)
    assert isinstance(logps, Tensor)
    return logps


def log_probs(
    setting: Setting,
    *,
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    grad: bool,
    calls: int = 1,
    targets: dict[str, float] | None = None,
) -> Case:
    """Log-probs; with ``grad`` all gradients. The upstream only comes in backward, so logits are made twice."""
    size = setting.sizes(N=n, D=d, V=v)
    n, d, v = size["N"], size["D"], size["V"]
    field = Field(setting)
    roof = ROOF + ("four GEMMs" if grad else "one GEMM")
    field.runs[roof] = gemms(4 if grad else 1)

    def enter(name: str, head: Callable[[Tensor, Tensor, Tensor], Tensor], **needs) -> None:
        if grad:
            loss = lambda x: (head(x["hidden"], x["weight"], x["labels"]) * x["upstream"]).mean()  # noqa: E731
            field.add_loss(name, loss, **needs)
        else:
            field.add(name, partial(no_grad, head), **needs)

    enter("eager", eager_logps)
    enter(OURS, our_logps)
    enter("torch.compile", torch.compile(eager_logps, dynamic=False), compiled=True)
    enter("TRL fused head", peers.trl_head, package="trl")
    enter(token_head_name(setting), peers.liger_token_head, package="liger_kernel")
    enter("verl's chunked head", peers.verl_head, package="verl")
    return Case(
        "linear_logps" + (" forward + backward" if grad else " forward"),
        f"N{n} D{d} V{v}",
        dtype,
        partial(inputs, n=n, d=d, v=v, dtype=dtype),
        lambda x: field.runs["eager"](in64(x)),
        field,
        targets=targets or {},
        roof=roof,
        least=0.75 if grad else 1.0,
        calls=calls,
    )


def no_grad(head: Callable[[Tensor, Tensor, Tensor], Tensor], x: Inputs) -> Outputs:
    """Log-probs alone, as a reference pass makes them."""
    with torch.no_grad():
        return {"logps": head(x["hidden"], x["weight"], x["labels"])}


# --- DPO -------------------------------------------------------------------------------------------------------------


def dpo_of(head: Head, length: int) -> Loss:
    """DPO against a reference of zeros, by a head that returns log-probs."""
    return lambda x: dpo(head(x["hidden"], x["weight"], x["labels"]).view(-1, length).sum(1))


def our_dpo(x: Inputs, *, length: int, **options) -> Tensor:
    """The loss of each chunk's pairs; a pair is never split."""
    from fastalign.losses.reduce import segment_sum
    from fastalign.ops import linear_loss

    n = x["labels"].numel()
    pairs = n // length // 2

    def loss_fn(stats) -> Tensor:
        chosen, rejected = segment_sum(stats.logps, stats.cu_seqlens).view(-1, 2).T
        return -F.logsigmoid(BETA * (chosen - rejected)).sum() / pairs

    layout = {"cu_seqlens": torch.arange(0, n + 1, length), "align": "pair", "num_scored": n}  # the host reads them
    return linear_loss(x["hidden"], x["weight"], x["labels"], loss_fn, **layout, **options)[0]


def our_composed_dpo(x: Inputs, *, length: int) -> Tensor:
    """The same loss after differentiable log-probs: logits are made twice."""
    return dpo_of(our_logps, length)(x)


def pair_head(
    setting: Setting,
    *,
    pairs: int,
    length: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    slabs: int | None = None,
    targets: dict[str, float] | None = None,
) -> Case:
    """DPO on pairs of equal lengths, the only layout that Liger's chunked loss takes.

    Args:
        slabs: bytes so few that no chunk of logits can be kept: the same call in slabs of the vocabulary.
    """
    size = setting.sizes(P=pairs, L=length, D=d, V=v)
    pairs, length, d, v = (size[letter] for letter in "PLDV")
    field = Field(setting)
    field.runs[BARE] = gemms(3)
    field.add_loss("eager", dpo_of(eager_logps, length))
    field.add_loss(OURS, partial(our_dpo, length=length))
    field.add_loss("fastalign linear_logps", partial(our_composed_dpo, length=length))
    if slabs:
        field.add_loss("fastalign, slabs", partial(our_dpo, length=length, memory=slabs))
    field.add_loss("TRL fused head", dpo_of(peers.trl_head, length), package="trl")
    field.add_loss("Liger chunked DPO", liger_dpo(length, compiled=False), package="liger_kernel")
    compiled = liger_dpo(length, compiled=True)
    field.add_loss("Liger chunked DPO, compiled", compiled, package="liger_kernel", compiled=True)
    return Case(
        "linear_loss DPO" + (", long pairs" if slabs else ""),
        f"P{pairs} L{length} D{d} V{v}",
        dtype,
        partial(inputs, n=2 * pairs * length, d=d, v=v, dtype=dtype),
        lambda x: field.runs["eager"](in64(x)),
        field,
        targets=targets or {},
        roof=BARE,
    )


def liger_dpo(length: int, compiled: bool) -> Loss:
    head = partial(peers.liger_dpo, length=length, beta=BETA, compiled=compiled)
    return lambda x: head(x["hidden"], x["weight"], x["labels"])


# --- GRPO ------------------------------------------------------------------------------------------------------------


def group_inputs(generator: torch.Generator, *, length: int, **sizes) -> Inputs:
    """Hidden states of sequences of equal lengths, log-probs of a nearby policy, one advantage per sequence."""
    x = inputs(generator, **sizes)
    rows = len(x["labels"])
    with torch.no_grad():
        now = eager_logps(x["hidden"], x["weight"], x["labels"])
    x["old"] = now - log_ratios(generator, rows)
    x["advantages"] = draw(generator, rows // length).repeat_interleave(length)
    return x


def grpo_of(head: Head) -> Loss:
    """The clipped loss's mean over tokens, by a head that returns log-probs."""

    def loss(x: Inputs) -> Tensor:
        return clipped(head(x["hidden"], x["weight"], x["labels"]), x["old"], x["advantages"]).mean()

    return loss


def our_grpo(x: Inputs) -> Tensor:
    """The clip as a loss function of each chunk's log-probs."""
    from fastalign.ops import linear_loss

    old, advantages, count = x["old"], x["advantages"], len(x["labels"])

    def loss_fn(stats) -> Tensor:
        return clipped(stats.logps, old[stats.rows], advantages[stats.rows]).sum() / count

    return linear_loss(x["hidden"], x["weight"], x["labels"], loss_fn, num_scored=count)[0]


def liger_grpo(length: int, compiled: bool) -> Loss:
    """Liger wants one advantage per sequence."""
    head = partial(peers.liger_grpo, length=length, clip=CLIP, compiled=compiled)
    return lambda x: head(x["hidden"], x["weight"], x["labels"], x["old"], x["advantages"][::length].contiguous())


def group_head(
    setting: Setting,
    *,
    sequences: int,
    length: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    targets: dict[str, float] | None = None,
) -> Case:
    """The clipped policy loss of GRPO from hidden states."""
    size = setting.sizes(B=sequences, L=length, D=d, V=v)
    sequences, length, d, v = (size[letter] for letter in "BLDV")
    field = Field(setting)
    field.runs[BARE] = gemms(3)
    field.add_loss("eager", grpo_of(eager_logps))
    field.add_loss(OURS, our_grpo)
    field.add_loss("fastalign linear_logps", grpo_of(our_logps))
    field.add_loss("TRL fused head", grpo_of(peers.trl_head), package="trl")
    field.add_loss("verl's chunked head", grpo_of(peers.verl_head), package="verl")
    field.add_loss("Liger per-token op", grpo_of(peers.liger_token_head), package="liger_kernel")
    field.add_loss("Liger chunked GRPO", liger_grpo(length, compiled=False), package="liger_kernel")
    compiled = liger_grpo(length, compiled=True)
    field.add_loss("Liger chunked GRPO, compiled", compiled, package="liger_kernel", compiled=True)
    return Case(
        "linear_loss GRPO",
        f"B{sequences} L{length} D{d} V{v}",
        dtype,
        partial(group_inputs, length=length, n=sequences * length, d=d, v=v, dtype=dtype),
        lambda x: field.runs["eager"](in64(x)),
        field,
        targets=targets or {},
        roof=BARE,
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Log-probs; pairs that fit a chunk, pairs that do not, groups."""
    kinds = (log_probs, pair_head, group_head)
    return (gpu_cases if setting.gpu else cpu_cases)(*(partial(partial, kind, setting) for kind in kinds))


def cpu_cases(logps, pairs, groups) -> dict[str, Callable[[], Case]]:
    small = {"d": 512, "v": 32000}
    base = {"n": 1024, **small}
    return {
        "linear_logps-forward-fp32": logps(**base, dtype=FP32, grad=False),
        "linear_logps-backward-fp32": logps(**base, dtype=FP32, grad=True),
        "linear_logps-backward-fp16": logps(**base, dtype=FP16, grad=True),
        "linear_logps-fixed-cost": logps(n=64, d=64, v=256, dtype=FP32, grad=True, calls=20, targets={"eager": 1 / 6}),
        "preference_head-fp32": pairs(pairs=8, length=64, **small, dtype=FP32),
        "preference_head-bf16": pairs(pairs=8, length=64, **small, dtype=BF16),
        "preference_head-long-fp32": pairs(pairs=1, length=512, **small, dtype=FP32, slabs=16 << 20),
        "preference_head-short-fp32": pairs(pairs=4, length=4, d=64, v=256, dtype=FP32),
        "grpo_head-fp32": groups(sequences=8, length=128, **small, dtype=FP32),
        "grpo_head-bf16": groups(sequences=8, length=128, **small, dtype=BF16),
    }


def gpu_cases(logps, pairs, groups) -> dict[str, Callable[[], Case]]:
    again, once = {ROOF + "four GEMMs": 1 / 1.10}, {ROOF + "one GEMM": 1 / 1.08}
    big = {"d": 4096, "dtype": BF16}
    found = {}
    for v, tag in ((131072, "131072"), (151936, "qwen3-8b")):
        found |= {
            f"linear_logps-forward-{tag}": logps(n=8192, v=v, **big, grad=False, targets=once),
            f"linear_logps-backward-{tag}": logps(n=8192, v=v, **big, grad=True, targets=again),
        }
    return {
        **found,
        "linear_loss-dpo": pairs(pairs=16, length=256, v=131072, **big, targets={BARE: 1 / 1.15}),
        "linear_loss-dpo-long": pairs(pairs=1, length=8192, v=131072, **big, slabs=2 << 30),
        "linear_loss-grpo": groups(sequences=16, length=512, v=151936, **big, targets={"TRL fused head": 3.0}),
    }
