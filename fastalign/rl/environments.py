"""Completions of several turns: the policy writes, an environment answers, until one of them ends the conversation.

    prompt | sampled tokens | observation | sampled tokens | ...

Tokens are appended and never encoded again. Observations are read, not scored. An environment is an object of the class
that `sampler.environment` names, one for each completion, in either of two habits:

    tools   `reset(**row)`; every other public method is a tool, called where the policy writes
            `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; `get_reward()`, if there, pays at the end
    gym     `init(**row)`, `step(text) -> (observation, reward, done)`, `close()`; observation None ends as well

The row is the prompt's in the dataset. `reset` and `init` may return a text, which is put behind the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastalign.losses import custom
from fastalign.parallel.shard import gathered
from fastalign.rl.sampler import Sampler
from fastalign.types import Prompt, Rollout

CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.S)
RESERVED = {"reset", "init", "step", "close", "get_reward"}
TURN = 0x9E3779B97F4A7C15
"""Spreads the seeds of turns: 2**64 divided by the golden ratio."""


class ToolUser:
    """An environment of tools in the gym habit."""

    def __init__(self, environment: Any, answer: Callable[[str], str]) -> None:
        self.environment, self.answer = environment, answer

    def init(self, **row: Any) -> str | None:
        """Begin anew with a row."""
        return self.environment.reset(**row)

    def step(self, text: str) -> tuple[str | None, float, bool]:
        """Call the tools that a turn asks for; it is the last when it asks for none."""
        results = [self.call(found) for found in CALL.findall(text)]
        if results:
            return self.answer("\n".join(results)), 0.0, False
        reward = self.environment.get_reward() if hasattr(self.environment, "get_reward") else 0.0
        return None, float(reward), True

    def call(self, text: str) -> str:
        """What a tool returns; what is wrong with a call is told to the policy, which may do better."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments") or {}
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            return f"error: a call is a JSON object with name and arguments ({error})"
        tools = tools_of(self.environment)
        if name not in tools:
            return f"error: no tool {name!r}, there are {', '.join(tools)}"
        try:
            return str(tools[name](**arguments))
        except Exception as error:  # of the policy's arguments, most likely
            return f"error: {type(error).__name__}: {error}"


def tools_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of an environment that a policy may call, by name."""
    names = [name for name in dir(environment) if not name.startswith("_") and name not in RESERVED]
    return {name: found for name in names if callable(found := getattr(environment, name))}


def load_environment(place: str, tokenizer: Any) -> Callable[[], Any]:
    """What makes an environment for a completion, in the gym habit.

    Args:
        place: ``file.py:Class`` or ``package.module:Class``.
        tokenizer: whose chat template, if it has one, writes what tools return.

    Raises:
        ValueError: it cannot be imported, or has neither habit.
    """
    where, _, name = place.rpartition(":")
    if not where:
        raise ValueError(f"sampler.environment: expected file.py:Class or package.module:Class, got {place!r}")
    module = custom.import_file(where) if where.endswith(".py") else custom.import_named(where)
    kind = getattr(module, name, None)
    if callable(kind) and hasattr(kind, "step") and hasattr(kind, "init"):
        return kind
    if callable(kind) and hasattr(kind, "reset"):
        return lambda: ToolUser(kind(), lambda text: tool_message(tokenizer, text))
    raise ValueError(f"sampler.environment: {place} has no class with reset and tools, or with init and step")


def tool_message(tokenizer: Any, text: str) -> str:
    """What stands behind a turn that called a tool: the result, and the beginning of the next turn."""
    if getattr(tokenizer, "chat_template", None) is None:
        return f"\n<tool_response>\n{text}\n</tool_response>\n"
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    behind = [*before, {"role": "tool", "content": text}]
    whole = tokenizer.apply_chat_template(behind, tokenize=False, add_generation_prompt=True)
    head = tokenizer.apply_chat_template(before, tokenize=False)
    return whole[len(head.rstrip("\n")) :] if whole.startswith(head.rstrip("\n")) else whole


@dataclass
class Conversation:
    """A completion in the making.

    Attributes:
        prompt: what it began with.
        sample: which of the prompt's.
        environment: in the gym habit.
        tokens, logps, scored: so far, observations included.
        reward: what the environment has paid.
    """

    prompt: Prompt
    sample: int
    environment: Any
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    scored: list[bool] = field(default_factory=list)
    reward: float = 0.0

    def add(self, tokens: Sequence[int], logps: Sequence[float] | None = None) -> None:
        """Append what was sampled, or an observation."""
        self.tokens += tokens
        self.logps += [0.0] * len(tokens) if logps is None else logps
        self.scored += [logps is not None] * len(tokens)

    @property
    def ids(self) -> np.ndarray:
        """All tokens."""
        return np.concatenate([self.prompt.ids, np.array(self.tokens, dtype=np.int64)])


def gathered_once(sampler: Any) -> AbstractContextManager:
    """Keeps the weights that a sampler samples from whole on this rank, where they are in this process."""
    policy = getattr(sampler, "policy", None)
    return nullcontext() if policy is None else gathered(policy)


class EnvironmentSampler:
    """Samples completions of several turns with another sampler.

    Args:
        sampler: of single turns; `sampler.max_new_tokens` and `stop` count for each.
        make: makes an environment.
        tokenizer: of the policy.
        max_turns: of the policy; a conversation that goes on then was cut off.
        max_length: tokens of a whole conversation.
    """

    def __init__(
        self,
        sampler: Sampler,
        make: Callable[[], Any],
        tokenizer: Any,
        max_turns: int,
        max_length: int,
    ) -> None:
        self.sampler, self.make, self.tokenizer = sampler, make, tokenizer
        self.exact = sampler.exact
        self.max_turns, self.max_length = max_turns, max_length

    def sync(self, policy: Any, version: int) -> None:
        """Sample from these weights from now on."""
        self.sampler.sync(policy, version)

    def generate(self, prompts: Sequence[Prompt], n: int, seed: int, *, greedy: bool = False) -> Iterator[Rollout]:
        """Samples 0 to n - 1 of each prompt, each as its conversation ends."""
        with gathered_once(self.sampler):  # a rank whose conversations are over does not wait for the others
            yield from self.converse(prompts, n, seed, greedy)

    def converse(self, prompts: Sequence[Prompt], n: int, seed: int, greedy: bool) -> Iterator[Rollout]:
        """`generate`, turn by turn."""
        talks = {prompt.row * n + i: self.begin(prompt, i) for prompt in prompts for i in range(n)}
        for turn in range(self.max_turns):
            last = turn == self.max_turns - 1
            going = [Prompt(talk.ids, number) for number, talk in talks.items()]
            for one in self.sampler.generate(going, 1, (seed + turn * TURN) % 2**63, greedy=greedy):
                talk = talks[one.row]
                finish = self.observe(talk, one)
                if finish or last:
                    yield self.rollout(talks.pop(one.row), finish or "length", one.version)
            if not talks:
                return

    def begin(self, prompt: Prompt, sample: int) -> Conversation:
        """An environment with the prompt's row, and what it says first."""
        talk = Conversation(prompt, sample, self.make())
        first = self.ask(talk, "init", **(prompt.columns or {}))
        if first:
            talk.add(self.encode(first))
        return talk

    def observe(self, talk: Conversation, one: Rollout) -> Any:
        """Tell the environment what was sampled; why the conversation ends, or None."""
        talk.add(one.tokens.tolist(), one.sampler_logps.tolist())
        text = self.tokenizer.decode(one.tokens.tolist(), skip_special_tokens=True)
        answer = self.ask(talk, "step", text)
        try:
            observation, reward, done = answer
            talk.reward += float(reward)
        except (TypeError, ValueError) as error:
            raise self.failure(talk, f"step returned {answer!r}, not (observation, reward, done)") from error
        if done or observation is None:
            return one.finish
        if one.finish == "length":
            return "length"
        talk.add(self.encode(str(observation)))
        return "length" if len(talk.ids) >= self.max_length else None

    def ask(self, talk: Conversation, name: str, *values: Any, **named: Any) -> Any:
        """Call a method of the user's."""
        try:
            return getattr(talk.environment, name)(*values, **named)
        except Exception as error:
            raise self.failure(talk, f"{name} failed: {custom.reason(error)}") from error

    def failure(self, talk: Conversation, what: str) -> ValueError:
        """One line that names the completion."""
        return ValueError(f"sampler.environment: prompt {talk.prompt.row}, sample {talk.sample}: {what}")

    def encode(self, text: str) -> list[int]:
        """Tokens of an observation."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def rollout(self, talk: Conversation, finish: Any, version: int) -> Rollout:
        """The whole conversation as one completion; its environment is closed."""
        if hasattr(talk.environment, "close"):
            self.ask(talk, "close")
        return Rollout(
            prompt=np.asarray(talk.prompt.ids, dtype=np.int64),
            tokens=np.array(talk.tokens, dtype=np.int64),
            sampler_logps=np.array(talk.logps, dtype=np.float32),
            row=talk.prompt.row,
            sample=talk.sample,
            finish=finish,
            version=version,
            scored=np.array(talk.scored),
            reward=talk.reward,
        )
