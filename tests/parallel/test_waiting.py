"""Beside other busy processes the threads of a run sleep while they wait for one another; alone they spin."""

import logging
import os
import subprocess
import sys
import time

import pytest
import torch

from fastalign.ops.backends import cpp
from fastalign.parallel.waiting import TASKS, adjustable, queued, sharing_cores

pytestmark = pytest.mark.skipif(
    cpp.unavailable() is not None or not queued(), reason="needs fastalign._C and a kernel that tells of waiting"
)


@pytest.fixture
def threads(monkeypatch):
    """More than one thread, which is when threads wait for one another."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def neighbours():
    """A busy process for every core."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for hog in hogs:
        hog.kill()
        hog.wait()


def num_threads():
    return len(list(TASKS.iterdir()))


def comes(condition):
    """Whether it becomes true within some seconds: threads start and end when the kernel finds the time."""
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_a_busy_neighbour_is_noticed_and_changes_no_bit(threads, neighbours, caplog):
    caplog.set_level(logging.INFO, "fastalign")
    a = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    product, until = a @ a, time.monotonic() + 20
    with sharing_cores():
        alone = num_threads()
        while not caplog.messages and time.monotonic() < until:
            assert torch.equal(a @ a, product)
        assert caplog.messages == ["other processes use this machine's cores: the run is slower than it would be alone"]
        assert comes(lambda: num_threads() > alone), "nobody is there to make the team larger than the machine"
        assert torch.equal(a @ a, product)
    assert comes(lambda: num_threads() < alone), "the watcher and its sleepers are still there"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_the_environments_word_stands(threads, monkeypatch, name):
    assert adjustable()
    monkeypatch.setenv(name, "0")
    assert not adjustable()


def test_one_thread_waits_for_nobody(threads):
    torch.set_num_threads(1)
    assert not adjustable()
