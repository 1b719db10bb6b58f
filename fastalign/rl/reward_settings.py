"""The setting ``rewards``: a list of mappings, each one reward function with its weight.

    rewards:
      - {function: my_rewards.py:accuracy, weight: 2.0}      # or package.module:function
      - {builtin: overlong, max_length: 512, buffer: 128}    # see fastalign.rl.builtins; its settings beside it
      - {model: runs/reward/model}                           # ours, or a sequence classifier with one label
      - {code: {tests: input_output, timeout: 5}}            # see fastalign.rl.code_rewards

Every one takes ``weight`` (default 1), ``name`` (default: that of the function or the directory), ``on_error``
(``raise``, or ``exclude``: where it fails it is left out of the sample's reward) and ``timeout``, seconds of one call.
A function also takes ``per``: it is called for all samples of a prompt (``group``), or for each alone (``sample``), all
at the same time. ``auto``, the default, begins with ``group``; of a function that takes over a second it is tried once
whether it gives each sample alone the same, and if so it goes on with ``sample``.

A function is called as TRL calls it, ``f(prompts=, completions=, completion_ids=, **columns) -> list``, with those
arguments that it takes. It returns for each completion a number; None for no reward; or for a process reward a list
with a number for each token of ``completion_ids``, None for tokens without one, such as all but the last of a step.
"""

from __future__ import annotations

import ast
import copy
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fastalign.losses import custom
from fastalign.rl.answers import Group
from fastalign.rl.builtins import BUILTINS
from fastalign.rl.code_rewards import CodeReward, CodeSettings
from fastalign.rl.reward_models import load_reward_model
from fastalign.rl.sandbox import refusal
from fastalign.words import describe_type, kind_of, members, nearest, spelled

COMMON = {
    "weight": "float",
    "name": "str",
    "on_error": "Literal['raise', 'exclude']",
    "timeout": "float",
}
"""What every reward takes, with its type."""
FUNCTION_ONLY = {"per": "Literal['auto', 'group', 'sample']"}
EXAMPLE = "[{function: my_rewards.py:accuracy, weight: 1.0}]"
PYTHON = {"int": int, "float": (int, float), "str": str, "bool": bool, "None": type(None)}


@dataclass(frozen=True)
class Reward:
    """One reward function, ready to be called.

    Attributes:
        kind: the key that names it: function, builtin, model or code.
        call: gives what the function returns for a group.
        needs: names of arguments that it cannot do without.
        is_async: `call` returns a coroutine.
        file: where its code is, for errors.
        name, weight, on_error, timeout, per: the settings; a timeout of None is none.
        counts: samples by what became of them, for metrics: ``excluded`` by ``on_error``, or the status of a program.
    """

    kind: str
    name: str
    call: Callable[[Group], Any]
    needs: frozenset[str] = frozenset()
    is_async: bool = False
    file: str | None = None
    weight: float = 1.0
    on_error: str = "raise"
    timeout: float | None = 300.0
    per: str = "auto"
    counts: Counter[str] = field(default_factory=Counter)


class Surroundings(NamedTuple):
    """What reward models need to know of the run: the policy's tokenizer, and where they compute."""

    tokenizer: PreTrainedTokenizerBase
    device: torch.device


def read_rewards(
    entries: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[Reward, ...]:
    """The reward functions that the setting names.

    Raises:
        ValueError: what is wrong with the setting, in one line.
    """
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"rewards: expected a list such as {EXAMPLE}, got {kind_of(entries) if entries else 'none'}")
    around = Surroundings(tokenizer, device)
    rewards = tuple(read_entry(entry, f"rewards[{i}]", around) for i, entry in enumerate(entries))
    name, count = Counter(reward.name for reward in rewards).most_common(1)[0]
    if count > 1:
        raise ValueError(f"rewards: {count} of them are named {name!r}: give each a `name` of its own")
    return rewards


def read_entry(entry: Any, setting: str, around: Surroundings) -> Reward:
    """One entry of the list."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{setting}: expected a mapping such as {EXAMPLE[1:-1]}, got {kind_of(entry)}")
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        got = f"got {' and '.join(kinds)}" if kinds else f"got the keys {', '.join(map(str, entry))}"
        raise ValueError(f"{setting}: expected one of {', '.join(KINDS)} such as {EXAMPLE[1:-1]}, {got}")
    own, make = KINDS[kinds[0]](entry, setting)
    options = {key: value for key, value in entry.items() if key != kinds[0]}
    check_keys(options, {**own, **COMMON}, setting)
    if not math.isfinite(options.get("weight", 1.0)):
        raise ValueError(f"{setting}.weight: expected a finite number, got {options['weight']}")
    if options.get("timeout", 1.0) <= 0:
        raise ValueError(f"{setting}.timeout: expected seconds above 0, got {options['timeout']:g}")
    reward = replace(make(around), **{key: options[key] for key in (*COMMON, *FUNCTION_ONLY) if key in options})
    if reward.on_error == "exclude":
        reward.counts["excluded"] = 0
    return reward


def check_keys(given: Mapping[str, Any], types: Mapping[str, str], setting: str) -> None:
    """Refuse a key that is not known, and a value of another type."""
    for key, value in given.items():
        if key not in types:
            raise ValueError(f"unknown key {key!r} in {setting}{nearest(str(key), types)}")
        if not is_of(value, types[key]):
            raise ValueError(f"{setting}.{key}: expected {describe_type(types[key])}, got {kind_of(value)}")


def is_of(value: Any, annotation: str) -> bool:
    """Whether a value is of a type as the code spells it, such as ``int | None`` or ``Literal['a', 'b']``."""
    for node in members(ast.parse(annotation, mode="eval").body):
        if isinstance(node, ast.Subscript):
            if value in ast.literal_eval(node.slice):
                return True
        elif isinstance(value, PYTHON[ast.unparse(node)]) and (not isinstance(value, bool) or "bool" in annotation):
            return True
    return False


Maker = tuple[dict[str, str], Callable[[Surroundings], Reward]]
"""Which keys an entry takes besides the common ones, with their types, and what makes its reward."""


def function_reward(entry: Mapping[str, Any], setting: str) -> Maker:
    """A user's function."""
    path = entry["function"]
    if not isinstance(path, str) or ":" not in path:
        hint = f": a built-in one is named {{builtin: {path}}}" if path in BUILTINS else ""
        raise ValueError(f"{setting}.function: expected file.py:function or module:function, got {path!r}{hint}")
    found = custom.find(path, f"{setting}.function")
    return FUNCTION_ONLY, lambda _: make_function("function", path.rpartition(":")[2], found)


def builtin_reward(entry: Mapping[str, Any], setting: str) -> Maker:
    """A built-in function; its settings are its keyword-only arguments."""
    name = entry["builtin"]
    if name not in BUILTINS:
        raise ValueError(f"{setting}.builtin: no reward {name!r}{nearest(str(name), BUILTINS)} ({', '.join(BUILTINS)})")
    found = BUILTINS[name]
    parameters = inspect.signature(found).parameters.values()
    settings = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    columns = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [key for key, p in settings.items() if p.default is p.empty and key not in entry]:
        raise ValueError(f"{setting}: {name} needs {missing[0]!r}, such as {{builtin: {name}, {missing[0]}: 100}}")
    chosen = partial(found, **{key: entry[key] for key in settings if key in entry})
    own = {key: spelled(p.annotation) for key, p in settings.items()}

    def make(around: Surroundings) -> Reward:
        try:
            chosen(**{column: [] for column in columns})
        except (ValueError, re.error) as error:  # of its settings
            raise ValueError(f"{setting}: {error}") from error
        return make_function("builtin", name, chosen, settings)

    return own, make


def model_reward(entry: Mapping[str, Any], setting: str) -> Maker:
    """A reward model; its calls wait for each other, so that none has a timeout unless it is given."""
    path = entry["model"]
    if not isinstance(path, str):
        raise ValueError(f"{setting}.model: expected a directory or hub name, got {kind_of(path)}")
    path = os.path.expanduser(path)

    def make(around: Surroundings) -> Reward:
        known = around.tokenizer, around.device, f"{setting}.model"
        model = load_reward_model(path, *known, offload=entry.get("offload", False))
        return Reward("model", os.path.basename(os.path.normpath(path)), model, timeout=None)

    return {"offload": "bool"}, make


def code_reward(entry: Mapping[str, Any], setting: str) -> Maker:
    """Tests of programs; every one of them has a time limit of its own."""
    place, given = f"{setting}.code", entry["code"]
    if not isinstance(given, Mapping) or "tests" not in given:
        raise ValueError(f"{place}: expected a mapping that names the column of tests, such as {{tests: input_output}}")
    check_keys(given, {field.name: str(field.type) for field in fields(CodeSettings)}, place)
    settings = CodeSettings(**given)
    for name in ("timeout", "memory_mb"):
        if getattr(settings, name) <= 0:
            raise ValueError(f"{place}.{name}: expected a number above 0, got {getattr(settings, name):g}")
    if not settings.unsafe and (reason := refusal()):
        remedy = "run where user namespaces are allowed, or trust the programs with `unsafe: true`"
        raise ValueError(f"{place}: programs cannot be isolated here ({reason}): {remedy}")
    reward = CodeReward(settings)
    needs = frozenset([settings.tests])
    return {}, lambda _: Reward("code", "code", reward, needs, timeout=None, per="sample", counts=reward.counts)


def make_function(kind: str, name: str, function: Callable[..., Any], settings: Container[str] = ()) -> Reward:
    """A function with TRL's signature, called with the arguments that it takes."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in settings]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p.default is p.empty for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    def call(group: Group) -> Any:
        taken = {key: values for key, values in group.arguments.items() if takes_all or key in named}
        return function(**(taken if kind == "builtin" else copied(taken)))

    return Reward(
        kind,
        name,
        call,
        needs=frozenset(name for name, required in named.items() if required),
        is_async=any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))),  # noqa: B004
        file=getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None),
    )


def copied(arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Arguments that a user's function may change: others of the same group get them as they were."""
    ids = "completion_ids"  # of many numbers, which a deep copy takes one by one
    rest = copy.deepcopy({key: values for key, values in arguments.items() if key != ids})
    return rest | ({ids: [each[:] for each in arguments[ids]]} if ids in arguments else {})


KINDS = {"function": function_reward, "builtin": builtin_reward, "model": model_reward, "code": code_reward}
"""By the key that names the reward."""
