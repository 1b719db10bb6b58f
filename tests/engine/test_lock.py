"""One process per run directory: another is refused with the name of the holder, a dead one's place is taken."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalign.engine.errors import RunError
from fastalign.engine.output.rundir import HOLDER, LOCK, held
from fastalign.engine.train import train
from fastalign.parallel.mesh import Axis, World
from runs import numbers, records

ALONE = World(Axis(), torch.device("cpu"))
HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def holder(pid: int, host: str) -> str:
    return json.dumps({"host": host, "pid": pid, "since": "2026-01-02 03:04:05"})


def test_a_directory_in_use_is_refused_and_left_as_it_is(configure):
    config = configure("sft", **{"run.steps": 2})
    train(config)
    before, directory = numbers(config.run.output_dir), Path(config.run.output_dir)
    config.run.resume = True
    with held(directory, ALONE):
        said = json.loads((directory / HOLDER).read_text())
        assert (said["pid"], said["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(RunError, match=rf"is in use by process {os.getpid()} on .* since {said['since']}; wait"):
            train(config)
        assert json.loads((directory / HOLDER).read_text()) == said
    assert not (directory / HOLDER).exists() and not (directory / LOCK).exists()
    train(config)
    assert numbers(directory) == before


def test_the_place_of_a_killed_process_is_taken(configure, caplog):
    """Its number may be that of a living process by now: the lock of the operating system counts."""
    config = configure("sft", **{"run.steps": 1})
    directory = Path(config.run.output_dir)
    directory.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory / LOCK], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    (directory / HOLDER).write_text(holder(os.getpid(), socket.gethostname()))
    with pytest.raises(RunError, match=rf"is in use by process {os.getpid()} on .* since 2026-01-02 03:04:05"):
        train(config)
    process.kill()
    process.wait()
    train(config)
    assert f"was left by process {os.getpid()}" in caplog.text and "taking over" in caplog.text
    assert len(records(directory)) == 1 and not (directory / HOLDER).exists()


def test_another_host_is_believed(configure):
    config = configure("sft", **{"run.steps": 1})
    file = Path(config.run.output_dir) / HOLDER
    file.parent.mkdir()
    file.write_text(holder(7, "elsewhere"))
    with pytest.raises(RunError, match=rf"process 7 on elsewhere since .*; if that process is dead, remove {file}"):
        train(config)
    assert file.exists()
    file.unlink()
    train(config)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pid": 3}'])
def test_a_holder_that_cannot_be_read_holds_nothing(configure, text):
    config = configure("sft", **{"run.steps": 1})
    (Path(config.run.output_dir)).mkdir()
    (Path(config.run.output_dir) / HOLDER).write_text(text)
    with held(Path(config.run.output_dir), ALONE):
        pass
