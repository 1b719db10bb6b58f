"""Scoring samples while others are still sampled: Python functions, built-in rewards, reward models and code tests.

All samples of a prompt, its group, are scored as soon as they are handed in. One thread orders the calls and watches
their timeouts. Each call has a thread of its own, since one that hangs must not keep the others waiting; ``async``
functions share one event loop, apart from the first, since one of them may block it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastalign.losses.custom import reason
from fastalign.rl.answers import Group, RewardError, Scores, make_scores, one_line, read_answer, sample_words
from fastalign.rl.reward_settings import Reward, read_rewards
from fastalign.types import Rollout
from fastalign.words import nearest

log = logging.getLogger(__name__)

AT_ONCE = {"function": 64, "builtin": 1, "model": 1, "code": os.cpu_count() or 1}
"""Calls that run at the same time: slow functions mostly wait for a server, all others for a core."""
SLOW = 1.0
"""Seconds of a call after which it is tried whether the samples of a prompt can be scored at once."""


class Scorer:
    """The reward functions of a run.

    Args:
        rewards: the setting `rewards`: a list of mappings, see `fastalign.rl.reward_settings`.
        tokenizer: of the policy; turns tokens to text.
        device: where reward models compute.

    Attributes:
        names: of the functions, in order.
        weights: one each, for `fastalign.rl.groups.combine`.

    Raises:
        ValueError: a setting that cannot be used, in one line.
    """

    def __init__(
        self,
        rewards: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rewards = read_rewards(rewards, tokenizer, torch.device(device))
        self.names = tuple(reward.name for reward in self.rewards)
        self.weights = tuple(reward.weight for reward in self.rewards)
        self.tokenizer = tokenizer
        self._loops: list[asyncio.AbstractEventLoop] = []
        self._free = {kind: asyncio.Semaphore(count) for kind, count in AT_ONCE.items()}
        self._apart = {reward.name for reward in self.rewards if reward.per == "sample"}
        self._tried: dict[str, asyncio.Task[None]] = {}
        self._excluded: set[str] = set()
        self._folder = os.getcwd()

    def submit(self, rollouts: Sequence[Rollout], columns: Mapping[str, Any]) -> Future[Scores]:
        """Begin to score all samples of one prompt.

        Args:
            rollouts: the samples.
            columns: the prompt's row of the dataset; ``prompt`` is its text or messages, by default the decoded tokens.

        Returns:
            The scores to come; ``result()`` raises what a function with ``on_error: raise`` did wrong, a `RewardError`.

        Raises:
            ValueError: a function needs an argument that is no column of the row.
        """
        group = self.group(rollouts, columns)
        for reward in self.rewards:
            if missing := sorted(reward.needs - group.arguments.keys()):
                hint = nearest(missing[0], columns, cutoff=0.6) or ": name one so with data.columns"
                raise ValueError(f"reward {reward.name} reads {missing[0]!r}, which is no column of the data{hint}")
        return asyncio.run_coroutine_threadsafe(self._score(group), self._order)

    @property
    def _order(self) -> asyncio.AbstractEventLoop:
        """The loop that orders the calls; threads begin with the first of them."""
        if not self._loops:
            self._loops += [start_loop("rewards"), start_loop("async rewards")]
        return self._loops[0]

    def group(self, rollouts: Sequence[Rollout], columns: Mapping[str, Any]) -> Group:
        """The samples of one prompt in TRL's words."""
        texts = [self.tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True) for one in rollouts]
        prompt = columns.get("prompt")
        if prompt is None:
            prompt = self.tokenizer.decode(rollouts[0].prompt.tolist(), skip_special_tokens=True)
        chat = not isinstance(prompt, str)
        rest = {name: [value] * len(texts) for name, value in columns.items() if name not in ("prompt", "completion")}
        own = {
            "prompts": [prompt] * len(texts),
            "completions": [[{"role": "assistant", "content": text}] if chat else text for text in texts],
            "completion_ids": [one.tokens.tolist() for one in rollouts],
        }
        return Group(tuple(rollouts), {**rest, **own})

    @staticmethod
    def collect(futures: Sequence[Future[Scores]]) -> np.ndarray:
        """``[B, F]`` float64 rewards of all samples of several prompts, in order; waits for them.

        Raises:
            RewardError: what a function did wrong, of the first prompt where one did.
        """
        return np.concatenate([future.result().table for future in futures])

    @staticmethod
    def collect_tokens(futures: Sequence[Future[Scores]]) -> list[np.ndarray] | None:
        """``[R, F]`` rewards of the tokens of each of the B samples, see `Scores`; None where no token is rewarded."""
        parts = [future.result() for future in futures]
        if all(part.tokens is None for part in parts):
            return None
        return [tokens for part in parts for tokens in part.all_tokens()]

    def take_counts(self) -> dict[str, int]:
        """Samples since the last call by what became of them: ``name/excluded`` by ``on_error: exclude``, and the
        statuses of programs, as ``name/compile_error``; zeros included, so that the keys are always the same."""
        taken = {f"{one.name}/{what}": count for one in self.rewards for what, count in one.counts.items()}
        for one in self.rewards:
            one.counts.subtract(dict(one.counts))
        return taken

    def close(self) -> None:
        """End the threads and programs; what is still being scored is cancelled."""
        for loop in self._loops:
            if not loop.is_closed():
                loop.call_soon_threadsafe(loop.stop)
        for reward in self.rewards:
            getattr(reward.call, "close", lambda: None)()

    async def _score(self, group: Group) -> Scores:
        given = await asyncio.gather(*(self._reward(reward, group) for reward in self.rewards))
        return make_scores(given, [len(one.tokens) for one in group.rollouts])

    async def _reward(self, reward: Reward, group: Group) -> list[Any]:
        """What one function gives each sample of a group."""
        if reward.name in self._apart:
            given = await asyncio.gather(*(self._call(reward, one) for one in group.singles()))
            return [value for part in given for value in part]
        start = self._order.time()
        values, seconds = await self._call(reward, group), self._order.time() - start
        slow = reward.kind == "function" and reward.per == "auto" and seconds > SLOW
        if slow and reward.name not in self._tried and not all(same(value, values[0]) for value in values):
            self._tried[reward.name] = asyncio.create_task(self._try_apart(reward, group, values, seconds))
        return values

    async def _try_apart(self, reward: Reward, group: Group, values: list[Any], seconds: float) -> None:
        """Whether a slow function gives each sample alone what it gave them together: then it is called so from now on.

        It is tried on values that differ: a function that compares the samples of a prompt then gives others.
        """
        singles = group.singles()
        try:
            answers = await asyncio.gather(*(self._answer(reward, one) for one in singles))
            alone = [read_answer(reward.name, one, x)[0] for one, x in zip(singles, answers, strict=True)]
        except RewardError:
            alone = []
        if len(alone) == len(values) and all(map(same, alone, values)):
            self._apart.add(reward.name)
            found = "alone each gets the same, so that they are scored at once from now on (`per: group` keeps them)"
        else:
            found = "alone they get other rewards, so that they stay together; an `async` function may be faster"
        log.info("reward %s took %.1f s for %d samples of a prompt: %s", reward.name, seconds, len(values), found)

    async def _call(self, reward: Reward, group: Group) -> list[Any]:
        """What one call gives; nan for all of its samples where it fails and may."""
        try:
            return read_answer(reward.name, group, await self._answer(reward, group))
        except RewardError as error:
            if reward.on_error == "raise":
                raise
            if reward.name not in self._excluded:
                log.warning("%s; left out (on_error: exclude), as later failures of it, without a line", error)
            self._excluded.add(reward.name)
            reward.counts["excluded"] += len(group.rollouts)
            return [np.nan] * len(group.rollouts)

    async def _answer(self, reward: Reward, group: Group) -> Any:
        """What the function returns.

        Raises:
            RewardError: it raised, or took too long.
        """
        run = self._run_async if reward.is_async else self._run_in_thread
        try:
            result, error = await run(reward, group)
        except asyncio.TimeoutError:
            what = f"{sample_words(group)}: no result within {reward.timeout:g} seconds (timeout)"
            raise RewardError(f"reward {reward.name} hangs on {what}") from None
        finally:
            with suppress(OSError):
                os.chdir(self._folder)  # which a function may have left, and the run's own paths begin from
        if error is None:
            return result
        raise await self._explain(reward, group, error) from error

    async def _run_async(self, reward: Reward, group: Group) -> tuple[Any, BaseException | None]:
        called = asyncio.run_coroutine_threadsafe(attempt_async(reward.call, group), self._loops[1])
        return await asyncio.wait_for(asyncio.wrap_future(called), reward.timeout)

    async def _run_in_thread(self, reward: Reward, group: Group) -> tuple[Any, BaseException | None]:
        async with self._free[reward.kind]:
            return await asyncio.wait_for(in_thread(lambda: attempt(reward.call, group)), reward.timeout)

    async def _explain(self, reward: Reward, group: Group, error: BaseException) -> RewardError:
        """What a function raised, in words: called anew on single samples, the first that fails is named."""
        for one in group.singles() if len(group.rollouts) > 1 else ():
            try:
                await self._answer(reward, one)
            except RewardError as alone:
                return alone
        cause = str(error) if isinstance(error, RewardError) else reason(error, reward.file)
        return RewardError(f"reward {reward.name} fails on {sample_words(group)}: {one_line(cause)}")


def same(a: float | np.ndarray, b: float | np.ndarray) -> bool:
    """Whether two samples got the same, None included."""
    return np.array_equal(a, b, equal_nan=True)


def start_loop(name: str) -> asyncio.AbstractEventLoop:
    """An event loop in a thread of its own, which keeps no process alive."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            loop.run_forever()
            loop.run_until_complete(cancel_others())
        finally:
            loop.close()

    threading.Thread(target=run, name=name, daemon=True).start()
    return loop


async def cancel_others() -> None:
    """End what still waits in the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def in_thread(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """What a call returns, made in a new thread; one that hangs ends with the process."""
    done: Future[Any] = Future()
    done.set_running_or_notify_cancel()  # nothing can cancel a thread
    threading.Thread(target=lambda: done.set_result(work()), name="reward", daemon=True).start()
    return asyncio.wrap_future(done)


def attempt(call: Callable[[Group], Any], group: Group) -> tuple[Any, BaseException | None]:
    """What a call returns, or what it raises; ``SystemExit`` too, which would end the thread without a word."""
    try:
        result = call(group)
        return asyncio.run(as_coroutine(result)) if inspect.isawaitable(result) else result, None
    except BaseException as error:
        return None, error


async def attempt_async(call: Callable[[Group], Any], group: Group) -> tuple[Any, BaseException | None]:
    """As `attempt`, of an ``async`` function."""
    try:
        return await call(group), None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error


async def as_coroutine(awaitable: Any) -> Any:
    """An awaitable of any kind as what ``asyncio.run`` takes."""
    return await awaitable
