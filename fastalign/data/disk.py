"""Writes that fail, in one line: what, where, and of a full disk how much it needs and has."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)


class WriteError(OSError):
    """A file could not be written; the text says it all."""


@contextmanager
def writing(what: str, path: Path, need: int = 0, remedy: str = "", then: str = "") -> Iterator[None]:
    """Turn what a block's writes raise into one `WriteError`.

    Args:
        what, path: named in the error.
        need: bytes that will be written, if they are known: the block is not entered when they are not free.
        remedy: what to do about it.
        then: or what to do once there is space, or the cause is mended.
    """
    try:
        if need > free_bytes(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except WriteError:
        raise
    except ConnectionError:  # of a process that ended, not of a disk
        raise
    except (OSError, SafetensorError) as error:
        if then:
            remedy = f"{'free some space' if errno_of(error) in FULL else 'mend that'} and {then}"
        raise WriteError(
            f"cannot write {what} {path}: {reason(error, path, need)}{remedy and f'; {remedy}'}"
        ) from error


def reason(error: BaseException, path: Path, need: int = 0) -> str:
    """Why a write failed, with the space that is needed and free when there is too little."""
    number = errno_of(error)
    if number not in FULL:
        return os.strerror(number) if number else f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    wanted = f"at least {readable(need)} needed, " if need else ""
    return f"{os.strerror(number)} ({wanted}{readable(free_bytes(path))} free)"


def errno_of(error: BaseException | None) -> int | None:
    """The error number behind an exception; safetensors and pyarrow have it in their text only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if told := re.search(r"(?:os error|errno) (\d+)", str(error), re.IGNORECASE):
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


def free_bytes(path: Path) -> int:
    """What may still be written where ``path`` is or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def readable(size: int) -> str:
    """Bytes for people.

    Example:
        >>> readable(12_345_678)
        '12.3 MB'
    """
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def write_whole(path: Path, text: str, what: str, then: str = "") -> None:
    """Replace a text file; one that cannot be written whole stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(what, path, then=then):
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
