"""A disk that fills up: one line with what is needed and free, no scratch left, and a run that goes on with room."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import forks
import pytest

from fastalign.data.repository import reason_of
from fastalign.disk import WriteError, free_bytes, write_whole, writing
from fastalign.engine import train as engine
from fastalign.engine.errors import RunError
from fastalign.engine.output import export
from fastalign.engine.output.metrics import read_metrics
from fastalign.engine.reference.precompute import precompute
from fastalign.engine.train import train
from runs import numbers, records

NEEDED = r"No space left on device \(at least [\d.]+ [kM]?B needed, [\d.]+ [kM]?B free\)"
SPARE = 64 << 10
"""Free bytes that serve small files and no tensors."""


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command: a small file system cannot be made")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def fill(small_disk) -> Callable[[int], Path]:
    """Leave so many bytes free; returns the file that takes the rest."""

    def leave(free: int) -> Path:
        (small_disk / "filler").write_bytes(b"")
        (small_disk / "filler").write_bytes(b"x" * (free_bytes(small_disk) - free))
        return small_disk / "filler"

    return leave


def before(call: Callable, action: Callable[[], object], at: int = 1) -> Callable:
    """The function with an action before its call number ``at``."""
    calls = []

    def wrapped(*args, **options):
        calls.append(args)
        if len(calls) == at:
            action()
        return call(*args, **options)

    return wrapped


def left(directory: Path) -> list[str]:
    """Everything in a run directory but what a run is meant to leave."""
    names = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    return sorted(n for n in names if re.search(r"tmp|\.new|\.old|lock|running", n))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_checkpoint_without_room_is_refused_before_it_is_written(configure, small_disk, fill, monkeypatch, earlier):
    config = configure("sft", **{"run.save_every": 2, "run.output_dir": str(small_disk / "run")})
    monkeypatch.setattr(
        engine, "make_updates", before(engine.make_updates, lambda: fill(SPARE), at=4 if earlier else 1)
    )
    with pytest.raises(RunError, match=rf"^cannot write the checkpoint .*step-{4 if earlier else 2}: {NEEDED}") as full:
        train(config)
    assert str(full.value).endswith("; earlier checkpoints are intact") == earlier
    checkpoints = small_disk / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("*")) == (["latest", "step-2"] if earlier else [])
    assert left(small_disk / "run") == []


def test_a_run_whose_checkpoint_cannot_fit_is_refused_before_its_first_step(configure, small_disk, fill):
    (small_disk / "run" / "checkpoints" / "step-1.tmp").mkdir(parents=True)
    (small_disk / "run" / "checkpoints" / "step-1.tmp" / "left").write_bytes(b"x" * SPARE)  # does not count
    fill(SPARE)
    config = configure(
        "dpo", **{"run.output_dir": str(small_disk / "run"), "reference.cache": str(small_disk / "logps")}
    )
    words = rf"^cannot write checkpoints to .*/run/checkpoints: {NEEDED}; free some space before the run starts$"
    with pytest.raises(RunError, match=words):
        train(config)
    assert sorted(p.name for p in small_disk.rglob("*")) == ["checkpoints", "filler", "run"], "nothing was computed"


def test_room_for_fewer_checkpoints_than_the_run_will_hold_is_told(configure, small_disk, fill, caplog):
    config = configure("sft", "before", **{"run.steps": 1})
    train(config)
    state = Path(config.run.output_dir) / "checkpoints" / "step-1"
    size = sum(path.stat().st_size for path in state.glob("*.safetensors"))
    small = {"run.output_dir": str(small_disk / "run"), "run.steps": 3, "run.save_every": 1}
    fill(2 * size + size // 2)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*step-3"):
        train(configure("sft", **small))
    assert re.search(
        r"has room for 2 more checkpoint\(s\) of .* and the run will hold 3 \(run\.keep is 2\)", caplog.text
    )
    caplog.clear()
    shutil.rmtree(small_disk / "run")
    fill(2 * size + size // 2)
    train(configure("sft", **small, **{"run.keep": 1}))
    assert "has room for" not in caplog.text


@pytest.mark.parametrize("pages", [0, 3, 6])
def test_a_checkpoint_that_does_not_fit_after_all_leaves_nothing(configure, small_disk, fill, monkeypatch, pages):
    config = configure("sft", **{"run.output_dir": str(small_disk / "run")})
    train(config)
    whole, state = numbers(config.run.output_dir), small_disk / "run" / "checkpoints" / "step-6"
    tensors = sum(path.stat().st_size for path in state.glob("*.safetensors"))
    config.run.output_dir = str(small_disk / "again")
    monkeypatch.setattr(engine, "save", before(engine.save, lambda: fill(tensors + pages * 4096)))
    with pytest.raises(
        RunError, match=r"^cannot write the checkpoint .*/again/checkpoints/step-6: No space left"
    ) as full:
        train(config)
    assert "earlier" not in str(full.value) and "\n" not in str(full.value)
    assert left(small_disk / "again") == [] and not list((small_disk / "again" / "checkpoints").glob("step*"))
    (small_disk / "filler").unlink()
    config.run.resume = True  # there is nothing to go on from: afresh
    train(config)
    assert numbers(config.run.output_dir) == whole


@pytest.mark.parametrize("room", [SPARE, 200 << 10])
def test_an_export_without_room_says_how_to_make_it(configure, small_disk, fill, monkeypatch, room):
    """Found before it is written, or while it is."""
    config = configure("sft", **{"run.output_dir": str(small_disk / "run")})
    with (
        monkeypatch.context() as patch,
        pytest.raises(WriteError, match=r"^cannot write the model .*/run/model: No space") as full,
    ):
        patch.setattr(engine, "export", before(engine.export, lambda: fill(room)))
        train(config)
    assert re.search(rf"{NEEDED}; free some space and export again with: .* --run\.resume true$", str(full.value))
    assert left(small_disk / "run") == [] and not (small_disk / "run" / "model").exists()
    (small_disk / "filler").unlink()
    config.run.resume = True
    train(config)
    assert (small_disk / "run" / "model" / "model.safetensors").exists()


def test_a_line_of_metrics_without_room_ends_the_run(configure, small_disk, fill, monkeypatch):
    whole, config = configure("sft", "whole"), configure("sft", **{"run.output_dir": str(small_disk / "run")})
    for one in (config, whole):
        one.run.save_every, one.run.steps = 5, 12
    train(whole)
    with (
        monkeypatch.context() as patch,
        pytest.raises(RunError, match=r"^cannot write metrics .*metrics\.jsonl: No space"),
    ):
        patch.setattr(engine, "make_updates", before(engine.make_updates, lambda: fill(0), at=6))
        train(config)  # a line soon needs another page
    assert 5 <= len(read_metrics(small_disk / "run" / "metrics.jsonl")) < 10
    assert left(small_disk / "run") == []
    (small_disk / "filler").unlink()
    config.run.resume = True
    train(config)
    assert numbers(config.run.output_dir) == numbers(whole.run.output_dir)


def test_a_report_without_room_does_not_fail_a_finished_run(configure, small_disk, fill, monkeypatch, caplog):
    config = configure("sft", **{"run.output_dir": str(small_disk / "run")})
    monkeypatch.setattr(export, "write_report", before(export.write_report, lambda: fill(0)))
    train(config)
    assert re.search(r"no report \(cannot write the report .*No space left.*fastalign report ", caplog.text)
    assert (small_disk / "run" / "model").exists() and left(small_disk / "run") == []


def test_settings_that_cannot_be_written_stay_as_they_were(configure, small_disk, fill):
    config = configure("sft", **{"run.output_dir": str(small_disk / "run")})
    train(config)
    settings = (small_disk / "run" / "config.yaml").read_text()
    fill(0)
    config.run.resume = True
    with pytest.raises(
        RunError, match=r"^cannot write the settings .*config\.yaml: No space left on device \(0 B free\)"
    ):
        train(config)
    assert (small_disk / "run" / "config.yaml").read_text() == settings and left(small_disk / "run") == []
    assert len(records(config.run.output_dir)) == 6


def test_a_cache_of_tokens_without_room_is_named(configure, small_disk, fill):
    fill(8192)
    config = configure("sft", **{"data.cache_dir": str(small_disk / "cache")})
    with pytest.raises(
        OSError, match=r"^cannot write the cache .*/cache/(rows|tokens): No space left .* set data\.cache_dir"
    ):
        train(config)
    assert [path for path in (small_disk / "cache").rglob("*") if "tmp" in path.name] == []


def test_a_copy_of_the_rows_without_room_is_named(small_disk, fill, monkeypatch):
    """What `datasets` keeps of the hub's rows is in a cache of its own."""
    fill(0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", small_disk / "hf")
    with pytest.raises(OSError) as full:
        (small_disk / "rows").write_bytes(b"x")
    assert re.search(r"^its copy in .*/small/hf: No space left .* or set HF_DATASETS_CACHE$", reason_of(full.value))


def test_a_cache_of_log_probs_without_room_is_named(configure, small_disk, fill):
    fill(8192)
    config = configure("dpo", **{"reference.cache": str(small_disk / "logps")})
    words = rf"^cannot write the reference cache .*: {NEEDED}; set reference\.cache to a writable directory, or to off"
    for run in (train, precompute):
        with pytest.raises(RunError, match=words):
            run(config)
    assert [path for path in (small_disk / "logps").rglob("*") if path.is_file()] == []


def test_other_failures_are_told_by_their_name(tmp_path):
    too_large = pytest.raises(OSError, match=r"^cannot write the thing .*: File too large; do less$")
    with too_large, writing("the thing", tmp_path, remedy="do less"):
        raise OSError(27, "File too large")


def test_two_ranks_say_it_once_and_wait_for_nobody(small_disk, tmp_path):
    """A held directory and full disks, met by one rank or both."""
    script = Path(__file__).with_name("ranks_files.py")
    output = forks.run(script, tmp_path, small_disk, ranks=2, timeout=100)
    told = sorted(re.findall(r"^\d .*", output, re.M))
    assert len(told) == 6 and told[0::2] == told[1::2], output  # the same on both ranks
    assert re.search(r"cannot write the checkpoint .*step-1 on rank [01]: No space left", told[0])
    assert re.search(r"cannot write the reference cache .*: No space left", told[2])
    assert re.search(r"is in use by process \d+ on .* since", told[4])


def test_the_remedy_fits_the_cause(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(WriteError, match=r"cannot write it .*file: Is a directory; fix that and start again$"):
        write_whole(tmp_path / "file", "text", "it", "start again")
