"""From argv and YAML files to a ``Config``: the command line's half that knows the schema.

The schema is the dataclasses of ``config.py`` and the keyword arguments of the chosen loss function; their docstrings
are the help. An unknown key is answered with the nearest accepted one.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any, cast

from fastalign.config import Config

METHODS = {
    "sft": "fine-tune on demonstrations or plain text",
    "dpo": "align on preference pairs",
}
"""The methods of ``engine.methods`` with their line of help; a copy, because the engine is slow to import."""

TRL_NAMES = {
    "model_name_or_path": "model.path",
    "bf16": "model.autocast",
    "dataset_name": "data.path",
    "dataset_train_split": "data.split",
    "train_batch_size": "batch.size",
    "per_device_train_batch_size": "batch.size",
    "gradient_accumulation_steps": "batch.tokens",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "max_grad_norm": "optim.clip_norm",
    "loss_type": "loss.name",
    "num_train_epochs": "run.epochs",
    "max_steps": "run.steps",
    "logging_steps": "run.log_every",
    "eval_steps": "run.eval_every",
    "save_steps": "run.save_every",
    "resume_from_checkpoint": "run.resume",
    "report_to": "run.trackers",
}
"""Names that users of TRL type, and what they are called here."""


class UsageError(ValueError):
    """The command line or a configuration file is wrong."""


def parse_config(method: str, argv: list[str]) -> Config:
    """Build a run's configuration; later files win over earlier ones, flags over files.

    Args:
        method: a key of ``METHODS``.
        argv: the arguments after the method.

    Raises:
        UsageError: an unknown key, a value of the wrong type, an unreadable file.
    """
    paths, flags = split_config(argv)
    trees = {path: read_yaml(path) for path in paths}
    for path, tree in trees.items():
        check_method(path, tree, method)
    name, loss = find_loss(method, asked_loss(flags, trees.values()))
    schema = schema_of(loss)
    for path, tree in trees.items():
        check_sections(path, tree, schema)
        leaves = dict(flatten(tree))
        check_keys(leaves, schema, name, f" in {path}")
        check_nulls(path, leaves, schema)
    check_keys(flag_keys(flags), schema, name)
    words = [word for path in paths for word in ("--config", path)] + flags + ["--loss.name", name]
    settings = parse(build_parser(method, name, loss), words, schema)
    return Config(
        method=method, loss=settings["loss"], **{key: cls(**settings[key]) for key, cls in sections().items()}
    )


def split_config(argv: list[str]) -> tuple[list[str], list[str]]:
    """The paths after ``--config``, and all other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, flags = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    return known.config, flags


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a mapping such as `optim: {{lr: 1e-5}}`, got {type(tree).__name__}")
    return tree


def asked_loss(flags: list[str], trees: Iterable[dict[str, Any]]) -> str | None:
    """The loss named by the last flag, or else by the last file that names one."""
    words = [word for flag in flags for word in flag.split("=", 1)]
    named = [section.get("name") for tree in trees if isinstance(section := tree.get("loss"), dict)]
    named += [value for flag, value in pairwise(words) if flag == "--loss.name"]
    return next((str(name) for name in reversed(named) if name is not None), None)


def find_loss(method: str, name: str | None) -> tuple[str, Callable[..., Any]]:
    """The canonical name and the function of a loss; TRL's spellings are understood."""
    losses, aliases = known_losses(method)
    asked = name or next(iter(losses))
    found = aliases.get(asked, asked)
    if found not in losses:
        known = [*losses, *aliases]
        raise UsageError(f"loss.name: {method} has no loss {asked!r}{nearest(asked, known)} (all: {', '.join(known)})")
    return found, losses[found]


def known_losses(method: str) -> tuple[Mapping[str, Callable[..., Any]], Mapping[str, str]]:
    """A method's losses, the default first, and other spellings of their names."""
    from fastalign.engine.methods import METHODS as methods  # brings torch

    return methods[method].losses, methods[method].aliases


def sections() -> dict[str, type]:
    """The sections of ``Config``: its fields that are dataclasses themselves."""
    factories = {field.name: field.default_factory for field in fields(Config)}
    return {name: cast(type, factory) for name, factory in factories.items() if is_dataclass(factory)}


def schema_of(loss: Callable[..., Any]) -> dict[str, str]:
    """Every accepted ``section.key`` with its type as the code spells it."""
    keywords = [p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {
        "method": "str",
        "loss.name": "str",
        **{f"loss.{p.name}": str(p.annotation) for p in keywords},
        **{f"{name}.{field.name}": str(field.type) for name, cls in sections().items() for field in fields(cls)},
    }


def check_method(path: str, tree: dict[str, Any], method: str) -> None:
    """Refuse a file that was written for another method."""
    if tree.get("method", method) != method:
        raise UsageError(
            f"{path} is for {tree['method']!r}, not {method!r}: run fastalign {tree['method']} --config {path}"
        )


def check_sections(path: str, tree: dict[str, Any], schema: dict[str, str]) -> None:
    """Refuse a section that is not a mapping of settings."""
    for section in ("loss", *sections()):
        value = tree.get(section, ...)
        if value is not ... and not (isinstance(value, dict) and value):
            key = next(key for key in schema if key.startswith(f"{section}.")).partition(".")[2]
            raise UsageError(
                f"{section} in {path}: expected a mapping such as `{section}: {{{key}: ...}}`, got {value!r}"
            )


def check_nulls(path: str, leaves: dict[str, Any], schema: dict[str, str]) -> None:
    """Refuse a null for a setting that has none: the parser lets it pass in a file."""
    for key, value in leaves.items():
        if value is None and "None" not in schema.get(key, "None"):
            raise UsageError(f"{key} in {path}: expected {schema[key]}, got null: leave the line out for the default")


def flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of a nested mapping down to its leaves, each with its value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flag_keys(flags: list[str]) -> Iterator[str]:
    """The dotted keys named by flags; ``--key+`` appends to a list."""
    names = (word[2:].split("=")[0].removesuffix("+") for word in flags if word.startswith("--"))
    return (name for name in names if name not in ("help", "print_config"))


def check_keys(keys: Iterable[str], schema: dict[str, str], loss: str, place: str = "") -> None:
    """Refuse the first key that neither is in the schema nor lies inside a setting that is a mapping."""
    for key in keys:
        section, name, *_ = [*key.split("."), ""]
        if key in schema or schema.get(f"{section}.{name}", "").startswith("dict"):
            continue
        owner = f" (the loss is {loss!r})" if section == "loss" else ""
        raise UsageError(f"unknown key {key!r}{place}{nearest(key, schema)}{owner}")


def nearest(name: str, accepted: Iterable[str]) -> str:
    """``: did you mean 'optim.lr'?`` or nothing; compares last parts first, then whole names."""
    accepted, last = list(accepted), name.rsplit(".", 1)[-1]
    same = [TRL_NAMES[last]] if last in TRL_NAMES else [key for key in accepted if key.rsplit(".", 1)[-1] == last]
    close = same or difflib.get_close_matches(name, accepted, n=1, cutoff=0.3)
    return f": did you mean {close[0]!r}?" if close else ""


def build_parser(method: str, name: str, loss: Callable[..., Any]) -> Any:
    """The jsonargparse parser of a method with one loss; its help is the docstrings of both."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    accepted = ", ".join(known_losses(method)[0])
    parser = jsonargparse.ArgumentParser(
        prog=f"fastalign {method}",
        usage=f"fastalign {method} [--config run.yaml] [--section.key value ...]",
        description=METHODS[method].capitalize() + ".",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the settings below; flags win over it.")
    parser.add_argument("--method", default=method, help=argparse.SUPPRESS)
    for section, cls in sections().items():
        parser.add_class_arguments(cls, section)
    parser.add_argument("--loss.name", default=name, help=f"One of {accepted}; each has its own settings.")
    parser.add_function_arguments(loss, "loss", skip=set(positionals(loss)))
    for action in parser._actions:  # no public way to leave out --model FILE, --data FILE, ...
        if action.dest in {"loss", *sections()}:
            action.help = argparse.SUPPRESS
    return parser


def positionals(loss: Callable[..., Any]) -> Iterator[str]:
    """Names of the loss's data arguments, which are not settings."""
    return (p.name for p in inspect.signature(loss).parameters.values() if p.kind is not p.KEYWORD_ONLY)


def parse(parser: Any, words: list[str], schema: dict[str, str]) -> dict[str, Any]:
    """Run the parser; its complaints become one line that names key, expected type and value."""
    try:
        return parser.parse_args(words).as_dict()
    except argparse.ArgumentError as error:
        match = re.search(r'[Kk]ey "([\w.]+)":.*(?:Got|Given) value: (.*)', str(error), re.DOTALL)
        if match and match[1] in schema:
            raise UsageError(f"{match[1]}: expected {schema[match[1]]}, got {match[2].strip()}") from error
        raise UsageError(str(error)) from error
