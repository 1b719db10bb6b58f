"""``sample`` and ``linear_sample``: a token of each row with its log-prob, as a decoding step draws it.

One column of each row is far above the others: every right sampler draws it, whatever its noise, and works as hard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases.head import gemms
from bench.field import BF16, FP32, OURS, ROOF, Field, Inputs, Outputs, Setting, draw, integers
from bench.measure import Case

PEAK = 60.0
"""The logit of the column that is drawn; what the others have is lost in fp32."""


def logits_inputs(generator: torch.Generator, *, n: int, v: int, dtype: torch.dtype) -> Inputs:
    """Logits with the spread of a trained model's, the column that is drawn, and the row's noise."""
    peak = integers(generator, v, n)
    logits = draw(generator, n, v, scale=2.0).scatter_(1, peak[:, None], PEAK).to(dtype)
    return {"logits": logits, "peak": peak, **noise(generator, v, n)}


def hidden_inputs(generator: torch.Generator, *, n: int, d: int, v: int, dtype: torch.dtype) -> Inputs:
    """Hidden states that lie in the direction of a row of the weight."""
    peak = integers(generator, v, n)
    weight = torch.nn.functional.normalize(draw(generator, v, d)) * 2
    hidden = weight[peak] * PEAK
    return {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "peak": peak, **noise(generator, v, n)}


def noise(generator: torch.Generator, v: int, n: int) -> Inputs:
    """Keys and positions."""
    return {"keys": integers(generator, v, n), "positions": integers(generator, v, n)}


# --- candidates ------------------------------------------------------------------------------------------------------


def multinomial(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As in transformers' ``generate``."""
    log_p = torch.log_softmax(logits.float(), -1)
    tokens = torch.multinomial(log_p.exp(), 1)
    return tokens[:, 0], log_p.gather(1, tokens)[:, 0]


def exponential_race(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As in vLLM: the largest of p over exponential noise."""
    log_p = torch.log_softmax(logits.float(), -1)
    tokens = log_p.exp().div_(torch.empty_like(log_p).exponential_()).argmax(-1)
    return tokens, log_p.gather(1, tokens[:, None])[:, 0]


def top_p_by_sort(logits: Tensor, *, top_p: float) -> tuple[Tensor, Tensor]:
    """As in transformers: a sort, a cumulated sum, a scatter."""
    ordered, places = torch.sort(logits.float())
    cut = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    cut[:, -1] = False
    return multinomial(logits.float().masked_fill(cut.scatter(1, places, cut), -torch.inf))


def from_logits(sampler: Callable[[Tensor], tuple[Tensor, Tensor]], x: Inputs) -> Outputs:
    """Tokens as a number that can be compared."""
    with torch.no_grad():
        return {"tokens": sampler(x["logits"])[0].double()}


def from_hidden(sampler: Callable[[Tensor], tuple[Tensor, Tensor]], x: Inputs) -> Outputs:
    """The same after the head's product."""
    with torch.no_grad():
        return {"tokens": sampler(x["hidden"] @ x["weight"].t())[0].double()}


def ours(x: Inputs, **options: Any) -> Outputs:
    """The op that is measured."""
    from fastalign.ops import sample

    return {"tokens": sample(x["logits"], x["keys"], x["positions"], **options)[0].double()}


def our_head(x: Inputs, **options: Any) -> Outputs:
    """The same from hidden states."""
    from fastalign.ops import linear_sample

    return {"tokens": linear_sample(x["hidden"], x["weight"], x["keys"], x["positions"], **options)[0].double()}


# --- cases -----------------------------------------------------------------------------------------------------------


def draws(setting: Setting, *, n: int, v: int, dtype: torch.dtype, top_p: float = 1.0, calls: int = 1) -> Case:
    """From logits that exist."""
    size, field = setting.sizes(N=n, V=v), Field(setting)
    n, v = size["N"], size["V"]
    if top_p < 1:
        field.add("eager", partial(from_logits, partial(top_p_by_sort, top_p=top_p)))
    else:
        field.add("eager", partial(from_logits, multinomial))
        field.add("exponential race (vLLM)", partial(from_logits, exponential_race))
    field.add(OURS, partial(ours, top_p=top_p))
    field.add("fastalign, torch backend", partial(ours, top_p=top_p, backend="torch"))
    make = partial(logits_inputs, n=n, v=v, dtype=dtype)
    name = "sample" + (f" top-p {top_p}" if top_p < 1 else "")
    return Case(name, f"N{n} V{v}", dtype, make, truth, field, calls=calls)


def truth(x: Inputs) -> Outputs:
    """The column far above the others."""
    return {"tokens": x["peak"].double()}


def head_draws(setting: Setting, *, n: int, d: int, v: int, dtype: torch.dtype, calls: int = 1) -> Case:
    """From hidden states."""
    size, field = setting.sizes(N=n, D=d, V=v), Field(setting)
    n, d, v = size["N"], size["D"], size["V"]
    roof = ROOF + "one GEMM"
    field.runs[roof] = gemms(1)
    field.add("eager", partial(from_hidden, multinomial))
    field.add("exponential race (vLLM)", partial(from_hidden, exponential_race))
    field.add(OURS, our_head)
    make = partial(hidden_inputs, n=n, d=d, v=v, dtype=dtype)
    return Case("linear_sample", f"N{n} D{d} V{v}", dtype, make, truth, field, roof=roof, calls=calls)


def cases(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Decoding steps."""
    kinds = (partial(partial, kind, setting) for kind in (draws, head_draws))
    return (gpu_cases if setting.gpu else cpu_cases)(*kinds)


def cpu_cases(logits, hidden) -> dict[str, Callable[[], Case]]:
    return {
        "sample-fp32": logits(n=64, v=8192, dtype=FP32, calls=10),
        "sample-bf16": logits(n=64, v=8192, dtype=BF16, calls=10),
        "sample-top-p-fp32": logits(n=64, v=8192, dtype=FP32, top_p=0.9, calls=3),
        "linear_sample-fp32": hidden(n=64, d=256, v=8192, dtype=FP32, calls=5),
    }


def gpu_cases(logits, hidden) -> dict[str, Callable[[], Case]]:
    return {
        "sample-151936": logits(n=256, v=151936, dtype=BF16),
        "sample-top-p-151936": logits(n=256, v=151936, dtype=BF16, top_p=0.9),
        "linear_sample-151936": hidden(n=256, d=4096, v=151936, dtype=BF16),
    }
