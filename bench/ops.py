"""Every op beside its rivals under pytest: ``python -m pytest bench/ops.py -k linear_loss``.

The same as ``python -m bench ops``: `bench.measure.Contest` runs a case, `bench.tables` prints and records it.
pytest-benchmark's own table holds fastalign's times; the table at the end holds everyone's.
"""

from __future__ import annotations

import pytest

from bench import cases, measure, run, tables
from bench.field import Setting
from bench.timing import clock


@pytest.mark.benchmark(timer=clock)
def test_op(benchmark, name: str, request: pytest.FixtureRequest) -> None:
    """Time one case; wrong numbers from fastalign fail, a rival's wrong numbers are left out of the table."""
    option = request.config.getoption
    setting = Setting(option("--device"), option("--compile"))
    case = cases.cases(setting)[name]()
    rounds = run.rounds_of(option("--rounds"), setting.device)
    contest = measure.Contest(case, rounds)
    contest.warm_up()

    def rivals() -> None:
        contest.until(measure.OURS)

    benchmark.group = f"{case.name} {case.shape} {case.dtype}"
    benchmark.pedantic(lambda: contest.sample(measure.OURS), setup=rivals, rounds=rounds)
    rivals()  # those whose turn comes after ours in the last round
    figures = contest.figures()
    tables.COLLECTED.extend(measure.rows(case, figures))
    assert figures[measure.OURS].failure is None, figures[measure.OURS].failure
    missed = measure.missed_targets(case, figures)
    assert not (option("--enforce") and missed), missed
