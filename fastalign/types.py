"""The shapes that cross rooms, documented once.

Letters, everywhere in this package: T packed tokens, N scored tokens, B sequences, P pairs, G group size,
S segments, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a row that is not scored."""


@dataclass(frozen=True)
class Segments:
    """The attention layout of a packed row, on the host: segment s is rows ``offsets[s]:offsets[s+1]``.

    A token sees its own segment up to itself, and all of its segment's parent, grandparent, and so on.
    A parent precedes its children.

    Attributes:
        offsets: ``[S+1]`` row offsets.
        parents: ``[S]`` index of the prefix segment, -1 for a root.
    """

    offsets: Sequence[int]
    parents: Sequence[int]

    def __len__(self) -> int:
        return len(self.parents)


@dataclass(frozen=True)
class PackedBatch:
    """A forest of token segments without padding: each segment is a prompt or a response.

    Attributes:
        input_ids: ``[T]`` int64, segments back to back.
        position_ids: ``[T]`` int64; a response continues the positions of its prompt.
        cu_segments: ``[S+1]`` int32 row offsets of the segments; stays on the host, where layouts are decided.
        parents: ``[S]`` int32 prefix segment of each segment, -1 for a root; stays on the host.
        rows: ``[N]`` int64, the hidden row that predicts each scored token (the last prompt row once per response).
        labels: ``[N]`` int64, the predicted tokens.
        cu_seqlens: ``[B+1]`` int32, offsets of each logical sequence in the N scored tokens; stays on the host.
        example_ids: dataset position of each example in the batch, in order; names the batch in error messages.
        logical_tokens: tokens before sharing, the prompt counted once per response.
        cu_groups: ``[G+1]`` int32, offsets of the examples in the B sequences; stays on the host.
        scores: ``[B]`` fp32, what the data say of each sequence: a pair's margin, a label, a candidate's score; for
            process rewards ``[N]`` labels of the steps; empty where they say nothing.
        mismatched: the same prompts with completions of other examples, one sequence each, for losses that compare.
        both: each sequence and behind it the mismatched one of its prompt, which a reference scores in one pass; None
            where its log-probs are known.
        ref_logps: ``[N]`` fp32 log-probs under the reference, when known.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_segments: Tensor
    parents: Tensor
    rows: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    example_ids: tuple[int, ...]
    logical_tokens: int
    cu_groups: Tensor
    scores: Tensor
    mismatched: PackedBatch | None = None
    both: PackedBatch | None = None
    ref_logps: Tensor | None = None

    @property
    def segments(self) -> Segments:
        """The attention layout over the T rows."""
        return Segments(self.cu_segments.tolist(), self.parents.tolist())

    @property
    def num_tokens(self) -> int:
        """T: the tokens the backbone computes."""
        return self.input_ids.numel()

    @property
    def num_scored(self) -> int:
        """N: the tokens the head scores."""
        return self.labels.numel()

    @property
    def num_sequences(self) -> int:
        """B: logical sequences, a pair counting two."""
        return self.cu_seqlens.numel() - 1

    @property
    def depth(self) -> int:
        """Segments on the longest way from a root: 1 when nothing is shared, 2 for prompts with their responses."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return max(depths)

    @property
    def num_attended(self) -> int:
        """Pairs of a query and a key that attention multiplies in one head."""
        offsets, depths, total = self.cu_segments.tolist(), [], 0
        for s, parent in enumerate(self.parents.tolist()):
            length, before = offsets[s + 1] - offsets[s], depths[parent] if parent >= 0 else 0
            depths.append(before + length)
            total += attended(length, before)
        return total

    @property
    def num_examples(self) -> int:
        """G: examples; 0 in the batch of a rank without work."""
        return len(self.example_ids)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on ``device``, layouts excepted."""
        return self._moved(
            lambda part: part.to(device, non_blocking=True) if isinstance(part, Tensor) else part.to(device)
        )

    def pin_memory(self) -> PackedBatch:
        """The same batch in host memory that a GPU copies from while it computes."""
        return self._moved(lambda part: part.pin_memory())

    def _moved(self, move: Callable[[Tensor | PackedBatch], Tensor | PackedBatch]) -> PackedBatch:
        """The same batch with what a device reads moved; layouts stay on the host."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        layouts = ("cu_segments", "parents", "cu_seqlens", "cu_groups")
        moved = {n: move(x) for n, x in every.items() if n not in layouts and isinstance(x, Tensor | PackedBatch)}
        return replace(self, **moved)


def attended(length: int, before: int = 0) -> int:
    """Pairs of a query and a key in a causal segment of ``length`` tokens after a prefix of ``before``."""
    return length * before + length * (length + 1) // 2


@dataclass(frozen=True)
class ForwardCost:
    """Multiply-adds of a model's forward pass, by what they grow with; only their proportions matter to a packer.

    Attributes:
        per_token: for a token that the backbone computes.
        per_attended: for a pair of a query and a key.
        per_scored: for a row that the head scores.
    """

    per_token: float = 1.0
    per_attended: float = 0.0
    per_scored: float = 0.0

    def of(self, tokens: int, attended: int, scored: int) -> float:
        """The whole."""
        return self.per_token * tokens + self.per_attended * attended + self.per_scored * scored


@dataclass(frozen=True)
class TokenStats:
    """What the head knows about scored tokens; all floating tensors are fp32 (fp64 for fp64 inputs).

    Inside a ``loss_fn`` it holds the n scored rows of one chunk; returned from an op it holds all N rows, detached,
    zero on rows that are not scored.

    Attributes:
        logps: ``[n]`` log-prob of the label; with label smoothing the smoothed one.
        rows: ``[n]`` int64 positions in the op's N rows.
        entropy: ``[n]`` entropy in nats, when asked for.
        is_top1: ``[n]`` bool, the label is the argmax: the first column that has the largest logit, over the vocabulary
            of all ranks. Compared are logits as the op scales them, after softcap and temperature and in the precision
            of its maximum (fp32, fp64 for fp64 inputs), from products rounded to their dtype: bf16 often ties. False
            where the row has no log-prob (NaN). Detached.
        sequences: ``[b]`` int64 global sequence ids of the chunk, when aligned.
        cu_seqlens: ``[b+1]`` int64 offsets of those sequences in the chunk's rows, when aligned.
        metrics: sums of the metrics that ``loss_fn`` returned, over all chunks.
        lse: ``[n]`` log-sum-exp of the logits, when asked for.
        divergence: ``[n]`` divergence between the distributions of policy and reference, for losses that read it.
    """

    logps: Tensor
    rows: Tensor
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    sequences: Tensor | None = None
    cu_seqlens: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    lse: Tensor | None = None
    divergence: Tensor | None = None


@dataclass(frozen=True)
class PairLogps:
    """Sequence log-probs of P preference pairs: sums over completion tokens, fp32 ``[P]``.

    Attributes:
        chosen, rejected: under the policy.
        ref_chosen, ref_rejected: under the reference; zeros for reference-free losses.
        chosen_lengths, rejected_lengths: ``[P]`` number of scored tokens.
        chosen_tails, rejected_tails, ref_chosen_tails, ref_rejected_tails: the part of the sums that comes from tokens
            beyond the length of the pair's shorter completion; for losses that weigh it otherwise.
        chosen_kls, rejected_kls: KL(reference || policy) over the vocabulary, summed over completion tokens; for losses
            that read it.
        mean_chosen_length: scored tokens per chosen completion over the whole optimizer step, the divisor that makes
            an imitation term a mean over tokens; None when these pairs are the whole step.
        step: the pairs of the whole optimizer step over all ranks, detached, for losses that compare pairs with each
            other; None when these pairs are all of them.
        places: ``[P]`` int64 positions of these pairs in ``step``.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    chosen_tails: Tensor | None = None
    rejected_tails: Tensor | None = None
    ref_chosen_tails: Tensor | None = None
    ref_rejected_tails: Tensor | None = None
    chosen_kls: Tensor | None = None
    rejected_kls: Tensor | None = None
    mean_chosen_length: float | Tensor | None = None
    step: PairLogps | None = None
    places: Tensor | None = None


@dataclass(frozen=True)
class LabelledLogps:
    """Sequence log-probs of B completions that were each called good or bad: sums over completion tokens, ``[B]``.

    Attributes:
        logps, ref_logps: under the policy and under the reference.
        desirable: ``[B]`` bool, the completion is good.
    """

    logps: Tensor
    ref_logps: Tensor
    desirable: Tensor


@dataclass(frozen=True)
class RankedLogps:
    """Sequence log-probs of the scored candidates of G prompts.

    Attributes:
        logps: ``[B]`` sums over completion tokens.
        lengths: ``[B]`` number of scored tokens.
        rewards: ``[B]`` scores of the candidates, by people or a model; larger is better.
        cu_groups: ``[G+1]`` offsets of the prompts in the B candidates.
    """

    logps: Tensor
    lengths: Tensor
    rewards: Tensor
    cu_groups: Tensor


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the loss and the sums behind its metrics.

    Attributes:
        loss: ``[]``, already divided by the global count; connected to the graph.
        metrics: detached sums by name; the engine adds them over micro-batches and ranks, then divides.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
