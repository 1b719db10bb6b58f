"""The store of reference log-probs: whole shards or none, damage found, many writers, kills at any moment."""

import os
import signal
import time
from pathlib import Path

import forks
import numpy as np
import pytest

from fastalign import disk
from fastalign.data import ref_cache
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.data.ref_cache import RefCache, Referenced, example_key, parts


def entries(first: int, count: int) -> dict[bytes, np.ndarray]:
    """Log-probs by key, of 0, 1, 2, ... tokens, each number known from its key."""
    return {key_of(i): values(i) for i in range(first, first + count)}


def key_of(i: int) -> bytes:
    return i.to_bytes(ref_cache.KEY_BYTES, "little")  # ends in null bytes, which must count


def values(i: int) -> np.ndarray:
    return -np.arange(i % 7, dtype=np.float32) - i


def holds(cache: RefCache, numbers: range | list[int]) -> bool:
    """Whether it knows them all and reads every one as it was."""
    found = cache.read([key_of(i) for i in numbers])
    return all(np.array_equal(x, values(i)) and x.dtype == np.float32 for i, x in zip(numbers, found, strict=True))


def pair(example_id: int = 0, prompt: int = 3) -> TokenExample:
    chosen, rejected = np.array([1] * prompt + [5, 6, 7]), np.array([1] * prompt + [8, 9])
    scored = [np.arange(len(ids)) >= prompt for ids in (chosen, rejected)]
    return TokenExample(((chosen, scored[0]), (rejected, scored[1])), example_id)


def test_what_was_written_is_read_bit_for_bit(tmp_path):
    cache = RefCache(tmp_path / "not" / "there")
    assert len(cache) == 0 and not cache.has([key_of(1)]).any()
    cache.write(entries(0, 5))
    assert len(cache) == 0  # what was added is seen after the next look
    cache.refresh()
    cache.write(entries(100, 13))
    cache.write(entries(3, 4))  # 3 and 4 again
    for known in (cache, RefCache(cache.directory)):
        known.refresh()
        assert len(known) == 5 + 13 + 2
        assert holds(known, [*range(100, 113), 6, 0, 5, 0, 3])
        assert known.has([key_of(2), key_of(7), key_of(2 << 64)]).tolist() == [True, False, False]
        assert known.num_bytes == sum(path.stat().st_size for path in cache.directory.iterdir())
    with pytest.raises(KeyError, match="1 of 2 examples are not in"):
        cache.read([key_of(1), key_of(50)])


def test_shards_are_only_ever_added(tmp_path):
    cache = RefCache(tmp_path)
    first = cache.write(entries(0, 4))
    before = first.read_bytes(), first.stat().st_mtime_ns
    again = cache.write(entries(0, 4))
    assert again != first and (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("damage", ["a flipped bit", "half a file", "an empty file", "another file's bytes"])
def test_a_damaged_shard_is_found_and_only_it_is_lost(tmp_path, caplog, damage):
    cache = RefCache(tmp_path)
    good, bad = cache.write(entries(0, 9)), cache.write(entries(9, 9))
    data = bad.read_bytes()
    middle = len(data) - 30
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    broken = {"a flipped bit": flipped, "half a file": data[: len(data) // 2], "an empty file": b""}
    bad.write_bytes(broken.get(damage, good.read_bytes()))
    reopened = RefCache(tmp_path)
    assert bad.name in caplog.text and "damaged" in caplog.text
    assert holds(reopened, range(9)) and not reopened.has([key_of(i) for i in range(9, 18)]).any()
    assert not bad.exists()
    reopened.write(entries(9, 9))
    assert holds(RefCache(tmp_path), range(18))


WRITER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_ref_cache import RefCache, Path, entries
plain = Path.open
def slowly(path, mode="r", **options):
    if "w" not in mode:
        return plain(path, mode, **options)
    file = plain(path, mode, buffering=0)
    class Slow:
        def __enter__(self): return self
        def __exit__(self, *error): file.close()
        def write(self, data):
            file.write(data[:999]); time.sleep(0.05); file.write(data[999:])
        flush, fileno = file.flush, file.fileno
    return Slow()
Path.open = slowly
cache, shard = RefCache(Path({directory!r})), {first}
while True:
    cache.write(entries(shard % 50 * 400, 400))
    shard += 1
"""


def writer(directory: Path, program: Path, first: int) -> forks.Forked:
    """A process that adds shards of 400 entries until it is killed, most of the time in the middle of writing one."""
    program.write_text(WRITER.format(tests=str(Path(__file__).parent), directory=str(directory), first=first))
    return forks.Forked(program)


def test_two_writers_killed_in_the_middle_leave_whole_shards(tmp_path_factory, tmp_path, caplog):
    programs = tmp_path_factory.mktemp("programs")
    both = [writer(tmp_path, programs / f"{first}.py", first) for first in (0, 3)]
    deadline = time.monotonic() + 30
    while not any(tmp_path.glob("*.safetensors")):
        assert time.monotonic() < deadline, "no shard in half a minute"
        time.sleep(0.01)
    for pause, process in zip((0.4, 0.13), both, strict=True):
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cache = RefCache(tmp_path)  # the other one goes on writing
        assert len(cache) and len(cache) % 400 == 0
        shards = [i for i in range(50) if cache.has([key_of(i * 400)]).any()]
        assert holds(cache, [i * 400 + j for i in shards for j in range(400)])
    assert "damaged" not in caplog.text


def test_what_a_killed_writer_left_is_ignored_and_removed_when_it_is_old(tmp_path):
    fresh, old, probe, others = (tmp_path / name for name in ("0-1.tmp", "0-2.tmp", ".probe-0", "0-3.tmp"))
    others.mkdir()  # cannot be unlinked, as another user's file
    for path in (fresh, old, probe):
        path.write_bytes(b"half a shard")
    for path in (old, probe, others):
        os.utime(path, (0, 0))
    cache = RefCache(tmp_path)
    cache.write(entries(0, 2))
    assert fresh.exists() and others.exists() and not old.exists() and not probe.exists()
    assert holds(RefCache(tmp_path), range(2))


def test_a_shard_that_cannot_be_read_is_a_miss(tmp_path, caplog):
    RefCache(tmp_path).write(entries(0, 2))
    (tmp_path / "0-1.safetensors").mkdir()
    cache = RefCache(tmp_path)
    assert holds(cache, range(2)) and not cache.has([key_of(5)]).any()
    assert "0-1.safetensors cannot be read (Is a directory)" in caplog.text
    assert (tmp_path / "0-1.safetensors").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device \(.* needed, .* free\); set reference.cache"):
        RefCache(tmp_path).write(entries(0, 2))
    assert not list(tmp_path.iterdir())


def test_the_key_is_the_tokens_and_what_is_scored_of_them():
    one = pair()
    (chosen, scored), rejected = one.sequences
    moved = scored.copy()
    moved[-1] = False
    split = (chosen[:2], scored[:2]), (chosen[2:], scored[2:]), rejected
    others = [
        pair(prompt=4),
        TokenExample((rejected, (chosen, scored)), 0),
        TokenExample(((chosen + 1, scored), rejected), 0),
        TokenExample(((chosen, moved), rejected), 0),
        TokenExample(split, 0),
        TokenExample(one.sequences, 0, own_rows=True),
    ]
    assert len({example_key(example) for example in [one, *others]}) == 1 + len(others)
    again = TokenExample(((chosen.astype(np.int32), scored), rejected), 9, "kind").fill(scores=np.ones(2))
    assert example_key(again) == example_key(one) and len(example_key(one)) == ref_cache.KEY_BYTES


class Rows(list):
    """A dataset in memory."""

    def fetch(self, indices: list[int]) -> list[TokenExample]:
        return [self[i] for i in indices]


def test_examples_bring_their_log_probs_into_the_batch(tmp_path):
    plain, other = pair(0), TokenExample((pair(7, prompt=2).sequences[1],), 7)
    mixed = TokenExample((pair(1, prompt=5).sequences[0],), 1, mismatched=other)
    rows, cache = Rows([plain, mixed]), RefCache(tmp_path)
    assert parts(rows) == [plain, mixed, other]
    known = {
        example_key(part): np.arange(n, dtype=np.float32) - 10 * n
        for part, n in zip(parts(rows), (5, 3, 2), strict=True)
    }
    cache.write(known)
    cache.refresh()
    data = Referenced(rows, cache)
    assert len(data) == 2
    batch = build_batch(data.fetch([1, 0]), share_prefix=True)
    assert batch.columns.ref_logps.tolist() == [-30, -29, -28, -50, -49, -48, -47, -46]
    batch = build_batch(data.fetch([1]), share_prefix=True)
    assert batch.companion.columns.ref_logps.tolist() == [-30, -29, -28, -20, -19]
    with pytest.raises(KeyError):
        Referenced(Rows([pair(prompt=9)]), cache).fetch([0])
