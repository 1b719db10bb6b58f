"""The sampler that `sampler.backend` names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastalign.config import SamplerConfig
from fastalign.models.policy import Policy
from fastalign.rl.exact import settle
from fastalign.rl.sampler import NativeSampler, Sampler, stops_of


def make_sampler(
    policy: Policy,
    settings: SamplerConfig,
    tokenizer: Any,
    *,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Sampler:
    """The sampler that the section `sampler` describes; all ranks of a sharded policy must call it.

    Args:
        policy: what is sampled from.
        settings: the section.
        tokenizer: the policy's.
        precision: makes the context in which training runs its forward, autocast's for example.

    Raises:
        ValueError: settings that nothing can be sampled with, or `sampler.exact: require` and it is not.
    """
    stops = stops_of(policy, tokenizer, settings.stop)
    native = NativeSampler(policy, settings, stops, precision=precision)
    settle(native)
    return native
