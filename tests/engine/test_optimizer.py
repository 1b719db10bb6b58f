"""Optimizers that take less memory: moments in 8 bits, masters on the host, steps within backward."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.config import OptimConfig
from fastalign.engine.adamw import AdamW
from fastalign.engine.eight_bit import BLOCK, decode, encode, levels
from fastalign.engine.optim import Trained, make_masters, make_optimizer, stepping, take_step
from fastalign.engine.train import train
from runs import LLAMA, numbers

WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 96}
"""Blocks of 64 fit all of its matrices but one."""
EIGHT = {"model.config": WIDE, "optim.name": "adamw_8bit"}


def weights(run):
    return load_file(Path(run.run.output_dir) / "model" / "model.safetensors")


def saved(run, step):
    files = (Path(run.run.output_dir) / "checkpoints" / f"step-{step}").glob("*.safetensors")
    return {name: x for file in files for name, x in load_file(file).items()}


def assert_equal(one, other):
    assert one.keys() == other.keys() and one and all(torch.equal(x, other[name]) for name, x in one.items())


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_near_and_decode_to_what_encodes_the_same(signed):
    x = torch.randn(37, 3 * BLOCK, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 3, 37)[:, None]
    x = x if signed else x.abs()
    x[3] = x[4, 5:70] = 0
    codes, scales = encode(x, signed)
    back = decode(codes, scales, signed)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and scales.shape == (37, 3)
    shares = (x - back).unflatten(-1, (-1, BLOCK)).abs() / scales.abs().clamp(min=1e-30)[..., None]
    assert shares.max() < 0.5 * levels(signed, x.device).diff().max() + 2**-8
    again = encode(back, signed)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    assert torch.equal(back == 0, x == 0) or signed  # of second moments nothing above 0 becomes 0
    most = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    assert torch.equal(back.unflatten(-1, (-1, BLOCK)).abs().amax(-1), most)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_stand_for_the_numbers_of_the_paper(signed):
    """A sign, zeros that give the decade, the rest cuts 0.1 to 1 into equal parts, of which each is its middle."""
    expected = {0.0, 1.0}
    for zeros in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - zeros + (not signed)) + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0**-zeros).tolist()
        expected |= {*middles, *(-x for x in middles if signed)}
    found = levels(signed, torch.device("cpu"))
    assert len(found) == len(expected) == 256
    torch.testing.assert_close(found.double(), torch.tensor(sorted(expected), dtype=torch.float64), rtol=1e-6, atol=0)


def make(dtype, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.Linear(96, 128)).to(dtype)
    return Trained(model, make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1, **settings), tell=False))


def gradients(trained, seed):
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)).to(trained.module[0].weight.dtype)
    return trained.module(x).float().square().mean()


def everything(trained):
    optimizer, every = trained.optimizer, [*trained.module.parameters()]
    states = [optimizer.state[optimizer.updated(p)] for p in every]
    return [*every, *map(optimizer.updated, every), *(x for state in states for x in state.values())]


def test_moments_in_8_bits_take_two_bytes_a_weight_and_step_as_those_in_fp32():
    plain, eight = make(torch.float32), make(torch.float32, name="adamw_8bit")
    for seed in range(20):
        for one in (plain, eight):
            gradients(one, seed).backward()
            take_step(one, 1e-3, 0.0, torch.tensor(True))
    first, second = (one.module[0].weight for one in (plain, eight))
    state = eight.optimizer.state[second]
    assert sum(x.nbytes for name, x in state.items() if name != "step") == second.numel() * 2.125
    start = make(torch.float32).module[0].weight
    moved = [(x - start).flatten() for x in (first, second)]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.995
    assert eight.optimizer.state[eight.module[0].bias]["exp_avg"].dtype == torch.float32  # too few for blocks


WAYS = [
    ("float32", {}),
    ("bfloat16", {}),
    ("bfloat16", {"master_weights": "compensated"}),
    ("bfloat16", {"master_weights": False}),
    ("float32", {"name": "adamw_8bit"}),
    ("bfloat16", {"name": "adamw_8bit"}),
    ("bfloat16", {"name": "adamw_8bit", "master_weights": "compensated"}),
]


@pytest.mark.parametrize("dtype, settings", WAYS)
def test_steps_within_backward_are_those_after_it_and_leave_no_gradient(dtype, settings):
    after, within = (make(getattr(torch, dtype), **settings) for _ in range(2))
    for seed, finite in enumerate([True, True, False, True]):
        gradients(after, seed).backward()
        norm = take_step(after, 1e-2, 0.0, torch.tensor(finite))
        with stepping(within, 1e-2, torch.tensor(finite)) as squares:
            gradients(within, seed).backward()
        torch.testing.assert_close(squares.norm(), norm, rtol=1e-12, atol=0)
        assert all(p.grad is None for p in within.module.parameters())
        assert all(torch.equal(a, b) for a, b in zip(everything(after), everything(within), strict=True))


def test_a_weight_whose_gradient_is_not_finite_stays_when_steps_are_within_backward():
    trained = make(torch.float32)
    before = copy.deepcopy(trained.module)
    with stepping(trained, 1e-2, torch.tensor(True)) as squares:
        x = trained.module[0](torch.ones(1, 128))
        (trained.module[1](x).sum() + trained.module[0].bias[0] * torch.inf).backward()
    same = [torch.equal(a, b) for a, b in zip(trained.module.parameters(), before.parameters(), strict=True)]
    assert same == [False, True, False, False] and not squares.norm().isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_on_the_host_step_as_those_beside_the_weights(dtype):
    """On a CPU both are in one memory: what is looked at is that no gradient, weight or moment is missed."""
    here, there = make(dtype), make(dtype)
    every = [*there.module.parameters()]
    masters = make_masters(every, on_host=True)
    groups = [{"params": [masters[p] for p in every if p.dim() > 1], "weight_decay": 0.1}]
    groups.append({"params": [masters[p] for p in every if p.dim() < 2], "weight_decay": 0.0})
    there = Trained(there.module, AdamW(groups, masters, on_host=True, lr=1e-2, betas=(0.9, 0.95), fused=True))
    for seed, finite in enumerate([True, False, True]):
        for one in (here, there):
            gradients(one, seed).backward()
            take_step(one, 1e-2, 1.0, torch.tensor(finite))
    assert all(torch.equal(a, b) for a, b in zip(everything(here), everything(there), strict=True))
    assert len(masters) == 4 and {m.dtype for m in masters.values()} == {torch.float32}


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_with_moments_in_8_bits_goes_on_to_the_bit_and_is_refused_with_others(configure):
    run = configure("sft", "run", **EIGHT, **{"run.steps": 4, "run.save_every": 2})
    train(run)
    expected, kept = numbers(run.run.output_dir), saved(run, 4)
    assert {name.split(".")[1] for name in kept} == {
        *("weight", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")
    }
    assert expected[-1]["loss"] < expected[0]["loss"]
    shutil.rmtree(Path(run.run.output_dir) / "checkpoints" / "step-4")
    run.run.resume = True
    train(run)
    assert numbers(run.run.output_dir) == expected
    assert_equal(saved(run, 4), kept)
    run.optim.name, run.run.steps = "adamw", 6
    with pytest.raises(ValueError, match=r"optim\.name: 'adamw_8bit' there, 'adamw' here"):
        train(run)


ALONE = {"optim.clip_norm": 0.0, "batch.tokens": 4000, "run.steps": 3}


def test_a_run_that_steps_within_backward_ends_with_the_same_weights(configure):
    after, within = configure("dpo", "after", **ALONE), configure("dpo", "in", **ALONE, **{"optim.in_backward": True})
    for run in (after, within):
        train(run)
    assert_equal(weights(within), weights(after))
    for one, other in zip(numbers(after.run.output_dir), numbers(within.run.output_dir), strict=True):
        assert one.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=1e-9)
        assert one == other


REFUSED = {
    r"optim\.clip_norm is 1, set it to 0": {"optim.in_backward": True},
    r"an update has \d micro-batches and may have 1: raise batch\.tokens \(200\), lower batch\.size \(6\)": {
        "optim.in_backward": True,
        "optim.clip_norm": 0.0,
        "batch.tokens": 200,
    },
    r"optim\.in_backward and optim\.offload exclude each other": {"optim.in_backward": True, "optim.offload": True},
    r"optim\.name adamw_8bit keeps moments in 8 bits, which holds no steps of optim\.betas 0\.999": {
        "optim.name": "adamw_8bit",
        "optim.betas": (0.9, 0.999),
    },
    r"optim\.offload keeps masters and moments in fp32 in host memory.*set optim\.name to adamw": {
        "optim.name": "adamw_8bit",
        "optim.offload": True,
    },
}


@pytest.mark.parametrize("told, settings", REFUSED.items())
def test_what_cannot_be_meant_is_refused(configure, told, settings):
    with pytest.raises(ValueError, match=told):
        train(configure("sft", **settings))


def test_on_a_cpu_offloading_changes_nothing_and_the_log_says_so(configure, caplog):
    run = configure("sft", **{"optim.offload": True, "run.steps": 1})
    with caplog.at_level("INFO"):
        train(run)
    assert caplog.text.count("optim.offload changes nothing: this is a CPU") == 1
