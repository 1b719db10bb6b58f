"""Plain words for types and values, for error messages and help: nobody need know Python to read them; and as YAML."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

ONE = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}
MANY = {"str": "strings", "int": "whole numbers", "float": "numbers"}
NUMERALS = {2: "two", 3: "three", 4: "four"}
EXAMPLES = {
    "optim.betas": "[0.9, 0.95]",
    "loss.loss_weights": "[1, 0.2]",
    "data.columns": "{prompt: question}",
    "select.languages": "[en, de]",
    "model.config": "{model_type: llama, hidden_size: 256}",
    "model.lora": "{r: 16, lora_alpha: 32}",
    "model.quantization": "{load_in_4bit: true}",
}
"""What a list or a mapping may look like, by setting."""
KINDS = {"NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number", "str": "a string"}
KINDS |= {"list": "a list", "tuple": "a list", "dict": "a mapping"}
PLURALS = {"NoneType": "nulls", "bool": "true or false", "int": "numbers", "float": "numbers", "str": "strings"}
PLURALS |= {"list": "lists", "dict": "mappings"}


def describe_type(annotation: str, setting: str = "") -> str:
    """What a setting accepts, from its type as the code spells it.

    Args:
        annotation: of a dataclass field or a keyword argument.
        setting: `section.key`; gives lists and mappings an example that makes sense for it.

    Example:
        >>> describe_type("int | None"), describe_type("Literal['linear', 'cosine']")
        ('a whole number or null', 'one of linear, cosine')
        >>> describe_type("Optional[float]")
        'a number or null'
        >>> describe_type("tuple[float, float]", "optim.betas")
        'two numbers such as [0.9, 0.95]'
    """
    example = EXAMPLES.get(setting)
    return _join([_describe(node, example) for node in members(ast.parse(annotation, mode="eval").body)])


def spelled(annotation: Any) -> str:
    """A type as the code spells it, in a file with and without postponed annotations."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def nearest(name: str, accepted: Iterable[str], cutoff: float = 0.3) -> str:
    """``: did you mean 'dpo'?``, or nothing where no accepted name is near; a beginning of one is nearest.

    Example:
        >>> nearest("apo", ["dpo", "apo_zero"]), nearest("sgd", ["dpo"], cutoff=0.6)
        (": did you mean 'apo_zero'?", '')
    """
    accepted, last = list(accepted), name.rsplit(".", 1)[-1]
    longer = [key for key in accepted if len(last) > 2 and key.rsplit(".", 1)[-1].startswith(f"{last}_")]
    close = longer or difflib.get_close_matches(name, accepted, n=1, cutoff=cutoff)
    return f": did you mean {close[0]!r}?" if close else ""


def kind_of(value: Any) -> str:
    """What a value of a file is; of a list also what it holds.

    Example:
        >>> kind_of(None), kind_of(["a", 1])
        ('null', 'a list of numbers and strings')
    """
    name = type(value).__name__
    inner = sorted({PLURALS.get(type(item).__name__, type(item).__name__) for item in value}) if name == "list" else []
    return KINDS.get(name, f"a {name}") + (f" of {' and '.join(inner)}" if inner else "")


def shown(value: Any) -> str:
    """A short value itself, otherwise its type: texts of the data stay out of messages."""
    return json.dumps(value) if isinstance(value, bool | int | float) else kind_of(value)


def members(node: ast.expr) -> list[ast.expr]:
    """The types of a union, or the one there is."""
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Optional":
        return [*members(node.slice), ast.Constant(None)]
    return [*members(node.left), *members(node.right)] if isinstance(node, ast.BinOp) else [node]


def _join(words: list[str]) -> str:
    """`a, b or c`; behind a list of choices the `or` gets a comma."""
    *others, last = words
    return f"{', '.join(others)}{',' if any(',' in word for word in others) else ''} or {last}" if others else last


def _describe(node: ast.expr, example: str | None) -> str:
    if not isinstance(node, ast.Subscript):
        return ONE.get(ast.unparse(node), ast.unparse(node))
    kind, inner = ast.unparse(node.value), node.slice
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if kind == "Literal":
        return f"one of {_choices(parts)}"
    if kind == "dict":
        of = " of strings" if ast.unparse(parts[-1]) == "str" else ""
        return f"a mapping{of} such as {example or '{name: value}'}"
    if kind == "tuple":
        return f"{NUMERALS[len(parts)]} {MANY[ast.unparse(parts[0])]}{_such_as(example)}"
    if isinstance(inner, ast.Subscript):  # a list of choices
        return f"a list of {_choices(inner.slice.elts if isinstance(inner.slice, ast.Tuple) else [inner.slice])}"
    return f"a list of {MANY[ast.unparse(inner)]}{_such_as(example)}"


def _choices(parts: list[ast.expr]) -> str:
    return ", ".join(str(ast.literal_eval(part)) for part in parts)


def _such_as(example: str | None) -> str:
    return f" such as {example}" if example else ""


def flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a nested mapping down to its leaves, each with its value; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Dumper(yaml.SafeDumper):
    """YAML that quotes a text which begins like a number: PyYAML does not read 1e5 and 0o17 as numbers."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\.?\d"), None)


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings as a file that is read again as the same."""
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False)
