"""A user's own loss: ``loss.name: my_module:my_loss`` or ``loss.name: path/to/file.py:my_loss``.

The function reads what the losses of its method read, and returns one loss for each of their units. It takes over the
traits of the method's default loss, unless it is a `Loss` itself, which says its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastalign.losses.traits import Loss
from fastalign.words import describe_type, nearest, spelled


def is_custom(name: str) -> bool:
    """Whether a name is an import path."""
    return ":" in name


def load(name: str, default: Loss) -> Loss:
    """Import a user's loss and check its signature.

    Args:
        name: ``module:function`` or ``file.py:function``; a relative file is looked for in the working directory.
        default: the default loss of the method, which has the traits and the arguments that are wanted.

    Raises:
        ValueError: with the file and the line, or what is wrong with the function.
    """
    found = find(name, "loss.name")
    loss = found if isinstance(found, Loss) else inherit(found, default)
    check_signature(name, loss.fn, default.fn)
    return replace(loss, read=loss.read or default.read)


def find(name: str, setting: str) -> Callable[..., Any]:
    """The function at an import path.

    Args:
        name: ``module:function`` or ``file.py:function``; a relative file is looked for in the working directory.
        setting: what errors call the setting that names it.

    Raises:
        ValueError: there is none, or its module cannot be imported: the setting, the file and the line.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = import_file(place) if place.endswith(".py") else import_named(place)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error.__cause__
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"{setting}: {place} has no function {attribute!r}{nearest(attribute, own)}")
    return found


def inherit(function: Callable[..., Any], default: Loss) -> Loss:
    """A function with the traits of its method's default loss, less those that are of that loss alone."""
    return replace(default, fn=function, aliases=(), nonnegative=(), metrics=None, flags="")


@cache
def import_file(place: str) -> ModuleType:
    """The module in a file; the file's folder is searched for what it imports."""
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"no file at {path}")
    search(path.parent)
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # files of one name may stand in several folders
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ValueError(f"cannot import {place}: {reason(error, str(path))}") from error
    return module


@cache
def import_named(place: str) -> ModuleType:
    """A module by its dotted name, also one in the working directory."""
    search(Path.cwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"cannot import {place}: {reason(error)}") from error
        where = f"in {Path.cwd()} or among the installed packages"
        raise ValueError(f"no module {place!r} {where}; a file is named with its .py") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot import {place}: {reason(error)}") from error


def search(folder: Path) -> None:
    """Let imports find modules in a folder, behind all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def reason(error: BaseException, file: str | None = None) -> str:
    """File, line and words of an error: the last line of ``file`` that led to it, else the last line of all."""
    if isinstance(error, SyntaxError):
        where, line, words = error.filename, error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        last = next((f for f in reversed(frames) if f.filename == file), frames[-1])
        where, line, words = last.filename, last.lineno, error
    return f"{where}, line {line}: {type(error).__name__}: {words}"


def check_signature(name: str, function: Callable[..., Any], default: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called as the method's own losses are, or a setting without type or default."""
    data = [p.name for p in inspect.signature(default).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    signature = inspect.signature(function)
    settings = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    for p in settings:
        if p.default is p.empty or p.annotation is p.empty or not is_known(p.annotation):
            raise ValueError(
                f"loss.name: the setting {p.name} of {name} needs a type and a default, such as `{p.name}: float = 1.0`"
            )
    try:
        signature.bind(*data)
    except TypeError as error:
        raise ValueError(
            f"loss.name: {name} takes {signature}; expected ({', '.join(data)}, *, settings...)"
        ) from error


def is_known(annotation: Any) -> bool:
    """Whether help and error messages have words for a type."""
    try:
        return bool(describe_type(spelled(annotation)))
    except (KeyError, ValueError, SyntaxError, AttributeError):
        return False
