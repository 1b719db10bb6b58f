"""What is seen of a run while it goes on: lines anywhere, and on real terminals of several widths a bar."""

import fcntl
import logging
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import datasets
import pytest

from fastalign.data import encode
from fastalign.engine.output import console, progress
from fastalign.engine.train import train

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import logging, sys
from pathlib import Path
from fastalign.process import prepare_process
from fastalign.engine.output.console import open_sinks
from fastalign.engine.output.progress import stage

prepare_process()
log = logging.getLogger("fastalign.test")
record = {"loss": 0.6931471, "rewards/accuracies": 0.6875, "rewards/margins": 0.0001523, "mean_token_accuracy": 0.5}
record |= {"grad_norm": 12.5, "lr": 1e-5, "tokens_per_second": 5000.0, "tokens": 100, "t_step": 0.02}
with open_sinks([], Path(), {}, total=1200, done=0, log_every=5) as (sink,):
    for step in range(1, 8):
        sink({"step": step, **record})
    with stage("evaluating", 40, shown=True) as tell:
        tell(10)
        log.warning("a line of the log")
        print("a line of somebody else")
        tell(40)
    sink({"step": 8, **record, "eval_loss": 0.25, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 0.125})
with stage("reference log-probs", 60, shown=True) as tell:
    tell(30)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TERM": "xterm-256color"}
TRAINING = ["loss 0.6931", "rewards/accuracies 0.6875", "rewards/margins 0.0001523", "mean_token_accuracy 0.5"]
TRAINING += ["grad_norm 12.5", "lr 1.00e-05", "5000 tok/s"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def seen():
    """What the program writes to terminals of several widths, each a process at the same time."""
    widths = [60, 80, 100, 120, 200]
    started = {width: on_terminal([sys.executable, "-c", PROGRAM], width) for width in widths}
    return {width: finished() for width, finished in started.items()}


def on_terminal(command, width):
    """Start a command on a terminal of so many columns; the function that comes of it waits for all that it wrote."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment)
    os.close(slave)
    written = []

    def read():
        while True:
            try:
                if not (data := os.read(master, 1 << 16)):
                    break
            except OSError:  # the other side is closed
                break
            written.append(data)

    reader = threading.Thread(target=read)
    reader.start()

    def finished():
        assert process.wait(timeout=60) == 0, b"".join(written).decode()
        reader.join()
        os.close(master)
        return b"".join(written).decode()

    return finished


def frames(text):
    """Lines as they were drawn, colours and movements left out."""
    return [line for line in re.split(r"[\r\n]+", CONTROL.sub("", text)) if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_bar_shows_step_total_and_time_left_first_and_whole_metrics_as_many_as_fit(seen, width):
    bars = [line for line in frames(seen[width]) if re.match(r"step +\d+/1200 ━", line)]
    assert bars
    for line in bars:
        match = re.fullmatch(r"step +\d+/1200 ━{10} eta (?:\?|\d:\d\d:\d\d) *(.*)", line.rstrip())
        assert match and len(line.rstrip()) <= width
    words = re.split(" {2,}", re.sub(r"^.*?eta \S+ *", "", bars[-1].rstrip()))
    assert words == TRAINING[: len(words)] and words[0] == "loss 0.6931"
    if len(words) < len(TRAINING):
        assert len(bars[-1].rstrip()) + 2 + len(TRAINING[len(words)]) > width
    else:
        assert width == 200


@pytest.mark.parametrize("width", [60, 200])
def test_lines_stay_above_the_bar(seen, width):
    text = "".join(frames(seen[width]))
    assert text.count("step 5/1200  loss 0.6931  rewards/accuracies 0.6875") == 1
    assert text.count("step 8/1200  eval_loss 0.25  eval_rewards/accuracies 0.75  eval_rewards/margins 0.125") == 1
    assert {"a line of the log", "a line of somebody else"} <= {line.strip() for line in frames(seen[width])}


@pytest.mark.parametrize("width", [60, 200])
def test_stages_have_a_bar_that_goes_when_they_end(seen, width):
    lines = frames(seen[width])
    assert any(re.match(r"evaluating +\d+/40 ━{10} eta ", line) for line in lines)
    assert any(re.match(r"reference log-probs +\d+/60 ━{10} eta ", line) for line in lines)
    wipes = seen[width].rpartition("\x1b[2K")[2]
    assert not CONTROL.sub("", wipes).strip()  # nothing is written after the last one wiped its line


def test_tmux_shows_one_line_of_a_bar(tmp_path):
    """A terminal that draws: what is left on its screen of 80 columns."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed: apt-get install tmux")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path / 'program.py'}; echo finished; sleep 60"
    tmux = ["tmux", "-L", f"fastalign-{os.getpid()}", "-f", "/dev/null"]
    new = [*tmux, "new-session", "-d", "-x", "80", "-y", "30", "-e", f"PYTHONPATH={ENVIRONMENT['PYTHONPATH']}", command]
    subprocess.run(new, check=True)
    try:
        for _ in range(300):
            time.sleep(0.1)
            screen = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True).stdout.splitlines()
            if "finished" in screen:
                break
    finally:
        subprocess.run([*tmux, "kill-server"])
    (bar,) = [line for line in screen if re.match(r"step +\d+/1200 ━", line)]
    assert re.fullmatch(r"step    8/1200 ━{10} eta \d:\d\d:\d\d  loss 0.6931  rewards/accuracies 0.6875", bar)
    assert "a line of the log" in screen and not any("evaluating" in line for line in screen)


# --- lines ---------------------------------------------------------------------------------------------------------


def written(capsys, records, **options):
    """The lines of a run on no terminal."""
    with console.open_sinks([], Path(), {}, **{"total": 6, "done": 0, "log_every": 2, **options}) as sinks:
        for record in records:
            for sink in sinks:
                sink(record)
    return capsys.readouterr().out.splitlines()


def record(step, **metrics):
    return {"step": step, "lr": step * 1e-3, "tokens_per_second": 1.0, "tokens": 10, "t_step": 0.5, **metrics}


def test_a_line_tells_means_since_the_last_one(capsys):
    losses = [1.0, 2.0, 4.0, 4.0, 7.0]
    lines = written(capsys, [record(n, loss=loss) for n, loss in enumerate(losses, 1)], total=5)
    assert [re.sub(" +eta .*", "", line) for line in lines] == [
        "step 2/5  loss 1.5  lr 2.00e-03  20 tok/s",
        "step 4/5  loss 4  lr 4.00e-03  20 tok/s",
        "step 5/5  loss 7  lr 5.00e-03  20 tok/s",
    ]


def test_tokens_are_counted_over_the_time_of_their_steps(capsys):
    slow, fast = record(1, loss=1.0), {**record(2, loss=1.0), "tokens": 90, "t_step": 0.5}
    assert "  100 tok/s" in written(capsys, [slow, fast])[0]


def test_a_step_in_which_nothing_was_counted_plays_no_part(capsys):
    records = [record(1, loss=1.0, margin=float("nan")), record(2, loss=1.0, margin=3.0)]
    assert "  margin 3  " in written(capsys, records)[0]
    records = [record(n, loss=1.0, margin=float("nan")) for n in (1, 2)]
    assert "margin" not in written(capsys, records)[0]


def test_an_evaluation_has_a_line_of_its_own_with_accuracy_and_margin(capsys):
    evaluated = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_margin": 1.5, "eval_runtime": 3.0}
    lines = written(capsys, [record(1, loss=1.0, **evaluated), record(2, loss=3.0)])
    assert lines[0] == "step 1/6  eval_loss 0.5  eval_accuracy 0.75  eval_margin 1.5"
    assert lines[1].startswith("step 2/6  loss 2  ")


def test_the_time_left_is_told_from_the_second_step_on(capsys):
    lines = written(capsys, [record(n, loss=1.0) for n in (1, 2, 3)], log_every=1)
    assert lines[0].endswith("  eta ?") and lines[1].endswith("  eta 0:00:00")


# --- stages --------------------------------------------------------------------------------------------------------


def test_a_long_stage_tells_how_far_it_is(configure, materials, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(encode, "_LINE_SECONDS", -1.0)
    datasets.disable_progress_bars()
    caplog.set_level(logging.INFO, "fastalign")
    held_out = {"data.eval_path": str(materials / "held_out.jsonl"), "data.cache_dir": str(tmp_path / "fresh")}
    try:
        train(configure("dpo", **held_out, **{"run.steps": 2, "reference.cache": str(tmp_path / "logps")}))
    finally:
        datasets.enable_progress_bars()
    text = [record.message for record in caplog.records]
    assert "tokenising: 96 of 96 rows" in text and "tokenising: 16 of 16 rows" in text
    reached = [re.match(r"(evaluating|reference log-probs): (\d+) of (\d+), eta ", line) for line in text]
    ends = {match[1]: (match[2], match[3]) for match in reached if match}
    assert ends["evaluating"] == ("16", "16") and ends["reference log-probs"][0] == ends["reference log-probs"][1]
    assert any(re.fullmatch(r"writing .*/model and report\.html", line) for line in text)


def test_a_short_stage_and_other_ranks_say_nothing(caplog, capsys):
    caplog.set_level(logging.INFO, "fastalign")
    for shown in (True, False):
        with progress.stage("evaluating", 4, shown=shown) as tell:
            tell(4)
    assert not caplog.records and capsys.readouterr() == ("", "")
