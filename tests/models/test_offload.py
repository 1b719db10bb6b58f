"""Activations in host memory: on a CPU that is a second place in the same memory, so that only their ways are seen."""

import gc
import weakref

import numpy as np
import pytest
import torch

from fastalign.config import ModelConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.models import offload
from fastalign.models.load import load_policy
from fastalign.models.offload import Offload
from fastalign.ops import linear_loss

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
TOKENS = 61
CPU = torch.device("cpu")


def batch(tokens, device):
    draw, scored = np.random.default_rng(0), np.arange(tokens) > 0
    return build_batch([TokenExample(((draw.integers(50, size=tokens), scored),), 0)], False).to(device)


def step(checkpointing, kept, device=CPU, tokens=TOKENS, **sizes):
    section = ModelConfig(config={**LLAMA, **sizes}, gradient_checkpointing=checkpointing)
    policy = load_policy(section).to(device).train()
    policy.offload = kept
    for _ in range(2):
        policy(batch(tokens, device), head).backward()
    return [p.grad for p in policy.parameters()]


def head(*tensors, **known):
    return linear_loss(*tensors, lambda stats: -stats.logps.mean(), **known)[0]


@pytest.fixture
def trips(monkeypatch):
    """What the forwards left on the host, in their order."""
    made, real = [], offload.Trip

    def noted(*known):
        made.append(real(*known))
        return made[-1]

    monkeypatch.setattr(offload, "Trip", noted)
    return made


@pytest.mark.parametrize("checkpointing", [False, "mlp", True])
@pytest.mark.parametrize("under_way", [0, 20_000, 1 << 28])
def test_gradients_are_those_of_activations_that_stay(checkpointing, under_way, trips):
    want = step(checkpointing, None)
    got = step(checkpointing, Offload(CPU, least=0, under_way=under_way))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(trips) == 2 and not any(trip.leaving for trip in trips)
    bytes_of = [sum(left.host.nbytes for left in trip.left) for trip in trips]
    inputs = 3 * TOKENS * 32 * 4
    assert bytes_of[0] == bytes_of[1] >= inputs and (checkpointing is not True or bytes_of[0] < 2 * inputs)
    assert all(TOKENS in left.host.shape for trip in trips for left in trip.left)
    held = [sum(x.nbytes for x, _ in trip.here.values()) for trip in trips]
    assert max(held) <= 2 * under_way


def test_what_has_left_is_freed_small_tensors_stay_and_a_forward_without_backward_is_left_alone(trips):
    kept = Offload(CPU, least=4 * TOKENS * 32, under_way=0)
    weight = torch.randn(32, 32, requires_grad=True)
    with kept(TOKENS):
        x = torch.randn(TOKENS, 32) @ weight
        y = x.exp()
        small = torch.randn(TOKENS, 3) * torch.ones(3, requires_grad=True)
        out, gone = (y * y).sum() + small.sum(), weakref.ref(y)
    del x, y
    gc.collect()
    assert gone() is None and {left.host.shape for left in trips[0].left} == {(TOKENS, 32)}
    out.backward()
    assert weight.grad.isfinite().all()
    with torch.no_grad(), kept(TOKENS):
        (weight @ weight).exp()
    assert len(trips) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_gradients_are_the_same_and_memory_is_less(checkpointing):
    device, sizes, most, grads = torch.device("cuda"), {"hidden_size": 256, "intermediate_size": 512}, [], []
    for kept in (None, Offload(device, least=0, under_way=1 << 20)):
        torch.cuda.reset_peak_memory_stats()
        grads.append([g.cpu() for g in step(checkpointing, kept, device, 2048, **sizes)])
        most.append(torch.cuda.max_memory_allocated())
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and most[1] < most[0]
