"""Checkpoints: whole or absent, free of pickles, exact."""

import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastalign.config import OptimConfig
from fastalign.engine.errors import RunError
from fastalign.engine.optim import AdamW, Trained, make_optimizer
from fastalign.engine.output import checkpoint, checkpoints
from fastalign.engine.output.rundir import is_own
from fastalign.parallel.mesh import Axis, World

WORLD = World(Axis(), torch.device("cpu"))


def stepped(seed: int = 0) -> tuple[nn.Module, AdamW]:
    """A model with tied weights after two updates."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 5, bias=False))
    model[2].weight = model[0].weight
    model.register_buffer("kept", torch.rand(3))
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    for _ in range(2):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def roles(model: nn.Module, optimizer: AdamW) -> dict[str, Trained]:
    return {"policy": Trained(model, optimizer)}


def names(directory) -> list[str]:
    return [path.name for path in checkpoints.whole_checkpoints(directory)]


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    model, optimizer = stepped()
    path = checkpoint.save_checkpoint(tmp_path, 2, roles(model, optimizer), {"note": 7}, WORLD, keep=1)
    drawn = torch.rand(3), random.random(), np.random.rand()
    other, fresh = stepped(seed=1)[0], make_optimizer(model, OptimConfig())
    fresh = make_optimizer(other, OptimConfig())
    assert checkpoint.load_checkpoint(path, roles(other, fresh), WORLD)["note"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[mine].keys() == fresh.state[theirs].keys()
        assert all(torch.equal(value, fresh.state[theirs][key]) for key, value in optimizer.state[mine].items())
    again = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_tensors_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", (1, 120))
    model, optimizer = stepped()
    path = checkpoint.save_checkpoint(tmp_path, 2, roles(model, optimizer), {}, WORLD, keep=1)
    assert len(list(path.glob("*.safetensors"))) > 4
    assert max(file.stat().st_size for file in path.glob("*.safetensors")) < 1000
    other, _ = stepped(seed=1)
    fresh = make_optimizer(other, OptimConfig())
    checkpoint.load_checkpoint(path, roles(other, fresh), WORLD)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    next(path.glob("*-model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"is not a whole checkpoint: .*-model-00002-of-.* is missing"):
        checkpoint.load_checkpoint(path, roles(other, fresh), WORLD)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    path = checkpoint.save_checkpoint(tmp_path, 2, roles(*stepped()), {}, WORLD, keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    for file in path.iterdir():
        assert not zipfile.is_zipfile(file) and not file.read_bytes().startswith(b"\x80")
        if file.suffix == ".json":
            json.loads(file.read_text())


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = stepped()
    for step in (2, 4, 10):
        checkpoint.save_checkpoint(tmp_path, step, roles(model, optimizer), {}, WORLD, keep=2)
    assert names(tmp_path) == ["step-4", "step-10"]
    assert checkpoints.newest_checkpoint(tmp_path) == tmp_path / "step-10"
    assert (tmp_path / "latest").read_text() == "step-10\n"


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model, optimizer = stepped()
    checkpoint.save_checkpoint(tmp_path, 2, roles(model, optimizer), {}, WORLD, keep=1)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", full)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*No space left on device.*earlier .* intact"):
        checkpoint.save_checkpoint(tmp_path, 4, roles(model, optimizer), {}, WORLD, keep=1)
    assert names(tmp_path) == ["step-2"]


def test_a_new_checkpoint_takes_the_place_of_what_is_not_whole(tmp_path):
    model, optimizer = stepped()
    path = checkpoint.save_checkpoint(tmp_path, 4, roles(model, optimizer), {}, WORLD, keep=2)
    (path / "state.json").unlink()
    checkpoint.save_checkpoint(tmp_path, 4, roles(model, optimizer), {}, WORLD, keep=2)
    assert names(tmp_path) == ["step-4"] and sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-4"]
    checkpoint.load_checkpoint(path, roles(*stepped()), WORLD)


def test_a_link_to_a_checkpoint_that_was_moved_away_is_removed_and_the_checkpoint_stays(tmp_path):
    model, optimizer = stepped()
    first = checkpoint.save_checkpoint(tmp_path / "run", 2, roles(model, optimizer), {}, WORLD, keep=1)
    first.symlink_to(first.rename(tmp_path / "archive"))
    checkpoint.save_checkpoint(tmp_path / "run", 4, roles(model, optimizer), {}, WORLD, keep=1)
    assert (
        names(tmp_path / "run") == ["step-4"] and not first.is_symlink() and not checkpoints.flaw(tmp_path / "archive")
    )


def test_a_link_stays_the_runs_own_and_leads_to_the_same_wherever_it_is_moved(tmp_path):
    model, optimizer = stepped()
    run = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        path = checkpoint.save_checkpoint(run, step, roles(model, optimizer), {}, WORLD, keep=2)
    path.symlink_to(Path("..", path.rename(tmp_path / "run" / "archive").name))
    assert is_own(path, tmp_path / "run") and not is_own(path, tmp_path)
    assert checkpoints.move_later(run, 2, tmp_path / "aside" / "deep") == ["step-4"]
    assert names(run) == ["step-2"] and names(tmp_path / "aside" / "deep") == ["step-4"]


class Killed(BaseException):
    """As a kill is: nothing answers it."""


@pytest.mark.parametrize("name", ["move", "point_to_newest"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_kill_while_later_checkpoints_are_moved_leaves_no_wrong_pointer(tmp_path, monkeypatch, name, after):
    run, trained = tmp_path / "run", roles(*stepped())
    state = {
        "config": {"method": "", "model": {}, "data": {}, "optim": {}, "run": {}},
        "loader": {"seed": 0, "num_examples": 1, "drawn": 1},
        "data": "",
        "carried": {"baseline": {"mean": 0.0, "count": 0}},
    }
    for step in (2, 4, 6, 8):
        checkpoint.save_checkpoint(run, step, trained, state, WORLD, keep=4)
    original, calls = getattr(checkpoints, name), iter(range(9))

    def killed(*args):
        if next(calls) == after:
            raise Killed
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, name, killed)
        try:
            checkpoints.move_later(run, 2, tmp_path / "aside")
        except Killed:
            assert not (run / "latest").exists()
    left = checkpoints.newest_checkpoint(run)
    assert left is not None and len(names(run)) + len(names(tmp_path / "aside")) == 4
    checkpoints.point_to_newest(run)  # as every resume does
    assert (run / "latest").read_text() == f"{left.name}\n"
    assert sorted(p.name for p in run.iterdir()) == ["latest", *names(run)]


@pytest.mark.parametrize("change", [{"files": None}, {"files": 3}, {"step": 3}])
def test_a_state_that_cannot_be_true_is_no_whole_checkpoint(tmp_path, change):
    path = checkpoint.save_checkpoint(tmp_path, 2, roles(*stepped()), {}, WORLD, keep=2)
    (path / "state.json").write_text(json.dumps({**json.loads((path / "state.json").read_text()), **change}))
    assert names(tmp_path) == []
    with pytest.raises(
        ValueError, match=r"state\.json is damaged|is not a whole checkpoint: its state\.json is that of"
    ):
        checkpoint.load_checkpoint(path, roles(*stepped()), WORLD)


def test_a_checkpoint_without_the_tensors_of_a_rank_is_not_published(tmp_path, monkeypatch):
    """They are on another disk, for one."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", (1, 120))
    written, model = checkpoint.write_tensors, nn.Linear(64, 64)

    def elsewhere(path, *rest):
        written(path, *rest)
        max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size).unlink()

    monkeypatch.setattr(checkpoint, "write_tensors", elsewhere)
    with pytest.raises(RunError, match=r"step-2: rank 0 sees \d+ of at least 16640 bytes: does every rank write there"):
        checkpoint.save_checkpoint(tmp_path, 2, roles(model, make_optimizer(model, OptimConfig())), {}, WORLD, keep=1)
    assert not list(tmp_path.iterdir())


def test_all_stay_while_no_gradient_comes(tmp_path):
    model, optimizer = stepped()
    for step, keep in ((1, 1), (2, None), (3, None), (4, 2)):
        checkpoint.save_checkpoint(tmp_path, step, roles(model, optimizer), {}, WORLD, keep)
        assert len(names(tmp_path)) == (2 if step == 4 else step)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a whole checkpoint: it has no state\.json"):
        checkpoint.load_checkpoint(tmp_path, roles(*stepped()), WORLD)
