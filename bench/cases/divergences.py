"""``divergence`` and ``linear_divergence``: a policy's whole distribution against a reference's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.cases.logits import COPY, copier
from bench.field import BF16, FP32, OURS, ROOF, Field, Inputs, Outputs, Setting, draw, in64
from bench.measure import Case

MIX = 0.5
TRL_MIX = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": MIX}
HEAD = ("hidden", "weight", "ref_hidden", "ref_weight")


def eager(logits: Tensor, ref_logits: Tensor, *, kind: str, wide: bool = False) -> Tensor:
    """Two log-softmaxes in full; ``[N]``."""
    if wide:
        logits, ref_logits = logits.float(), ref_logits.float()
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    if kind == "forward_kl":
        return kl(log_q, log_p)
    if kind == "reverse_kl":
        return kl(log_p, log_q)
    log_m = torch.log(MIX * log_q.exp() + (1 - MIX) * log_p.exp())
    return MIX * kl(log_q, log_m) + (1 - MIX) * kl(log_p, log_m)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``KL(a || b)`` over the last dimension."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


# --- from logits -----------------------------------------------------------------------------------------------------


def logits_inputs(generator: torch.Generator, *, n: int, v: int, dtype: torch.dtype) -> Inputs:
    """Logits, and those of a model that differs by 1 in the standard deviation."""
    logits = draw(generator, n, v, scale=2.0)
    return {
        "logits": logits.to(dtype).requires_grad_(),
        "ref_logits": (logits + draw(generator, n, v)).to(dtype),
    }


def averaged(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """The mean divergence over rows, by a function that returns it per row or summed."""
    return lambda x: f(x["logits"], x["ref_logits"]).sum() / len(x["logits"])


def ours(logits: Tensor, ref_logits: Tensor, **options) -> Tensor:
    from fastalign.ops import divergence

    return divergence(logits, ref_logits, **options)


def divergence(
    setting: Setting,
    *,
    n: int,
    v: int,
    dtype: torch.dtype,
    kind: str,
    model: str = "",
    targets: dict[str, float] | None = None,
) -> Case:
    """Values and the gradient of the policy's logits."""
    size = setting.sizes(N=n, V=v)
    field, leaves = Field(setting), ("logits",)
    field.add_loss("eager", averaged(partial(eager, kind=kind)), leaves)
    if dtype != FP32:
        field.add_loss("eager in fp32", averaged(partial(eager, kind=kind, wide=True)), leaves)
    compiled = torch.compile(partial(eager, kind=kind, wide=True), dynamic=False)
    field.add_loss("torch.compile", averaged(compiled), leaves, compiled=True)
    field.add_loss(OURS, averaged(partial(ours, kind=kind, mix=MIX)), leaves)
    field.add_loss("fastalign, torch backend", averaged(partial(ours, kind=kind, mix=MIX, backend="torch")), leaves)
    trl = partial(peers.trl_jsd, mix=TRL_MIX[kind])
    field.add_loss("TRL generalized_jsd_loss", averaged(trl), leaves, package="trl")
    if dtype != FP32:  # summed in 16 bits, the above may miss the budget
        wide = lambda logits, ref_logits: trl(logits.float(), ref_logits.float())  # noqa: E731
        field.add_loss("TRL generalized_jsd_loss in fp32", averaged(wide), leaves, package="trl")
    field.runs[COPY] = copier()
    return Case(
        f"divergence {kind}",
        f"{size['N']}x{size['V']}" + (f" ({model})" if model else ""),
        dtype,
        partial(logits_inputs, n=size["N"], v=size["V"], dtype=dtype),
        lambda x: field.runs["eager"](in64(x)),
        field,
        targets=targets or {},
        roof=COPY,
        least=2.5,  # both logits read twice, one gradient written
    )


# --- from hidden states ----------------------------------------------------------------------------------------------


def head_inputs(generator: torch.Generator, *, n: int, d: int, v: int, dtype: torch.dtype) -> Inputs:
    """A policy's hidden states and head, and a reference's whose logits differ by about 1 in the standard deviation."""
    hidden, weight = draw(generator, n, d), draw(generator, v, d, scale=2.0 / d**0.5)
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "ref_hidden": (hidden + draw(generator, n, d, scale=0.4)).to(dtype),
        "ref_weight": (weight + draw(generator, v, d, scale=0.8 / d**0.5)).to(dtype),
    }


def of_head(f: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """The mean divergence over rows."""
    return lambda x: f(*(x[name] for name in HEAD)).mean()


def eager_head(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, *, kind: str) -> Tensor:
    """Both logits in full."""
    streams = F.linear(hidden, weight), F.linear(ref_hidden, ref_weight)
    return eager(*streams, kind=kind, wide=hidden.dtype != torch.float64)


def our_head(*streams: Tensor, **options) -> Tensor:
    from fastalign.ops import linear_divergence

    return linear_divergence(*streams, **options)


def six_gemms(x: Inputs) -> Outputs:
    """The least of an exact method that keeps no logits: both streams twice, two gradients."""
    hidden, weight, ref_hidden, ref_weight = (x[name].detach() for name in HEAD)
    for _ in range(2):
        logits = hidden @ weight.T
        ref_hidden @ ref_weight.T
    logits @ weight
    logits.T @ hidden
    return {}


def linear_divergence(setting: Setting, *, n: int, d: int, v: int, dtype: torch.dtype, kind: str) -> Case:
    """The mean divergence and the gradients of the policy's hidden states and head."""
    size = setting.sizes(N=n, D=d, V=v)
    n, d, v = size["N"], size["D"], size["V"]
    field, mix, roof = Field(setting), TRL_MIX[kind], ROOF + "six GEMMs"
    field.runs[roof] = six_gemms
    field.add_loss("eager", of_head(partial(eager_head, kind=kind)))
    field.add_loss(OURS, of_head(partial(our_head, kind=kind, mix=MIX)))
    compiled = torch.compile(partial(eager_head, kind=kind), dynamic=False)
    field.add_loss("torch.compile", of_head(compiled), compiled=True)
    field.add_loss("TRL chunked divergence", of_head(partial(peers.trl_divergence_head, mix=mix)), package="trl")
    field.add_loss("Liger chunked JSD", of_head(partial(peers.liger_jsd, mix=mix)), package="liger_kernel")
    return Case(
        f"linear_divergence {kind}",
        f"N{n} D{d} V{v}",
        dtype,
        partial(head_inputs, n=n, d=d, v=v, dtype=dtype),
        lambda x: field.runs["eager"](in64(x)),
        field,
        roof=roof,
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Each kind once, one kind in both widths."""
    logits, head = partial(partial, divergence, setting), partial(partial, linear_divergence, setting)
    if setting.gpu:
        bytes_moved = {COPY: 0.88 / 2.5}
        big = {"n": 4096, "v": 151936, "dtype": BF16}
        return {
            "divergence-forward_kl": logits(**big, kind="forward_kl", model="Qwen3", targets=bytes_moved),
            "divergence-jsd": logits(**big, kind="jsd", model="Qwen3", targets=bytes_moved),
            "linear_divergence-jsd": head(n=4096, d=4096, v=131072, dtype=BF16, kind="jsd"),
        }
    small = {"n": 256, "v": 32000}
    return {
        "divergence-forward_kl-fp32": logits(**small, dtype=FP32, kind="forward_kl"),
        "divergence-reverse_kl-fp32": logits(**small, dtype=FP32, kind="reverse_kl"),
        "divergence-jsd-fp32": logits(**small, dtype=FP32, kind="jsd"),
        "divergence-jsd-bf16": logits(**small, dtype=BF16, kind="jsd"),
        "divergence-qwen3": logits(n=32, v=151936, dtype=BF16, kind="forward_kl", model="Qwen3"),
        "divergence-small-vocabulary": logits(n=4096, v=64, dtype=FP32, kind="forward_kl"),
        "linear_divergence-forward_kl-fp32": head(n=256, d=512, v=32000, dtype=FP32, kind="forward_kl"),
        "linear_divergence-jsd-fp32": head(n=256, d=512, v=32000, dtype=FP32, kind="jsd"),
        "linear_divergence-jsd-bf16": head(n=256, d=512, v=32000, dtype=BF16, kind="jsd"),
    }
