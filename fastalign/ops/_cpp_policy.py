"""The native kernel of ``policy_loss`` behind tensors: checks, memory, addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.ops import _cpp
from fastalign.ops._functors import COLUMNS, Knobs, columns

SURROGATES = {"sft": 0, "pg": 0, "ppo": 1, "cispo": 2, "sapo": 3}


def run(
    out: Tensor | None,
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
    entropy: bool,
    temperature: float | Tensor,
    softcap: float | None,
) -> Tensor:
    """The table of ``COLUMNS``, and (unless ``out`` is None) the gradient of the summed losses, in one read.

    Args:
        out: ``[N, V]`` of the dtype of the logits, of any strides; may be the logits themselves.
        logits, labels, temperature, softcap: as in ``_cpp.forward``.
        weights, advantages, old_logps, ref_logps: ``[N]``; what is None is 1, the log-probs themselves, no KL.
        loss, kl_estimator, knobs: as in ``_functors.fill``.
        entropy: whether to compute the entropy.

    Returns:
        ``[12, N]`` fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    from fastalign import _C

    rows, dtype = _cpp._check(logits, labels), torch.float64 if logits.dtype == torch.float64 else torch.float32
    table = torch.empty(len(COLUMNS), rows, dtype=dtype)
    given = {"weights": weights, "advantages": advantages, "old_logps": old_logps, "ref_logps": ref_logps}
    vectors = {name: _cpp._vector(name, x, rows, dtype) for name, x in given.items() if x is not None}
    if out is not None:
        _cpp._check_out(out, logits)
    matrices = {} if out is None else {"grad": _cpp._matrix(out)}
    fields = _statistics(table, entropy, knobs)
    op, _alive = _cpp._describe(logits, labels, temperature, softcap, 1.0, fields, **matrices)
    _C.PolicyLoss(
        rows=op,
        surrogate=SURROGATES[loss],
        k2=kl_estimator == "k2",
        table=table.data_ptr(),
        **{name: x.data_ptr() for name, x in vectors.items()},
        **vars(knobs),
    ).run(torch.get_num_threads())
    return table


def _statistics(table: Tensor, entropy: bool, knobs: Knobs) -> dict[str, Tensor]:
    """The rows of the table that the sweeps write and read: the entropy and its coefficients only where wanted."""
    wanted = {"logps", "max", "logsum", "g"}
    wanted |= {"entropy"} if entropy or knobs.entropy_coef != 0 else set()
    wanted |= {"alpha", "beta"} if knobs.entropy_coef != 0 else set()
    return {name: row for name, row in columns(table).items() if name in wanted}
