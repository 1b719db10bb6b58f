"""Options and the closing table of ``python -m pytest bench/ops.py``."""

from __future__ import annotations

import pytest
import torch

from bench import common, report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastalign benchmarks")
    group.addoption("--rounds", type=int, default=15, help="samples of every candidate")
    group.addoption(
        "--threads", type=int, default=1, help="CPU threads; one is timed in CPU time, several in wall time"
    )
    group.addoption("--compile", action="store_true", help="add torch.compile as a rival (slow to start)")
    group.addoption("--record", action="store_true", help="append the figures to bench/results")
    group.addoption("--enforce", action="store_true", help="fail where a target ratio is missed")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))


def pytest_terminal_summary(config: pytest.Config) -> None:
    if report.COLLECTED:
        report.print_ops(report.COLLECTED, common.environment())
    if report.COLLECTED and config.getoption("--record"):
        print("recorded in", report.record_ops(report.COLLECTED))
