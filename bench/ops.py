"""Every op beside its rivals: ``python -m pytest bench/ops.py``.

Options: ``--rounds 20``, ``--threads 1``, ``--compile`` (adds torch.compile), ``--record`` (append to
``results/ops-<device>.json``), ``--enforce`` (fail where a target ratio is missed), ``-k NAME``.

pytest-benchmark's own table holds fastalign's times; the summary at the end holds everyone's, interleaved in one run,
with the error against float64 beside each time.
"""

from __future__ import annotations

import pytest

from bench import cases, measure
from bench.report import COLLECTED


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize("name", cases.CASES)
def test_op(benchmark, name: str, request: pytest.FixtureRequest) -> None:
    """Time one case; wrong numbers from fastalign fail, a rival's wrong numbers are left out of the table."""
    option = request.config.getoption
    case = cases.CASES[name](compiled=option("--compile"))
    contest = measure.Contest(case)
    contest.warm_up()
    benchmark.group = f"{case.name} {case.shape} {case.dtype}"
    benchmark.pedantic(
        lambda: contest.sample(measure.OURS), setup=lambda: contest.until(measure.OURS), rounds=option("--rounds")
    )
    contest.finish_round()
    figures = contest.figures()
    COLLECTED.extend(measure.rows(case, figures))
    assert figures[measure.OURS].failure is None, figures[measure.OURS].failure
    if option("--enforce"):
        missed = missed_targets(case, figures)
        assert not missed, missed


def missed_targets(case: measure.Case, figures: dict[str, measure.Figure]) -> dict[str, str]:
    """The rivals that we do not beat by the wanted ratio."""
    ours = figures[measure.OURS].median
    ratios = {name: figures[name].median / ours for name in case.targets if not figures[name].failure}
    return {name: f"{r:.2f}x, wanted {case.targets[name]}x" for name, r in ratios.items() if r < case.targets[name]}
