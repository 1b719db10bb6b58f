"""Token losses of SFT and policy gradients straight from logits: loss and gradient in one read of the logits.

    loss = sum_t w_t (-A_t value(l_t, r_t) + kl_coef kl_t - entropy_coef H_t),     l = logps,  r = exp(l - l_old)

The row's coefficient is computed inside the kernel (``fastalign.ops.functors`` defines it), so that the
gradient is written while the row is still in cache, for an upstream gradient of 1; backward scales it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastalign.ops import dispatch
from fastalign.ops.backends.torch.policy_loss import tabulate, write_gradient
from fastalign.ops.backends.torch.token_logps import row_blocks
from fastalign.ops.checks import (
    check_device,
    check_in_place,
    check_labels,
    check_matrix,
    check_scaling,
    split_temperature,
    stats_dtype,
)
from fastalign.ops.final import mark
from fastalign.ops.functors import COLUMNS, FUNCTORS, KL_ESTIMATORS, Knobs, check_loss, columns, make_knobs, ratio_of
from fastalign.ops.half import power_of_two, row_bound
from fastalign.ops.parallel import agree, checked_together
from fastalign.ops.rows import Coefficients
from fastalign.ops.token_logps import Call as TokenCall
from fastalign.ops.token_logps import facts, statistics
from fastalign.ops.token_logps import reference as token_reference
from fastalign.types import IGNORE_INDEX, TokenStats

# --- reference -------------------------------------------------------------------------------------------------------


def reference(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    advantages: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    *,
    loss: str,
    kl_estimator: str,
    knobs: Knobs,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The specification: log-probs, then the value of each functor and of the KL, differentiated by autograd."""
    rows = labels != IGNORE_INDEX
    every, entropies = token_reference(logits, labels, temperature=temperature, softcap=softcap, entropy=True)
    assert entropies is not None
    logps, entropy, weights = every[rows], entropies[rows], weights[rows].to(every.dtype)
    a = torch.ones_like(logps) if advantages is None else advantages[rows].to(logps.dtype)
    ratio = ratio_of(logps - (logps.detach() if old_logps is None else old_logps[rows].to(logps.dtype)))
    value, *_ = FUNCTORS[loss](logps, ratio, ratio > 0, a, knobs)
    losses = -a * value - knobs.entropy_coef * entropy
    if ref_logps is not None and knobs.kl_coef != 0:
        losses = losses + knobs.kl_coef * KL_ESTIMATORS[kl_estimator](ref_logps[rows].to(logps.dtype) - logps)[0]
    return (weights * losses).sum()


# --- custom op -------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """The op's arguments, in the order of its schema."""

    logits: Tensor
    labels: Tensor
    temperatures: Tensor | None
    weights: Tensor
    advantages: Tensor | None
    old_logps: Tensor | None
    ref_logps: Tensor | None
    loss: str
    kl_estimator: str
    knobs: list[float]
    temperature: float
    softcap: float | None
    entropy: bool
    backend: str | None
    group: str | None
    shards: list[int] | None

    @property
    def tokens(self) -> TokenCall:
        """The same rows as ``token_logps`` is called with them."""
        scaling = (self.temperatures, self.temperature, self.softcap)
        return TokenCall(self.logits, self.labels, *scaling, self.backend, self.group, self.shards)


SCHEMA = (
    "Tensor logits, Tensor labels, Tensor? temperatures, Tensor weights, Tensor? advantages, Tensor? old_logps, "
    "Tensor? ref_logps, str loss, str kl_estimator, float[] knobs, float temperature, float? softcap, bool entropy, "
    "str? backend, str? group, int[]? shards"
)
TENSORS = 7
"""So many of the arguments are tensors."""


def _compute(out: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
    """The loss and the table; the gradient, in fp16 times ``_row_scale``, goes into ``out``.

    In two sweeps over a split vocabulary, whose ranks exchange their statistics in between, and in fp16, where the
    row's coefficients decide its scale.
    """
    late = out is not None and (call.group is not None or call.logits.dtype == torch.float16)
    tokens, rows = call.tokens, (call.weights, call.advantages, call.old_logps, call.ref_logps)
    choice = {"loss": call.loss, "kl_estimator": call.kl_estimator, "knobs": Knobs(*call.knobs)}
    if call.group is None:
        run = dispatch.kernels("policy_loss", call.backend, call.logits.device, call.logits.dtype).run
        table = run(
            None if late else out,
            call.logits,
            tokens.rows()[0],
            *rows,
            **choice,
            entropy=call.entropy,
            **tokens.scaling,
        )
    else:
        table = tabulate(statistics(tokens, call.entropy, top1=True), call.labels, *rows, **choice)
    if out is not None and late:
        _write_gradient(out, call, table)
    return columns(table)["loss"].sum(dtype=torch.float64).to(table.dtype), table


def _write_gradient(out: Tensor, call: _Call, table: Tensor) -> None:
    """The gradient from the table, by the backward sweep of ``token_logps``; in fp16 times ``_row_scale``."""
    tokens, column, scale = call.tokens, columns(table), _row_scale(call, table)
    if scale is not None:
        column |= {name: column[name] * scale for name in ("g", "alpha", "beta")}
    if out.numel():
        sweep, (labels, _) = tokens.sweep.backward, tokens.rows()
        write_gradient(out, call.logits, labels, column, Knobs(*call.knobs), sweep, **tokens.scaling)


def _row_scale(call: _Call, table: Tensor) -> Tensor | None:
    """``[N]`` the power of two by which a row's fp16 gradient is scaled until backward (``half``), or None."""
    if call.logits.dtype != torch.float16:
        return None
    column, tau = columns(table), call.tokens.scaling["temperature"]
    bonus = (column["alpha"], column["beta"]) if Knobs(*call.knobs).entropy_coef != 0 else ()
    return power_of_two(row_bound(Coefficients(column["g"], *bonus), 1 / tau))


@torch.library.custom_op(
    "fastalign::policy_loss", mutates_args=(), schema=f"({SCHEMA}, bool gradient) -> (Tensor, Tensor, Tensor)"
)
def _op(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the table, and the gradient for an upstream of 1 (``[0]`` when not wanted), in fp16 scaled."""
    *args, gradient = args
    call = _Call(*args)
    grad = torch.empty(call.logits.shape if gradient else 0, dtype=call.logits.dtype, device=call.logits.device)
    return *_compute(grad if gradient else None, call), grad


@_op.register_fake
def _(logits, labels, *rest):
    row = torch.empty(len(COLUMNS), logits.shape[0], dtype=stats_dtype(logits), device=logits.device)
    return row.new_empty(()), row, torch.empty(logits.shape if rest[-1] else 0, dtype=logits.dtype, device=row.device)


def _setup_context(ctx, inputs, output) -> None:
    (*args, _), (_, table, grad) = inputs, output
    ctx.mark_non_differentiable(table, grad)
    ctx.set_materialize_grads(False)
    half = grad.dtype == torch.float16
    ctx.options = args[TENSORS:]
    ctx.save_for_backward(grad, *((*args[:TENSORS], table) if half else ()))


def _backward(ctx, upstream, *_):
    grad, *saved = ctx.saved_tensors
    if upstream is not None and saved:
        *tensors, table = saved
        scale = _row_scale(_Call(*tensors, *ctx.options), table)
        assert scale is not None
        grad = (grad * (upstream / scale)[:, None]).to(grad.dtype)
    elif upstream is not None:
        grad = grad * upstream
    return None if upstream is None else grad, *(None,) * len(_Call._fields)


_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The op outside of tracing: the gradient is returned without a copy and may overwrite the logits."""

    @staticmethod
    def forward(ctx, inplace, *args):
        call = _Call(*args)
        logits = call.logits
        out = logits.detach() if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        loss, table = _compute(out, call)
        if inplace:  # whoever else saved these logits must fail, not read gradients
            torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(*((None,) * (TENSORS + 1) if inplace else (*call[:TENSORS], table)))
        ctx.made, ctx.inplace, ctx.options = [(out, _row_scale(call, table))], inplace, call[TENSORS:]
        ctx.mark_non_differentiable(table)
        ctx.set_materialize_grads(False)
        return loss, table

    @staticmethod
    def backward(ctx, upstream, _):
        if ctx.inplace and (torch.is_grad_enabled() or not ctx.made):
            again = "double backward" if torch.is_grad_enabled() else "a second backward"
            raise RuntimeError(f"policy_loss: {again} is not supported with inplace=True: it overwrote the logits")
        others = (None,) * (len(_Call._fields) - 1)
        if upstream is None:
            return None, None, *others
        with torch.no_grad():
            made, scale = ctx.made.pop() if ctx.made else _again(ctx)
            grad = _scaled(made, scale, upstream)
        return None, mark("policy_loss", grad, ctx.saved_tensors[0]) if torch.is_grad_enabled() else grad, *others


def _again(ctx) -> tuple[Tensor, Tensor | None]:
    """The gradient again, for a second backward, from the saved table; and its scale."""
    *tensors, table = ctx.saved_tensors
    call = _Call(*tensors, *ctx.options)
    out = torch.empty(call.logits.shape, dtype=call.logits.dtype, device=call.logits.device)
    _write_gradient(out, call, table)
    return out, _row_scale(call, table)


def _scaled(grad: Tensor, scale: Tensor | None, upstream: Tensor) -> Tensor:
    """``grad / scale * upstream`` in place, skipped where the factor is 1; on CUDA without a host sync.

    An fp16 gradient is multiplied in fp32, block of rows by block of rows.
    """
    if scale is not None:
        factors = (upstream / scale)[:, None]
        for rows in row_blocks(grad):
            grad[rows] = grad[rows] * factors[rows]
    elif grad.device.type != "cpu" and dispatch.missing("triton") is None:
        dispatch.kernels("policy_loss", "triton", grad.device).scale(grad, upstream)
    elif grad.device.type != "cpu" or upstream.item() != 1.0:
        grad.mul_(upstream)
    return grad


# --- public ----------------------------------------------------------------------------------------------------------


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    old_logps: Tensor | None = None,
    advantages: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    loss: str = "ppo",
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    dual_clip: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    process_group: torch.distributed.ProcessGroup | None = None,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, TokenStats]:
    """A token loss of policy gradients, or SFT, with its gradient made in the same read of the logits.

    With ``l`` the label's log-prob under ``softmax(softcap(logits) / temperature)`` and ``r = exp(l - old_logps)``, the
    loss is ``sum_t w_t (l_t + kl_coef kl_t - entropy_coef H_t)``, where ``l_t`` is

    - ``"sft"``: ``-l``;  ``"pg"``: ``-A l`` (REINFORCE, ReMax);
    - ``"ppo"``: ``max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))``, Schulman et al. 2017, eq. 7; with ``dual_clip``
      c, for ``A < 0`` at most ``-A c``, Ye et al. 2020. A clip is inactive on its boundary;
    - ``"cispo"``: ``-A sg(clip(r, 1 - clip_low, 1 + clip_high)) l``, MiniMax-M1 (arXiv 2506.13585), whose
      ``clip_low`` is None: no lower bound;
    - ``"sapo"``: ``-A (4 / tau) s(tau (r - 1))``, ``s`` the logistic function and tau ``tau_pos`` if ``A > 0``, else
      ``tau_neg``, Soft Adaptive Policy Optimization (arXiv 2511.20347).

    ``kl`` estimates KL(policy || reference): k2 ``(l - l_ref)^2 / 2`` or k3 ``exp(l_ref - l) - (l_ref - l) - 1``.
    Log-ratios are clamped to +-20 before ``exp``, with no gradient outside.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, any strides.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored: its gradient is exactly 0, and neither its
            logits nor anything else of it is read.
        old_logps: ``[N]`` log-probs under the policy that sampled; None for the current policy: the ratio is exactly 1.
        advantages: ``[N]``; None for "sft" alone.
        ref_logps: ``[N]`` log-probs under the reference, for the KL; with ``kl_coef=0`` it is a metric only.
        loss: the name of the loss.
        clip_low, clip_high: distance of the ratio's bounds from 1, None for no bound; "ppo" and "cispo".
        dual_clip: c > 1 above, "ppo" only.
        tau_pos, tau_neg: gates of "sapo".
        kl_coef, kl_estimator: weight of the KL in the loss; "k2" or "k3" (k1 has no useful gradient).
        entropy_coef: weight of the entropy bonus.
        weights: ``[N]`` weight of each token; by default 1 / number of scored rows.
        temperature: a positive number or ``[N]``; gets no gradient.
        softcap: ``cap * tanh(logits / cap)`` before the temperature.
        entropy: return the entropy also when it has no weight.
        process_group: as in ``token_logps``: ``logits`` are then this rank's columns, all else is the same everywhere.
            Loss and statistics have the same bits on every rank. The logits are then read twice. (So are fp16 logits
            in any case: their gradient is kept scaled by a power of two per row until backward.)
        inplace: overwrite ``logits`` with their gradient, in this call, instead of allocating ``[N, V]``: nothing else
            may use them. An earlier op that needs them in its backward raises; logits whose elements share memory are
            refused. Ignored where no gradient is recorded, and under ``torch.compile``, which plans memory.
        backend: "torch", "cpp", "triton", "cuda" or None for the best one here.

    Returns:
        loss ``[]`` in fp32 (fp64 for fp64 logits), connected to the graph, and the detached ``TokenStats`` of all rows.
        Its metrics are fp64 ``[2]`` (sum, count) over scored rows: ``ratio``, ``kl`` if there is a reference, and for
        losses that clip ``clip_ratio/low`` and ``clip_ratio/high``, the tokens on which a bound acts.

    Raises:
        ValueError: a wrong argument; a CPU label outside ``[0, V)`` (on CUDA that row becomes NaN).
        RuntimeError: double backward; a second backward after ``inplace`` (otherwise it recomputes).

    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> loss, stats = policy_loss(logits, torch.tensor([1, -100]), advantages=torch.tensor([2.0, 0.0]))
    >>> loss.item(), stats.metrics["ratio"]
    (-2.0, tensor([1., 1.], dtype=torch.float64))
    """
    given = {"weights": weights, "advantages": advantages, "old_logps": old_logps, "ref_logps": ref_logps}
    with checked_together(process_group, logits):
        knobs = make_knobs(clip_low, clip_high, dual_clip, tau_pos, tau_neg, kl_coef, entropy_coef)
        check_matrix("logits", logits, "[N, V]")
        check_labels(labels, logits, "logits")
        check_loss(loss, advantages, dual_clip, kl_coef, ref_logps, kl_estimator)
        check_scaling(temperature, softcap, labels)
        check_in_place("inplace", inplace, logits)
        prepared = {name: _row(name, x, logits) for name, x in given.items()}
        same = facts("policy_loss", logits, process_group, backend)
    same |= {name: "None" if x is None else "given" for name, x in given.items()}
    number, temperatures = split_temperature(temperature, logits, stats_dtype(logits))
    scored = labels != IGNORE_INDEX
    if weights is None:
        mean = scored.sum().clamp(min=1).to(stats_dtype(logits)).reciprocal().expand(labels.shape)
        prepared["weights"] = mean.contiguous()
    rows, asked = (temperatures, *prepared.values()), entropy or entropy_coef != 0
    same |= {"temperature": temperature, "softcap": softcap, "entropy": asked, "loss": loss, "dual_clip": dual_clip}
    same |= {"clip_low": clip_low, "clip_high": clip_high, "tau_pos": tau_pos, "tau_neg": tau_neg}
    same |= {"kl_coef": kl_coef, "kl_estimator": kl_estimator, "entropy_coef": entropy_coef}
    group, shards, _ = agree(process_group, logits, logits.shape[1], same, False, labels)
    settings = (loss, kl_estimator, knobs, number, softcap, asked, backend, group, shards)
    call = _Call(logits, labels, *rows, *settings)  # pyright: ignore  # rows are five
    gradient = torch.is_grad_enabled() and logits.requires_grad
    traced = torch.compiler.is_compiling() or type(logits) not in (Tensor, Parameter)
    if gradient and not traced:
        total, table = _Eager.apply(inplace, *call)
    else:
        total, table, _ = _op(*call, gradient)
    return total, _stats(table, scored, asked, loss, ref_logps is not None)


def _row(name: str, x: Tensor | None, logits: Tensor) -> Tensor | None:
    """``x`` as the kernels read it: ``[N]``, contiguous, of the statistics' dtype, without a graph."""
    if x is None:
        return None
    if x.shape != logits.shape[:1]:
        raise ValueError(f"{name} must be [N] with N = {logits.shape[0]} rows of logits, got shape {list(x.shape)}")
    if x.requires_grad:
        raise ValueError(f"{name} gets no gradient; pass {name}.detach()")
    check_device(name, x, "logits", logits)
    return x.to(stats_dtype(logits)).contiguous()


def _stats(table: Tensor, scored: Tensor, entropy: bool, loss: str, has_reference: bool) -> TokenStats:
    column, count = columns(table.detach()), scored.sum()
    named = {"ratio": "ratio"} | ({"kl": "kl"} if has_reference else {})
    if loss in ("ppo", "cispo"):
        named |= {"clip_ratio/low": "clip_low", "clip_ratio/high": "clip_high"}
    sums = {name: column[row].sum(dtype=torch.float64) for name, row in named.items()}
    return TokenStats(
        column["logps"],
        torch.arange(len(scored), device=scored.device),
        column["entropy"] if entropy else None,
        column["top1"] != 0,
        metrics={name: torch.stack([total, count.to(total.dtype)]) for name, total in sums.items()},
    )
