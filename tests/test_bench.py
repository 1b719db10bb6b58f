"""The benchmarks on toy sizes: they run, they measure what they say, and wrong answers get no number."""

from __future__ import annotations

import argparse
import ast
import graphlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/ is not installed

from bench import common, gpu, measure, memory, ops, peers, report, sides, train, turns
from bench.__main__ import main as bench
from bench.cases import cases
from bench.field import Field, Setting
from bench.workload import Workload
from fastalign import cli

ROOT = common.ROOT
FP32 = torch.float32
TOY = Setting(toy=True)
GATED = sorted({build().name: name for name, build in cases(TOY).items()}.values())
"""One case of each kind, by name: at toy size the others differ in their dtype alone."""


def failures(figures: dict[str, measure.Figure]) -> dict[str, str]:
    return {who: figure.failure for who, figure in figures.items() if figure.failure}


@pytest.mark.parametrize("name", GATED)
def test_every_candidate_is_timed_and_right(name):
    case = cases(TOY)[name]()
    figures = measure.run(case, rounds=2)
    assert failures(figures) == case.field.skipped
    assert all(len(figures[who].samples) == 2 and figures[who].first > 0 for who in case.candidates)
    assert figures[measure.OURS].error is not None
    assert all((figure.error is None) == who.startswith("roof: ") for who, figure in figures.items() if figure.samples)


@pytest.mark.parametrize("name", [name for name in cases(TOY) if "bf16" in name or "fp16" in name])
def test_ours_is_right_in_16_bits(name):
    assert measure.run(cases(TOY)[name](), rounds=1)[measure.OURS].failure is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases(Setting("cuda", toy=True)))
def test_ours_is_right_on_the_gpu(name):
    figures = measure.run(cases(Setting("cuda", toy=True))[name](), rounds=2)
    assert figures[measure.OURS].failure is None and figures[measure.OURS].median > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_cases_can_be_built(device):
    for name, build in cases(Setting(device, compiled=True)).items():
        case = build()
        everyone = {*case.candidates, *case.field.skipped}
        assert measure.OURS in case.candidates and case.baseline in case.candidates, name
        # Liger's per-token op has the name of its native kernel only where that runs.
        assert {*case.targets} - {"Liger SM90 per-token op"} <= everyone, name
        assert {*case.field.losses} <= {*case.candidates}, name
        assert case.roof is None or case.roof in case.candidates, name


def toy_case(targets=(), **candidates) -> measure.Case:
    def make(generator):
        return {"x": torch.randn(9, generator=generator)}

    def right(x):
        return {"y": x["x"] * 2}

    field = Field(TOY)
    field.runs = {"eager": right, measure.OURS: right, **candidates}
    return measure.Case("double", "9", FP32, make, right, field, targets=dict(targets))


def test_a_wrong_or_failing_rival_gets_no_number():
    def failing(x):
        raise RuntimeError("no kernel for this device")

    bad = {
        "wrong": lambda x: {"y": x["x"] * 2.001},
        "zeros": lambda x: {"y": torch.zeros(9)},
        "nan": lambda x: {"y": x["x"] * torch.nan},
        "misshapen": lambda x: {"y": (x["x"] * 2)[:1]},
        "failing": failing,
    }
    case = toy_case(**bad)
    figures = measure.run(case, rounds=2)
    assert all("over" in figures[who].failure for who in ("wrong", "zeros", "nan", "misshapen"))
    assert "RuntimeError" in figures["failing"].failure and "no kernel for this device" in figures["failing"].failure
    rows = measure.rows(case, figures)
    assert {row["who"] for row in rows if "p50_ms" in row} == {"eager", measure.OURS}


def test_a_wrong_baseline_grants_no_budget():
    case = toy_case(wrong=lambda x: {"y": x["x"] * 2.001})
    case.candidates["eager"] = lambda x: {"y": x["x"] * torch.nan}
    figures = measure.run(case, rounds=1)
    assert {*failures(figures)} == {"eager", "wrong"}


def test_our_own_failure_is_not_hidden(monkeypatch, capsys):
    def broken(x):
        raise IndexError("row 3")

    case = toy_case()
    case.candidates[measure.OURS] = broken
    with pytest.raises(IndexError):
        measure.run(case, rounds=1)
    monkeypatch.setattr(ops.cases, "cases", lambda setting: {"double": lambda: case})
    assert bench(["ops", "--device", "cpu", "--rounds", "1", "--no-compile"]) == 1
    assert "FAILED: double: IndexError: row 3" in capsys.readouterr().out


def test_missed_targets_count_when_enforced(monkeypatch, capsys):
    slow = {"slow": lambda x: time.sleep(0.02) or {"y": x["x"] * 2}}
    for wanted, code in ((1.5, 0), (1e6, 1)):
        case = toy_case({"slow": wanted}, **slow)
        monkeypatch.setattr(ops.cases, "cases", lambda setting, case=case: {"double": lambda: case})
        torch.set_num_threads(2)  # one thread is timed in CPU time, and sleeping costs none
        assert bench(["ops", "--device", "cpu", "--rounds", "3", "--enforce", "--threads", "2"]) == code
        assert ("target missed: double: slow" in capsys.readouterr().out) == bool(code)


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


def test_time_is_bounded_but_not_below_five_rounds():
    assert len(measure.run(toy_case(), rounds=50, seconds=0)[measure.OURS].samples) == measure.LEAST_ROUNDS
    assert len(measure.run(toy_case(), rounds=7)[measure.OURS].samples) == 7


def test_plans_are_recorded_beside_the_times():
    figures = measure.run(cases(TOY)["linear_loss-frozen-fp32"](), rounds=1)
    assert "one_pass" in figures[measure.OURS].plans[0]
    assert "frozen" in figures["fastalign linear_logps"].plans[0]
    assert figures["eager"].plans == ()


def test_records_say_where_they_were_measured(tmp_path):
    for value in (1, 2):
        path = common.record("toy", [{"value": value}], common.environment(), tmp_path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2]
    assert rows[0]["device"] and rows[0]["commit"] and rows[0]["versions"]["torch"] == common.version("torch")


def test_an_absent_peer_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    field = cases(TOY)["linear_loss-fp32"]().field
    assert "TRL fused head" not in field.runs
    assert "trl is not installed" in field.skipped["TRL fused head"]
    assert "needs a GPU" in field.skipped["Liger fused linear CE"]
    monkeypatch.setattr(peers, "version", lambda package: "1.2.0")
    assert "trl 1.2.0 is installed, 1.16.x" in peers.missing("trl")


def test_no_module_imports_in_a_circle():
    graph = {}
    for path in (ROOT / "bench").rglob("*.py"):
        found = graph[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("bench"):
                found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    packages = {"bench", "bench.cases"}  # a package imports its modules, and they others of it
    modules = {name: wanted & graph.keys() - packages for name, wanted in graph.items() if name not in packages}
    assert len(modules) > 15 and list(graphlib.TopologicalSorter(modules).static_order())


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_counts_what_a_call_adds():
    block = 64 << 20

    def greedy(x):
        kept = torch.ones(block // 4)
        return (x["x"] * 2).sum() * kept[0]

    case = toy_case()
    case.field.losses["greedy"] = greedy
    figures = memory.child(case, "greedy", ["no grad"])["no grad"]
    assert 0.9 < figures["peak_mib"] * common.MIB / block < 1.2
    assert figures["predicted_mib"] is None


def test_memory_of_ours_stands_beside_the_plan():
    figures = memory.child(cases(TOY)["linear_loss-fp32"](), measure.OURS, ["full"])["full"]
    size = {"hidden": 12 * 16, "weight": 61 * 16}
    assert figures["outputs_mib"] * common.MIB == 4 * sum(size.values())
    assert "one_pass" in figures["plans"][0] and figures["predicted_mib"] > figures["outputs_mib"]


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path) -> Path:
    """Two sessions of ops, one of memory and one of training, as the commands record them."""
    fast = {"fast": lambda x: {"y": x["x"] * 2}}
    case = toy_case(**fast)
    case.field.skipped["absent"] = "not <installed>"
    rows = measure.rows(case, measure.run(case, rounds=2))
    where = common.environment()
    for stamp, factor in (("2026-01-01", 5.0), ("2026-01-02", 1.0)):
        slower = [{**row, "p50_ms": row["p50_ms"] * factor} if "p50_ms" in row else row for row in rows]
        common.record("ops-cpu", slower, {**where, "time": stamp}, tmp_path)
    what = {"case": "double", "shape": "9", "dtype": "float32", "mode": "full"}
    peak = {"peak_mib": 3.0, "reserved_mib": 3.0, "outputs_mib": 1.0, "predicted_mib": 2.9}
    common.record("memory-cpu", [{**what, **peak, "who": "fastalign"}], where, tmp_path)
    run = {"wall": [1] * 4, "cpu": [1] * 4, "queued": [0] * 4, "losses": [0.7, 0.6], "peak_mib": 5, "ready_mib": 2}
    side = train.summarise([run], Workload("", steps=4, warmup=2))
    facts = {"task": "dpo", "dtype": "float32", "parameters": 9, "examples": 8}
    common.record("train-dpo", [{**facts, **side, "side": name} for name in ("fastalign", "trl")], where, tmp_path)
    return tmp_path


def test_the_report_renders(results, capsys):
    assert bench(["report", "--results", str(results)]) == 0
    page = Path(capsys.readouterr().out.strip())
    text = page.read_text()
    assert page == results / "report" / "index.html"
    assert "double, 9, float32" in text and "not &lt;installed&gt;" in text and "2026-01-02" in text
    assert "2026-01-01" not in text  # the older session of the same case
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # names of formats; nothing is fetched
    if importlib.util.find_spec("matplotlib"):
        names = ("ops-0-speed", "memory-1-memory", "train-2-0-training")
        assert all((page.parent / f"{name}.{kind}").stat().st_size > 5000 for name in names for kind in ("png", "svg"))
        assert text.count("<svg") == 3


def test_a_lost_case_is_shown(results):
    times = {measure.OURS: 2.0, "peer": 1.0, "roof: copy": 0.5, "fastalign, in place": 0.4}
    what = {"case": "c", "shape": "s", "dtype": "d", "errors": {"y": 0.0}}
    rows = [{**what, "who": who, "p50_ms": ms} for who, ms in times.items()]
    assert ops.best_peer(rows)["who"] == "peer"
    assert "<td>peer<td>1.00<td>0.50" in report.losses([rows])
    assert "No case of this run is lost" in report.losses([rows[:1] + rows[2:]])


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required"),
        (["opps"], "invalid choice: 'opps'"),
        (["ops", "--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["ops", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["ops", "--device", "cpu", "--only", "nothing"], "no case matches 'nothing'"),
        (["memory", "--mode", "half"], "invalid choice: 'half'"),
        (["train", "--device", "cpu", "--steps", "2"], "--steps: the first 2 are not timed"),
        (["train", "--device", "cpu", "--task", "sft", "--precomputed"], "--precomputed: sft has no reference"),
        (["train", "--device", "cpu", "--neighbours", "-1"], "--neighbours: expected 0 or more, got -1"),
        (["report", "--results", "/nowhere"], "no results in /nowhere"),
    ],
)
def test_wrong_input_is_answered_in_one_line(words, message, capsys):
    try:
        code = bench(words)
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err
    assert code and message in error and error.count("\n") == 1 and error.startswith("fastalign bench")


def test_the_command_runs_the_checkouts_bench(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise ImportError('the wrong bench')")
    command = [sys.executable, "-m", "fastalign", "bench", "ops", "--device", "cpu", "--list", "--only", "gae"]
    if sys.version_info < (3, 11):  # there the folder of the command cannot be left out of the search
        (tmp_path / "bench" / "__init__.py").unlink()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["gae", "gae-one-segment"], done.stderr


def test_a_package_without_bench_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastalign" / "cli.py"))
    assert cli.main(["bench", "ops"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no bench/ beside the package" in error and "clone it" in error


def test_the_gpu_call_keeps_to_its_time_whatever_its_parts_do(tmp_path, monkeypatch, capsys):
    words = ("-c print('DEVICE')", "-c import,nothing", "-c while(1):pass", "-c pass")
    monkeypatch.setattr(gpu, "prepare", lambda call, wheels: None)
    monkeypatch.setattr(gpu, "PARTS", [gpu.Part("bench", 5 if "while" in x else 60, x) for x in words])
    monkeypatch.setattr(gpu.subprocess, "run", short(gpu.subprocess.run))
    assert bench(["gpu", "--device", "cpu", "--out", str(tmp_path)]) == 1
    told = (tmp_path / "summary.txt").read_text()
    assert told == "".join(f"{line}\n" for line in capsys.readouterr().out.splitlines())
    lines = [line.split("] ")[1] for line in told.splitlines()]
    assert [line.split(" in ")[0].split(" after ")[0] for line in lines[:4]] == [
        "exit 0",
        "exit 1",
        "STOPPED",
        "exit 0",
    ]
    assert "cpu" in (tmp_path / "bench.log").read_text() and lines[-1] == "done"
    assert bench(["gpu", "--device", "cpu", "--out", str(tmp_path), "--minutes", "0"]) == 1
    assert "no time left: -c pass" in capsys.readouterr().out


def short(run):
    """`subprocess.run` with limits of a tenth, so that nobody waits for them."""
    return lambda *args, timeout, **options: run(*args, timeout=timeout / 10, **options)


# --- training --------------------------------------------------------------------------------------------------------


def toy_pairs(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon"]

    def text(least: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, 12)))

    return [{"prompt": text(1), "chosen": " " + text(1), "rejected": " " + text(1)} for _ in range(count)]


def toy_work(directory: Path, task: str, **more) -> Workload:
    toy = Workload(
        str(directory), task=task, steps=4, warmup=1, examples=3, max_length=24, vocab_size=300, hidden_size=64,
        layers=1, threads=torch.get_num_threads(), lr=1e-2, **more,
    )  # fmt: skip
    assert sides.prepare(toy, toy_pairs(40))["examples_seen"] == 12
    return toy


def run_side(name: str, work: Workload) -> dict:
    sides.run(name, work)
    return json.loads((work.path / f"{name}.json").read_text())


# Steps of lr 1e-2 on 64 hidden units move the loss by tenths; fp32 sums in another order by millionths.
# kto's baseline comes from other mismatched completions, so its sides agree until that is above 0.
@pytest.mark.parametrize(
    "task, known, alike", [("sft", False, 4), ("reward", False, 4), ("dpo", False, 4), ("dpo", True, 4),
                           ("kto", False, 2), ("grpo-update", False, 4)]
)  # fmt: skip
def test_both_sides_train_alike(task, known, alike, tmp_path):
    work = toy_work(tmp_path, task, precomputed=known)
    ours = run_side("fastalign", work)
    assert len(ours["wall"]) == work.steps == len(ours["tokens"]) and min(ours["flops"]) > 0
    if task == "dpo":
        assert ours["losses"][0] == pytest.approx(math.log(2), abs=1e-7)
    if reason := peers.missing("trl"):
        pytest.skip(reason)
    theirs = run_side("trl", work)
    assert max(ours["losses"]) - min(ours["losses"]) > 0.01
    assert ours["losses"][:alike] == pytest.approx(theirs["losses"][:alike], abs=1e-4)


def test_steps_that_sample_take_answers_of_one_length_on_every_side(tmp_path):
    work = toy_work(tmp_path, "grpo", answer=8)
    names = ["fastalign", *["trl"] * (peers.missing("trl") is None)]
    for name in names:
        run = run_side(name, work)
        assert run["scored"] == [3 * 8 * 8] * 4, "EOS ends no answer"
        assert all(0 < part < whole for part, whole in zip(run["sampling"], run["wall"], strict=True))
        assert len(run["rewards"]) == 4 and all(0 < reward < 1 for reward in run["rewards"])


def test_ppo_is_timed_without_a_peer(tmp_path, monkeypatch, capsys):
    work = toy_work(tmp_path, "ppo", answer=8)
    monkeypatch.setattr(train, "run_sides", lambda names, *_: {name: run_side(name, work) for name in names})
    options = argparse.Namespace(task="ppo", device="cpu", only=None, peer="trl", repeats=1, profile=False)
    figures = train.measure(options, work)
    assert list(figures) == ["fastalign"] and "TRL has no trainer for ppo" in capsys.readouterr().out
    train.parts_table({**figures, "again": figures["fastalign"]})
    assert capsys.readouterr().out.count("1.00x") == 2


def test_the_roof_is_measured_at_the_models_shapes(tmp_path):
    work = Workload(str(tmp_path), hidden_size=64, layers=1, vocab_size=300, threads=1)
    assert (300, 64, 1) in sides.product_shapes(work)
    sides.run("roof", work)
    rates = json.loads((tmp_path / "roof.json").read_text())
    assert rates["torch.mm"] > 0 and all(rate < 1e5 for rate in rates.values())


STEPS = """
import os, sys, time
name, log, fail, done = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[5])
for step in range(5):
    os.write(done, b".")
    assert sys.stdin.buffer.read(1)
    if step == fail:
        sys.exit("out of memory")
    with open(log, "a", buffering=1) as file:
        file.write(f"{name} begins {step}\\n")
        time.sleep(0.01)
        file.write(f"{name} ends {step}\\n")
"""


def start_steps(name: str, directory: Path, fail: int = -1) -> turns.Side:
    command = [sys.executable, "-c", STEPS, name, str(directory / "steps"), str(fail)]
    return turns.Side(name, command, directory / f"{name}.log", {})


def test_sides_take_turns_step_by_step(tmp_path):
    turns.take_turns([partial(start_steps, name, tmp_path) for name in "ab"], steps=4)
    lines = [line.split() for line in (tmp_path / "steps").read_text().splitlines()]
    for begun, ended in zip(lines[0::2], lines[1::2], strict=True):
        assert (begun[0], begun[2]) == (ended[0], ended[2]) and begun[1] == "begins", "two worked at a time"
    steps = [[int(line[2]) for line in lines[0::2][i : i + 2]] for i in range(0, 10, 2)]
    assert steps == [[step] * 2 for step in range(5)], "what comes after the last step counts as the fifth here"


def test_a_side_can_take_its_steps_in_a_row(tmp_path):
    turns.take_turns([partial(start_steps, name, tmp_path) for name in "ab"], steps=4, in_a_row=True)
    names = [line.split()[0] for line in (tmp_path / "steps").read_text().splitlines()]
    assert "".join(names[:16]) == "a" * 8 + "b" * 8


def test_the_ratio_leaves_out_what_a_side_waited_for_a_core(capsys):
    work = Workload("", steps=3, warmup=0, threads=2)
    same = {"losses": [0.7], "peak_mib": 5, "ready_mib": 2}
    quick = {"wall": [1.0, 2.0, 5.0], "queued": [0.0, 1.0, 4.0], "cpu": [2.0, 2.0, 2.0]}
    slow = {"wall": [2.0, 2.5, 3.0], "queued": [0.0, 0.5, 9.0], "cpu": [4.0, 4.0, 4.0]}  # in line by several threads
    ours, theirs = (train.summarise([{**run, **same}], work) for run in (quick, slow))
    assert ours["own_seconds"] == [1.0] * 3 and theirs["own_seconds"] == [2.0] * 3
    assert train.times_as_fast(ours, theirs, work) == 2.0
    assert train.times_as_fast(ours, theirs, replace(work, neighbours=1)) == 1.25
    assert train.in_line(ours) == pytest.approx(5 / 8)
    train.print_disturbed({"fastalign": ours, "again": {**ours, "own_seconds": ours["step_seconds"]}})
    assert capsys.readouterr().out.startswith("fastalign stood in line for a core 62% of the time")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_a_side_goes_ahead_of_others_where_that_is_allowed(tmp_path):
    try:  # what this process may, its children may
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    except OSError as refused:
        pytest.skip(str(refused))
    look = "import os, sys, time; time.sleep(0.3); sys.exit(os.sched_getscheduler(0) != os.SCHED_RR)"
    turns.Side("a", [sys.executable, "-c", look], tmp_path / "log", {}, ahead=True).end()


def test_a_side_that_fails_ends_the_others(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)b failed.*out of memory"):
        turns.take_turns([partial(start_steps, "a", tmp_path), partial(start_steps, "b", tmp_path, 2)], steps=4)


def test_a_step_lasts_from_one_turn_to_the_next(monkeypatch):
    log = turns.StepLog(turns=0)
    monkeypatch.setattr(turns, "wait_for_turn", lambda done: time.sleep(0.2))
    log.tick()
    log.tick()
    assert len(log.wall) == len(log.cpu) == len(log.queued) == 1 and log.wall[0] < 0.1


def test_neighbours_are_busy_while_a_side_runs_and_gone_after():
    with train.busy(2) as hogs:
        assert len(hogs) == 2 and all(hog.poll() is None for hog in hogs)
    assert all(hog.poll() is not None for hog in hogs)
    row = {"task": "dpo", "dtype": "float32", "parameters": 9}
    assert report.key(row, "train") != report.key({**row, "neighbours": 2}, "train")


def test_the_summary_counts_timed_steps_only():
    work = Workload("", steps=4, warmup=2, examples=8)
    run = {"wall": [9, 9, 1, 2], "cpu": [9, 9, 2, 4], "queued": [0] * 4, "losses": [0.7], "peak_mib": 5, "ready_mib": 2}
    row = train.summarise([run], work)
    assert row["examples_per_second"] == pytest.approx(16 / 3)
    assert row["cpu_seconds_per_step"] == pytest.approx(3)
