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
from typing import Any, ClassVar, NamedTuple

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


class Flag(NamedTuple):
    """``--key text``, or ``--key+ text`` that appends to a list; no text when the next word is a flag too."""

    key: str
    appends: bool
    text: str | None


class Loader(yaml.SafeLoader):
    """YAML whose words without quotes stay words; a key that is given twice is an error."""

    yaml_implicit_resolvers: ClassVar = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping, every key of which is there once."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and "merge" not in key.tag]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"{min(twice)!r} is given more than once; keep one", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _word(loader: Loader, node: yaml.ScalarNode) -> str:
    text = node.value.encode("utf-16", "surrogatepass").decode("utf-16")  # a pair of JSON's escapes is one character
    return text if node.style else Plain(text)


Loader.add_constructor("tag:yaml.org,2002:str", _word)


def load(source: Any) -> Any:
    """What a YAML file or a flag's text holds; words without quotes are left as `Plain`."""
    try:
        tree = yaml.load(source, Loader)
        free(tree)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("a part of it holds itself, or it is nested too deeply") from error
    return tree


def read(value: Any, annotation: str) -> Any:
    """A value from `Loader` as its setting takes it, whose type is given as the code spells it.

    Example:
        >>> read(Plain("off"), "str"), read(Plain("off"), "bool | None"), read(Plain("1e-6"), "float")
        ('off', False, 1e-06)
        >>> read(Plain("010"), "int"), read(Plain("010"), "str | None"), read(Plain("~"), "str | None")
        (10, '010', None)
        >>> read("off", "bool | str"), read("null", "str | None")  # in quotes
        ('off', 'null')
    """
    return _read(value, types_of(annotation))


def types_of(annotation: str) -> dict[str, ast.expr]:
    """The types of a setting by name: `list` for a list of anything."""
    return _named(ast.parse(annotation, mode="eval").body)


def _named(node: ast.expr) -> dict[str, ast.expr]:
    return {ast.unparse(x.value if isinstance(x, ast.Subscript) else x): x for x in members(node)}


def inner(node: ast.expr) -> list[ast.expr]:
    """The types in a list, a tuple or a dict, or the choices of a Literal."""
    assert isinstance(node, ast.Subscript)
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _read(value: Any, types: dict[str, ast.expr]) -> Any:
    if "Any" in types:
        return free(value)
    if isinstance(value, dict) and "dict" in types:
        return {str(key): _read(x, _named(inner(types["dict"])[-1])) for key, x in value.items()}
    if isinstance(value, list) and "list" in types:
        return [_read(x, _named(inner(types["list"])[0])) for x in value]
    if isinstance(value, list) and "tuple" in types:
        return tuple(_read(x, _named(node)) for x, node in zip(value, inner(types["tuple"]), strict=True))
    if isinstance(value, str):
        return scalar(value, types)
    if type(value).__name__ in types or (value is None and "None" in types):  # by a tag of YAML
        return value
    raise ValueError(value)


def scalar(text: str, types: dict[str, ast.expr]) -> Any:
    """A word for a setting of these types; in quotes it is a text wherever one is taken."""
    plain, takes_text = isinstance(text, Plain), "str" in types
    if plain and text in NULLS:
        if "None" in types:
            return None
        raise ValueError(text)
    if "bool" in types and (plain or not takes_text) and (truth := boolean(text)) is not None:
        return truth
    if "Literal" in types and text in map(ast.literal_eval, inner(types["Literal"])):
        return str(text)
    if takes_text and not (plain and text.lower() in ("true", "false")):  # nobody means these as a name
        return str(text)
    number = as_number(text)
    if "int" in types and isinstance(number, int):
        return number
    if "float" in types and number is not None:
        return float(number)
    raise ValueError(text)


def free(value: Any) -> Any:
    """A value of which only its own words tell what it is: those of a Hugging Face or PEFT config."""
    if isinstance(value, dict):
        return {str(key): free(x) for key, x in value.items()}
    if isinstance(value, list):
        return [free(x) for x in value]
    if not isinstance(value, Plain):
        if isinstance(value, str | int | float | None):
            return value
        raise ValueError(f"{value!r} is of a type that no setting takes: {type(value).__name__}")
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


def as_number(text: str) -> int | float | None:
    """The number that a word is, or None."""
    if WHOLE.fullmatch(text):
        digits = text.lstrip("+-")
        return int(text, 0) if digits[:2].lower() in ("0x", "0o", "0b") else int(text)
    if NUMBER.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if WIDE.fullmatch(text) else None


def read_value(key: str, value: Any, annotation: str, place: str = "") -> Any:
    """A value as the setting takes it."""
    try:
        return read(value, annotation)
    except (ValueError, OverflowError) as error:
        expected = describe_type(annotation, key)
        if value is None or (isinstance(value, Plain) and value in NULLS):
            raise UsageError(f"{key}{place}: expected {expected}, got null: leave it out for the default") from error
        raise UsageError(f"{key}: expected {expected}, got {as_written(value)}") from error


def read_flag(key: str, text: str, annotation: str) -> Any:
    """What a flag's text is, not yet read: a list or a mapping where the setting takes one, else a word.

    For a part of a free mapping quotes make a text, as in a file.
    """
    types = types_of(annotation)
    opens = "[{" if types.keys() & {"list", "tuple", "dict"} else "[{\"'" if "Any" in types else ""
    if not text or text[0] not in opens:
        return Plain(text) if text else text
    try:
        return load(text)
    except ValueError as error:
        raise UsageError(f"{key}: {text!r} is not valid YAML: {error}") from error


def split_flags(words: list[str]) -> tuple[list[Flag], list[str]]:
    """The flags with their texts, and the words that belong to none: ``--help``, ``--print_config`` and mistakes."""
    flags, others, left = [], [], list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or word.split("=")[0] in ("--help", "--print_config"):
            others.append(word)
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            text = left.pop(0) if left and not left[0].startswith("--") else None
        flags.append(Flag(name.removesuffix("+"), name.endswith("+"), text))
    return flags, others


def take_flag(settings: dict[str, Any], flag: Flag, schema: dict[str, str]) -> None:
    """Put what a flag gives in its place; only a part of a mapping leaves the other parts as they are."""
    if flag.text is None:
        raise UsageError(f"--{flag.key}: expected one argument")
    section, *names = flag.key.split(".")
    name, *parts = names or [section]  # a setting may be in no section
    key, place = (f"{section}.{name}", settings[section]) if names else (name, settings)
    types = types_of(schema[key])
    if flag.appends:
        if parts or "list" not in types:
            raise UsageError(f"--{flag.key}+: a + appends to a list, which {flag.key} is not")
        more = read_flag(key, flag.text, schema[key])
        more = more if isinstance(more, list) else [more]
        before = place[name] if isinstance(place[name], list) else []
        place[name] = before + read_value(key, more, schema[key])
    elif parts:
        part = read_flag(flag.key, flag.text, ast.unparse(inner(types["dict"])[-1]))
        place[name] = place[name] or {}
        put(place[name], parts, read_value(key, nest(parts, part), schema[key]))
    else:
        place[name] = read_value(key, read_flag(key, flag.text, schema[key]), schema[key])


def nest(parts: list[str], value: Any) -> Any:
    """A value inside mappings of one key each."""
    return {parts[0]: nest(parts[1:], value)} if parts else value


def put(mapping: dict[str, Any], parts: list[str], found: dict[str, Any]) -> None:
    """Put the value that ``found`` has behind these keys behind the same keys of a mapping."""
    first, *rest = parts
    if rest and isinstance(mapping.get(first), dict):
        put(mapping[first], rest, found[first])
    else:
        mapping[first] = found[first]


def as_written(value: Any) -> str:
    """A value for an error, as its user wrote it."""
    if isinstance(value, Plain) or value == "":
        return str(value) or "nothing"
    return in_yaml(free(value))


def in_yaml(value: Any) -> str:
    """A value as a configuration file may write it, in JSON."""
    return json.dumps(value, default=str, ensure_ascii=False)
