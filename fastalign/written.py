"""Settings as they are written in YAML, each read as what its setting takes.

YAML 1.1 guesses what a word without quotes is: ``off`` becomes false, 010 eight, 1:30 ninety, 2024-01-01 a date and
1e5 a text. Here the type of the setting decides: one that takes text gets the word as it is written, one that takes
true or false also knows on, off, yes and no, and a number is what everybody reads as that number.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from fastalign.words import describe_type, members

NULLS = {"", "~", "null", "Null", "NULL"}
TRUE, FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
WHOLE = re.compile(r"[-+]?(\d+(_\d+)*|0[xX][\da-fA-F]+|0[oO][0-7]+|0[bB][01]+)")
NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?\d*|\.\d+)([eE][-+]?\d+)?")
WIDE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class UsageError(ValueError):
    """The command line or a configuration file is wrong."""


class Plain(str):
    """A word that is written without quotes, not yet read as anything."""

    __slots__ = ()


class Loader(yaml.SafeLoader):
    """YAML whose words without quotes stay words; a key that is written twice is an error."""

    yaml_implicit_resolvers: ClassVar = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, every key of which is there once."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and "merge" not in key.tag]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"{min(twice)!r} stands more than once; keep one", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _word(loader: Loader, node: yaml.ScalarNode) -> str:
    text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")  # a pair of JSON's escapes is one character
    return text if node.style else Plain(text)


Loader.add_constructor("tag:yaml.org,2002:str", _word)


def read(value: Any, annotation: str) -> Any:
    """A value as its setting takes it.

    Args:
        value: from `Loader`.
        annotation: the setting's type as the code spells it.

    Raises:
        ValueError: no number, for a setting that takes nothing else.

    Example:
        >>> read(Plain("off"), "str"), read(Plain("off"), "bool | None"), read(Plain("1e-6"), "float")
        ('off', False, 1e-06)
        >>> read(Plain("010"), "int"), read(Plain("010"), "str | None"), read(Plain("~"), "str | None")
        (10, '010', None)
    """
    return _read(value, members(ast.parse(annotation, mode="eval").body))


def _read(value: Any, types: list[ast.expr]) -> Any:
    parts = {_name(node): node for node in types}
    if isinstance(value, dict):
        inner = _inner(parts.get("dict"))
        return {str(key): _read(x, members(inner[-1])) if inner else free(x) for key, x in value.items()}
    if isinstance(value, list):
        inner = _inner(parts.get("list") or parts.get("tuple"))
        return [_read(x, members(inner[0])) if inner else free(x) for x in value]
    if "Any" in parts:
        return free(value)
    return scalar(value, set(parts)) if isinstance(value, str) else value


def _name(node: ast.expr) -> str:
    return ast.unparse(node.value if isinstance(node, ast.Subscript) else node)


def _inner(node: ast.expr | None) -> list[ast.expr]:
    """The types in a list, a tuple or a dict."""
    if not isinstance(node, ast.Subscript):
        return []
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def scalar(text: str, types: set[str]) -> Any:
    """A word for a setting of these types."""
    plain, takes_text = isinstance(text, Plain), bool(types & {"str", "Literal"})
    if plain and text in NULLS:
        return None
    if plain and (truth := boolean(text)) is not None and ("bool" in types or not takes_text):
        return truth
    if takes_text and plain and text.lower() in ("true", "false"):
        return text.lower() == "true"  # refused: nobody means these as a name
    if takes_text or not types & {"int", "float"}:
        return str(text)
    if (number := as_number(text)) is None:
        raise ValueError(text)
    return number


def free(value: Any) -> Any:
    """A value of which only its own words tell what it is: those of a Hugging Face or PEFT config."""
    if isinstance(value, dict):
        return {str(key): free(x) for key, x in value.items()}
    if isinstance(value, list):
        return [free(x) for x in value]
    if not isinstance(value, Plain):
        return value
    if value in NULLS:
        return None
    found = boolean(value)
    found = as_number(value) if found is None else found
    return str(value) if found is None else found


def boolean(text: str) -> bool | None:
    """True or false, in any of the words of YAML; else None."""
    if text not in (text.lower(), text.upper(), text.capitalize()):
        return None
    return True if text.lower() in TRUE else False if text.lower() in FALSE else None


def as_number(text: str) -> int | float | str | None:
    """The number that a word is; infinity and NaN, which JSON has not, as they are written; None for other words."""
    if WHOLE.fullmatch(text):
        digits = text.lstrip("+-")
        return int(text, 0) if digits[:2].lower() in ("0x", "0o", "0b") else int(text)
    if NUMBER.fullmatch(text):
        return float(text)
    return str(text) if WIDE.fullmatch(text) else None


def read_tree(tree: dict[str, Any], schema: dict[str, str]) -> dict[str, Any]:
    """The settings of a file, each read as what it takes."""
    found: dict[str, Any] = {}
    for section, values in tree.items():
        if isinstance(values, dict):
            found[section] = {name: read_value(f"{section}.{name}", x, schema) for name, x in values.items()}
        else:
            found[section] = read_value(section, values, schema)
    return found


def read_flags(flags: list[str], schema: dict[str, str]) -> list[str]:
    """The flags with lists and mappings as JSON, where nothing is left to guess; a number that is none is refused."""
    words = list(flags)
    for place, word in enumerate(flags):
        flag, equals, value = word.partition("=")
        key = flag.removeprefix("--").removesuffix("+")
        if not flag.startswith("--") or key not in schema:
            continue
        if equals:
            words[place] = f"{flag}={read_flag(key, value, schema)}"
        elif place + 1 < len(flags) and not flags[place + 1].startswith("--"):
            words[place + 1] = read_flag(key, flags[place + 1], schema)
    return words


def read_flag(key: str, value: str, schema: dict[str, str]) -> str:
    """A flag's value as the parser is to have it."""
    if value[:1] not in ("[", "{"):
        read_value(key, Plain(value), schema)
        return value
    try:
        return as_string(read_value(key, yaml.load(value, Loader), schema))
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: {value!r} is not valid YAML: {error}") from error


def read_value(key: str, value: Any, schema: dict[str, str]) -> Any:
    """A value as the setting takes it."""
    if key not in schema:  # a part of a mapping
        section, name, part = key.split(".", 2)
        raise UsageError(f"{key}: written so as a flag; in a file write {section}: {{{name}: {{{part}: ...}}}}")
    try:
        return read(value, schema[key])
    except ValueError as error:
        shown = value if isinstance(value, str) else in_yaml(value)
        raise UsageError(f"{key}: expected {describe_type(schema[key], key)}, got {shown}") from error


def in_yaml(value: Any) -> str:
    """A value as a configuration file may write it, in JSON."""
    return json.dumps(value, default=str, ensure_ascii=False)


def as_string(value: Any) -> str:
    """A value for the parser, which reads YAML: all but ASCII escaped, as some characters are breaks or forbidden."""
    return re.sub(r"[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", in_yaml(value))
