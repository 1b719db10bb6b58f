"""Options and the closing table of ``python -m pytest bench/ops.py``: those of ``python -m bench ops``."""

from __future__ import annotations

import pytest
import torch

from bench import common, measure, ops
from bench.cases import cases
from bench.field import Setting


def pytest_addoption(parser: pytest.Parser) -> None:
    new = parser.getgroup("fastalign benchmarks").addoption
    found = "cuda" if torch.cuda.is_available() else "cpu"
    new("--device", choices=["cpu", "cuda"], default=found, help="where to measure")
    new("--rounds", type=int, help="samples of every candidate")
    new("--threads", type=int, default=1, help="CPU threads; one is timed in CPU time, several in wall time")
    new("--compile", action="store_true", help="add torch.compile as a rival (slow to start)")
    new("--record", action="store_true", help="append the figures to bench/results")
    new("--enforce", action="store_true", help="fail where a target ratio is missed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", cases(Setting(metafunc.config.getoption("--device"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.startswith("test_op["):
            item.add_marker(pytest.mark.benchmark(timer=measure.clock))


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(request.config.getoption("--threads"))


def pytest_terminal_summary(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if ops.COLLECTED:
        where = common.environment(device)
        for rows in ops.by_case(ops.COLLECTED):
            ops.print_case(rows)
        ops.print_summary(ops.COLLECTED, where)
        if config.getoption("--record"):
            print("recorded in", ops.record(ops.COLLECTED, device, where))
