"""``token_logps``: log-probs of the labels, and entropy, from logits that exist."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import peers
from bench.field import BF16, FP32, OURS, ROOF, Field, Inputs, Outputs, Setting, draw, gradient, in64, integers
from bench.measure import Case

Statistics = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
"""From logits ``[N, V]`` and labels ``[N]`` to log-probs, or log-probs and entropy, ``[N]``."""
COPY = ROOF + "copy"


def inputs(generator: torch.Generator, *, n: int, v: int, dtype: torch.dtype, grad: bool) -> Inputs:
    """Logits with the spread of a trained model's (about +-8), labels, and upstream gradients per row."""
    return {
        "logits": draw(generator, n, v, scale=2.0, dtype=dtype).requires_grad_(grad),
        "labels": integers(generator, v, n),
        "upstream": draw(generator, n),
        "upstream_entropy": draw(generator, n),
    }


# --- candidates ------------------------------------------------------------------------------------------------------


def eager(logits: Tensor, labels: Tensor, *, entropy: bool, softcap: float | None = None):
    """What is written by hand: a log-softmax in full, in the dtype of the logits."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(z, -1)
    logps = log_p.gather(-1, labels[:, None])[:, 0]
    return (logps, -(log_p.exp() * log_p).sum(-1)) if entropy else logps


def upcast(logits: Tensor, labels: Tensor, **options):
    """`eager` with the logits in fp32."""
    return eager(logits.float(), labels, **options)


def gather_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    """The other way to write it by hand: no ``[N, V]`` output."""
    return logits.gather(-1, labels[:, None])[:, 0] - torch.logsumexp(logits, -1)


def ours(logits: Tensor, labels: Tensor, **options):
    """The op that is measured."""
    from fastalign.ops import token_logps

    return token_logps(logits, labels, **options)


def candidates(
    setting: Setting, *, dtype: torch.dtype, entropy: bool, grad: bool, inplace: bool, softcap: float | None
) -> tuple[dict[str, Statistics], Field]:
    """Everyone who can compute it, and a field that knows the absent."""
    found: dict[str, Statistics] = {}
    field = Field(setting)
    options = {"entropy": entropy, "softcap": softcap}

    def enter(name: str, f: Statistics, **needs) -> None:
        field.add(name, f, **needs)
        if name in field.runs:
            found[name] = f

    enter("eager", partial(eager, **options))
    if dtype != FP32:
        enter("eager in fp32", partial(upcast, **options))
    enter("torch.compile", torch.compile(partial(upcast, **options), dynamic=False), compiled=True)
    enter(OURS, partial(ours, **options, inplace_backward=inplace))
    native = partial(ours, **options, inplace_backward=inplace, backend="cuda")
    enter("fastalign, CUDA C++", native, gpu="its kernels are CUDA C++", backend="cuda")
    enter("fastalign, torch backend", partial(ours, **options, backend="torch"))
    if grad:
        other = "fastalign, " + ("fresh memory" if inplace else "in place")
        enter(other, partial(ours, **options, inplace_backward=not inplace))
    triton = "its kernels are Triton"
    if softcap is None and entropy:
        enter("TRL's two functions", peers.trl_logps_entropy, package="trl")
        enter("TRL's kernel", peers.trl_kernel, package="trl", gpu=triton)
    if softcap is None and not entropy:
        enter("eager gather - logsumexp", gather_logsumexp)
        enter("TRL selective_log_softmax", peers.trl_logps, package="trl")
        enter("quack", peers.quack_cross_entropy, package="quack-kernels", gpu="CUDA only", hopper=True)
    if not entropy:
        liger = partial(peers.liger_cross_entropy, softcap=softcap)
        enter("Liger cross-entropy", liger, package="liger_kernel", gpu=triton)
    return found, field


# --- the timed runs --------------------------------------------------------------------------------------------------


def named(result: Tensor | tuple[Tensor, Tensor]) -> Outputs:
    """The results by name."""
    return dict(zip(("logps", "entropy"), result if isinstance(result, tuple) else (result,), strict=False))


def forward(f: Statistics, x: Inputs) -> Outputs:
    """The statistics alone."""
    with torch.no_grad():
        return named(f(x["logits"], x["labels"]))


def backward(f: Statistics, x: Inputs) -> Outputs:
    """The statistics and the gradient of the logits under the upstream gradients."""
    found = named(f(x["logits"], x["labels"]))
    upstream = [x["upstream" if name == "logps" else "upstream_entropy"].to(y.dtype) for name, y in found.items()]
    torch.autograd.backward(tuple(found.values()), upstream)
    return {**{name: y.detach() for name, y in found.items()}, "d_logits": gradient(x["logits"])}


def weighed(f: Statistics, x: Inputs) -> Tensor:
    """A loss with those upstream gradients."""
    found = named(f(x["logits"], x["labels"]))
    return sum((y * x["upstream" if name == "logps" else "upstream_entropy"]).sum() for name, y in found.items())


def read(x: Inputs) -> Outputs:
    """The least that a CPU does: one read of the logits."""
    x["logits"].sum()
    return {}


def copier() -> Callable[[Inputs], Outputs]:
    """A copy of the logits into memory that is there already: the device's bandwidth, read and written."""
    kept: list[Tensor] = []

    def copy(x: Inputs) -> Outputs:
        if not kept:
            kept.append(torch.empty_like(x["logits"].detach()))
        kept[0].copy_(x["logits"].detach())
        return {}

    return copy


def token_logps(
    setting: Setting,
    *,
    n: int,
    v: int,
    dtype: torch.dtype,
    grad: bool,
    entropy: bool = False,
    inplace: bool = False,
    softcap: float | None = None,
    model: str = "",
    calls: int = 1,
    targets: dict[str, float] | None = None,
) -> Case:
    """Log-probs of the labels, with ``entropy`` also the entropy, with ``grad`` also the gradient of the logits.

    Args:
        inplace: the gradient takes the place of the logits.
    """
    size = setting.sizes(N=n, V=v)
    functions, field = candidates(setting, dtype=dtype, entropy=entropy, grad=grad, inplace=inplace, softcap=softcap)
    run = backward if grad else forward
    field.runs = {name: partial(run, f) for name, f in functions.items()}
    field.losses = {name: partial(weighed, f) for name, f in functions.items()} if grad else {}
    field.runs[COPY] = copier()
    if not grad:
        field.runs[ROOF + "read"] = read
    name = "token_logps" + (" + entropy" if entropy else "") + (", softcap" if softcap else "")
    return Case(
        f"{name} forward" + (" + backward" if grad else "") + (" in place" if inplace else ""),
        f"{size['N']}x{size['V']}" + (f" ({model})" if model else ""),
        dtype,
        partial(inputs, n=size["N"], v=size["V"], dtype=dtype, grad=grad),
        lambda x: run(partial(eager, entropy=entropy, softcap=softcap), in64(x)),
        field,
        targets=targets or {},
        roof=COPY,
        least=1.5 if grad else 0.5,  # sweeps over the logits, in copies: a copy reads and writes
        calls=calls,
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """The cases of this device: sizes for both kinds of sweep, named models, and where eager is hard to beat."""
    make = partial(partial, token_logps, setting)
    if setting.gpu:
        forward, both = {COPY: 0.88 / 0.5}, {COPY: 0.88 / 1.5}
        big = {"n": 8192, "dtype": BF16}
        trained = {**big, "grad": True, "inplace": True, "targets": both}
        return {
            "token_logps-entropy-forward-131072": make(**big, v=131072, grad=False, entropy=True, targets=forward),
            "token_logps-entropy-forward-qwen3": make(
                **big, v=151936, grad=False, entropy=True, targets=forward, model="Qwen3"
            ),
            "token_logps-forward-qwen3": make(**big, v=151936, grad=False, targets={"quack": 0.95}, model="Qwen3"),
            "token_logps-entropy-backward-qwen3": make(**trained, v=151936, entropy=True, model="Qwen3"),
            "token_logps-backward-llama3": make(**trained, v=128256, model="Llama-3"),
            "token_logps-softcap-backward-gemma2": make(
                n=4096, v=256000, dtype=BF16, grad=True, softcap=30.0, model="Gemma-2"
            ),
            "token_logps-backward-small-vocabulary": make(n=65536, v=64, dtype=FP32, grad=True),
            "token_logps-forward-few-rows": make(n=16, v=151936, dtype=BF16, grad=False, model="Qwen3"),
        }
    base = {"n": 512, "v": 32000}
    three, five = {"eager": 3.0, "torch.compile": 2.0}, {"eager": 5.0, "torch.compile": 2.0}
    return {
        "token_logps-forward-fp32": make(**base, dtype=FP32, grad=False, targets={"eager": 3.0}),
        "token_logps-forward-bf16": make(**base, dtype=BF16, grad=False, targets={"eager": 5.0}),
        "token_logps-entropy-forward-fp32": make(**base, dtype=FP32, grad=False, entropy=True, targets=three),
        "token_logps-entropy-forward-bf16": make(**base, dtype=BF16, grad=False, entropy=True, targets=five),
        "token_logps-backward-fp32": make(**base, dtype=FP32, grad=True, targets={"eager": 2.5}),
        "token_logps-backward-bf16": make(**base, dtype=BF16, grad=True, targets={"eager": 2.5}),
        "token_logps-entropy-backward-fp32": make(**base, dtype=FP32, grad=True, entropy=True, targets={"eager": 2.5}),
        "token_logps-entropy-backward-bf16": make(**base, dtype=BF16, grad=True, entropy=True, targets={"eager": 2.5}),
        "token_logps-backward-llama3": make(n=64, v=128256, dtype=BF16, grad=True, model="Llama-3"),
        "token_logps-entropy-forward-qwen3": make(n=64, v=151936, dtype=BF16, grad=False, entropy=True, model="Qwen3"),
        "token_logps-softcap-backward-gemma2": make(
            n=32, v=256000, dtype=BF16, grad=True, softcap=30.0, model="Gemma-2"
        ),
        "token_logps-backward-small-vocabulary": make(n=4096, v=64, dtype=FP32, grad=True),
        "token_logps-forward-one-row": make(n=1, v=512, dtype=FP32, grad=False),
        "token_logps-fixed-cost": make(n=64, v=256, dtype=FP32, grad=True, calls=20, targets={"eager": 1 / 3}),
    }
