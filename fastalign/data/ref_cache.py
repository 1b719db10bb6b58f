"""Log-probs under a reference as data: computed once, kept by content, read through a memory map.

A cache is a directory of shards. A shard is a safetensors file, written whole and never changed:

    keys    [n, 16] uint8   what the log-probs are of: see ``example_key``
    offsets [n + 1] int64   of the n examples in
    logps   [N]     fp32    log-probs of their scored tokens

Its name begins with the hash of its bytes, so one that was damaged is known when the cache is opened; its examples are
then missing, and nothing else. No file is ever written twice and none is shared by two writers: there is no lock to
wait for, and a writer that is killed leaves nothing but a ``.tmp`` that no reader looks at.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, save

from fastalign.data.examples import Examples, TokenExample
from fastalign.disk import replace_file, writing

log = logging.getLogger(__name__)

KEY_BYTES = 16
STALE_SECONDS = 86400.0
"""A ``.tmp`` older than a day belongs to no living writer."""


def example_key(example: TokenExample) -> bytes:
    """A hash of the tokens of all sequences and of which are scored; not of where the example stands in its data.

    A ``mismatched`` example has a key of its own.
    """
    digest = hashlib.blake2b(b"own rows" if example.own_rows else b"", digest_size=KEY_BYTES)
    for ids, scored in example.sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        digest.update(np.asarray(scored, dtype=bool).tobytes())
    return digest.digest()


def parts(examples: Iterable[TokenExample]) -> list[TokenExample]:
    """The examples, each followed by its ``mismatched`` one: everything that is scored by itself."""
    return [part for example in examples for part in (example, example.mismatched) if part is not None]


class RefCache:
    """The log-probs of one reference, computed in one way, by the key of their example.

    Opening reads and checks every shard that is there; `refresh` takes up those that other processes added. A missing
    directory is an empty cache: it is made by the first `write`.

    Args:
        directory: of this reference alone; whatever changes a log-prob must change the directory.

    Example:
        >>> cache = RefCache(directory)                                         # doctest: +SKIP
        >>> cache.write({example_key(example): logps})                          # doctest: +SKIP
        >>> cache.read([example_key(example)])[0]                               # doctest: +SKIP
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.num_bytes = 0
        self._files: dict[str, safe_open] = {}
        self._keys = np.empty(0, dtype=f"S{KEY_BYTES}")  # sorted; where each one's log-probs are:
        self._places = np.empty((0, 3), dtype=np.int64)  # file, start, stop
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Take up the shards that were added since the last look; damaged ones are removed and reported."""
        tables = [(self._keys, self._places)]
        for path in sorted(self.directory.glob("*.safetensors")):
            if path.name not in self._files and (shard := _open(path)) is not None:
                keys, offsets, size = shard
                number = np.full(len(keys), len(self._files))
                self._files[path.name] = safe_open(path, framework="numpy")
                self.num_bytes += size
                tables.append((keys, np.stack([number, offsets[:-1], offsets[1:]], axis=1)))
        keys = np.concatenate([keys for keys, _ in tables])
        self._keys, first = np.unique(keys, return_index=True)  # of two equal ones the older
        self._places = np.concatenate([places for _, places in tables])[first]

    @property
    def shards(self) -> list[str]:
        """Names of the files that were taken up; files of one name hold the same everywhere."""
        return list(self._files)

    def has(self, keys: Sequence[bytes], shards: Container[str] | None = None) -> np.ndarray:
        """``[n]`` bool: which keys are known, in some of the shards if these are named."""
        positions, known = self._find(keys)
        if shards is not None and known.any():
            allowed = np.array([name in shards for name in self._files])
            known[known] = allowed[self._places[positions[known], 0]]
        return known

    def read(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """The log-probs of each key, fp32 ``[scored tokens]``.

        Raises:
            KeyError: a key that is not there.
        """
        positions, known = self._find(keys)
        if not known.all():
            raise KeyError(f"{np.count_nonzero(~known)} of {len(keys)} examples are not in {self.directory}")
        files = list(self._files.values())
        return [_slice(files[file], start, stop) for file, start, stop in self._places[positions].tolist()]

    def num_tokens(self, keys: Sequence[bytes]) -> int:
        """How many log-probs the known ones among the keys have together."""
        positions, known = self._find(keys)
        return int(np.diff(self._places[positions[known], 1:]).sum())

    def write(self, entries: Mapping[bytes, np.ndarray]) -> Path:
        """Add a shard, whole or not at all, and on the disk when this returns; `refresh` makes it readable.

        Args:
            entries: fp32 log-probs by key; not empty.

        Raises:
            OSError: the directory cannot be written.
        """
        lengths = [len(logps) for logps in entries.values()]
        data = save(
            {
                "keys": np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(-1, KEY_BYTES),
                "offsets": np.cumsum([0, *lengths], dtype=np.int64),
                "logps": np.concatenate([*entries.values()]).astype(np.float32),
            }
        )
        with writing(
            "the reference cache", self.directory, len(data), "set reference.cache to a writable directory, or to off"
        ):
            self.directory.mkdir(parents=True, exist_ok=True)
            _reap(self.directory)
            path = self.directory / f"{_hash(data)}-{uuid.uuid4().hex}.safetensors"
            replace_file(path, data, flushed=True)
            return path

    def _find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """``[n]`` positions in the table, and whether the key is really there."""
        wanted = np.array(keys, dtype=self._keys.dtype)
        positions = np.searchsorted(self._keys, wanted)
        if not len(self._keys):
            return positions, np.zeros(len(wanted), dtype=bool)
        positions = np.minimum(positions, len(self._keys) - 1)
        return positions, self._keys[positions] == wanted


class Referenced:
    """A dataset whose examples bring their reference log-probs along, read from a cache that holds all it is asked."""

    def __init__(self, dataset: Examples, cache: RefCache) -> None:
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def lengths(self) -> np.ndarray:
        """``[n]`` tokens of the longest sequence of each example."""
        return self.dataset.lengths()

    def fetch(self, indices: list[int]) -> list[TokenExample]:
        """The examples at ``indices`` with the column ``ref_logps``, their ``mismatched`` ones too."""
        examples = self.dataset.fetch(indices)
        every = parts(examples)
        found = iter(self.cache.read([example_key(example) for example in every]))
        return [_attach(example, found) for example in examples]


def _attach(example: TokenExample, found: Iterable[np.ndarray]) -> TokenExample:
    known, other = example.fill(ref_logps=next(iter(found))), example.mismatched
    return known if other is None else replace(known, mismatched=other.fill(ref_logps=next(iter(found))))


def _slice(file: safe_open, start: int, stop: int) -> np.ndarray:
    return file.get_slice("logps")[start:stop] if stop > start else np.empty(0, dtype=np.float32)


def _open(path: Path) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Keys, offsets and size of a shard; None, and away with it, when its bytes are not those that were written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:  # another process found it damaged first
        return None
    except OSError as error:
        log.warning("reference cache: %s cannot be read (%s): its examples count as missing", path, error.strerror)
        return None
    if _hash(data) == path.name.partition("-")[0]:
        shard = load(data)
        return shard["keys"].view(f"S{KEY_BYTES}")[:, 0], shard["offsets"], len(data)
    log.warning("reference cache: %s is damaged; its examples will be computed again", path)
    with suppress(OSError):  # a cache that others keep may be read-only
        path.unlink(missing_ok=True)
    return None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _reap(directory: Path) -> None:
    """Remove what killed processes left."""
    for path in [*directory.glob("*.tmp"), *directory.glob(".probe-*")]:
        with suppress(OSError):  # another writer was faster, or another user's it is
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
