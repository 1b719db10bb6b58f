"""A run that is refused leaves its directory as it was."""

from pathlib import Path

import pytest

from fastalign.engine.train import train
from runs import numbers

SHORT = {"run.steps": 4, "run.save_every": 1, "run.keep": 4}


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def own_rows(materials, tmp_path) -> Path:
    """A data file of this test alone."""
    path = tmp_path / "own.jsonl"
    path.write_text((materials / "rows.jsonl").read_text())
    return path


@pytest.fixture
def finished(configure, own_rows) -> Path:
    """The directory of a run with checkpoints at steps 1 to 4."""
    config = configure("sft", **SHORT, **{"data.path": str(own_rows)})
    train(config)
    return Path(config.run.output_dir)


def test_a_resume_that_fails_leaves_later_checkpoints(configure, finished, own_rows):
    own_rows.write_text("".join(own_rows.read_text().splitlines(keepends=True)[:-4]))
    before = contents(finished)
    back = {"data.path": str(own_rows), "run.resume": str(finished / "checkpoints" / "step-2")}
    with pytest.raises(ValueError, match="num_examples=96, this run has 92"):
        train(configure("sft", **SHORT, **back))
    assert contents(finished) == before


def test_latest_names_the_checkpoint_that_a_run_went_back_to(configure, finished, own_rows, monkeypatch):
    expected = numbers(finished)
    monkeypatch.setattr("fastalign.engine.train.run", lambda job, done: None)
    back = {"data.path": str(own_rows), "run.resume": str(finished / "checkpoints" / "step-2")}
    train(configure("sft", **SHORT, **back))
    assert (finished / "checkpoints" / "latest").read_text() == "step-2\n"
    assert numbers(finished) == expected[:2]


def test_other_data_of_the_same_length_is_refused(configure, finished, own_rows):
    text = own_rows.read_text()
    own_rows.write_text("".join(reversed(text.splitlines(keepends=True))))
    before = contents(finished)
    again = {"data.path": str(own_rows), "run.resume": True}
    with pytest.raises(ValueError, match=r"step-4 was trained on other data: .* resume with the same rows"):
        train(configure("sft", **SHORT, **again))
    assert contents(finished) == before
    own_rows.write_text(text)
    train(configure("sft", **SHORT, **again, **{"data.cache_dir": str(own_rows.parent / "cache")}))


@pytest.mark.parametrize(
    "broken", [{"data.path": "absent.jsonl"}, {"model.config": {"hidden_size": 8}}, {"loss.no_such": 1}]
)
def test_a_set_up_that_fails_leaves_no_run_behind(configure, broken):
    config = configure("sft", **{"run.steps": 1}, **broken)
    with pytest.raises(ValueError):
        train(config)
    directory = Path(config.run.output_dir)
    assert not directory.exists() or contents(directory) == {}
    train(configure("sft", **{"run.steps": 1, "run.resume": True}))
    assert len(numbers(directory)) == 1


def test_a_directory_without_checkpoint_and_lines_is_fresh(configure):
    config = configure("sft", **{"run.steps": 1, "run.resume": True})
    directory = Path(config.run.output_dir)
    directory.mkdir()
    (directory / "config.yaml").write_text("method: dpo\n")  # of a run that died before its first step
    (directory / "metrics.jsonl").touch()
    train(config)
    assert len(numbers(directory)) == 1
