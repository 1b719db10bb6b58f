"""An adapter (LoRA) on a frozen head: ``linear_loss(..., lora=)`` beside merging it into the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.cases.head import BARE, eager, gemms, linear_cross_entropy, ours
from bench.cases.head import inputs as head_inputs
from bench.field import BF16, FP32, OURS, Field, Inputs, Outputs, Setting, draw, in64, trained
from bench.measure import Case

SCALE = 2.0
LEAVES = ("hidden", "a", "b")


def inputs(generator: torch.Generator, *, n: int, d: int, v: int, rank: int, dtype: torch.dtype) -> Inputs:
    """A frozen head and an adapter some way into training."""
    x = head_inputs(generator, n=n, d=d, v=v, dtype=dtype, frozen=True)
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


def truth(x: Inputs) -> Outputs:
    """Float64, with the loss of the bare head."""
    wide = in64(x)
    return {**trained(eager_adapter, wide, LEAVES), "loss of the bare head": eager(wide).detach()}


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
    field.add_loss("eager", eager_adapter, LEAVES)
    field.add_loss("eager, merged weight", eager_merged, LEAVES)
    field.add_loss(OURS, partial(our_adapter, scored=n), LEAVES)
    field.add_loss("fastalign, merged weight", partial(our_merged, scored=n), LEAVES)
    field.add("fastalign, no adapter", partial(bare_head, scored=n))
    field.add_loss("TRL fused head, merged weight", trl_merged, LEAVES, package="trl")
    return Case(
        "linear_loss cross-entropy, adapter on a frozen head",
        f"N{n} D{d} V{v} rank {rank}",
        dtype,
        partial(inputs, n=n, d=d, v=v, rank=rank, dtype=dtype),
        truth,
        field,
        targets=targets or {},
        roof=BARE,
        least=2 / 3,
    )


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """One size."""
    make = partial(partial, adapter, setting)
    if setting.gpu:
        cheap = {"fastalign, no adapter": 1 / 1.05}
        return {"linear_loss-adapter-131072": make(n=8192, d=4096, v=131072, dtype=BF16, targets=cheap)}
    return {"linear_loss-adapter-fp32": make(n=1024, d=512, v=32000, dtype=FP32)}
