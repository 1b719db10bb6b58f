"""Runs that have stopped learning say so: steps without a gradient, losses that explode, pairs that prefer nothing."""

import json
import logging
import signal
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from test_interrupt import sending

from fastalign import cli
from fastalign.engine import train as engine
from fastalign.engine.errors import RunError
from fastalign.engine.interrupt import Interrupted
from fastalign.engine.output.alarms import EXPLODED, PATIENCE, Alarms
from fastalign.engine.output.checkpoints import whole_checkpoints
from fastalign.engine.output.collapse import BLIND_STEPS, DIFFERENCE
from fastalign.engine.setup import load_data
from fastalign.engine.train import train
from fastalign.rl.groups import Group, reward_metrics
from fastalign.types import Rollout
from runs import records, write_yaml


def steps(alarms, *numbers, first=1):
    """Check steps of (loss, grad_norm)."""
    for step, (loss, grad_norm) in enumerate(numbers, first):
        alarms.check({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": 0.5})


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_one_step_without_a_gradient_is_told_once(caplog):
    steps(Alarms(), (0.7, 1.0), (0.7, 0.0), (0.7, 1.0), (0.7, 0.0), (0.7, 0.0), (0.7, 1e-300))
    (line,) = warnings(caplog)
    assert line.startswith("step 2: grad_norm is exactly 0 while the loss is 0.7:") and "\n" not in line
    assert "lower optim.lr" in line and f"after {PATIENCE} such steps in a row the run stops" in line


def test_several_in_a_row_stop_the_run_and_name_the_first():
    alarms = Alarms()
    steps(alarms, (0.7, 1.0), (0.7, 0.0), (0.7, 1.0), *[(8.25, 0.0)] * (PATIENCE - 1))
    with pytest.raises(
        RunError, match=r"^step 8: grad_norm has been exactly 0 since step 4, 5 steps in a row, .* 8\.25"
    ):
        steps(alarms, (8.25, 0.0), first=3 + PATIENCE)


def test_every_rank_stops_and_one_speaks(caplog):
    with pytest.raises(RunError):
        steps(Alarms(speaks=False), *[(0.7, 0.0)] * PATIENCE)
    assert not warnings(caplog)


def test_a_loss_at_its_minimum_is_told_and_may_go_on(caplog):
    """A hinge, or a teacher that equals its pupil: without a loss there is no gradient to miss."""
    steps(Alarms(), (0.7, 1.0), *[(0.0, 0.0)] * (3 * PATIENCE), *[(0.1, 0.0)] * (PATIENCE - 1), (0.0, 0.0), (0.1, 0.0))
    assert [line[:50] for line in warnings(caplog)] == [
        "step 2: loss and grad_norm are exactly 0: these ex",
        "step 17: grad_norm is exactly 0 while the loss is ",
    ]


@pytest.mark.parametrize("first, limit", [(0.02, 1), (0.7, 1), (-3.0, 3), (366.0, 366)])
def test_an_exploding_loss_is_told_once(caplog, first, limit):
    alarms = Alarms()
    steps(alarms, (first, 1.0), (EXPLODED * limit, 1.0))
    assert not warnings(caplog)
    steps(alarms, (EXPLODED * limit * 1.01, 1.0), (EXPLODED * limit * 9.0, 1.0), first=3)
    (line,) = warnings(caplog)
    assert line.startswith("step 3: the loss is") and "may be diverging" in line


BLOWN_UP = {"optim.lr": 1e6, "optim.warmup": 0, "optim.weight_decay": 0.0, "run.steps": 30, "reference.cache": "off"}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_run_that_blows_its_weights_up_ends_in_one_line(configure, caplog, method):
    config = configure(method, **{**BLOWN_UP, "run.save_every": 1})
    with pytest.raises(RunError, match=r"since step 2, 5 steps in a row, .* again with a lower optim\.lr") as stop:
        train(config)
    assert "\n" not in str(stop.value) and "those of steps below 2 are from before it happened" in str(stop.value)
    lines = records(config.run.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[-1]["grad_norm"] == 0
    assert max(line["mean_token_accuracy"] for line in lines[1:]) < 0.05, "logits that are all equal are no hits"
    assert sum(line.startswith("step 2: grad_norm is exactly 0") for line in warnings(caplog)) == 1
    kept = whole_checkpoints(Path(config.run.output_dir) / "checkpoints")
    assert [path.name for path in kept] == [f"step-{n}" for n in (1, 2, 3, 4, 5)], "step 1 is the last good one"


def test_a_run_that_ends_before_the_alarm_says_so_last(configure, capsys, monkeypatch):
    config = configure("sft", **{**BLOWN_UP, "run.steps": 4})
    monkeypatch.setattr(cli, "prepare_process", lambda: None)
    assert cli.train("sft", ["--config", str(write_yaml(config))]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"done: {config.run.output_dir} holds model/, metrics.jsonl, report.html; but grad_norm has")
    assert "exactly 0 since step 2 while the loss is not: nothing was learned from there on" in last
    assert train(configure("sft", "well", **{"run.steps": 2})) == ""


def test_a_run_that_is_stopped_before_the_alarm_says_so_last(configure, monkeypatch):
    config = configure("sft", **BLOWN_UP)
    monkeypatch.setattr(engine, "make_updates", sending(signal.SIGINT, engine.make_updates, at=3))
    with pytest.raises(Interrupted, match=r"after step 3 of 30; saved .*; grad_norm has been exactly 0 since step 2"):
        train(config)


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows_of(materials, tmp_path):
    """``rows_of(name, same)``: eight pairs in a file, the first ``same`` of them with rejected like chosen."""

    def write(same, **columns):
        rows = [json.loads(line) for line in (materials / "rows.jsonl").read_text().splitlines()[:8]]
        for row in rows[:same]:
            row["rejected"] = row["chosen"]
        made = [{"prompt": row["prompt"], **{k: f(row) for k, f in columns.items()}} for row in rows]
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        return str(path)

    return write


PAIR = {"chosen": lambda row: row["chosen"], "rejected": lambda row: row["rejected"]}
RANKED = {"completions": lambda row: [row["chosen"], row["rejected"]], "scores": lambda row: [1.0, 0.0]}
FORMS = {
    "dpo": ("dpo", {}, PAIR, "preference"),
    "reward": ("reward", {}, PAIR, "preference"),
    "kto": ("kto", {}, PAIR, "preference"),
    "rrhf": ("rrhf", {}, PAIR, "preference"),
    "k_wise": ("reward", {"loss.name": "k_wise"}, RANKED, "ranked"),
}


@pytest.mark.parametrize("form", FORMS)
def test_pairs_without_a_choice_are_refused_or_counted(configure, rows_of, caplog, form):
    method, loss, columns, kind = FORMS[form]
    number = 16 if form == "kto" else 8  # both completions of a row are examples
    for same in (0, 3, 8):
        config = configure(method, **loss, **{"data.path": rows_of(same, **columns), "data.format": kind})
        caplog.clear()
        if same < 8:
            load_data(config)
            told = [line for line in warnings(caplog) if "the same tokens" in line]
            expected = f"are the same tokens in {same * number // 8} of {number} examples: these prefer nothing"
            assert len(told) == (same > 0) and all(expected in line for line in told)
            continue
        with pytest.raises(ValueError, match=rf"data\.path: .* in {number} of {number} examples: .* nothing to prefer"):
            load_data(config)


def test_labels_of_one_kind_are_told(configure, rows_of, caplog):
    cases = (
        ([True], "all 8 completions are labelled good: kto also learns from bad ones"),
        ([False], "all 8 completions are labelled bad: kto also learns from good ones"),
        ([True, False], None),
    )
    for labels, expected in cases:
        pick = cycle(labels)
        columns = {"completion": lambda row: row["chosen"], "label": lambda row, pick=pick: next(pick)}
        load_data(configure("kto", **{"data.path": rows_of(0, **columns), "data.format": "unpaired"}))
        told = [line for line in warnings(caplog) if "are labelled" in line]
        assert [expected in line for line in told] == ([True] if expected else [])
        caplog.clear()


@pytest.mark.parametrize("loss", [{}, {"loss.name": "k_wise"}])
def test_candidates_without_a_better_one_are_told(configure, rows_of, caplog, loss):
    for equal, expected in ((3, "no candidate has a better score than another in 3 of 8 examples"), (0, None)):
        scores = cycle([[0.5, 0.5]] * equal + [[0.5, -1.0]] * (8 - equal))
        columns = {**RANKED, "scores": lambda row, scores=scores: next(scores)}
        method = "reward" if loss else "rrhf"
        load_data(configure(method, **loss, **{"data.path": rows_of(0, **columns), "data.format": "ranked"}))
        told = [line for line in warnings(caplog) if "better score" in line]
        assert [expected in line for line in told] == ([True] if expected else [])
        caplog.clear()


def test_what_is_cut_away_is_told(configure, rows_of):
    """Pairs that differ behind data.max_length alone."""
    columns = {
        "chosen": lambda row: "The same beginning. " * 20 + "yes",
        "rejected": lambda row: "The same beginning. " * 20 + "no",
    }
    config = configure("dpo", **{"data.path": rows_of(0, **columns), "data.max_length": 90})
    with pytest.raises(ValueError, match=r"8 were cut at data\.max_length 90, beyond which they may differ: raise it"):
        load_data(config)


def test_held_out_pairs_without_a_choice_are_told_not_refused(configure, rows_of, caplog):
    config = configure("dpo", **{"data.eval_path": rows_of(8, **PAIR)})
    load_data(config)
    assert any(line.startswith("the held-out data: chosen and rejected") for line in warnings(caplog))


def sampled(*steps, **same):
    """Records of steps that sample: 32 prompts, rewards of 0 and 1."""
    usual = {"loss": 0.0, "grad_norm": 1.0, "lr": 1e-4, "examples": 32, "frac_reward_zero_std": 0.2}
    usual |= {"reward_std": 0.35, "rewards/right/std": 0.5, "entropy": 0.4, "reward": 0.5}
    return [{"step": step, **usual, **same, **each} for step, each in enumerate(steps, 1)]


@pytest.mark.parametrize(
    "steps, begins",
    [
        (
            [{}] * 3 + [{"reward": 0.05}] * 5,
            "step 6: the mean reward of the last 5 steps is 0.23, that of the first 3 was 0.5:",
        ),
        (
            [{}] * 3 + [{"entropy": 0.03}] * 5,
            "step 8: the entropy over the last 5 steps is 0.03 nats a token, over the",
        ),
        (
            [{}, {"kl": 0.2}, {"kl": 1.5}, {"kl": 2.0}],
            "step 3: kl is 1.5 nats a token: the policy has left the reference",
        ),
        (
            [*({"val/ratio_max": x} for x in (4.0, 280.0, 4.0, 31.0))],
            "step 4: val/ratio_max is up to 280 in the last 5 steps: tokens became",
        ),
        (
            [{"frac_reward_zero_std": 1.0}] * 6,
            "step 5: since step 1, 5 steps in a row, all completions that are compared",
        ),
        ([{DIFFERENCE: 1e-7, "sampling/exact": 1.0}] * 2, f"step 1: {DIFFERENCE} is 1e-07 in a run whose sampler was"),
        (
            [{"critic/vf_explained_var": -0.25}] * BLIND_STEPS,
            "step 20: critic/vf_explained_var is -0.25 over the last 5",
        ),
    ],
)
def test_a_collapse_is_told_once_with_its_step(steps, begins, caplog):
    alarms = Alarms()
    for record in sampled(*steps, *steps[-1:]):
        alarms.check(record)
    (line,) = warnings(caplog)
    assert line.startswith(begins) and "\n" not in line


def test_runs_that_learn_raise_no_alarm(caplog):
    """Rewards that rise and waver, a policy that becomes surer, exact or not; no gradient where all rewards agree."""
    noise = [0.5, 0.3, 0.62, 0.41, 0.55, 0.36, 0.6, 0.7, 0.68, 0.8]
    alarms = Alarms()
    for i, record in enumerate(sampled(*({"reward": x, "entropy": 0.4 - 0.03 * i} for i, x in enumerate(noise)))):
        alarms.check({**record, "kl": 0.01 * i, "val/ratio_max": 11.0, DIFFERENCE: 1e-6, "sampling/exact": 0.0})
    for record in sampled(*[{"frac_reward_zero_std": 1.0, "grad_norm": 0.0}] * 4):
        alarms.check(record)
    for record in sampled({"val/ratio_max": 44.7}, *[{"val/ratio_max": 2.0}] * 4, {"val/ratio_max": 44.7}):
        alarms.check(record)
    for record in sampled(*[{"critic/vf_explained_var": -0.5}] * (BLIND_STEPS - 1), {"critic/vf_explained_var": -0.05}):
        alarms.check(record)
    assert not warnings(caplog)


def test_rewards_of_single_completions_are_compared_over_the_step():
    def group(row, reward):
        rollout = Rollout(np.array([1]), np.array([2, 3]), np.zeros(2, np.float32), row, 0, "eos", 0, None, None)
        return Group([rollout], np.array([[reward]]), np.array([reward]))

    told = reward_metrics([group(0, 0.0), group(1, 1.0)], ["right"])
    assert told["reward"] == 0.5 and told["reward_std"] == pytest.approx(0.5**0.5) and not told["frac_reward_zero_std"]
    assert reward_metrics([group(0, 1.0), group(1, 1.0)], ["right"])["frac_reward_zero_std"] == 1
