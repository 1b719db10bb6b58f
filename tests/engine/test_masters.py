"""Weights in half precision: their masters in fp32 learn as an fp32 run does, and live as long as the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastalign.config import OptimConfig
from fastalign.engine.optim import make_optimizer
from fastalign.engine.train import train
from fastalign.models import lora
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained
from runs import numbers

LR, STEPS = 5e-7, 30


MASTER, WEIGHT, LEFT = "policy.master.", "policy.weight.", "policy.remainder."


def tensors(run, step):
    """What a checkpoint holds, by name."""
    files = (Path(run.run.output_dir) / "checkpoints" / f"step-{step}").glob("*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


def updated(run, step):
    """The weights that the optimizer's steps were added to, without a prefix."""
    every = tensors(run, step)
    left = {name.removeprefix(LEFT): x for name, x in every.items() if name.startswith(LEFT)}
    if left:
        return {name: every[WEIGHT + name].double() + x.double() for name, x in left.items()}
    kind = MASTER if any(name.startswith(MASTER) for name in every) else WEIGHT
    return {name.removeprefix(kind): x for name, x in every.items() if name.startswith(kind)}


@pytest.fixture
def start(configure, tmp_path):
    """A checkpoint in bf16: all runs start from the same numbers."""
    section = configure("sft").model
    policy = load_policy(section, tokenizer=(tokenizer := load_tokenizer(section)))
    save_pretrained(load_policy(section, tokenizer=tokenizer), tokenizer, tmp_path / "start")
    policy.model.bfloat16().save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


@pytest.fixture
def tune(configure, start):
    def make(name, dtype="bfloat16", **overrides):
        settings = {"model.path": start, "model.config": None, "model.tokenizer": None, "model.dtype": dtype}
        settings |= {"run.steps": STEPS, "optim.lr": LR, "optim.warmup": 0, "optim.weight_decay": 0.0}
        return configure("sft", name, **{**settings, **overrides})

    return make


def moves(run, start):
    """How far each weight has come."""
    before = load_file(Path(start) / "model.safetensors")
    after = updated(run, STEPS)
    return torch.cat([(after[f"model.{name}"].double() - x.double()).flatten() for name, x in before.items()])


def test_masters_move_as_the_weights_of_an_fp32_run_and_bf16_alone_does_not(tune, start, caplog):
    """30 steps of 5e-7: of weights of about 0.02 bf16 holds no change below 6e-5."""
    wide, half, alone = tune("wide", "float32"), tune("half"), tune("alone", **{"optim.master_weights": False})
    twice = tune("twice", **{"optim.master_weights": "compensated"})
    for run in (wide, half, twice):
        train(run)
    assert "master_weights" not in caplog.text
    train(alone)
    told = "optim.master_weights false: steps of optim.lr 5e-07 on bfloat16 weights mostly round to nothing"
    assert caplog.text.count(told) == 1
    want, lost = (moves(run, start) for run in (wide, alone))
    for run in (half, twice):
        got = moves(run, start)
        assert got.abs().mean() / want.abs().mean() == pytest.approx(1, abs=0.03)
        assert (
            torch.nn.functional.cosine_similarity(got, want, dim=0) > 0.95
        )  # gradients of bf16 forwards, through Adam
        assert (got != 0)[want != 0].double().mean() > 0.99  # tokens that no row has stay
    assert lost.abs().mean() / want.abs().mean() < 0.2 and (lost != 0).double().mean() < 0.2


def test_the_checkpoint_is_in_fp32_and_the_exported_model_is_its_rounding(tune):
    run = tune("run", **{"run.steps": 2, "optim.lr": 1e-3})
    train(run)
    kept, masters = tensors(run, 2), updated(run, 2)
    assert {x.dtype for name, x in kept.items() if not name.startswith(WEIGHT)} == {torch.float32}
    exported = AutoModelForCausalLM.from_pretrained(Path(run.run.output_dir) / "model")
    assert exported.dtype == torch.bfloat16
    for name, x in exported.state_dict().items():
        assert torch.equal(x, masters[f"model.{name}"].bfloat16()) and torch.equal(x, kept[f"{WEIGHT}model.{name}"])
    assert any(not torch.equal(x, x.bfloat16().float()) for x in masters.values())


@pytest.mark.parametrize("masters", [True, "compensated"])
def test_a_run_with_masters_goes_on_to_the_bit(tune, masters):
    run = tune("run", **{"run.steps": 6, "run.save_every": 3, "optim.lr": 1e-3, "optim.master_weights": masters})
    train(run)
    expected, kept = numbers(run.run.output_dir), tensors(run, 6)
    shutil.rmtree(Path(run.run.output_dir) / "checkpoints" / "step-6")
    run.run.resume = True
    train(run)
    assert numbers(run.run.output_dir) == expected
    again = tensors(run, 6)
    assert again.keys() == kept.keys() and all(torch.equal(again[name], x) for name, x in kept.items())


@pytest.mark.parametrize("begins", [True, False])
def test_a_run_may_begin_or_cease_to_keep_masters_and_says_so(tune, caplog, begins):
    settings = {"run.steps": 4, "run.save_every": 2, "optim.lr": 1e-3}
    run = tune("run", **settings, **{"optim.master_weights": not begins})
    train(run)
    directory = Path(run.run.output_dir) / "checkpoints"
    shutil.rmtree(directory / "step-4")
    if begins:  # as an earlier release left it, which knew no masters
        state = json.loads((directory / "step-2" / "state.json").read_text())
        del state["config"]["optim"]["master_weights"]
        (directory / "step-2" / "state.json").write_text(json.dumps(state))
    run.run.resume, run.optim.master_weights = True, begins
    with caplog.at_level("INFO"):
        train(run)
    told = {
        True: "resume: the checkpoint has no fp32 masters of this kind: they start from its weights",
        False: "resume: the checkpoint's fp32 masters are left out: optim.master_weights is false",
    }
    assert caplog.text.count(told[begins]) == 1
    assert ({x.dtype for x in updated(run, 4).values()} == {torch.float32}) is begins


def test_masters_that_start_from_a_checkpoint_are_its_weights(tune):
    run = tune("run", **{"run.steps": 2, "optim.lr": 1e-3, "optim.master_weights": False})
    train(run)
    weights = updated(run, 2)
    run.run.resume, run.optim.master_weights, run.optim.schedule = True, True, "cosine"
    train(run)  # at its end already: only loaded, and exported
    exported = load_file(Path(run.run.output_dir) / "model" / "model.safetensors")
    assert all(torch.equal(x, weights[f"model.{name}"]) for name, x in exported.items())


def test_the_overview_names_masters(tune, capsys):
    train(tune("run", **{"run.steps": 1}))
    assert "weights bfloat16 with float32 masters, autocast off" in capsys.readouterr().out


def test_an_adapter_over_bf16_trains_in_fp32_without_masters(tune, capsys):
    pytest.importorskip("peft")
    run = tune("run", **{"run.steps": 2, "model.lora": {"r": 2}})
    train(run)
    assert "weights bfloat16 and float32, autocast off" in capsys.readouterr().out
    kept = tensors(run, 2)
    assert not any(name.startswith(MASTER) for name in kept) and {x.dtype for x in kept.values()} == {torch.float32}


WHOLE = {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}


def test_whole_modules_beside_an_adapter_train_in_fp32_as_with_masters(tune, monkeypatch):
    """To the bit."""
    pytest.importorskip("peft")
    settings = {"run.steps": 4, "run.save_every": 2, "optim.lr": 1e-3, "model.lora": WHOLE}
    now, before = tune("now", **settings), tune("before", **settings)
    train(now)
    with monkeypatch.context() as patch:
        patch.setattr(lora, "raise_trained", lambda model: None)
        train(before)
    expected, kept = numbers(before.run.output_dir), tensors(now, 4)
    assert numbers(now.run.output_dir) == expected
    masters = {name: x for name, x in tensors(before, 4).items() if name.startswith(MASTER)}
    assert len(masters) == 6 and {x.dtype for x in kept.values()} == {torch.float32}
    assert all(torch.equal(x, kept[name.replace(MASTER, WEIGHT)]) for name, x in masters.items())
    exported = [load_file(Path(run.run.output_dir) / "model" / "adapter_model.safetensors") for run in (now, before)]
    for name, x in exported[0].items():
        assert x.dtype == (torch.float32 if "lora_" in name else torch.bfloat16) and torch.equal(x, exported[1][name])


def test_gradients_of_many_micro_batches_add_up_in_fp32():
    """A sum of 2000 equal parts: in bf16 it stands still at 256."""
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    make_optimizer(layer, OptimConfig())
    for _ in range(2000):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.item() == 2000


def test_a_step_that_is_called_off_leaves_masters_and_weights():
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer = make_optimizer(layer, OptimConfig(lr=0.1))
    before = [x.detach().clone() for pair in optimizer.masters.items() for x in pair]
    layer(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    after = [x for pair in optimizer.masters.items() for x in pair]
    assert all(torch.equal(x, was) for x, was in zip(after, before, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    optimizer.zero_grad()
    assert all((weight == master.bfloat16()).all() for weight, master in optimizer.masters.items())
    assert layer.weight.grad is None and not torch.equal(layer.weight, before[0])


def test_a_compensated_step_that_is_called_off_leaves_everything():
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer = make_optimizer(layer, OptimConfig(lr=0.1, master_weights="compensated"))
    x, held = torch.ones(1, 2, dtype=torch.bfloat16), []
    for called_off in (0.0, 1.0, 0.0):
        layer(x).sum().backward()
        optimizer.found_inf = torch.tensor(called_off)
        optimizer.step()
        every = [layer.weight, layer.bias, *(x for p in layer.parameters() for x in optimizer.state[p].values())]
        held.append([each.detach().clone() for each in every])
    assert all(torch.equal(a, b) for a, b in zip(held[0], held[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(held[1][:2], held[2][:2], strict=True))
    assert sum(each.nbytes for each in held[2][2:] if each.dim()) == 6 * 6  # and the weight and its gradient: 12


def test_moments_in_bf16_that_would_stand_still_are_refused(tune):
    run = tune("run", **{"optim.master_weights": "compensated", "optim.betas": (0.9, 0.999)})
    told = r"optim\.master_weights compensated .* no steps of optim\.betas 0\.999: set the second to 0\.99 or less"
    with pytest.raises(ValueError, match=told):
        train(run)


def test_float16_is_warned_of(caplog):
    make_optimizer(torch.nn.Linear(2, 2, dtype=torch.float16), OptimConfig())
    assert "float16 weights train without loss scaling: gradients below 6e-8 are lost" in caplog.text
