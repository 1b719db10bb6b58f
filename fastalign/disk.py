"""Writing files: whole or not at all, flushed to the disk, and one line when it fails: what, where, how much space."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
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
        then: or what to do once there is space, or the cause is fixed.
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
            remedy = f"{'free some space' if errno_of(error) in FULL else 'fix that'} and {then}"
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
        if found := re.search(r"(?:os error|errno) (\d+)", str(error), re.IGNORECASE):
            return int(found[1])
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


@contextmanager
def kept_from_others() -> Iterator[None]:
    """What is made inside only the owner and the group can write, even where the umask lets everybody."""
    was = os.umask(0o077)
    os.umask(was | stat.S_IWOTH)
    try:
        yield
    finally:
        os.umask(was)


def open_to_all(directory: Path) -> bool:
    """Whether every user of this machine can replace what lies in a directory."""
    mode = directory.stat().st_mode if directory.is_dir() else 0
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def write_whole(path: Path, text: str, what: str, then: str = "") -> None:
    """Replace a text file; one that cannot be written whole stays as it was."""
    with writing(what, path, then=then):
        replace_file(path, text.encode())


def replace_file(path: Path, content: bytes, flushed: bool = False) -> None:
    """Write a file beside its place and rename it; with ``flushed`` it is on the disk then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        if flushed:
            flush(temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    if flushed:
        flush(path.parent)


def flush(path: Path, inside: bool = False) -> None:
    """Force a file, or the entries of a directory, to the disk; with ``inside`` first all that the directory holds."""
    for entry in [*(path.rglob("*") if inside else ()), path]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
