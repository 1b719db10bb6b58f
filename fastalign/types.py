"""The shapes that cross packages, documented once.

Letters, everywhere in this package: T packed tokens, N scored tokens, B sequences, P pairs, G group size,
S segments, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
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


Axis = Literal["token", "sequence"]
"""What a column has a number for: each of the N scored tokens, or each of the B sequences."""


TOKEN: dict[str, Axis] = {"axis": "token"}
SEQUENCE: dict[str, Axis] = {"axis": "sequence"}


@dataclass(frozen=True)
class Columns:
    """What a loss reads of a batch besides the policy's own outputs: one number per scored token or per sequence.

    A column is None while it is not known. What belongs to a pair or a prompt stands at each of its sequences.

    Attributes:
        weights: ``[N]`` factor of each token's loss: the reduction, with the counts of the whole step inside; for
            losses with a number per token.
        value_weights: ``[N]`` factor of each token's value loss: a mean over tokens, whatever the policy's reduction.
        ref_logps: ``[N]`` fp32 log-probs under the reference.
        old_logps: ``[N]`` fp32 log-probs under the policy as it sampled, by the training forward.
        sampler_logps: ``[N]`` fp32 log-probs that the sampler gave.
        token_rewards: ``[N]`` fp32 rewards of single tokens; nan where there is none.
        advantages: ``[N]`` fp32, how much better than expected each token did.
        values: ``[N]`` fp32 of the critic as the tokens were sampled.
        returns: ``[N]`` fp32, what the critic learns.
        step_labels: ``[N]`` fp32, 1 for a right reasoning step and 0 for a wrong one.
        example_weights: ``[B]`` factor of the loss of the sequence's pair or prompt, or of its own; for other losses.
        scores: ``[B]`` fp32, what the data say of each sequence: a pair's margin, a label, a candidate's score.
        truncated: ``[B]`` fp32, 1 for a completion that was cut off.
        greedy_scores: ``[B]`` fp32 reward of the greedy answer to the sequence's prompt.
        baseline: ``[B]`` fp64, what unpaired losses measure log-ratios or rewards from.
        mean_lengths: ``[B]`` fp64 scored tokens per chosen completion of the step, the divisor that makes an imitation
            term a mean over tokens.
        rank_margins: ``[B]`` the reference's margin of the rank that the sequence's pair has in the step.
        rank_ratios: ``[B]`` the log-ratio of the same rank in the step on the other side of the pairs.
    """

    weights: Tensor | None = field(default=None, metadata=TOKEN)
    value_weights: Tensor | None = field(default=None, metadata=TOKEN)
    ref_logps: Tensor | None = field(default=None, metadata=TOKEN)
    old_logps: Tensor | None = field(default=None, metadata=TOKEN)
    sampler_logps: Tensor | None = field(default=None, metadata=TOKEN)
    token_rewards: Tensor | None = field(default=None, metadata=TOKEN)
    advantages: Tensor | None = field(default=None, metadata=TOKEN)
    values: Tensor | None = field(default=None, metadata=TOKEN)
    returns: Tensor | None = field(default=None, metadata=TOKEN)
    step_labels: Tensor | None = field(default=None, metadata=TOKEN)
    example_weights: Tensor | None = field(default=None, metadata=SEQUENCE)
    scores: Tensor | None = field(default=None, metadata=SEQUENCE)
    truncated: Tensor | None = field(default=None, metadata=SEQUENCE)
    greedy_scores: Tensor | None = field(default=None, metadata=SEQUENCE)
    baseline: Tensor | None = field(default=None, metadata=SEQUENCE)
    mean_lengths: Tensor | None = field(default=None, metadata=SEQUENCE)
    rank_margins: Tensor | None = field(default=None, metadata=SEQUENCE)
    rank_ratios: Tensor | None = field(default=None, metadata=SEQUENCE)

    def known(self) -> dict[str, Tensor]:
        """The columns that are not None, by name."""
        return {name: value for name in AXES if (value := getattr(self, name)) is not None}

    def read(self, name: str, loss: str) -> Tensor:
        """A column that a loss cannot do without.

        Raises:
            ValueError: it is None.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{loss} reads the column {name} of the batch, which was not filled: see Columns")
        return value

    def map(self, change: Callable[[Tensor], Tensor]) -> Columns:
        """The same with each column changed, such as moved to a device."""
        return Columns(**{name: change(value) for name, value in self.known().items()})

    def pick(self, index: Mapping[Axis, Any]) -> Columns:
        """The entries of each axis at an index; columns of an axis without one are None."""
        kept = {name: value for name, value in self.known().items() if AXES[name] in index}
        return Columns(**{name: value[index[AXES[name]]] for name, value in kept.items()})

    def at(self, stats: TokenStats) -> Columns:
        """The entries of the rows, and where a chunk has them of the sequences, that the statistics are of."""
        sequences: dict[Axis, Tensor] = {} if stats.sequences is None else {"sequence": stats.sequences}
        return self.pick({"token": stats.rows, **sequences})

    @staticmethod
    def join(parts: Sequence[Columns]) -> Columns:
        """The columns of parts one after the other, as far as every part knows them."""
        known = [part.known() for part in parts]
        common = [name for name in AXES if known and all(name in one for one in known)]
        return Columns(**{name: torch.cat([one[name] for one in known]) for name in common})


AXES: dict[str, Axis] = {f.name: f.metadata["axis"] for f in fields(Columns)}
"""The axis of each column."""


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
        columns: all else that a loss reads.
        ends: ``[B]`` int32, the segment in which each sequence ends; stays on the host; None where it was not laid out
            by `fastalign.data.pack`.
        companion: each sequence and behind it one with the same prompt and the completion of another example, for
            losses that compare with these.
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
    columns: Columns = field(default_factory=Columns)
    ends: Tensor | None = None
    companion: PackedBatch | None = None

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
        return self._moved(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in host memory that a GPU copies from while it computes."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with what a device reads moved; layouts stay on the host."""
        tensors = {name: move(getattr(self, name)) for name in ("input_ids", "position_ids", "rows", "labels")}
        companion = None if self.companion is None else self.companion._moved(move)
        return replace(self, **tensors, columns=self.columns.map(move), companion=companion)

    def fill(self, **columns: Tensor | None) -> PackedBatch:
        """The same batch with these columns."""
        return replace(self, columns=replace(self.columns, **columns))


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
            of its maximum (fp32, fp64 for fp64 inputs), from products rounded to their dtype: bf16 often ties (with
            ``logits="float32"`` they are not rounded). False where the row has no log-prob (NaN). Detached.
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
class SampleStats:
    """What is known of tokens that were drawn, each ``[B]`` fp32 (fp64 for fp64 inputs), detached.

    Attributes:
        logps: log-prob of the token under the distribution that it was drawn from: after temperature, over what
            truncation has kept.
        entropy: in nats, after temperature, before truncation.
        kept_mass: probability that top-k, top-p and min-p have kept, 1 without these; ``logps + ln kept_mass`` is the
            log-prob before truncation.
    """

    logps: Tensor
    entropy: Tensor
    kept_mass: Tensor


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
        columns: all else that losses read, of the 2P sequences; None when these pairs are the whole optimizer step:
            what depends on the step is then made of them.
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
    columns: Columns | None = None


@dataclass(frozen=True)
class LabelledLogps:
    """Sequence log-probs of B completions that were each called good or bad: sums over completion tokens, ``[B]``.

    ``logps, ref_logps`` are under the policy and under the reference; ``desirable [B]`` bool, the completion is good;
    ``baseline`` ``[B]`` or ``[]``, what the loss measures from.
    """

    logps: Tensor
    ref_logps: Tensor
    desirable: Tensor
    baseline: Tensor


@dataclass(frozen=True)
class RankedLogps:
    """Sequence log-probs of the B scored candidates of G prompts: sums over scored tokens, and how many these are.

    ``rewards [B]`` are scores by people or a model; ``cu_groups [G+1]`` offsets of the prompts in the candidates.
    """

    logps: Tensor
    lengths: Tensor
    rewards: Tensor
    cu_groups: Tensor


@dataclass(frozen=True)
class Prompt:
    """What a sampler continues: ``[P]`` int64 tokens, its row in the dataset, and what an environment reads there."""

    ids: np.ndarray
    row: int
    columns: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Rollout:
    """A completion that a policy sampled, in tokens: text never goes back into training.

    Attributes:
        prompt: ``[P]`` int64 tokens that were continued.
        tokens: ``[R]`` int64 tokens behind it, the EOS or stop token that ended them included.
        sampler_logps: ``[R]`` fp32 log-probs under the distribution that they were drawn from.
        row, sample: position of the prompt in the dataset, and which of its samples this is.
        finish: an EOS token, a stop text or ``sampler.max_new_tokens``; ``version``: steps behind the weights.
        scored: ``[R]`` bool, False for tokens that an environment wrote; None: all were sampled.
        kept_mass: ``[R]`` fp32 probability that top-k, top-p and min-p have kept; None without these.
        reward: what an environment paid, if there is one.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    sampler_logps: np.ndarray
    row: int
    sample: int
    finish: Literal["eos", "length", "stop"]
    version: int
    scored: np.ndarray | None = None
    kept_mass: np.ndarray | None = None
    reward: float | None = None
