"""Epochs: every row once per pass, a last step that may be short, and means over the rows that it has."""

import pytest

from fastalign.engine.train import train
from runs import numbers, records


@pytest.fixture
def few(configure, materials, tmp_path):
    """A run over the first so many rows."""

    def make(rows: int, name: str = "run", **overrides):
        path = tmp_path / f"{rows}.jsonl"
        path.write_text("".join((materials / "rows.jsonl").read_text().splitlines(keepends=True)[:rows]))
        every = {"data.path": str(path), "run.steps": None, "batch.size": 8}
        return configure("sft", name, **{**every, **overrides})

    return make


@pytest.mark.parametrize(
    "epochs, sizes, seen",
    [(2, [8, 1, 8, 1], 2), (1, [8, 1], 1), (2.5, [8, 1, 8, 1, 5], 23 / 9), (0.5, [5], 5 / 9)],
)
def test_so_many_passes_are_so_many_rows(few, epochs, sizes, seen):
    config = few(9, **{"run.epochs": epochs})
    train(config)
    lines = records(config.run.output_dir)
    assert [line["examples"] for line in lines] == sizes
    assert [line["epoch"] for line in lines] == [sum(sizes[: i + 1]) / 9 for i in range(len(sizes))]
    assert lines[-1]["epoch"] == seen


def test_a_short_step_is_the_mean_over_its_rows(few):
    """As in a run whose steps are that short: nothing is divided by batch.size."""
    for name, size in (("eight", 8), ("three", 3)):
        train(few(3, name, **{"run.epochs": 1, "batch.size": size}))
    eight, three = (numbers(few(3, name).run.output_dir) for name in ("eight", "three"))
    assert eight == three and len(eight) == 1


def test_epochs_end_where_they_end_whatever_run_steps_is(few):
    config = few(9, **{"run.steps": 3})
    train(config)
    lines = records(config.run.output_dir)
    assert [(line["examples"], line["epoch"]) for line in lines] == [(8, 8 / 9), (1, 1), (8, 17 / 9)]


def test_rows_fewer_than_a_step_are_one_step_per_epoch(few, caplog):
    config = few(3, **{"run.steps": 2})
    train(config)
    assert [(line["examples"], line["epoch"]) for line in records(config.run.output_dir)] == [(3, 1), (3, 2)]
    assert "batch.size is 8 and there are 3 training examples: every step has 3" in caplog.messages


def test_more_epochs_go_on_row_by_row(few):
    constant = {"optim.schedule": "constant", "optim.warmup": 0}
    train(few(9, **constant, **{"run.epochs": 1}))
    train(few(9, **constant, **{"run.epochs": 3, "run.resume": True}))
    lines = records(few(9).run.output_dir)
    assert [line["examples"] for line in lines] == [8, 1, 8, 1, 8, 1]
    assert [line["epoch"] for line in lines] == [8 / 9, 1, 17 / 9, 2, 26 / 9, 3]
    with pytest.raises(ValueError, match=r"step-6 is beyond run\.epochs 2: it is after 6 steps and 27 examples"):
        train(few(9, **constant, **{"run.epochs": 2, "run.resume": True}))


def test_a_schedule_ends_with_the_last_row(few):
    config = few(9, **{"run.epochs": 2, "optim.schedule": "linear", "optim.warmup": 0})
    train(config)
    assert [line["lr"] for line in records(config.run.output_dir)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


@pytest.mark.parametrize("epochs", [float("inf"), float("nan"), 0.0, -1.0])
def test_passes_that_never_end_or_begin_are_refused(few, epochs):
    with pytest.raises(ValueError, match=r"run\.epochs must be above 0 and finite"):
        train(few(9, **{"run.epochs": epochs}))


def test_a_short_last_step_is_told_before_the_first(few, capsys):
    train(few(9, **{"run.epochs": 3}))
    assert "6 of 8 examples each, the last of each epoch of 1: 3 epochs of 9 examples" in " ".join(
        capsys.readouterr().out.split()
    )
    constant = {"optim.schedule": "constant", "optim.warmup": 0}
    train(few(9, "on", **constant, **{"run.epochs": 1}))
    train(few(9, "on", **constant, **{"run.epochs": 3, "run.resume": True}))
    words = "6 of 8 examples each, the last of each epoch of 1: 3 epochs of 9 examples, going on after step 2"
    assert words in " ".join(capsys.readouterr().out.split())
