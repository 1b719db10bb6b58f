"""Whether the log-probs of sampling are bit for bit those of training: tried on the model itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastalign.config import SamplerConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.models.policy import Policy, register_attention
from fastalign.ops import linear_loss
from fastalign.parallel.shard import gathered, reshard
from fastalign.rl.sampler import NativeSampler, Stops, truncates
from fastalign.types import PackedBatch, Prompt, Rollout, TokenStats

log = logging.getLogger(__name__)

PROMPTS = (1, 5, 16, 23, 70)
"""Tokens of the prompts that are tried: of blocks of keys, none, a part, one, more."""
SAMPLES = 7
"""Completions of each, so that more rows are decoded than products are padded to, and not a round number."""
TOKENS = 20
"""Of each completion: it goes on past the end of a block of keys, wherever its prompt ends."""


def probe(sampler: NativeSampler, trained: Policy | None = None) -> str | None:
    """Sample from random prompts and compare with the log-probs of training, bit for bit.

    All ranks of a sharded policy must call it.

    Args:
        sampler: with the weights as they are now.
        trained: the policy, where the sampler has a copy of it.

    Returns:
        None when they are equal, else by how much they differ and the first layer whose output does.
    """
    trained = trained or sampler.policy
    tried = _without_limits(sampler)
    limit = (sampler.policy.max_length or (max(PROMPTS) + TOKENS + 1, ""))[0]
    lengths = [length for length in PROMPTS if length + TOKENS <= limit] or [1]
    apart_by = layouts(trained, sampler.policy)
    with gathered(trained) if trained.team is None else nullcontext():
        prompts = _prompts(sampler.policy, lengths)
        apart = 0.0
        for some, n in ((prompts[-1:], 1), (prompts, SAMPLES)):  # padded to more rows, and not
            rollouts = sorted(tried.generate(some, n, 0), key=lambda r: (r.row, r.sample))
            apart = max(apart, largest_difference(rollouts, trained_logps(tried, rollouts, trained)))
        if apart == 0:
            return None
        where = apart_by or f"first in {_first_difference(tried, prompts[-1:], trained)}"
    return f"log-probs of sampling and training differ by up to {apart:.2g}, {where}"


def layouts(trained: Policy, sampled: Policy) -> str:
    """Over how many ranks training and sampling split layers; empty where neither does."""
    ours = 1 if trained.team is None else trained.team.mesh.size()
    theirs = 1 if sampled.team is None or sampled is trained else sampled.team.mesh.size()
    if ours == theirs == 1:
        return ""
    training = f"splits layers over {ours} ranks (parallel.tp)" if ours > 1 else "has whole layers"
    sampling = f"splits them over {theirs} (parallel.generate)" if theirs > 1 else "has them whole"
    return f"as training {training} and sampling {sampling}"


def compare_many(
    policy: Policy, count: int, *, prompts: int = 16, answers: int = 16, tokens: int = 128
) -> tuple[int, float]:
    """How many tokens were sampled, ``count`` at least, and by how much log-probs of sampling and training differ.

    Random prompts of 1 to 20 tokens have several ``answers`` of so many tokens each, until there are enough.
    """
    sampler = NativeSampler(policy, SamplerConfig(max_new_tokens=tokens), Stops())
    done, apart = 0, 0.0
    while done < count:
        some = _prompts(policy, [1 + (7 * i) % 20 for i in range(prompts)], seed=done)
        rollouts = sorted(sampler.generate(some, answers, done), key=lambda r: (r.row, r.sample))
        with torch.no_grad():
            apart = max(apart, largest_difference(rollouts, trained_logps(sampler, rollouts)))
        done += sum(len(rollout.tokens) for rollout in rollouts)
    return done, apart


def settle(sampler: NativeSampler, trained: Policy | None = None) -> None:
    """Set whether a sampler is exact as `sampler.exact` asks for, and log it; the arguments are those of `probe`.

    Raises:
        ValueError: `sampler.exact` is require and it is not, as where top_k, top_p or min_p leave tokens out.
    """
    wanted = sampler.settings.exact
    if wanted == "require" and truncates(sampler.settings):
        raise ValueError(
            "sampler.exact: require, but top_k, top_p and min_p draw from fewer tokens than training counts: leave "
            "these settings out"
        )
    if wanted == "off" or truncates(sampler.settings):
        return
    found = probe(sampler, trained)
    sampler.exact = found is None
    if found is None:
        log.info("sampler: exact, log-probs of sampling are bit for bit those of training")
        return
    text = f"{found}{_advice(sampler, trained)}"
    if wanted == "require":
        raise ValueError(f"sampler.exact: require, but {text}")
    meant = layouts(trained or sampler.policy, sampler.policy)  # which is told once, by the main rank
    log.log(logging.INFO if meant else logging.WARNING, "sampler: not exact: %s", text)


def trained_logps(sampler: NativeSampler, rollouts: Sequence[Rollout], trained: Policy | None = None) -> Tensor:
    """Log-probs of the sampled tokens by the packed forward and `linear_loss`, as training computes them, ``[N]``."""
    batch = batch_of(rollouts).to(next(sampler.policy.parameters()).device)
    temperature = sampler.settings.temperature or 1.0

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> TokenStats:
        loss = {"loss_fn": lambda stats: stats.logps.sum(), "entropy": True, "temperature": temperature}
        return linear_loss(hidden, weight, labels, **loss, **options)[1]

    with torch.enable_grad(), sampler.precision():
        model = trained or sampler.policy
        logps = model(batch, head).logps.detach()
    if model.team is not None:
        reshard(model)
    return logps


def batch_of(rollouts: Sequence[Rollout]) -> PackedBatch:
    """Rollouts as one packed batch, the samples of a prompt behind it; sorted by prompt."""
    examples = []
    for row in dict.fromkeys(rollout.row for rollout in rollouts):
        sequences = tuple(_sequence(rollout) for rollout in rollouts if rollout.row == row)
        examples.append(TokenExample(sequences, row))
    return build_batch(examples, True)


def _sequence(rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([rollout.prompt, rollout.tokens])
    return ids, np.arange(len(ids)) >= len(rollout.prompt)


def largest_difference(rollouts: Sequence[Rollout], logps: Tensor) -> float:
    """Between log-probs of sampling and others; 0 when all bits are equal."""
    sampled = torch.from_numpy(np.concatenate([rollout.sampler_logps for rollout in rollouts]))
    logps = logps.detach().cpu()
    return 0.0 if torch.equal(sampled, logps) else (sampled.double() - logps).abs().nan_to_num(torch.inf).max().item()


def _without_limits(sampler: NativeSampler) -> NativeSampler:
    """A sampler of the same policy whose completions all have `TOKENS` tokens, drawn from the whole vocabulary."""
    whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = {"max_rows": len(PROMPTS) * SAMPLES, "max_new_tokens": TOKENS}
    settings = replace(sampler.settings, **whole, **rows)
    return NativeSampler(sampler.policy, settings, Stops(), precision=sampler.precision)


def _prompts(policy: Policy, lengths: Sequence[int], seed: int = 0) -> list[Prompt]:
    random, size = np.random.default_rng(seed), policy.num_tokens
    return [Prompt(random.integers(size, size=length), row) for row, length in enumerate(lengths)]


# --- where they differ -----------------------------------------------------------------------------------------------


Calls = list[tuple[Tensor, Tensor]]
"""Input and output ``[T, ...]`` of each call of a module."""


def _first_difference(sampler: NativeSampler, prompts: Sequence[Prompt], trained: Policy) -> str:
    """The first module that makes other outputs from equal inputs when it samples than when it trains."""
    with _watched(sampler.policy) as sampling:
        rollouts = sorted(sampler.generate(prompts, SAMPLES, 0), key=lambda rollout: rollout.sample)
    with _watched(trained) as training:
        trained_logps(sampler, rollouts, trained)
    batch = batch_of(rollouts)
    begins = batch.cu_seqlens[:-1].long()
    rows = [torch.arange(len(prompts[0].ids)), *(batch.rows[begins + t] for t in range(1, TOKENS))]
    for name, ((inputs, outputs), *_) in training.items():
        calls = sampling.get(name, [])[-TOKENS:]
        if _alike(inputs, [x for x, _ in calls], rows) and not _alike(outputs, [x for _, x in calls], rows):
            return name
    return "the head"


def _alike(whole: Tensor, parts: Sequence[Tensor], rows: Sequence[Tensor]) -> bool:
    """Whether the rows of a packed batch equal those of the forwards that sampled them, padding left out."""
    return all(torch.equal(whole[at], part[: len(at)]) for at, part in zip(rows, parts, strict=False))


@contextmanager
def _watched(policy: Policy) -> Iterator[dict[str, Calls]]:
    """Notes what goes into and comes out of every module below the policy's head, by name in the order of their end."""
    seen: dict[str, Calls] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            found = [_first_tensor((*arguments, *options.values())), _first_tensor((output,))]
            if all(x is not None and x.dim() > 1 and len(x) == 1 for x in found):
                pair = [x[0].detach().clone() for x in found if x is not None]
                seen.setdefault(name, []).append((pair[0], pair[1]))

        return note

    modules = dict(policy.backbone.named_modules())
    hooks = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in modules.items() if name]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    parts = [x for value in values for x in (value if isinstance(value, tuple | list) else [value])]
    return next((x for x in parts if isinstance(x, Tensor) and x.is_floating_point()), None)


def _advice(sampler: NativeSampler, trained: Policy | None) -> str:
    """The setting of the attention that makes it exact, where one does."""
    policy, was, cpp = sampler.policy, sampler.policy.attention, register_attention("cpp")
    if trained is not None or policy.team is not None or was in (cpp, register_attention("auto")):  # cpp where possible
        return ""
    try:
        policy.use_attention(cpp)
        helps = probe(sampler) is None
    except ValueError:  # it cannot serve this model here
        helps = False
    finally:
        policy.use_attention(was)
    return ": it is exact with model.attention cpp" if helps else ""
