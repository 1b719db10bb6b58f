"""The small parts of the engine: objectives, schedules, metrics, report, console."""

import ctypes
import json
import math
import os
import sys
from dataclasses import replace

import forks
import numpy as np
import pytest
import torch
from torch import nn

from fastalign.config import BatchConfig, Config, ModelConfig, OptimConfig
from fastalign.engine.errors import RunError
from fastalign.engine.methods import make_objective
from fastalign.engine.optim import learning_rate, make_optimizer
from fastalign.engine.output import console, metrics, report
from fastalign.engine.settings import settle
from fastalign.engine.timing import Stopwatch
from fastalign.engine.train import train
from fastalign.parallel.mesh import Axis, World

PLOTS = report.plots  # before a fixture makes runs skip them


@pytest.mark.parametrize(
    "method, loss, words",
    [
        ("dop", {}, r"unknown method 'dop': did you mean 'dpo'\? \(all: sft, "),
        ("dpo", {"name": "simp"}, r"loss.name: dpo has no loss 'simp': did you mean 'simpo'\?"),
        ("dpo", {"bta": 1.0}, r"unknown keyword of loss 'dpo' 'bta': did you mean 'beta'\? \(all: beta\)"),
        ("sft", {"beta": 1.0}, r"unknown keyword of loss 'sft' 'beta' \(all: none\)"),
    ],
)
def test_a_wrong_objective_is_answered_with_the_accepted_names(method, loss, words):
    with pytest.raises(ValueError, match=words):
        make_objective(method, loss)


@pytest.mark.parametrize(
    "method, loss, words",
    [
        ("reward", {"center_coef": -0.01}, r"loss\.center_coef must be at least 0, got -0\.01"),
        ("kto", {"undesirable_weight": -1.0}, r"loss\.undesirable_weight must be at least 0"),
        ("rrhf", {"rank_weight": math.nan}, r"loss\.rank_weight must be at least 0, got nan"),
        ("dpo", {"name": ["dpo", "cpo"], "cpo_alpha": -1.0}, r"loss\.cpo_alpha must be at least 0"),
        ("distill", {"temperature": 0.0}, r"gkd: temperature must be above 0, got 0\.0"),
        ("distill", {"beta": 1.5}, r"gkd: beta must be in \[0, 1\], got 1\.5"),
        ("dpo", {"name": ["dpo", "sigmoid"]}, r"dpo is listed more than once; name each loss of a sum once"),
        ("kto", {"name": ["kto", "bco"]}, r"kto takes one loss, .* got kto, bco"),
        ("reward", {"name": ["reward", "k_wise"]}, r"reward takes one loss, .* got reward, k_wise"),
    ],
)
def test_settings_of_a_loss_that_cannot_be_meant_are_refused_before_any_work(method, loss, words):
    with pytest.raises(ValueError, match=words):
        make_objective(method, loss)


def test_objectives_know_their_reference_and_defaults():
    assert make_objective("dpo", {}).options == {"beta": 0.1}
    assert make_objective("dpo", {"name": "sigmoid", "beta": 0.5}).name == "dpo"
    needs = {name: make_objective("dpo", {"name": name}).needs_reference for name in ("dpo", "ipo", "simpo")}
    assert needs == {"dpo": True, "ipo": True, "simpo": False}
    assert not make_objective("sft", {}).needs_reference


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
        ("linear", 2, [0.5, 1, 1, 0.5]),
        ("constant", 0.3, [0.5, 1, 1, 1]),  # a share, rounded up to 2 steps
        ("cosine", 9, [1 / 9, 2 / 9, 3 / 9, 4 / 9]),  # warm-up longer than the run
    ],
)
def test_schedules(schedule, warmup, expected):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup=warmup)
    assert [learning_rate(step, 4, config) for step in (1, 2, 3, 4)] == pytest.approx(expected)


def test_weight_decay_is_for_matrices():
    model = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_step_is_called_off_on_the_device():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer, OptimConfig(lr=0.1))
    layer(torch.ones(1, 2)).sum().backward()
    layer.weight.grad[0, 0] = math.nan
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_metrics_are_cut_back_and_a_broken_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.truncate_metrics(path, 0) == metrics.Kept(0, 0, False)
    assert path.read_text() == ""
    path.write_text("".join(json.dumps({"step": n, "loss": 0.1 * n}) + "\n" for n in (1, 2, 3)) + '{"ste')
    assert metrics.truncate_metrics(path, 2) == metrics.Kept(last=2, dropped=1, was_cut=True)
    assert metrics.read_metrics(path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    path.write_text('{"step": 1}\n{"step": 2}')
    assert metrics.truncate_metrics(path, 2) == metrics.Kept(2, 0, False)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'  # another line may follow
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not JSON"):
        metrics.read_metrics(path)


def test_steps_wait_on_the_device_and_the_first_bad_one_stops(tmp_path):
    objective, seen = make_objective("sft", {}), []
    log = metrics.MetricsLog(
        tmp_path / "metrics.jsonl", objective, World(Axis(), torch.device("cpu")), [seen.append], 32.0
    )

    def add(step, loss, grad_norm):
        watch = Stopwatch(torch.device("cpu"))
        watch.end = watch.start + 0.5
        sums = torch.tensor([[0.0, 1.0], [loss, 1.0], [0.0, 1.0]], dtype=torch.float64)
        work = {"step": step, "epoch": 0.0, "flops_model": 8.0, **dict.fromkeys(metrics.WORK, 1), "tokens": 5}
        log.add(metrics.StepResult(work, sums, torch.tensor(grad_norm), [(sums[1], (step,))], watch))

    add(1, 0.5, 1.0)
    add(2, 0.25, 1.0)
    assert not seen and not metrics.read_metrics(tmp_path / "metrics.jsonl")
    log.sync()
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [record["loss"] for record in seen] == [0.5, 0.25]
    assert lines[0]["tokens_per_second"] == pytest.approx(10)
    assert lines[0]["mfu"] == pytest.approx(0.5)  # 8 operations in half a second of 32 a second
    add(3, 0.5, math.inf)
    add(4, math.nan, 1.0)
    with pytest.raises(RunError, match=r"step 3: loss is 0.5 and grad_norm is inf on examples \[3\]"):
        log.flush()
    log.close()
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_means_divide_sums_by_their_own_counts():
    objective = make_objective("sft", {})
    assert objective.metric_names == ("entropy", "loss", "mean_token_accuracy")
    sums = torch.tensor([[2.0, 4.0], [6.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    values = metrics.means(objective, sums)
    assert values["entropy"] == 0.5
    assert values["loss"] == 1.5 and values["perplexity"] == math.exp(1.5)
    assert math.isnan(values["mean_token_accuracy"]) and metrics.tidy(values)["mean_token_accuracy"] is None


def test_a_report_is_written_from_whatever_is_there(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "plots", PLOTS)
    with pytest.raises(ValueError, match=r"holds no run: expected config\.yaml and metrics\.jsonl"):
        report.write_report(tmp_path)
    (tmp_path / "config.yaml").write_text("method: dpo\nloss: {name: <b>}\n")
    assert "no step finished yet" in report.write_report(tmp_path).read_text()
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "eval_loss": 0.75}, {"step": 3, "loss": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')
    text = report.write_report(tmp_path).read_text()
    assert text.count("<svg") == 1 and "<td>loss<td>0.5<td>0.25<td>0.25<td>0.5" in text and "3 steps" in text
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert "src=" not in text and "href=" not in text.replace('xlink:href="#', "")


def test_a_report_shows_completions_of_the_first_and_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plots", lambda curves: "")
    (tmp_path / "config.yaml").write_text("method: grpo\n")
    samples = [
        {"step": step, "prompt": f"p{i}", "completion": "<script>", "finish_reason": "eos"} | {"reward": step / 3}
        for step in (1, 2, 3)
        for i in range(20)
    ]
    lines = "".join(json.dumps(line) + "\n" for line in samples)
    (tmp_path / "samples.jsonl").write_text(lines + '{"step": 4, "prompt": "p')
    text = report.write_report(tmp_path).read_text()
    assert "<h3>Step 1</h3>" in text and "<h3>Step 3</h3>" in text and "<h3>Step 2</h3>" not in text
    assert text.count("&lt;script&gt;") == 2 * report.SHOWN_SAMPLES and "<script>" not in text
    assert "<td>p0<td>&lt;script&gt;<td>eos<td>0.3333<td>-" in text
    (tmp_path / "samples.jsonl").write_text("")
    assert "Sampled completions" not in report.write_report(tmp_path).read_text()


def test_the_console_shows_rewards_where_completions_are_sampled():
    record = {
        "loss": 1e-9,
        "reward": 0.5,
        "completions/mean_length": 7.25,
        "entropy": 0.375,
        "kl": None,
        "grad_norm": 1.5,
    }
    assert console.metrics(record) == ["reward 0.5", "completions/mean_length 7.25", "entropy 0.375", "grad_norm 1.5"]
    assert console.metrics({**record, "eval_reward": 0.25}, "eval_") == ["eval_reward 0.25"]
    both = console.means([{**record, "lr": 1e-3, "tokens_per_second": 2.0}] * 2)
    assert console.words(both) == [*console.metrics(record), "lr 1.00e-03", "2 tok/s"]


def test_a_report_says_why_it_has_no_plots(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert "pip install fastalign[report]" in PLOTS({})


def test_a_long_run_is_drawn_with_few_points_and_all_its_spikes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BATCH", 300)
    lines, path = 20_000, tmp_path / "metrics.jsonl"
    values = np.sin(np.arange(1, lines + 1) / 2000)
    spikes = {11: 50.0, 4_345: -40.0, 13_210: 30.0, 19_999: 20.0}
    for step, value in spikes.items():
        values[step - 1] = value
    records = [{"step": n, "loss": float(x), "rate": n if n % 2 else None} for n, x in enumerate(values, 1)]
    records[400]["eval_loss"] = 3.0
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    last, curves = report.read_curves(path)
    curve = curves["loss"]
    points = dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
    assert last == lines and len(points) <= report.MOST_POINTS and list(points) == sorted(points)
    assert spikes.items() <= points.items() and points.items() <= dict(enumerate(values.tolist(), 1)).items()
    assert (curve.first, curve.last, curve.total) == (values[0], values[-1], pytest.approx(values.sum()))
    drawn = np.interp(np.arange(1, lines + 1), curve.steps, curve.values)
    near = 2 * lines // report.BUCKETS  # a spike is drawn with the next points of both sides
    smooth = [n - 1 for n in range(1, lines + 1) if all(abs(n - s) > near for s in spikes)]
    assert np.abs(drawn - values)[smooth].max() < 0.03  # what the sine does in a bucket, 50 steps
    assert (curves["rate"].first, curves["rate"].last, curves["rate"].total) == (1, lines - 1, lines**2 / 4)
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:1000]) + '{"step": 10')
    last, curves = report.read_curves(path)
    assert last == 1000 and curves["loss"].values.tolist() == values[:1000].tolist()
    assert (curves["eval_loss"].steps.tolist(), curves["eval_loss"].values.tolist()) == ([401], [3.0])
    path.write_text("".join(json.dumps(record) + "\n" for record in records).replace('"step": 5000,', '"step": "x",'))
    with pytest.raises(ValueError, match="line 5000 is not the object of a step"):
        report.read_curves(path)


TRACKER = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")
class Run:
    id, name = "r7", "run-2"
def note(*what):
    with calls.open("a") as file:
        file.write(json.dumps(what) + "\\n")
def init(**options):
    note("init", {k: v for k, v in options.items() if k != "config"})
    return Run()
def log(values, step):
    note("log", step)
def finish():
    note("finish", None)
"""


@pytest.mark.parametrize("module, key, known", [("wandb", "id", "r7"), ("trackio", "name", "run-2")])
def test_a_resumed_run_goes_on_in_its_trackers_run(configure, tmp_path, monkeypatch, module, key, known):
    """What the tracker is told; the tracker itself is a module that writes it down."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{module}.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, module, raising=False)
    settings = {"run.trackers": [module], "optim.schedule": "constant"}
    train(configure("sft", **settings, **{"run.steps": 2}))
    train(configure("sft", **settings, **{"run.steps": 3, "run.resume": True}))
    train(configure("sft", "another", **settings, **{"run.steps": 1, "run.resume": True}))
    calls = [json.loads(line) for line in (tmp_path / "modules" / "calls.jsonl").read_text().splitlines()]
    begun = [options for call, options in calls if call == "init"]
    assert begun[0] == {"project": "fastalign", "name": "run"}
    assert begun[1] == {"project": "fastalign", "name": "run", key: known, "resume": "allow"}
    assert begun[2] == {"project": "fastalign", "name": "another"}
    assert [step for call, step in calls if call == "log"] == [1, 2, 3, 1]
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {module: known}
    sys.modules.pop(module)


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan, math.inf])
def test_a_wait_that_cannot_be_meant_is_refused(configure, minutes):
    with pytest.raises(ValueError, match=r"^parallel\.timeout_minutes must be above 0 and below 1,000,000, got"):
        train(configure("sft", **{"parallel.timeout_minutes": minutes}))


def test_trackers_that_are_absent_are_refused(monkeypatch):
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"asks for wandb, which is not installed: pip install wandb"):
        console.check_trackers(["wandb"])
    with pytest.raises(ValueError, match=r"unknown tracker 'wandbb' .* expected one of tensorboard, wandb, trackio"):
        console.check_trackers(["wandbb"])


@pytest.mark.parametrize(
    "model, device, tokens",
    [({}, "cpu", 1536), ({"autocast": True}, "cpu", 4096), ({"dtype": "bfloat16"}, "cpu", 4096), ({}, "cuda", 4096)],
)
def test_the_budget_of_a_micro_batch_fits_the_device(model, device, tokens):
    config = Config("sft", model=ModelConfig(**model))
    assert settle(config, torch.device(device)).batch.budget == tokens
    chosen = replace(config, batch=BatchConfig(tokens=77))
    assert settle(chosen, torch.device(device)) == chosen


@pytest.mark.parametrize(
    "model, expected",
    [
        (
            {"attention": "flash"},
            r"^model\.attention: flash needs a CUDA GPU, half precision .* flash-attn package .*cpu",
        ),
        (
            {"attention": "varlen", "dtype": "bfloat16"},
            r"^model\.attention: varlen needs a CUDA GPU and half precision",
        ),
    ],
)
def test_an_attention_that_this_machine_cannot_compute_is_refused_before_any_work(model, expected):
    with pytest.raises(ValueError, match=expected) as refused:
        settle(Config("sft", model=ModelConfig(**model)), torch.device("cpu"))
    assert "set it to auto" in str(refused.value) and "fastalign_" not in str(refused.value)


GROWTH = """
import ctypes, torch
from fastalign.engine.settings import bound_kernels

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if BOUND:
    bound_kernels()
weight = torch.randn(256, 256, dtype=torch.bfloat16)
for rows in range(200, 360):
    torch.nn.functional.linear(torch.randn(rows, 256, dtype=torch.bfloat16), weight)
    if rows == 240:
        before = libc.mallinfo2().uordblks
print(libc.mallinfo2().uordblks - before)
"""


def test_products_of_ever_new_shapes_keep_no_memory(tmp_path):
    """oneDNN and PyTorch would keep what they compiled for each of 1024 shapes."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2") or not torch.backends.mkldnn.is_available():
        pytest.skip("counts glibc's memory, and oneDNN's kernels")
    grown, environment = [], {name: None for name in os.environ if "CACHE_CAPACITY" in name}
    for bound in (False, True):
        (tmp_path / "program.py").write_text(GROWTH.replace("BOUND", str(bound)))
        grown.append(int(forks.run(tmp_path / "program.py", **environment)))
    if grown[0] < 10 << 20:
        pytest.skip(f"this processor's products keep {grown[0]} bytes anyway")
    assert grown[1] < grown[0] / 8
