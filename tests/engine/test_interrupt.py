"""Signals: a run that is stopped has saved, and goes on to the bit."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_resume import wait_for_lines

from fastalign.engine import evaluate as evaluation
from fastalign.engine import train as engine
from fastalign.engine.interrupt import Interrupted
from fastalign.engine.output import export
from fastalign.engine.output.report import write_report
from fastalign.engine.reference import cache as filling
from fastalign.engine.reference.precompute import precompute
from fastalign.engine.train import train
from runs import ROOT, assert_close, finish, fork, launch, numbers, records, write_yaml

PATHS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def checkpoints(config) -> list[str]:
    return sorted(p.name for p in (Path(config.run.output_dir) / "checkpoints").glob("*"))


def sending(number, before, at: int = 1):
    """The function, whose call number ``at`` is preceded by a signal to this process."""
    calls = []

    def call(*args, **options):
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return before(*args, **options)

    return call


@pytest.fixture
def stop_at(monkeypatch):
    """Run a configuration that is sent a signal at a call of a function; the text and the code it ended with."""

    def run(config, number, module, name: str, at: int = 1) -> tuple[str, int]:
        with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
            patch.setattr(module, name, sending(number, getattr(module, name), at))
            train(config)
        return str(stopped.value), stopped.value.code

    return run


@pytest.mark.slow
def test_ctrl_c_saves_and_the_printed_command_goes_on_to_the_bit(configure, materials):
    settings = {"run.steps": 24, "run.eval_every": 15, "data.eval_path": str(materials / "held_out.jsonl")}
    whole, config = (configure("sft", name, **settings) for name in ("whole", "stopped here"))
    process, directory = fork(config), Path(config.run.output_dir)
    wait_for_lines(directory / "metrics.jsonl", 3)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .* since 20.*choose another"):
        train(config)
    assert write_report(directory).exists()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    last = len(records(directory))
    assert 3 <= last < 24 and checkpoints(config) == ["latest", f"step-{last}"]
    assert not list(directory.glob(".lock")) and not list(directory.glob("running.json"))
    line = output.splitlines()[-1]
    assert line.startswith(
        f"fastalign: error: interrupted after step {last} of 24; saved {directory}/checkpoints/step-"
    )
    assert output.count("error") == 1 and "Traceback" not in output
    command = line.partition("go on with: ")[2]
    assert shlex.split(command)[-4:] == ["--config", f"{directory}/config.yaml", "--run.resume", "true"]
    subprocess.run(command, shell=True, check=True, env={**os.environ, **PATHS}, cwd=ROOT)
    train(whole)
    assert numbers(directory) == numbers(whole.run.output_dir)
    assert len(records(directory)) == 24


@pytest.mark.slow
def test_torchrun_forwards_sigterm_and_every_rank_saves(configure):
    settings = {"run.steps": 40, "run.keep": 9}
    whole, config = (configure("sft", name, **settings) for name in ("whole", "stopped"))
    process = launch(config, write_yaml(config), "--standalone", "--nproc-per-node", 2)
    directory = Path(config.run.output_dir)
    wait_for_lines(directory / "metrics.jsonl", 2)
    second = max(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    os.kill(second, signal.SIGUSR2)  # one rank alone is asked
    wait_for_lines(directory / "metrics.jsonl", len(records(directory)) + 3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    last = len(records(directory))
    assert 2 < last < 40 and f"step-{last}" in checkpoints(config) and len(checkpoints(config)) == 3, output
    assert "(as SIGUSR2 asked)" in output
    told = [line for line in output.splitlines() if line.startswith("fastalign: error:")]
    assert len(told) == 1 and f"interrupted after step {last} of 40; saved" in told[0]
    assert "--standalone --nproc-per-node 2 -m fastalign sft --config" in told[0]
    config.run.resume = True
    finish(fork(config, ranks=2))
    train(whole)
    assert_close(whole.run.output_dir, directory, tolerance=1e-5)  # ranks reorder sums


def test_a_rank_that_is_killed_starts_all_again_and_in_the_end_ends_the_run_with_one_line(configure):
    """The launcher's: which rank and why, and from rank 0 how far the run was. Nothing of torch's own."""
    config = configure("sft", **{"run.steps": 500, "run.save_every": 2, "run.show_example": False})
    config.run.resume, config.run.log_every = "auto", 500
    path, directory = write_yaml(config), Path(config.run.output_dir)
    command = [sys.executable, "-m", "fastalign", "torchrun", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "sft"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, **PATHS, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--config", str(path)], env=environment, cwd=ROOT, **pipes)
    wait_for_lines(directory / "metrics.jsonl", 3)
    first = ranks_of(process)
    os.kill(max(first), signal.SIGKILL)
    while not (again := ranks_of(process)) or again & first:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    before = len(records(directory))
    wait_for_lines(directory / "metrics.jsonl", before + 3, seconds=120)
    os.kill(max(again), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL, errors
    steps = [line["step"] for line in records(directory)]
    assert steps == [*range(1, len(steps) + 1)] and f"resumed from {directory}/checkpoints/step-" in errors
    *before, line = errors.splitlines()
    start = "fastalign: error: rank 1 was stopped by SIGKILL; interrupted after step "
    assert line.startswith(start) and "; go on with: " in line
    assert "; no new checkpoint, as a rank has ended (rank" in line and re.search(
        r"step \d+, \w+, in (\w+ of|no coll)", line
    )
    quiet = ("error", "Traceback", "saving", "SIGTERM", "interrupted")
    assert not [text for text in before if any(word in text for word in quiet)], errors


def ranks_of(process) -> set[int]:
    """The processes below a launcher."""
    return set(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def test_sigusr2_saves_and_goes_on(configure, monkeypatch):
    whole, config = (configure("sft", name, **{"run.keep": 9}) for name in ("whole", "saved"))
    train(whole)
    monkeypatch.setattr(engine, "make_updates", sending(signal.SIGUSR2, engine.make_updates, at=3))
    train(config)
    assert checkpoints(config) == ["latest", "step-3", "step-6"]
    assert numbers(config.run.output_dir) == numbers(whole.run.output_dir)


STOPPED = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]


@pytest.mark.parametrize("number, code", STOPPED)
def test_a_stop_finishes_the_step_it_came_in(configure, stop_at, number, code):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and a run leaves it so
    config = configure("sft")
    text, ended = stop_at(config, number, engine, "make_updates", at=3)
    assert ended == code and text.startswith("interrupted after step 3 of 6; saved ")
    assert text.endswith(f" -m fastalign sft --config {config.run.output_dir}/config.yaml --run.resume true")
    assert checkpoints(config) == ["latest", "step-3"] and len(records(config.run.output_dir)) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_before_the_first_step_there_is_nothing_to_save(configure, stop_at):
    config = configure("sft")
    for module, name in ((engine, "load_data"), (engine, "peak_memory")):
        text, code = stop_at(config, signal.SIGTERM, module, name)
        assert (text, code) == ("interrupted before step 1; nothing to save", 143)
        assert not (Path(config.run.output_dir) / "checkpoints").exists()
    train(config)  # the directory is free


def test_a_resumed_run_that_has_not_moved_has_nothing_new(configure, stop_at):
    config = configure("sft")
    stop_at(config, signal.SIGINT, engine, "make_updates", at=3)
    config.run.resume = True
    text, _ = stop_at(config, signal.SIGINT, engine, "peak_memory")
    assert text.startswith("interrupted after step 3 of 6; go on with: ") and checkpoints(config) == [
        "latest",
        "step-3",
    ]
    text, _ = stop_at(config, signal.SIGINT, engine, "load_data")
    assert text.startswith("interrupted before it went on from ") and text.endswith("step-3; nothing new to save")


@pytest.mark.parametrize("save_every", [0, 3])
def test_an_evaluation_that_is_stopped_is_made_by_the_resume(configure, materials, stop_at, save_every):
    settings = {"run.eval_every": 3, "run.save_every": save_every, "data.eval_path": str(materials / "held_out.jsonl")}
    whole, config = (configure("sft", name, **settings) for name in ("whole", "stopped"))
    train(whole)
    text, _ = stop_at(config, signal.SIGINT, evaluation, "evaluation_steps")
    assert text.startswith("interrupted after step 3 of 6;") and "step-3" in checkpoints(config)
    assert len(records(config.run.output_dir)) == 2
    config.run.resume = True
    text, _ = stop_at(
        config, signal.SIGINT, evaluation, "evaluation_steps", at=2
    )  # the last, after the first is made up
    assert text.startswith("interrupted after step 6 of 6;") and len(records(config.run.output_dir)) == 5
    train(config)
    assert numbers(config.run.output_dir) == numbers(whole.run.output_dir)
    assert (Path(config.run.output_dir) / "model").exists()


def test_an_evaluation_that_fails_costs_nothing(configure, materials, monkeypatch):
    settings = {"run.eval_every": 3, "data.eval_path": str(materials / "held_out.jsonl")}
    whole, config = (configure("sft", name, **settings) for name in ("whole", "failed"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        fine = iter([engine.evaluate])
        patch.setattr(engine, "evaluate", lambda *a, **k: next(fine, too_large)(*a, **k))
        train(config)
    assert checkpoints(config) == ["latest", "step-6"] and len(records(config.run.output_dir)) == 5
    config.run.resume = True
    train(config)
    assert numbers(config.run.output_dir) == numbers(whole.run.output_dir)
    assert (Path(config.run.output_dir) / "model").exists()
    train(config)  # a finished run is exported again
    assert numbers(config.run.output_dir) == numbers(whole.run.output_dir)


def too_large(*args, **options):
    raise MemoryError


def test_log_probs_that_were_computed_before_a_stop_are_kept(configure, stop_at):
    config = configure("dpo", **{"reference.cache": "auto", "run.steps": 40})
    config.data.cache_dir = config.run.output_dir + "-cache"
    text, _ = stop_at(config, signal.SIGINT, filling, "split", at=3)
    assert text == (
        "interrupted before step 1; the reference log-probs computed so far are kept: the same command goes on"
    )
    summary = precompute(config)
    assert 0 < int(summary.split(" hits")[0].split()[-1]) < 96, summary


def test_an_export_that_is_stopped_is_made_by_the_resume(configure, stop_at):
    config = configure("sft")
    text, code = stop_at(config, signal.SIGTERM, export, "save_pretrained")
    assert code == 143 and text.startswith("interrupted in the export; go on with: ")
    assert [p.name for p in Path(config.run.output_dir).glob("*model*")] == []
    config.run.resume = True
    text, code = stop_at(config, signal.SIGTERM, export, "write_report")
    assert code == 143 and (Path(config.run.output_dir) / "model" / "config.json").exists()
    assert text == (
        f"interrupted in the report; the run is complete: write it later with: fastalign report {config.run.output_dir}"
    )


@pytest.mark.parametrize("minutes, kept", [(1e-9, ["step-4", "step-5", "step-6"]), (0, ["step-6"]), (15, ["step-6"])])
def test_the_clock_saves_too(configure, minutes, kept):
    config = configure("sft", **{"run.save_minutes": minutes, "run.keep": 3})
    train(config)
    assert checkpoints(config) == ["latest", *kept]
    assert [line["step"] for line in records(config.run.output_dir)] == [1, 2, 3, 4, 5, 6]


SCRIPT = """
import hashlib, time
from fastalign.engine.interrupt import handled
with handled() as signals:
    signals.at_once, signals.where = False, "after step 1 of 9"
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, where no handler runs
"""


@pytest.mark.parametrize("first, second, code", [("SIGINT", "SIGINT", 130), ("SIGTERM", "SIGTERM", 143)])
def test_a_second_signal_stops_at_once(first, second, code):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env={**os.environ, **PATHS}, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, first))
    time.sleep(0.4)
    assert process.poll() is None
    process.send_signal(getattr(signal, second))
    _, error = process.communicate(timeout=10)
    assert process.returncode == code
    assert error.splitlines()[-1] == f"fastalign: error: stopped at once by a second {second}; nothing to save"


@pytest.mark.parametrize("everybody", [False, True])
def test_workers_that_tokenise_end_with_the_run(configure, materials, tmp_path, everybody):
    """Ctrl-C reaches the workers of a terminal's process group too, and `kill` the run alone."""
    rows = (materials / "rows.jsonl").read_text()
    (tmp_path / "many.jsonl").write_text(rows * 200)
    many = {"data.path": str(tmp_path / "many.jsonl"), "data.num_proc": 2, "data.cache_dir": str(tmp_path / "cache")}
    process = fork(configure("dpo", **many))
    run = psutil.Process(process.pid)
    workers = []
    while len(workers) < 2:  # those that have tokenised something
        workers = run.children(recursive=True) if list(tmp_path.glob("cache/tokens/*/*.parts/*.json")) else []
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in output
    assert output.rstrip().splitlines()[-1] == "fastalign: error: interrupted before step 1; nothing to save"
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
