"""The native kernel of ``policy_loss`` behind tensors: checks, memory, addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops.backends import cpp
from fastalign.ops.checks import stats_dtype
from fastalign.ops.functors import COLUMNS, Knobs, columns

ROWS = ("weights", "advantages", "old_logps", "ref_logps")
SURROGATES = {"sft": 0, "pg": 0, "ppo": 1, "cispo": 2, "sapo": 3}


def run(
    out: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    *rows: Tensor | None,
    **settings: Any,
) -> Tensor:
    """The table of ``COLUMNS``, and (unless ``out`` is None) the gradient of the summed losses, in one read.

    Args:
        out: ``[N, V]`` of the dtype of the logits, of any strides; may be the logits themselves.
        logits, labels: as in ``cpp.token_logps.forward``.
        rows: weights, advantages, old_logps and ref_logps, each ``[N]``; what is None is 1, the log-probs themselves,
            no KL.
        settings: temperature and softcap as in ``cpp.token_logps.forward``, loss, kl_estimator and knobs as in
            ``functors.fill``, entropy: whether to compute the entropy.

    Returns:
        ``[13, N]`` fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    cpp.check(logits, labels)
    op, table, _alive = describe(out, logits, labels, dict(zip(ROWS, rows, strict=True)), **settings)
    op.run(torch.get_num_threads())
    return table


def describe(
    out: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    rows: dict[str, Tensor | None],
    *,
    loss: str,
    kl_estimator: str,
    knobs: Knobs,
    entropy: bool,
    temperature: float | Tensor,
    softcap: float | None,
) -> tuple[Any, Tensor, list[Any]]:
    """The addresses, the fresh table that a kernel fills, and what must stay alive until it has."""
    from fastalign import _C

    if out is not None:
        cpp.check_out(out, logits)
    table = torch.empty(len(COLUMNS), logits.shape[0], dtype=stats_dtype(logits), device=logits.device)
    vectors, fields = cpp.vectors(rows, logits), _statistics(table, entropy, knobs)
    op, alive = cpp.describe(logits, labels, temperature, softcap, 1.0, fields, out)
    policy = _C.PolicyLoss(
        rows=op,
        surrogate=SURROGATES[loss],
        k2=kl_estimator == "k2",
        table=table.data_ptr(),
        **{name: x.data_ptr() for name, x in vectors.items()},
        **vars(knobs),
    )
    return policy, table, [*alive, *vectors.values()]


def _statistics(table: Tensor, entropy: bool, knobs: Knobs) -> dict[str, Tensor]:
    """The rows of the table that the sweeps write and read: the entropy and its coefficients only where wanted."""
    wanted = {"logps", "max", "logsum", "g", "top1"}
    wanted |= {"entropy"} if entropy or knobs.entropy_coef != 0 else set()
    wanted |= {"alpha", "beta"} if knobs.entropy_coef != 0 else set()
    return {name: row for name, row in columns(table).items() if name in wanted}
