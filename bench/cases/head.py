"""The LM head: cross-entropy by ``linear_loss`` from hidden states, beside every head that can be had.

One GEMM over the head costs 2NVD. The least for a loss with all gradients is three of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.field import (
    BF16,
    FP16,
    FP32,
    OURS,
    ROOF,
    Field,
    Inputs,
    Loss,
    Outputs,
    Setting,
    capability,
    draw,
    in64,
    integers,
    trained,
)
from bench.measure import Case

TRITON = "its kernels are Triton"
BARE = ROOF + "three GEMMs"


def inputs(
    generator: torch.Generator,
    *,
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    frozen: bool = False,
    masked: float = 0.0,
) -> Inputs:
    """Hidden states of unit scale, weights that give logits of about +-8, labels of which a share is not scored."""
    labels, count = integers(generator, v, n), scored_rows(n, masked)
    scored = torch.randperm(n, generator=generator, device=generator.device) < count
    return {
        "hidden": draw(generator, n, d, dtype=dtype).requires_grad_(),
        "weight": draw(generator, v, d, scale=2.0 / d**0.5, dtype=dtype).requires_grad_(not frozen),
        "labels": labels.where(scored, -100),
        "all_labels": labels,
        "count": scored.sum(),
        "upstream": draw(generator, n),
    }


def scored_rows(n: int, masked: float) -> int:
    """How many rows are scored: known beforehand, as to a trainer that made the labels."""
    return n - round(n * masked)


# --- roofs -----------------------------------------------------------------------------------------------------------


def gemms(count: int) -> Callable[[Inputs], Outputs]:
    """The bare products: logits; the gradients of hidden states and weight; a fourth makes logits again."""

    def run(x: Inputs) -> Outputs:
        hidden, weight = x["hidden"].detach(), x["weight"].detach()
        logits = hidden @ weight.T
        if count > 1:
            logits @ weight
        if count > 2:
            logits.T @ hidden
        if count > 3:
            torch.mm(hidden, weight.T, out=logits)
        return {}

    return run


# --- cross-entropy ---------------------------------------------------------------------------------------------------


def eager(x: Inputs, *, softcap: float | None = None) -> Tensor:
    """Logits in full and torch's cross-entropy in fp32."""
    return linear_cross_entropy(x["hidden"], x["weight"], x["labels"], softcap)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), labels)


def ours(x: Inputs, *, scored: int, labels: str = "labels", **options) -> Tensor:
    """The op that is measured, given the loss as a function of log-probs."""
    from fastalign.ops import linear_loss

    rows, options = (x["hidden"], x["weight"], x[labels]), {"num_scored": scored, **options}
    return linear_loss(*rows, lambda stats: -stats.logps.sum() / scored, **options)[0]


def ours_composable(x: Inputs, *, scored: int, **options) -> Tensor:
    """Differentiable log-probs: what any autograd code can continue from."""
    from fastalign.ops import linear_logps

    logps = linear_logps(x["hidden"], x["weight"], x["labels"], num_scored=scored, **options)
    assert isinstance(logps, Tensor)
    return -logps.sum() / scored


def of_logps(head: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Cross-entropy by a head that returns log-probs."""
    return lambda x: -head(x["hidden"], x["weight"], x["labels"]).sum() / x["count"]


def of_mean(head: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    """Cross-entropy by a head that returns the mean itself."""
    return lambda x: head(x["hidden"], x["weight"], x["labels"])


def token_head_name(setting: Setting) -> str:
    """Liger's per-token op is two programs."""
    native = setting.gpu and capability() == (9, 0)
    return "Liger SM90 per-token op" if native else "Liger per-token op (verl's chunks)"


def add_heads(field: Field, softcap: float | None = None) -> None:
    """Every peer's cross-entropy from hidden states."""
    setting = field.setting
    compiled = torch.compile(partial(linear_cross_entropy, softcap=softcap), dynamic=False)
    field.add_loss("torch.compile", of_mean(compiled), compiled=True)
    liger = partial(peers.liger_head, softcap=softcap)
    field.add_loss("Liger fused linear CE", of_mean(liger), package="liger_kernel", gpu=TRITON)
    package = {"package": "cut-cross-entropy"}
    if setting.gpu:
        field.add_loss("cut-cross-entropy", of_mean(peers.cut_cross_entropy(softcap)), **package)
        exact = peers.cut_cross_entropy(softcap, filter_eps=None)
        field.add_loss("cut-cross-entropy, exact", of_mean(exact), **package)
    else:
        torch_compile = peers.cut_cross_entropy(softcap, impl="torch_compile")
        field.add_loss("cut-cross-entropy's compiled", of_mean(torch_compile), compiled=True, **package)
    if softcap is None:
        field.add_loss("TRL fused head", of_logps(peers.trl_head), package="trl")
        field.add_loss(token_head_name(setting), of_logps(peers.liger_token_head), package="liger_kernel")
        field.add_loss("verl's chunked head", of_logps(peers.verl_head), package="verl")
        field.add_loss("quack linear CE", of_mean(peers.quack_head), package="quack-kernels", gpu="CUDA", hopper=True)


def cross_entropy(
    setting: Setting,
    *,
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    frozen: bool = False,
    masked: float = 0.0,
    softcap: float | None = None,
    model: str = "",
    calls: int = 1,
    targets: dict[str, float] | None = None,
) -> Case:
    """Mean cross-entropy with the gradients of hidden states and, unless ``frozen``, weight.

    Args:
        masked: the share of rows that are not scored.
    """
    size = setting.sizes(N=n, D=d, V=v)
    n, d, v = size["N"], size["D"], size["V"]
    field, scored = Field(setting), scored_rows(n, masked)
    field.runs[BARE] = gemms(3)
    field.add_loss("eager", partial(eager, softcap=softcap))
    field.add_loss(OURS, partial(ours, scored=scored, softcap=softcap))
    if dtype in (BF16, FP16):
        field.add_loss("fastalign, logits in fp32", partial(ours, scored=scored, softcap=softcap, logits="float32"))
    field.add_loss("fastalign linear_logps", partial(ours_composable, scored=scored, softcap=softcap))
    add_heads(field, softcap)
    if frozen:
        field.add("fastalign, trainable head", partial(with_trainable_head, scored=scored))
    if masked:
        field.add("fastalign, every row", every_row)
        if not setting.gpu:
            selected = of_logps(partial(peers.trl_head, select=True))
            field.add_loss("TRL fused head, rows selected", selected, package="trl")
    name = "linear_loss cross-entropy" + (", frozen head" if frozen else "") + (", softcap" if softcap else "")
    return Case(
        name + (f", {masked:.0%} masked" if masked else ""),
        f"N{n} D{d} V{v}" + (f" ({model})" if model else ""),
        dtype,
        partial(inputs, n=n, d=d, v=v, dtype=dtype, frozen=frozen, masked=masked),
        partial(truth, masked=masked, softcap=softcap),
        field,
        targets=targets or {},
        roof=BARE,
        least=(2 / 3 if frozen else 1.0) * (1 - masked),
        calls=calls,
    )


def truth(x: Inputs, *, masked: float, softcap: float | None) -> Outputs:
    """Float64, with the loss of all rows where one candidate scores them all."""
    wide = in64(x)
    found = trained(partial(eager, softcap=softcap), {**wide, "weight": wide["weight"].requires_grad_()})
    if masked:
        found["loss of all rows"] = eager({**wide, "labels": x["all_labels"]}).detach()
    return found


def with_trainable_head(x: Inputs, *, scored: int) -> Outputs:
    """The same inputs, the head's gradient made as well."""
    return trained(partial(ours, scored=scored), {**x, "weight": x["weight"].requires_grad_()})


def every_row(x: Inputs) -> Outputs:
    """The same rows, all of them scored."""
    every = partial(ours, labels="all_labels", scored=len(x["labels"]))
    return {"loss of all rows": trained(every, x)["loss"]}


# --- an adapter (LoRA) on a frozen head: `lora=` beside merging it into the weight -----------------------------------

SCALE = 2.0
ADAPTER = ("hidden", "a", "b")


def adapter_inputs(generator: torch.Generator, *, n: int, d: int, v: int, rank: int, dtype: torch.dtype) -> Inputs:
    """A frozen head and an adapter some way into training."""
    x = inputs(generator, n=n, d=d, v=v, dtype=dtype, frozen=True)
    x["a"] = draw(generator, rank, d, scale=d**-0.5, dtype=dtype).requires_grad_()
    x["b"] = draw(generator, v, rank, scale=0.2, dtype=dtype).requires_grad_()
    return x


def merged(x: Inputs) -> Tensor:
    """The weight with the adapter in it: ``[V, D]``, trained through the adapter."""
    return x["weight"] + SCALE * (x["b"] @ x["a"])


def eager_adapter(x: Inputs) -> Tensor:
    """Two more products onto logits in full."""
    extra = SCALE * F.linear(F.linear(x["hidden"], x["a"]), x["b"])
    logits = F.linear(x["hidden"], x["weight"]) + extra
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), x["labels"])


def eager_merged(x: Inputs) -> Tensor:
    """One product with the merged weight."""
    return linear_cross_entropy(x["hidden"], merged(x), x["labels"])


def our_adapter(x: Inputs, *, scored: int) -> Tensor:
    return ours(x, scored=scored, lora=(x["a"], x["b"], SCALE))


def our_merged(x: Inputs, *, scored: int) -> Tensor:
    return ours({**x, "weight": merged(x)}, scored=scored)


def trl_merged(x: Inputs) -> Tensor:
    """TRL's head takes no adapter: the weight is merged first."""
    return -peers.trl_head(x["hidden"], merged(x), x["labels"]).mean()


def bare_head(x: Inputs, *, scored: int) -> Outputs:
    """The frozen head without its adapter."""
    found = trained(partial(ours, scored=scored), x)
    return {"loss of the bare head": found["loss"]}


def adapter_truth(x: Inputs) -> Outputs:
    """Float64, with the loss of the bare head."""
    wide = in64(x)
    return {**trained(eager_adapter, wide, ADAPTER), "loss of the bare head": eager(wide).detach()}


def adapter(
    setting: Setting,
    *,
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype,
    rank: int = 16,
    targets: dict[str, float] | None = None,
) -> Case:
    """Mean cross-entropy with the gradients of hidden states and adapter."""
    size = setting.sizes(N=n, D=d, V=v)
    n, d, v = size["N"], size["D"], size["V"]
    field = Field(setting)
    field.runs[BARE] = gemms(3)
    field.add_loss("eager", eager_adapter, ADAPTER)
    field.add_loss("eager, merged weight", eager_merged, ADAPTER)
    field.add_loss(OURS, partial(our_adapter, scored=n), ADAPTER)
    field.add_loss("fastalign, merged weight", partial(our_merged, scored=n), ADAPTER)
    field.add("fastalign, no adapter", partial(bare_head, scored=n))
    field.add_loss("TRL fused head, merged weight", trl_merged, ADAPTER, package="trl")
    return Case(
        "linear_loss cross-entropy, adapter on a frozen head",
        f"N{n} D{d} V{v} rank {rank}",
        dtype,
        partial(adapter_inputs, n=n, d=d, v=v, rank=rank, dtype=dtype),
        adapter_truth,
        field,
        targets=targets or {},
        roof=BARE,
        least=2 / 3,
    )


# --- the list --------------------------------------------------------------------------------------------------------


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """The one-pass head, frozen, masked, with an adapter; named models; sizes where plain torch wins."""
    kinds = (cross_entropy, adapter)
    return (gpu_cases if setting.gpu else cpu_cases)(*(partial(partial, kind, setting) for kind in kinds))


def cpu_cases(head, adapted) -> dict[str, Callable[[], Case]]:
    base = {"n": 1024, "d": 512, "v": 32000}
    wanted = {BARE: 1 / 1.20, "TRL fused head": 1.8}
    half, skip = {"fastalign, trainable head": 1 / 0.75}, {"fastalign, every row": 1 / 0.45}
    return {
        "linear_loss-fp32": head(**base, dtype=FP32, targets=wanted),
        "linear_loss-bf16": head(**base, dtype=BF16, targets=wanted),
        "linear_loss-fp16": head(**base, dtype=FP16),
        "linear_loss-frozen-fp32": head(**base, dtype=FP32, frozen=True, targets=half),
        "linear_loss-frozen-bf16": head(**base, dtype=BF16, frozen=True, targets=half),
        "linear_loss-frozen-fp16": head(**base, dtype=FP16, frozen=True),
        "linear_loss-masked-fp32": head(**base, dtype=FP32, masked=0.6, targets=skip),
        "linear_loss-masked-bf16": head(**base, dtype=BF16, masked=0.6, targets=skip),
        "linear_loss-masked-fp16": head(**base, dtype=FP16, masked=0.6),
        "linear_loss-adapter-fp32": adapted(**base, dtype=FP32),
        "linear_loss-qwen3": head(n=128, d=1024, v=151936, dtype=BF16, model="Qwen3-0.6B"),
        "linear_loss-small-vocabulary": head(n=256, d=512, v=512, dtype=FP32),
        "linear_loss-few-rows": head(n=4, d=512, v=32000, dtype=FP32),
        "linear_loss-fixed-cost": head(n=64, d=64, v=256, dtype=FP32, calls=20, targets={"eager": 1 / 3}),
    }


def gpu_cases(head, adapted) -> dict[str, Callable[[], Case]]:
    triton = {"TRL fused head": 3.0, "Liger fused linear CE": 3.0}
    one = {BARE: 1 / 1.12, **triton, "Liger SM90 per-token op": 1.2, "quack linear CE": 0.95}
    one |= {"cut-cross-entropy": 1.2, "cut-cross-entropy, exact": 1.7}
    two, skip, cheap = (
        {BARE: 1 / 0.72, **triton},
        {"fastalign, every row": 1 / 0.45},
        {"fastalign, no adapter": 1 / 1.05},
    )
    big = {"n": 8192, "d": 4096, "dtype": BF16}
    found: dict[str, Callable[[], Case]] = {}
    for v, model in ((131072, ""), (151936, "Qwen3-8B")):
        tag = model.lower() or str(v)
        found |= {
            f"linear_loss-{tag}": head(**big, v=v, targets=one, model=model),
            f"linear_loss-frozen-{tag}": head(**big, v=v, frozen=True, targets=two, model=model),
        }
    llama = {"n": 4096, "d": 4096, "v": 128256, "dtype": BF16, "model": "Llama-3-8B"}
    return {
        **found,
        "linear_loss-fp16-131072": head(n=8192, d=4096, v=131072, dtype=FP16, targets={BARE: 1 / 1.12}),
        "linear_loss-masked-131072": head(**big, v=131072, masked=0.6, targets=skip),
        "linear_loss-adapter-131072": adapted(**big, v=131072, targets=cheap),
        "linear_loss-llama3": head(**llama, targets={"quack linear CE": 0.95}),
        "linear_loss-gemma2": head(n=8192, d=2304, v=256000, dtype=BF16, softcap=30.0, model="Gemma-2-2B"),
        "linear_loss-small-vocabulary": head(n=4096, d=1024, v=512, dtype=BF16),
        "linear_loss-few-rows": head(n=16, d=4096, v=151936, dtype=BF16, model="Qwen3-8B"),
    }
