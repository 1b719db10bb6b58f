"""From argv and YAML files to a ``Config``: the command line's half that knows the schema.

The schema is the dataclasses of ``config.py`` and the keyword arguments of the chosen loss function; their docstrings
are the help. An unknown key is answered with the nearest accepted one.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, cast

from fastalign import words, written
from fastalign.config import AlgorithmConfig, Config, SamplerConfig
from fastalign.engine.methods import METHODS, ON_POLICY, choose, one_or_list, own_options
from fastalign.trl_names import TRL_NAMES, TRL_ON_POLICY
from fastalign.words import as_yaml, describe_type, flatten, kind_of, spelled
from fastalign.written import Flag, UsageError, in_yaml, read_value, split_flags, take_flag

if TYPE_CHECKING:
    from fastalign.losses.traits import Loss

Losses = Mapping[str, "Loss"]
"""The losses of a configuration by name; more than one for a weighted sum."""


def parse_config(method: str, argv: list[str], given: dict[str, Any] | None = None) -> Config:
    """Build a run's configuration; later files win over earlier ones, flags over files.

    Args:
        method: the command.
        argv: what stands behind it.
        given: settings by section that win over the files, from a program.

    Raises:
        UsageError: an unknown key, a value of the wrong type, an unreadable file.
        SystemExit: the help or the settings were asked for, and are printed.
    """
    paths, flags, others = split_config(argv)
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}{nearest(method, METHODS)} (all: {', '.join(METHODS)})")
    files = [(path, read_yaml(path)) for path in paths]
    files += [("the call", given)] if given else []
    for path, tree in files:
        check_method(path, tree, method)
    trees = [tree for _, tree in files]
    algorithm = asked_algorithm(method, flags, trees)
    losses = find_losses(method, asked_loss(method, flags, trees), algorithm)
    schema, settings = schema_of(losses, method), defaults(losses, method, algorithm)
    for path, tree in files:
        check_sections(path, tree, schema, ("loss", *sections(method)))
        check_keys(dict(flatten(tree)), schema, method, losses, f" in {path}")
        take_file(settings, path, tree, schema)
    check_keys((flag.key for flag in flags), schema, method, losses)
    if {"-h", "--help"} & set(others):
        print(help_text(method, losses), end="")
        raise SystemExit(0)
    if strange := [word for word in others if word != "--print_config"]:
        raise UsageError(f"unrecognized arguments: {' '.join(strange)}")
    for flag in flags:
        if flag.key != "method":
            take_flag(settings, flag, schema)
        elif flag.text != method:
            raise UsageError(f"--method: the method is the word behind fastalign, here {method}; leave the flag out")
    settings["loss"]["name"] = one_or_list(losses)  # not as a file or a flag spells it
    if others:
        print(as_yaml({"method": method, **settings}), end="")
        raise SystemExit(0)
    whole = {key: settings[key] for key in ("rewards",) if key in settings}
    made = {key: cls(**settings[key]) for key, cls in sections(method).items()}
    return Config(method=method, loss=settings["loss"], **whole, **made)


def parse_sections(command: str, purpose: str, argv: list[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The sections of a command that trains nothing, by name; what else a run's file holds is passed over.

    Settings of the section that is named like the command are flags without a section; true needs no value there.

    Args:
        command: its name.
        purpose: what help says of it.
        argv: its arguments.
        kinds: the dataclass of each section.
    """
    paths, flags, others = split_config(argv)
    schema = {f"{name}.{field.name}": str(field.type) for name, cls in kinds.items() for field in fields(cls)}
    settings = {name: vars(cls()) for name, cls in kinds.items()}
    if {"-h", "--help"} & set(others):
        texts = section_texts(kinds)
        print(written_help(command, purpose, settings, schema, texts, command), end="")
        raise SystemExit(0)
    for path in paths:
        tree = read_yaml(path)
        unread = {"method", *(field.name for field in fields(Config))} - kinds.keys()
        tree = {key: value for key, value in tree.items() if str(key).partition(".")[0] not in unread}
        check_sections(path, tree, schema, kinds)
        check_keys(dict(flatten(tree)), schema, command, {}, f" in {path}")
        take_file(settings, path, tree, schema)
    own = {field.name for field in fields(kinds[command])}
    flags = [flag._replace(key=f"{command}.{flag.key}") if flag.key in own else flag for flag in flags]
    check_keys((flag.key for flag in flags), schema, command, {})
    for flag in flags:
        on = flag.text is None and schema.get(flag.key) == "bool"
        take_flag(settings, flag._replace(text="true") if on else flag, schema)
    if strange := [word for word in others if word != "--print_config"]:
        raise UsageError(f"unrecognized arguments: {' '.join(strange)}")
    if others:
        print(as_yaml(settings), end="")
        raise SystemExit(0)
    return {name: cls(**settings[name]) for name, cls in kinds.items()}


def own_flags(command: str, purpose: str, argv: list[str], kind: type) -> tuple[Any, list[str]]:
    """A command's own settings, which are flags without a section, and the words that are left for the run's.

    Args:
        command: its name.
        purpose: what help says of it.
        argv: its arguments.
        kind: the dataclass of its settings.
    """
    settings = {command: vars(kind())}
    schema = {f"{command}.{field.name}": str(field.type) for field in fields(kind)}
    if {"-h", "--help"} & set(argv):
        print(written_help(command, purpose, settings, schema, section_texts({command: kind}), command), end="")
        print("\nThe other settings are those of the method: fastalign METHOD --help")
        raise SystemExit(0)
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        key = f"{command}.{word[2:].partition('=')[0].replace('-', '_')}"
        if not word.startswith("--") or key not in schema:
            rest.append(word)
            continue
        given = word.partition("=")[2] if "=" in word else "true" if schema[key] == "bool" else next(words, None)
        take_flag(settings, Flag(key, False, given), schema)
    return kind(**settings[command]), rest


def defaults(losses: Losses, method: str = "", algorithm: AlgorithmConfig | None = None) -> dict[str, Any]:
    """All settings by section, as they are when nothing but the algorithm is given."""
    from fastalign.losses.mixture import settings  # brings torch

    loss = {"name": one_or_list(losses), **settings(losses)}
    if algorithm is not None:
        loss |= own_options(losses, algorithm)
    rewards: dict[str, Any] = {"rewards": []} if method in ON_POLICY else {}
    return {**{name: vars(cls()) for name, cls in sections(method).items()}, "loss": loss, **rewards}


def asked_algorithm(method: str, flags: list[Flag], trees: list[dict[str, Any]]) -> AlgorithmConfig | None:
    """Name and preset of the algorithm, as the last flag or file has them; None for a method without one."""
    if method not in ON_POLICY:
        return None
    from fastalign.rl.algorithms import settle  # brings torch

    asked = {}
    for name in ("name", "preset"):
        key = f"algorithm.{name}"
        written_down = [value for tree in trees for k, value in given_in(tree) if k == key]
        written_down += [flag.text for flag in flags if flag.key == key and flag.text is not None]
        if written_down and str(written_down[-1]) not in written.NULLS:
            asked[name] = str(written_down[-1])
    try:
        return settle(METHODS[method].algorithms, AlgorithmConfig(**asked))
    except ValueError as error:
        raise UsageError(str(error)) from error


def take_file(settings: dict[str, Any], path: str, tree: dict[str, Any], schema: dict[str, str]) -> None:
    """Put what a file gives in the place of what was there; a mapping takes the place of a whole one."""
    seen = set()
    for key, value in given_in(tree):
        if key in WHOLE and key in schema:
            settings[key] = read_value(key, value, schema[key], f" in {path}")
            continue
        section, name, *parts = key.split(".", 2)
        if parts:
            raise UsageError(f"{key}: written so as a flag; in a file write {section}: {{{name}: {{{parts[0]}: ...}}}}")
        if key in seen:
            raise UsageError(f"{key} is given more than once in {path}; keep one")
        seen.add(key)
        settings[section][name] = read_value(key, value, schema[key], f" in {path}")


WHOLE = ("rewards",)
"""Settings that are in no section."""


def given_in(tree: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a file by their dotted keys, whether it nests them in sections or not."""
    for section, values in tree.items():
        if isinstance(values, dict) and "." not in str(section):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        elif section != "method":
            yield section, values


def split_config(argv: list[str]) -> tuple[list[str], list[Flag], list[str]]:
    """The paths after ``--config``, the other flags, and the words that belong to none."""
    flags, others = split_flags(argv)
    paths = [flag.text for flag in flags if flag.key == "config"]
    if None in paths:
        raise UsageError("--config: expected one argument")
    return list(map(str, paths)), [flag for flag in flags if flag.key != "config"], others


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file; words without quotes are left as `written.Plain`."""
    try:
        with open(path, encoding="utf-8") as file:
            tree = written.load(file)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected a mapping such as `optim: {{lr: 1e-5}}`, got {kind_of(written.free(tree))}")
    return tree


def asked_loss(method: str, flags: list[Flag], trees: Iterable[dict[str, Any]]) -> list[str]:
    """The losses named by the last flag (``dpo``, ``dpo,sft`` or ``[dpo, sft]``), or else by the last file with any."""
    named = [value for tree in trees for key, value in given_in(tree) if key == "loss.name"]
    asked = next((names_in(name) for name in reversed(named) if written.free(name) is not None), [])
    for flag in flags:
        if flag.key == "loss.name" and flag.text is not None:
            before = asked or [next(iter(METHODS[method].losses))]
            asked = [*(before if flag.appends else []), *names_in(flag.text)]
    return asked


def names_in(value: Any) -> list[str]:
    """The names in ``loss.name``."""
    if value in ([], "[]"):
        raise UsageError("loss.name: expected a loss or a list of them, got []: leave it out for the default")
    names = value if isinstance(value, list) else str(value).strip("[]").split(",")
    return [str(name).strip(" \"'") for name in names]


def find_losses(method: str, asked: list[str], algorithm: AlgorithmConfig | None = None) -> Losses:
    """The losses by their canonical names, the method's default for none; an import path brings a user's own."""
    from fastalign.rl.algorithms import ALGORITHMS

    try:
        return choose(method, asked, None if algorithm is None else ALGORITHMS[str(algorithm.name)].loss)
    except ValueError as error:
        raise UsageError(str(error)) from error


def sections(method: str) -> dict[str, type]:
    """The sections of a method: the fields of ``Config`` that are dataclasses, and those of methods that sample."""
    factories = {field.name: field.default_factory for field in fields(Config)}
    plain = {name: cast(type, factory) for name, factory in factories.items() if is_dataclass(factory)}
    return {**plain, **({"algorithm": AlgorithmConfig, "sampler": SamplerConfig} if method in ON_POLICY else {})}


def schema_of(losses: Losses, method: str = "") -> dict[str, str]:
    """Every accepted ``section.key`` with its type as the code spells it."""
    parameters = [p for loss in losses.values() for p in inspect.signature(loss.fn).parameters.values()]
    return {
        "method": "str",
        "loss.name": "list[str] | str",
        **({"loss.loss_weights": "list[float] | None"} if len(losses) > 1 else {}),
        **{f"loss.{p.name}": spelled(p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY},
        **{f"{name}.{field.name}": str(field.type) for name, cls in sections(method).items() for field in fields(cls)},
        **({"rewards": "list[dict[str, Any]]"} if method in ON_POLICY else {}),
    }


def asked_method(argv: list[str], default: str) -> str:
    """The method that the last file with any was written for."""
    named = [tree["method"] for tree in map(read_yaml, split_config(argv)[0]) if "method" in tree]
    if named and str(named[-1]) not in METHODS:
        raise UsageError(f"unknown method {named[-1]!r}{nearest(str(named[-1]), METHODS)} (all: {', '.join(METHODS)})")
    return str(named[-1]) if named else default


def check_method(path: str, tree: dict[str, Any], method: str) -> None:
    """Refuse a file that was written for another method."""
    named = tree.get("method", method)
    if str(named) not in METHODS:
        hint = f"{nearest(str(named), METHODS)} (all: {', '.join(METHODS)})"
        raise UsageError(f"{path} is for the unknown method {in_yaml(named)}{hint}")
    if named != method:
        raise UsageError(f"{path} is for '{named}', not {method!r}: run fastalign {named} --config {path}")


def check_sections(path: str, tree: dict[str, Any], schema: dict[str, str], names: Iterable[str]) -> None:
    """Refuse a section that is not a mapping of settings."""
    for section in names:
        value = tree.get(section, ...)
        if value is not ... and not (isinstance(value, dict) and value):
            key = next(key for key in schema if key.startswith(f"{section}.")).partition(".")[2]
            got = in_yaml(written.free(value))
            raise UsageError(f"{section} in {path}: expected a mapping such as `{section}: {{{key}: ...}}`, got {got}")


def check_keys(keys: Iterable[str], schema: dict[str, str], method: str, losses: Losses, place: str = "") -> None:
    """Refuse the first key that neither is in the schema nor lies inside a setting that is a mapping."""
    for key in keys:
        section, name, *_ = [*key.split("."), ""]
        if key in schema or (schema.get(f"{section}.{name}", "").startswith("dict") and all(key.split("."))):
            continue
        if key.rsplit(".", 1)[-1] == "loss_weights" and len(losses) == 1:
            raise UsageError(f"{key}{place}: {no_sum(method, next(iter(losses)))}")
        if section in ("algorithm", "sampler", "rewards") and method in METHODS and method not in ON_POLICY:
            raise UsageError(f"{method} does not sample: {section}{place} is of {', '.join(ON_POLICY)}")
        if section != "loss":
            raise UsageError(f"unknown key {key!r}{place}{nearest(key, schema)}")
        own = [k for k in schema if k.startswith("loss.") and (k != "loss.name" or words.nearest(key, [k], cutoff=0.8))]
        hint = nearest(key, [*own, *(k for k in schema if k.endswith(f".{name}"))])
        raise UsageError(f"unknown key {key!r}{place}{hint} (the loss is {'+'.join(losses)!r})")


def no_sum(method: str, name: str) -> str:
    """Why a single loss takes no weights, and how to name several."""
    others = [other for other in METHODS[method].losses if other != name]
    if not others:
        return f"{name!r} is the only loss of {method}, so there is no sum to weigh; leave it out"
    other = "sft" if "sft" in others else others[0]
    return f"weights are for a sum of losses, and {name!r} is alone; name several first: `loss.name: [{name}, {other}]`"


def nearest(name: str, accepted: Iterable[str]) -> str:
    """``: did you mean 'optim.lr'?`` or nothing; compares last parts first, then whole names."""
    accepted, last = list(accepted), name.rsplit(".", 1)[-1]
    same = [key for key in accepted if key.rsplit(".", 1)[-1] == last]
    same += [names[last] for names in (TRL_ON_POLICY, TRL_NAMES) if names.get(last) in accepted]
    return f": did you mean {same[0]!r}?" if same else words.nearest(name, accepted)


def help_text(method: str, losses: Losses) -> str:
    """What ``--help`` prints: every setting with its docstring, what it accepts and its default."""
    settings = defaults(losses, method, asked_algorithm(method, [], []))
    return written_help(method, METHODS[method].help, settings, schema_of(losses, method), docstrings(method, losses))


def written_help(
    command: str,
    purpose: str,
    settings: Mapping[str, Mapping[str, Any]],
    schema: Mapping[str, str],
    texts: Mapping[str, str | None],
    own: str = "",
) -> str:
    """The help of a command; settings of the section ``own`` are flags without it."""
    parser = argparse.ArgumentParser(
        prog=f"fastalign {command}",
        usage=f"fastalign {command} [--config run.yaml] [--section.key value ...]",
        description=f"{purpose.capitalize()}.",
    )
    parser.add_argument("--config", help="YAML file of the settings below; flags win over it.")
    parser.add_argument("--print_config", action="store_true", help="Print all settings as YAML and exit.")
    for key in [key for key in settings if key in WHOLE]:
        parser.add_argument(f"--{key}", metavar=key.upper(), help=f"{REWARDS} (default: {settings[key]})")
    for section, values in settings.items():
        if section in WHOLE:
            continue
        group = parser.add_argument_group((texts[section] or section).rstrip("."))
        for name, default in values.items():
            key = f"{section}.{name}"
            written_default = default if isinstance(default, str) else in_yaml(default)
            text = f"{texts.get(key, '')} (type: {describe_type(schema[key], key)}, default: {written_default})"
            flag = name if section == own else key
            group.add_argument(f"--{flag}", metavar=name.upper(), help=text.replace("%", "%%"))
    return parser.format_help()


REWARDS = (
    "What scores completions, a list of {function: file.py:name}, {model: directory}, {builtin: name} or "
    "{code: {...}}, each with weight and name."
)


def docstrings(method: str, losses: Losses) -> dict[str, str | None]:
    """What the docstrings of the dataclasses and the losses say of every section and setting."""
    from docstring_parser import parse

    texts = section_texts(sections(method))
    for loss in reversed([*losses.values()]):  # of a setting of several losses, the first one's counts
        texts |= {f"loss.{p.arg_name}": p.description for p in parse(loss.fn.__doc__ or "").params}
    names = f"One of {', '.join(METHODS[method].losses)}; or your own, file.py:function."
    texts["loss.name"] = f"{names} Each has its own settings. A list is a weighted sum."
    texts["loss.loss_weights"] = "One weight per loss; default: 1 each."
    texts["loss"] = (next(iter(losses.values())).fn.__doc__ or "").partition("\n")[0]
    return texts


def section_texts(kinds: Mapping[str, type]) -> dict[str, str | None]:
    """What the docstrings of dataclasses say of them and of each setting."""
    from docstring_parser import parse_from_object

    documents = {name: parse_from_object(cls) for name, cls in kinds.items()}
    texts = {f"{name}.{p.arg_name}": p.description for name, document in documents.items() for p in document.params}
    return {**texts, **{name: document.short_description for name, document in documents.items()}}
