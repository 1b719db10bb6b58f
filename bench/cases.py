"""The measured cases: inputs, the float64 oracle, fastalign and its rivals.

Letters: N rows, V vocabulary, D hidden, P pairs, L tokens per sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers
from bench.measure import OURS, Case, Inputs, Outputs

BETA = 0.1
Run = Callable[[Inputs], Outputs]


# --- token_logps: log-probs from logits -------------------------------------------------------------------------------


def _logits(generator: torch.Generator, n: int, v: int, dtype: torch.dtype, grad: bool) -> Inputs:
    """Logits with the spread of a trained model's (about +-8), labels, and an upstream gradient per row."""
    return {
        "logits": (2.0 * torch.randn(n, v, generator=generator)).to(dtype).requires_grad_(grad),
        "labels": torch.randint(v, (n,), generator=generator),
        "upstream": torch.randn(n, generator=generator),
    }


def _eager_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]


def _logsumexp_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None])[:, 0] - torch.logsumexp(logits, -1)


def _upcast_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return _eager_logps(logits.float(), labels)


def _our_logps(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    from fastalign.ops import token_logps

    logps = token_logps(logits, labels, **options)  # pyright: ignore[reportArgumentType]
    assert isinstance(logps, Tensor)
    return logps


def _logps_only(f: Callable[..., Tensor], x: Inputs) -> Outputs:
    with torch.no_grad():
        return {"logps": f(x["logits"], x["labels"])}


def _logps_and_gradient(f: Callable[..., Tensor], x: Inputs) -> Outputs:
    logps = f(x["logits"], x["labels"])
    logps.backward(x["upstream"].to(logps.dtype))
    return {"logps": logps.detach(), "d_logits": _gradient(x["logits"])}


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _in64(x: Inputs) -> Inputs:
    """The same numbers in float64."""
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v for k, v in x.items()
    }


def token_logps(n: int, v: int, dtype: torch.dtype, grad: bool, targets: dict[str, float], compiled: bool) -> Case:
    """Log-probs of the labels; with ``grad`` also the gradient of the logits."""
    functions = {"eager": _eager_logps, "eager gather - logsumexp": _logsumexp_logps, OURS: _our_logps}
    functions["fastalign, torch backend"] = partial(_our_logps, backend="torch")
    if dtype != torch.float32:
        functions["eager in fp32"] = _upcast_logps
    if grad:
        functions["fastalign, in place"] = partial(_our_logps, inplace_backward=True)
    if compiled:
        functions["torch.compile"] = torch.compile(_eager_logps)
    skipped = peers.add(functions, "TRL selective_log_softmax", "trl", peers.trl_selective_log_softmax)
    skipped["Liger cross-entropy"] = "its kernels are Triton and need a GPU"
    wrap = _logps_and_gradient if grad else _logps_only
    candidates: dict[str, Run] = {name: partial(wrap, f) for name, f in functions.items()}
    candidates["roof: read and write" if grad else "roof: read"] = _read_and_write if grad else _read
    make = partial(_logits, n=n, v=v, dtype=dtype, grad=grad)
    name = "token_logps " + ("forward + backward" if grad else "forward")
    return Case(
        name, f"{n}x{v}", dtype, make, lambda x: candidates["eager"](_in64(x)), candidates, "eager", skipped, targets
    )


def _read(x: Inputs) -> Outputs:
    x["logits"].sum()
    return {}


def _read_and_write(x: Inputs) -> Outputs:
    x["logits"].detach().mul_(0.5)
    return {}


# --- linear_loss: from hidden states to a loss and its gradients ------------------------------------------------------


def _hidden(generator: torch.Generator, n: int, d: int, v: int, dtype: torch.dtype) -> Inputs:
    """Hidden states of unit scale and weights that give logits of about +-8."""
    return {
        "hidden": torch.randn(n, d, generator=generator).to(dtype).requires_grad_(),
        "weight": (torch.randn(v, d, generator=generator) * (2.0 / d**0.5)).to(dtype).requires_grad_(),
        "labels": torch.randint(v, (n,), generator=generator),
    }


def _three_gemms(x: Inputs) -> Outputs:
    """The work no exact method avoids: logits, and their products with weight and hidden states."""
    hidden, weight = x["hidden"].detach(), x["weight"].detach()
    logits = hidden @ weight.T
    logits @ weight
    logits.T @ hidden
    return {}


def _trained(loss: Tensor, x: Inputs) -> Outputs:
    """Backward from ``loss``; the outputs that are checked."""
    loss.backward()
    return {"loss": loss.detach(), "d_hidden": _gradient(x["hidden"]), "d_weight": _gradient(x["weight"])}


def _eager_cross_entropy(x: Inputs) -> Outputs:
    logits = F.linear(x["hidden"], x["weight"])
    return _trained(F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), x["labels"]), x)


def _our_cross_entropy(x: Inputs, **options: object) -> Outputs:
    from fastalign.ops import linear_loss

    n = x["labels"].numel()
    loss, _ = linear_loss(x["hidden"], x["weight"], x["labels"], lambda stats: -stats.logps.sum() / n, **options)
    return _trained(loss, x)


def _our_two_pass_cross_entropy(x: Inputs) -> Outputs:
    from fastalign.ops import linear_logps

    logps = linear_logps(x["hidden"], x["weight"], x["labels"])
    assert isinstance(logps, Tensor)
    return _trained(-logps.mean(), x)


def _trl_cross_entropy(x: Inputs) -> Outputs:
    return _trained(-peers.trl_fused_head(x["hidden"], x["weight"], x["labels"]).mean(), x)


def _compiled_cross_entropy() -> Run:
    loss = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y))
    return lambda x: _trained(loss(x["hidden"], x["weight"], x["labels"]), x)


def linear_loss(n: int, d: int, v: int, dtype: torch.dtype, targets: dict[str, float], compiled: bool) -> Case:
    """Mean cross-entropy from hidden states, with the gradients of hidden states and weight."""
    candidates: dict[str, Run] = {
        "roof: three GEMMs": _three_gemms,
        "eager": _eager_cross_entropy,
        OURS: _our_cross_entropy,
        "fastalign linear_logps": _our_two_pass_cross_entropy,
    }
    if compiled:
        candidates["torch.compile"] = _compiled_cross_entropy()
    skipped = peers.add(candidates, "TRL fused head", "trl", _trl_cross_entropy)
    skipped["Liger fused linear CE"] = "its kernels are Triton and need a GPU"
    return Case(
        "linear_loss cross-entropy",
        f"N{n} D{d} V{v}",
        dtype,
        partial(_hidden, n=n, d=d, v=v, dtype=dtype),
        lambda x: _eager_cross_entropy(_in64(x)),
        candidates,
        "eager",
        skipped,
        targets,
    )


# --- linear_loss on preference pairs ----------------------------------------------------------------------------------


def _dpo(sequence_logps: Tensor) -> Tensor:
    """DPO with a reference of zeros: ``mean_p -log sigmoid(beta (chosen_p - rejected_p))``, sequences neighbours."""
    chosen, rejected = sequence_logps.view(-1, 2).T
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _eager_dpo(x: Inputs, length: int) -> Outputs:
    logps = _eager_logps(F.linear(x["hidden"], x["weight"]), x["labels"])
    return _trained(_dpo(logps.view(-1, length).sum(1)), x)


def _trl_dpo(x: Inputs, length: int) -> Outputs:
    logps = peers.trl_fused_head(x["hidden"], x["weight"], x["labels"])
    return _trained(_dpo(logps.view(-1, length).sum(1)), x)


def _our_dpo(x: Inputs, length: int) -> Outputs:
    from fastalign.losses.reduce import segment_sum
    from fastalign.ops import linear_loss
    from fastalign.types import TokenStats

    n = x["labels"].numel()
    pairs = n // length // 2

    def loss_fn(stats: TokenStats) -> Tensor:
        assert stats.cu_seqlens is not None
        chosen, rejected = segment_sum(stats.logps, stats.cu_seqlens).view(-1, 2).T
        return -F.logsigmoid(BETA * (chosen - rejected)).sum() / pairs

    cu_seqlens = torch.arange(0, n + 1, length)
    loss, _ = linear_loss(x["hidden"], x["weight"], x["labels"], loss_fn, cu_seqlens=cu_seqlens, align="pair")
    return _trained(loss, x)


def preference_head(pairs: int, length: int, d: int, v: int, dtype: torch.dtype, compiled: bool) -> Case:
    """DPO from hidden states of pairs of equal lengths, the only layout that Liger's chunked loss takes."""
    candidates: dict[str, Run] = {
        "roof: three GEMMs": _three_gemms,
        "eager": partial(_eager_dpo, length=length),
        OURS: partial(_our_dpo, length=length),
    }
    skipped = peers.add(candidates, "TRL fused head + DPO", "trl", partial(_trl_dpo, length=length))
    liger = partial(_liger_dpo, length=length, compiled=compiled)
    skipped |= peers.add(candidates, "Liger chunked DPO", "liger_kernel", liger)
    n = 2 * pairs * length
    make = partial(_hidden, n=n, d=d, v=v, dtype=dtype)
    shape = f"P{pairs} L{length} D{d} V{v}"
    return Case(
        "linear_loss DPO", shape, dtype, make, lambda x: _eager_dpo(_in64(x), length), candidates, "eager", skipped
    )


def _liger_dpo(x: Inputs, length: int, compiled: bool) -> Outputs:
    return _trained(peers.liger_dpo(x["hidden"], x["weight"], x["labels"], length, BETA, compiled), x)


FP32, BF16 = torch.float32, torch.bfloat16
CASES: dict[str, Callable[..., Case]] = {
    "token_logps-forward-fp32": partial(token_logps, 512, 32000, FP32, False, {"eager": 3.0}),
    "token_logps-forward-bf16": partial(token_logps, 512, 32000, BF16, False, {"eager": 5.0}),
    "token_logps-backward-fp32": partial(token_logps, 512, 32000, FP32, True, {"eager": 2.5}),
    "token_logps-backward-bf16": partial(token_logps, 512, 32000, BF16, True, {}),
    "token_logps-backward-small-vocabulary": partial(token_logps, 4096, 64, FP32, True, {}),
    "linear_loss-fp32": partial(
        linear_loss, 1024, 512, 32000, FP32, {"roof: three GEMMs": 1 / 1.30, "TRL fused head": 1.5}
    ),
    "linear_loss-bf16": partial(linear_loss, 1024, 512, 32000, BF16, {}),
    "linear_loss-small-vocabulary": partial(linear_loss, 256, 512, 512, FP32, {}),
    "preference_head-fp32": partial(preference_head, 8, 64, 512, 32000, FP32),
}
