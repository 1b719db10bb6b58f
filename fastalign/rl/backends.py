"""The sampler that `sampler.backend` names; those beside the native one, whose log-probs are near those of training.

`transformers`: the continuous batching of the installed release, in this process. `vllm`: a server that speaks OpenAI's
API and takes and gives token ids, as vLLM's does; the user starts it, see `examples/vllm_server.sh`.
"""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from fastalign.config import SamplerConfig
from fastalign.disk import readable
from fastalign.models.policy import Policy
from fastalign.models.verify import stock_attention
from fastalign.ops import sample_keys
from fastalign.parallel.clip import local
from fastalign.parallel.reallocate import move
from fastalign.parallel.shard import gathered
from fastalign.rl.exact import settle
from fastalign.rl.sampler import Finish, NativeSampler, Sampler, Stops, check_prompts, check_settings, stops_of
from fastalign.types import Prompt, Rollout

log = logging.getLogger(__name__)

PAGE = 32
"""Tokens of a page of transformers' cache: a completion leaves half of one unused."""
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # renamed in 5.17
MOST_REQUESTS = 64
"""Requests at a time to a server, which batches them, where `sampler.max_rows` does not say."""
PATIENCE = 600
"""Seconds that a request may take."""
RELOAD = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --max-logprobs 1"
"""Starts a server that takes new weights."""

Publish = Callable[[Policy, int, Callable[[Path], None]], None]
"""Writes a policy's weights of a version to a directory and calls a function with it; all ranks call it together."""


def make_sampler(
    policy: Policy | None,
    settings: SamplerConfig,
    tokenizer: Any,
    *,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    lent: Policy | None = None,
    publish: Publish | None = None,
) -> Sampler:
    """The sampler that the section `sampler` describes; all ranks of a sharded policy must call it.

    Args:
        policy: what is sampled from; None for a server, which has weights of its own.
        settings: the section.
        tokenizer: the policy's.
        precision: makes the context in which training runs its forward, autocast's for example.
        lent: a copy of the policy, in a layout and dtype of its own, to sample from instead.
        publish: of a run that trains, for a server: hands it the weights.

    Raises:
        ValueError: settings that nothing can be sampled with, a server that does not answer, or `sampler.exact:
            require` where it is not exact.
    """
    check_settings(settings)
    stops = stops_of(policy, tokenizer, settings.stop)
    if settings.exact == "require" and settings.backend != "native":
        raise ValueError(f"sampler.exact: require, but only sampler.backend native can be, got {settings.backend}")
    if settings.backend == "vllm":
        return ServerSampler(settings, stops, publish, policy)
    assert policy is not None, "only a server samples without a policy"
    if lent is not None:
        received, size = move(policy, lent), sum(local(p).nbytes for p in lent.parameters())
        told = (
            "sampler: from a copy of the weights, %s on every rank (parallel.generate), %s of it received from others"
        )
        log.info(told, readable(size), readable(received))
    if settings.backend == "transformers":
        sampler: Sampler = TransformersSampler(lent or policy, settings, stops, precision=precision)
    else:
        sampler = NativeSampler(lent or policy, settings, stops, precision=precision)
        settle(sampler, None if lent is None else policy)
    return sampler if lent is None else Lent(sampler, lent)


class Lent:
    """Samples from a copy of the policy, which takes the weights whenever they are new.

    Args:
        sampler: of the copy.
        copy: in a layout and dtype of its own; has the weights of the policy but for those that train.
    """

    def __init__(self, sampler: Sampler, copy: Policy) -> None:
        self.sampler, self.copy, self.exact = sampler, copy, sampler.exact

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int, *, greedy: bool = False) -> Iterator[Rollout]:
        """Samples 0 to n - 1 of each prompt, each as it ends."""
        return self.sampler.generate(prompts, n, seed, greedy=greedy)

    def sync(self, policy: Policy, version: int) -> None:
        """Move the weights; all ranks must call it."""
        move(policy, self.copy, trained=True)
        self.sampler.sync(self.copy, version)


def rollout(
    prompt: Prompt, sample: int, tokens: list[int], logps: list[float], finish: Finish, version: int
) -> Rollout:
    """A completion of another sampler."""
    ids, logps_ = np.asarray(prompt.ids, dtype=np.int64), np.array(logps, dtype=np.float32)
    return Rollout(ids, np.array(tokens, dtype=np.int64), logps_, prompt.row, sample, finish, version)


# --- transformers ----------------------------------------------------------------------------------------------------


class TransformersSampler:
    """transformers' continuous batching, with its own attention.

    Its draws depend on what is sampled together. A stop text is found when a completion is whole.

    Args:
        policy: is put back as it was after each call.
        settings: the `sampler` section.
        stops: what ends a completion.
        precision: makes the context in which training runs its forward.
    """

    exact = False

    def __init__(
        self,
        policy: Policy,
        settings: SamplerConfig,
        stops: Stops,
        *,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.policy, self.settings, self.stops, self.precision = policy, settings, stops, precision
        self.version = 0

    def sync(self, policy: Policy, version: int) -> None:
        """The weights are the policy's own: only their version is new."""
        self.policy, self.version = policy, version

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int, *, greedy: bool = False) -> Iterator[Rollout]:
        """Samples 0 to n - 1 of each prompt, each as it ends."""
        check_prompts(self.policy, prompts)
        wanted = {f"{i}/{sample}": (prompt, sample) for i, prompt in enumerate(prompts) for sample in range(n)}
        cold = {key: x for key, x in wanted.items() if (greedy and x[1] == 0) or self.settings.temperature == 0}
        warm = {key: x for key, x in wanted.items() if key not in cold}
        training = self.policy.training
        with gathered(self.policy):  # also on a rank without prompts, which the others need for it
            for requests, draws in ((cold, False), (warm, True)):
                if requests:
                    with stock_attention(self.policy), within(self.precision, self.policy.model):
                        yield from self._run(requests, draws, seed)
        self.policy.train(training)

    def _run(self, requests: dict[str, tuple[Prompt, int]], draws: bool, seed: int) -> Iterator[Rollout]:
        rows = min(len(requests), self.settings.max_rows or MOST_REQUESTS)
        longest = max(len(prompt.ids) for prompt, _ in requests.values())
        pages = rows * -(-(longest + self.settings.max_new_tokens + 1) // PAGE)
        paged: dict[str, Any] = {PAGE_SIZE: PAGE}
        cache = ContinuousBatchingConfig(  # what is left out is guessed from the memory, which takes it
            **paged,
            num_blocks=pages + rows,
            max_batch_tokens=max(longest, rows, 512),
            max_requests_per_batch=rows,
            return_logprobs=True,
            seed=seed,
        )
        options = {"generation_config": self._options(draws), "continuous_batching_config": cache, "warmup": False}
        model: Any = self.policy.model
        with model.continuous_batching_context_manager(**options) as manager:
            for key, (prompt, _) in requests.items():
                room = self.settings.max_new_tokens
                if self.policy.max_length is not None:
                    room = min(room, self.policy.max_length[0] - len(prompt.ids))
                ends = sorted(self.stops.eos) or -1
                manager.add_request(prompt.ids.tolist(), key, max_new_tokens=room, eos_token_id=ends)
            for _ in requests:
                yield self._rollout(*self._next(manager, requests))

    def _next(self, manager: Any, requests: dict[str, tuple[Prompt, int]]) -> tuple[Prompt, int, Any]:
        """The next completion that is whole."""
        while (found := manager.get_result(timeout=1)) is None or not found.is_finished():
            if found is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped by itself: see its log")
        if found.error is not None:
            raise RuntimeError(f"transformers' continuous batching: {found.error}")
        return *requests[found.request_id], found

    def _rollout(self, prompt: Prompt, sample: int, found: Any) -> Rollout:
        tokens, logps = list(found.generated_tokens), list(found.logprobs)
        for count in range(1, len(tokens) + 1):
            if finish := self.stops.reason(tokens[:count]):
                return rollout(prompt, sample, tokens[:count], logps[:count], finish, self.version)
        return rollout(prompt, sample, tokens, logps, "length", self.version)

    def _options(self, draws: bool) -> GenerationConfig:
        settings = self.settings
        cut: dict[str, Any] = {}
        if draws:
            cut = {"temperature": settings.temperature, "top_k": settings.top_k or None, "top_p": settings.top_p}
            cut["min_p"] = settings.min_p or None
        return GenerationConfig(do_sample=draws, max_new_tokens=settings.max_new_tokens, **cut)


@contextmanager
def within(precision: Callable[[], AbstractContextManager], model: Any) -> Iterator[None]:
    """Meanwhile the model's forward runs in that context, in whichever thread: autocast is one thread's own.

    Keys and values enter the cache in its dtype, that of the weights.
    """
    paged: Any = PagedAttentionCache
    forward, update = model.forward, paged.update

    @wraps(forward)
    def inside(*values: Any, **named: Any) -> Any:
        with precision():
            return forward(*values, **named)

    def cast(cache: Any, *values: Any, **named: Any) -> Any:
        def fit(x: Any) -> Any:
            return x.to(cache.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        return update(cache, *map(fit, values), **{name: fit(x) for name, x in named.items()})

    with replaced(model, "forward", inside), replaced(paged, "update", cast):
        yield


@contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Meanwhile an object or a class has another function of that name; one that it inherits it inherits again."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


# --- a server --------------------------------------------------------------------------------------------------------


class ServerSampler:
    """A server that completes token ids, such as vLLM's; a request per completion, with a seed of its own.

    In a run that trains, the server reads the weights anew before it completes what follows a change of them: by the
    route `/collective_rpc`, which vLLM has in its development mode. All ranks generate together then.

    Args:
        settings: the `sampler` section; `url` is where the API begins.
        stops: what ends a completion.
        publish: hands the server the weights; without it it keeps those that it was started with.
        policy: whose weights these are.
    """

    exact = False

    def __init__(
        self, settings: SamplerConfig, stops: Stops, publish: Publish | None = None, policy: Policy | None = None
    ) -> None:
        if settings.url is None:
            raise ValueError(
                "sampler.url is not set: sampler.backend vllm needs the server's, http://localhost:8000/v1"
            )
        self.settings, self.stops, self.version, self.publish = settings, stops, 0, publish
        self.changed = policy
        self.model = self._ask("models")["data"][0]["id"]
        if publish is not None:
            self._require_reload()

    def sync(self, policy: Policy, version: int) -> None:
        """Hand the server these weights before it completes anything."""
        self.changed, self.version = policy, version

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int, *, greedy: bool = False) -> Iterator[Rollout]:
        """Samples 0 to n - 1 of each prompt, each as it ends."""
        check_prompts(None, prompts)
        if self.changed is not None and self.publish is not None:
            self.publish(self.changed, self.version, self._reload)
            self.changed = None
        pool = ThreadPoolExecutor(self.settings.max_rows or MOST_REQUESTS)
        try:
            asked = [
                pool.submit(self._complete, prompt, sample, seed, greedy and sample == 0)
                for prompt in prompts
                for sample in range(n)
            ]
            for done in as_completed(asked):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _complete(self, prompt: Prompt, sample: int, seed: int, cold: bool) -> Rollout:
        settings = self.settings
        key = sample_keys(seed, torch.tensor([prompt.row]), torch.tensor([sample])).item()
        body = {
            "model": self.model,
            "prompt": prompt.ids.tolist(),
            "max_tokens": settings.max_new_tokens,
            "temperature": 0.0 if cold else settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "min_p": settings.min_p,
            "seed": int(key) & (2**31 - 1),
            "stop": list(self.stops.texts),
            "stop_token_ids": sorted(self.stops.eos),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }
        choice = self._ask("completions", body)["choices"][0]
        tokens, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not tokens or logps is None or len(tokens) != len(logps):
            raise ValueError(
                f"sampler.url: {settings.url} gives no token_ids with log-probs: expected a server that knows "
                "return_token_ids, such as vLLM 0.11 or later"
            )
        ended: Finish = "eos" if tokens[-1] in self.stops.eos else "stop"
        finish = "length" if choice["finish_reason"] == "length" else ended
        return rollout(prompt, sample, tokens, logps, finish, self.version)

    def _require_reload(self) -> None:
        """Refuse a server that cannot be given new weights: what it sampled would be of another policy."""
        try:
            ask(f"{self._root}/collective_rpc", None, "sampler.url")
        except ValueError as error:
            if "answers 404" in str(error):
                raise ValueError(
                    f"sampler.url: {self._root} cannot be given the weights that train, as it has no /collective_rpc: "
                    f"start it by {RELOAD}, or leave sampler.backend out, which samples in the process"
                ) from error  # any other answer is of a route that only takes posts

    def _reload(self, directory: Path) -> None:
        """Have the server read weights from a directory, and forget what it has computed with those before."""
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}, "timeout": PATIENCE}
        try:
            ask(f"{self._root}/collective_rpc", rpc, "sampler.url")
            ask(f"{self._root}/reset_prefix_cache", {}, "sampler.url")
        except ValueError as error:
            remedy = "it must see that folder, and its reload_weights must take weights_path, as in vLLM of 2026"
            raise ValueError(f"the server did not take the weights in {directory}: {error}; {remedy}") from error

    @property
    def _root(self) -> str:
        return str(self.settings.url).rstrip("/").removesuffix("/v1")

    def _ask(self, what: str, body: dict[str, Any] | None = None) -> Any:
        return ask(f"{str(self.settings.url).rstrip('/')}/{what}", body, "sampler.url")


def ask(url: str, body: dict[str, Any] | None, setting: str) -> Any:
    """What a server answers, with the key in OPENAI_API_KEY if there is one.

    Args:
        url: of the request.
        body: what is posted; None gets.
        setting: what errors call the setting that names the server.

    Raises:
        ValueError: it does not answer, or with an error, or no JSON.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(500).decode(errors="replace").split())
        raise ValueError(f"{setting}: {url} answers {error.code}: {said}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}: {url} does not answer ({error}): start the server, or mend the url") from error
