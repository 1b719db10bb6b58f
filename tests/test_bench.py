"""The benchmarks on toy sizes: they run, they measure what they say, and wrong answers get no number."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import cases, common, measure, peers, sides, train, workload
from bench.workload import Workload

FP32 = torch.float32
TOYS = {
    "forward": lambda: cases.token_logps(5, 37, FP32, False, {}, False),
    "forward bf16": lambda: cases.token_logps(5, 37, torch.bfloat16, False, {}, False),
    "backward": lambda: cases.token_logps(5, 37, FP32, True, {}, False),
    "linear_loss": lambda: cases.linear_loss(7, 8, 61, FP32, {}, False),
    "preference_head": lambda: cases.preference_head(3, 5, 8, 61, FP32, False),
}


@pytest.mark.parametrize("name", TOYS)
def test_every_candidate_is_timed_and_right(name):
    case = TOYS[name]()
    figures = measure.run(case, rounds=2)
    assert {who: figure.failure for who, figure in figures.items() if figure.failure} == case.skipped
    assert all(len(figures[who].samples) == 2 for who in case.candidates)
    assert figures[measure.OURS].error is not None


def test_all_cases_can_be_built():
    for name, build in cases.CASES.items():
        case = build(compiled=False)
        assert measure.OURS in case.candidates and case.baseline in case.candidates, name
        assert set(case.targets) <= set(case.candidates) | set(case.skipped), name


def toy_case(**candidates) -> measure.Case:
    def make(generator):
        return {"x": torch.randn(9, generator=generator)}

    def right(x):
        return {"y": x["x"] * 2}

    return measure.Case("double", "9", FP32, make, right, {"eager": right, measure.OURS: right, **candidates})


def test_a_wrong_or_failing_rival_gets_no_number():
    def wrong(x):
        return {"y": x["x"] * 2.001}

    def failing(x):
        raise RuntimeError("no kernel for this device")

    figures = measure.run(toy_case(wrong=wrong, failing=failing), rounds=2)
    assert "over" in figures["wrong"].failure
    assert figures["failing"].failure == "RuntimeError: no kernel for this device"
    rows = measure.rows(toy_case(), figures)
    assert {row["who"] for row in rows if "p50_ms" in row} == {"eager", measure.OURS}


def test_our_own_failure_is_not_hidden():
    case = toy_case()
    case.candidates[measure.OURS] = lambda x: torch.ones(0)[3]
    with pytest.raises(IndexError):
        measure.run(case, rounds=1)


def test_rounds_are_shuffled_and_inputs_are_fresh():
    seen = {"eager": [], measure.OURS: []}
    order = []
    case = toy_case()
    for name in seen:
        case.candidates[name] = lambda x, name=name: (
            (seen[name].append(x["x"]), order.append(name)) and {"y": x["x"] * 2}
        )
    measure.run(case, rounds=12)
    rounds = list(zip(order[2::2], order[3::2], strict=True))  # the first two calls warm up
    assert len(set(rounds)) == 2 and all(len(set(pair)) == 2 for pair in rounds)
    ours, theirs = torch.stack(seen[measure.OURS]), torch.stack(seen["eager"])
    assert torch.equal(ours, theirs)
    assert len(ours.unique(dim=0)) == 13


def test_records_say_where_they_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for value in (1, 2):
        path = common.record("toy", [{"value": value}])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2]
    assert rows[0]["device"] and rows[0]["commit"] and rows[0]["versions"]["torch"] == common.version("torch")


def test_an_absent_peer_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    case = cases.linear_loss(7, 8, 61, FP32, {}, False)
    assert "TRL fused head" not in case.candidates
    assert "trl is not installed" in case.skipped["TRL fused head"]
    monkeypatch.setattr(peers, "version", lambda package: "1.2.0")
    assert "trl 1.2.0 is installed, 1.16.x" in peers.missing("trl")


def toy_pairs(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]

    def text(least: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, 12)))

    return [{"prompt": text(1), "chosen": " " + text(1), "rejected": " " + text(1)} for _ in range(count)]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workload:
    toy = Workload(
        str(tmp_path_factory.mktemp("work")), steps=4, warmup=1, pairs=3, max_length=24, vocab_size=300, hidden_size=64,
        layers=1, threads=torch.get_num_threads(), lr=1e-2,
    )  # fmt: skip
    assert workload.prepare(toy, toy_pairs(20))["pairs"] == 12
    return toy


def run_side(name: str, work: Workload) -> dict:
    sides.run(name, work, profile=False)
    return json.loads((work.path / f"{name}.json").read_text())


def test_both_sides_train_alike(work):
    ours = run_side("fastalign", work)
    assert len(ours["wall"]) == work.steps + 1
    assert ours["losses"][0] == pytest.approx(math.log(2), abs=1e-7)
    if reason := peers.missing("trl"):
        pytest.skip(reason)
    theirs = run_side("trl", work)
    # Steps of lr 1e-2 on 64 hidden units move the loss by tenths; fp32 sums in another order by millionths.
    assert max(ours["losses"]) - min(ours["losses"]) > 0.05
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)


def test_the_summary_counts_timed_steps_only():
    work = Workload("", steps=4, warmup=2, pairs=8)
    run = {"wall": [0, 9, 18, 19, 21], "cpu": [0, 9, 18, 20, 24], "losses": [0.7] * 4, "peak_mib": 5, "ready_mib": 2}
    row = train.summarise([run], work)
    assert row["pairs_per_second"] == pytest.approx(16 / 3)
    assert row["cpu_seconds_per_step"] == pytest.approx(3)


def test_turns_are_cut_at_the_last_answer():
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"chosen": f"{turns} d", "rejected": f"{turns} e"}
    assert workload.split_turns(row) == {"prompt": turns, "chosen": " d", "rejected": " e"}
    assert workload.split_turns({**row, "rejected": "\n\nHuman: x\n\nAssistant: e"}) is None
