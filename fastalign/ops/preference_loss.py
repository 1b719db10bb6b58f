"""A loss of preference pairs straight from logits: statistics, sums per sequence, the loss, and one backward sweep.

    L_s = sum of log-probs over sequence s,    loss = sum_p l(chosen_p, rejected_p) / num_pairs

The coefficient of a token is its sequence's, known once both sequences of a pair are summed: two sweeps of
``token_logps`` around a loss that is any function of ``PairLogps``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastalign.ops.parallel import checked_together
from fastalign.ops.token_logps import reference as token_reference
from fastalign.ops.token_logps import token_logps
from fastalign.types import IGNORE_INDEX, PairLogps

PairLoss = Callable[[PairLogps], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


def reference(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    *,
    loss_fn: PairLoss,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The specification: a Python loop over sequences."""
    logps, _ = token_reference(logits, labels, temperature=temperature, softcap=softcap)
    spans = list(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True))
    scored = torch.stack([(labels[a:b] != IGNORE_INDEX).sum() for a, b in spans])
    sums = torch.stack([logps[a:b].sum() for a, b in spans])
    ref = torch.zeros_like(sums)
    if ref_logps is not None:
        ref = torch.stack([ref_logps[a:b][labels[a:b] != IGNORE_INDEX].to(sums.dtype).sum() for a, b in spans])
    pair = PairLogps(sums[0::2], sums[1::2], ref[0::2], ref[1::2], scored[0::2], scored[1::2])
    losses = loss_fn(pair)
    return (losses[0] if isinstance(losses, tuple) else losses).mean()


def preference_loss(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    *,
    loss_fn: PairLoss,
    num_pairs: int | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of preference pairs, from logits that already exist.

    The loss is passed as a function, so that there is one copy of its mathematics: those of
    ``fastalign.losses.preference``, with their parameters bound by ``functools.partial``, or a user's own.

    Args:
        logits: ``[N, V]`` fp32, bf16, fp16 or fp64, any strides.
        labels: ``[N]`` int64 or int32; -100 marks a row that is not scored, never read and not counted.
        cu_seqlens: ``[2P+1]`` offsets of the sequences in the N rows; sequence 2p is chosen, 2p + 1 rejected.
        ref_logps: ``[N]`` log-probs under the reference; None for losses without one.
        loss_fn: gets the ``PairLogps`` of P pairs and returns losses ``[P]``, or (losses, dict of metric sums).
        num_pairs: the divisor, when pairs of other calls share the mean; P by default.
        temperature, softcap, process_group, inplace_backward, backend: as in ``token_logps``; of a split vocabulary
            ``logits`` are this rank's columns, and the loss has the same bits on every rank.

    Returns:
        loss ``[]`` in fp32 (fp64 for fp64 logits), connected to the graph, and the metrics of ``loss_fn``, detached.

    Raises:
        ValueError: a wrong argument; losses that are not ``[P]``.
        RuntimeError: as ``token_logps``.

    >>> logits, labels = torch.zeros(4, 8), torch.tensor([1, 2, 3, -100])
    >>> hinge = lambda pair: (1 - pair.chosen + pair.rejected).relu()
    >>> preference_loss(logits, labels, torch.tensor([0, 2, 4]), None, loss_fn=hinge)
    (tensor(3.0794), {})
    """
    with checked_together(process_group, logits):
        _check(labels, cu_seqlens, ref_logps)
    logps = token_logps(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        process_group=process_group,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    assert isinstance(logps, Tensor)
    result = loss_fn(_pairs(logps, labels, cu_seqlens, ref_logps))
    losses, metrics = result if isinstance(result, tuple) else (result, {})
    pairs = cu_seqlens.shape[0] // 2
    if losses.shape != (pairs,):
        raise ValueError(f"loss_fn must return one loss per pair, [{pairs}], got shape {list(losses.shape)}")
    loss = losses.sum() / (max(pairs, 1) if num_pairs is None else num_pairs)
    return loss, {name: torch.as_tensor(value).detach() for name, value in metrics.items()}


def _check(labels: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] % 2 == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be integer offsets [2P+1] of P pairs, chosen before rejected; "
            f"got {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}"
        )
    if ref_logps is not None and ref_logps.shape != labels.shape:
        raise ValueError(f"ref_logps must be [N] like labels, {list(labels.shape)}; got {list(ref_logps.shape)}")
    if ref_logps is not None and ref_logps.requires_grad:
        raise ValueError("ref_logps gets no gradient; pass ref_logps.detach()")


def _pairs(logps: Tensor, labels: Tensor, cu_seqlens: Tensor, ref_logps: Tensor | None) -> PairLogps:
    """Sums and lengths over the scored rows of each sequence, in fp64 before they are rounded."""
    offsets, scored = cu_seqlens.to(torch.int64), labels != IGNORE_INDEX

    def sums(x: Tensor) -> Tensor:
        return torch.segment_reduce(x.double(), "sum", offsets=offsets, initial=0.0)

    policy, lengths = sums(logps).to(logps.dtype), sums(scored).long()
    ref = torch.zeros_like(policy) if ref_logps is None else sums(torch.where(scored, ref_logps, 0)).to(logps.dtype)
    return PairLogps(policy[0::2], policy[1::2], ref[0::2], ref[1::2], lengths[0::2], lengths[1::2])
