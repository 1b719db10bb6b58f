"""Sampling completions with the policy itself: on its training weights, through its own packed forward and head.

    prompts                  one packed forward; keys and values go to a forest, the head draws n first tokens of each
        |
    rows                     at most `sampler.max_rows` grow at once, a token of each per forward
        |
    finished rollouts        leave at once; their place is taken by the next row

A token depends on the weights, the seed, the prompt's row in the dataset, the sample's number and the position, and on
nothing else: not on the other rows, their number or order, nor on threads or ranks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from fastalign.config import SamplerConfig
from fastalign.models.decoding import Cached, Decode, Prefill, Shapes, prompt_batch, token_batch
from fastalign.models.packed_layers import PackedLayers, packed_layers
from fastalign.models.policy import Policy
from fastalign.ops import linear_sample, sample_keys
from fastalign.ops.attention import layout
from fastalign.ops.forest_decode import Forest
from fastalign.parallel.shard import gathered
from fastalign.types import PackedBatch, Prompt, Rollout

PREFILL_TOKENS = 4096
"""Tokens of prompts that are computed together, as long as there is more than one prompt."""
MOST_ROWS = 256
"""More rows than these make a token hardly cheaper: the products run at their full rate by then."""
MEMORY_SHARE = 0.25
"""Of the memory that is free, what the keys and values of rows may take."""

Finish = Literal["eos", "length", "stop"]


class Sampler(Protocol):
    """Completes prompts, in tokens."""

    exact: bool
    """Its log-probs are bit for bit those that training computes of the same tokens."""

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int, *, greedy: bool = False) -> Iterator[Rollout]:
        """Samples 0 to n - 1 of each prompt, each as it ends; with ``greedy`` sample 0 is that of temperature 0."""
        ...

    def sync(self, policy: Policy, version: int) -> None:
        """Sample from these weights from now on; rollouts carry the version."""
        ...


@dataclass(frozen=True)
class Stops:
    """What ends a completion before its last allowed token.

    Attributes:
        eos: tokens that do.
        texts: texts that do.
        decode: makes text of tokens, special ones included; needed for texts.
    """

    eos: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    @property
    def tail(self) -> int:
        """Last tokens in which any of the texts is found: a token is at least a byte, some at a text's edge none."""
        return max(len(text.encode()) for text in self.texts) + 8

    def reason(self, tokens: list[int]) -> Finish | None:
        """Why a completion ends with the last of its tokens; None when it goes on."""
        if tokens[-1] in self.eos:
            return "eos"
        if self.texts and self.decode is not None:
            text = self.decode(tokens[-self.tail :])
            return "stop" if any(stop in text for stop in self.texts) else None
        return None


def stops_of(policy: Policy | None, tokenizer: Any, texts: Sequence[str] = ()) -> Stops:
    """The EOS tokens of the tokenizer and of the model's generation config, and the texts of `sampler.stop`."""
    if "" in texts:
        raise ValueError("sampler.stop holds an empty text, which would end every completion at once: leave it out")
    settings = policy and getattr(policy.model, "generation_config", None)
    found = getattr(tokenizer, "eos_token_id", None), getattr(settings, "eos_token_id", None)
    eos = [token for each in found for token in (each if isinstance(each, list) else [each]) if token is not None]

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    return Stops(frozenset(eos), tuple(texts), decode)


@dataclass
class Group:
    """The samples of a prompt that are not finished yet, and what the forest calls the prompt."""

    prompt: Prompt
    entry: int
    left: int


@dataclass
class Row:
    """A completion that is being sampled."""

    group: Group
    sample: int
    key: int
    cold: bool
    """At temperature 0."""
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    entry: int = -1
    """What the forest calls it, once it grows there."""

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.group.prompt.ids) + len(self.tokens)


class NativeSampler:
    """Samples in this process, from the weights that are trained.

    Args:
        policy: is left as it is: its mode, gradients and the generators are not touched. Of a sharded one all ranks
            must begin to generate together; until they end, each has its weights whole. Of one that is only split the
            ranks of its team must ask for the same: they compute each token together.
        settings: the `sampler` section.
        stops: what ends a completion.
        precision: makes the context in which training runs its forward, autocast's for example.
    """

    exact: bool = False

    def __init__(
        self,
        policy: Policy,
        settings: SamplerConfig,
        stops: Stops,
        *,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        check_settings(settings)
        self.policy, self.settings, self.stops, self.precision = policy, settings, stops, precision
        self.version = 0
        self._layers: PackedLayers | None = None
        self._head: Tensor | None = None

    def sync(self, policy: Policy, version: int) -> None:
        """The weights are the policy's own: only their version is new."""
        self.policy, self.version = policy, version

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int, *, greedy: bool = False) -> Iterator[Rollout]:
        """Samples 0 to n - 1 of each prompt, each as it ends.

        Args:
            prompts: what is continued.
            n: completions of each.
            seed: of the draws.
            greedy: sample 0 takes the most likely tokens; its log-probs are those at temperature 1.

        Raises:
            ValueError: a prompt that is empty or as long as the model can read.
        """
        check_prompts(self.policy, prompts)
        with gathered(self.policy):
            self._layers = self._packed()
            try:
                yield from self._run(prompts, n, seed, greedy)
            finally:
                self._layers = self._head = None

    def _run(self, prompts: Sequence[Prompt], n: int, seed: int, greedy: bool) -> Iterator[Rollout]:
        waiting, ready, live = deque(prompts), deque[Row](), list[Row]()
        if not waiting or n < 1:
            return
        forest = self._forest()
        most = self.settings.max_rows or self._affordable(forest, prompts)
        while waiting or ready or live:
            while waiting and len(live) + len(ready) < most:
                drawn = self._begin(forest, self._next(waiting, n, most - len(live) - len(ready)), n, seed, greedy)
                yield from self._sift(forest, drawn, ready)
            while ready and len(live) < most:
                row = ready.popleft()
                row.entry = forest.add_row(row.group.entry)
                live.append(row)
            if live:
                self._grow(forest, live)
                grown, live = live, []
                yield from self._sift(forest, grown, live)

    def _next(self, waiting: deque[Prompt], n: int, free: int) -> list[Prompt]:
        """The next prompts, as many as fill the free rows, within a budget of tokens."""
        taken = [waiting.popleft()]
        tokens = len(taken[0].ids)
        while waiting and len(taken) * n < free and tokens + len(waiting[0].ids) <= PREFILL_TOKENS:
            taken.append(waiting.popleft())
            tokens += len(taken[-1].ids)
        return taken

    def _begin(self, forest: Forest, prompts: list[Prompt], n: int, seed: int, greedy: bool) -> list[Row]:
        """Compute prompts once and draw the first token of all their samples."""
        entries = forest.add_prompts([len(prompt.ids) for prompt in prompts])
        groups = [Group(prompt, entry, n) for prompt, entry in zip(prompts, entries, strict=True)]
        numbers = torch.tensor([[group.prompt.row, sample] for group in groups for sample in range(n)])
        keys = sample_keys(seed, numbers[:, 0], numbers[:, 1]).tolist()
        rows = [Row(group, i, keys[g * n + i], greedy and i == 0) for g, group in enumerate(groups) for i in range(n)]
        batch = prompt_batch([prompt.ids for prompt in prompts], n, forest.device)
        plan, kept = layout(batch.segments), sum(len(prompt.ids) for prompt in prompts)
        self._draw(rows, batch, Prefill(plan.longest, plan, forest, entries, kept))
        return rows

    def _grow(self, forest: Forest, live: list[Row]) -> None:
        """One more token of each row."""
        step = forest.step([row.entry for row in live])
        tokens = [row.tokens[-1] for row in live]
        positions = [row.length - 1 for row in live]
        batch = token_batch(tokens, positions, forest.device)
        self._draw(live, batch, Decode(max(positions) + 1, forest, step, len(live), self._layers))
        forest.advance(step)

    def _draw(self, rows: list[Row], batch: PackedBatch, cached: Cached) -> None:
        """Run the policy and append to each row the token that the head draws from its hidden state."""
        settings = self.settings
        numbers = torch.tensor([[row.key, len(row.tokens)] for row in rows]).to(batch.input_ids.device)
        keys, positions = numbers.unbind(1)
        cut: dict[str, Any] = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}

        def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[list[Any]]:
            drawn = torch.empty_like(keys), *keys.new_empty(2, len(rows), dtype=torch.float32)
            for temperature, at in self._temperatures(rows):
                inputs = hidden[at], self._narrowed(weight), keys[at], positions[at]
                tokens, stats = linear_sample(*inputs, temperature=temperature, **cut, **options)
                for whole, part in zip(drawn, (tokens, stats.logps, stats.kept_mass), strict=True):
                    whole[at] = part.to(whole.dtype)
            return [x.tolist() for x in drawn]

        with torch.no_grad(), self.precision():
            drawn = self.policy(batch, head, cached=cached)
        for row, token, logp, kept in zip(rows, *drawn, strict=True):
            row.tokens.append(token)
            row.logps.append(logp)
            row.kept.append(kept)

    def _temperatures(self, rows: list[Row]) -> Iterator[tuple[float, slice | Tensor]]:
        """Which of the rows are drawn at which temperature.

        Not one call with a temperature per row: that would be rounded otherwise than the number that training has.
        """
        cold = [i for i, row in enumerate(rows) if row.cold]
        if len(cold) in (0, len(rows)):
            yield 0.0 if cold else self.settings.temperature, slice(None)
            return
        warm = [i for i, row in enumerate(rows) if not row.cold]
        yield from ((self.settings.temperature, torch.tensor(warm)), (0.0, torch.tensor(cold)))

    def _sift(self, forest: Forest, drawn: Iterable[Row], going_on: Any) -> Iterator[Rollout]:
        """Those of the rows that have ended, out of the forest; the others to ``going_on``."""
        for row in drawn:
            finish = self.stops.reason(row.tokens) or ("length" if self._is_full(row) else None)
            if finish is None:
                going_on.append(row)
                continue
            if row.entry >= 0:
                forest.drop_row(row.entry)
            row.group.left -= 1
            if row.group.left == 0:
                forest.drop_prompt(row.group.entry)
            yield self._rollout(row, finish)

    def _is_full(self, row: Row) -> bool:
        limit = self.policy.max_length
        return len(row.tokens) == self.settings.max_new_tokens or (limit is not None and row.length >= limit[0])

    def _rollout(self, row: Row, finish: Finish) -> Rollout:
        return Rollout(
            prompt=np.asarray(row.group.prompt.ids, dtype=np.int64),
            tokens=np.array(row.tokens, dtype=np.int64),
            sampler_logps=np.array(row.logps, dtype=np.float32),
            row=row.group.prompt.row,
            sample=row.sample,
            finish=finish,
            version=self.version,
            kept_mass=np.array(row.kept, dtype=np.float32) if truncates(self.settings) else None,
        )

    def _forest(self) -> Forest:
        """An empty forest of the model's shapes and of the dtype that its layers make keys and values in."""
        batch = prompt_batch([np.zeros(1, dtype=np.int64)], 1, self._device)
        shapes = Shapes(1, layout(batch.segments))
        with torch.no_grad(), self.precision():
            self.policy(batch, lambda hidden, *_, **__: hidden, cached=shapes)
        return shapes.forest(type(self.policy.model).__name__, self._device)

    def _narrowed(self, weight: Tensor) -> Tensor:
        """The head's weight as autocast multiplies it, cast once for this generation."""
        kind = weight.device.type
        if not torch.is_autocast_enabled(kind) or weight.dtype != torch.float32:
            return weight
        if self._head is None:
            self._head = weight.detach().to(torch.get_autocast_dtype(kind))
        return self._head

    def _packed(self) -> PackedLayers | None:
        """The layers with weights packed for this generation, where that serves."""
        with torch.no_grad(), self.precision():
            return packed_layers(self.policy, MEMORY_SHARE * free_memory(self._device))

    def _affordable(self, forest: Forest, prompts: Sequence[Prompt]) -> int:
        """Rows whose keys and values fit into `MEMORY_SHARE` of what is free, each with a prompt of its own."""
        longest = max(len(prompt.ids) for prompt in prompts) + self.settings.max_new_tokens
        size = torch.empty(0, dtype=forest.dtype).element_size()
        row = 2 * len(forest.keys) * forest.key_heads * forest.head_size * size * longest
        rows = int(min(MOST_ROWS, max(1, MEMORY_SHARE * free_memory(self._device) // row)))
        return rows if self.policy.head_group is None else self.policy.team.least(rows)

    @property
    def _device(self) -> torch.device:
        return next(self.policy.parameters()).device


def check_settings(settings: SamplerConfig) -> None:
    """Refuse settings from which nothing can be sampled."""
    least: dict[str, tuple[float, float]] = {
        "temperature": (0.0, float("inf")),
        "top_k": (0, float("inf")),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "max_new_tokens": (1, float("inf")),
        "max_rows": (1, float("inf")),
    }
    for name, (low, high) in least.items():
        value = getattr(settings, name)
        if value is not None and not (low <= value <= high and (name != "top_p" or value > 0)):
            bounds = f"from {low:g} to {high:g}" if high < float("inf") else f"of {low:g} or more"
            raise ValueError(f"sampler.{name}: expected a number {bounds}, got {value}")


def check_prompts(policy: Policy | None, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that cannot be continued, and a policy that cannot continue any."""
    if policy is not None and policy.has_scalar_head:
        raise ValueError("a reward model gives scores, not tokens: sample from a causal LM")
    limit, why = (policy and policy.max_length) or (None, "")
    for prompt in prompts:
        if len(prompt.ids) == 0:
            raise ValueError(f"prompt {prompt.row} is empty: there is nothing to continue; leave it out")
        if limit is not None and len(prompt.ids) >= limit:
            raise ValueError(
                f"prompt {prompt.row} has {len(prompt.ids)} tokens, which leaves none of {limit} ({why}) for a "
                "completion: shorten it or leave it out"
            )


def truncates(settings: SamplerConfig) -> bool:
    """Whether tokens are drawn from less than the whole vocabulary."""
    return settings.top_k > 0 or settings.top_p < 1 or settings.min_p > 0


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, on a CPU this rank's share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
