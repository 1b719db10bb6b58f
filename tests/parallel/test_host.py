"""Frozen weights that rest in host memory."""

import copy

import pytest
import torch
from torch import nn

from fastalign.parallel.host import rest

CPU = torch.device("cpu")


class Block(nn.Linear):
    def forward(self, x):
        if x.isnan().any():
            raise ArithmeticError("not a number")
        return super().forward(x).tanh()


class Model(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 3), Block(3, 3))
        self.head = nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.head(self.blocks(x)) * self.scale


def places(model):
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def test_layers_visit_the_device_one_at_a_time_and_nothing_else_changes():
    """The other device is a second place in this memory: weights are where they rest only between the calls."""
    model = Model().requires_grad_(False)
    alone, x, seen = copy.deepcopy(model), torch.randn(4, 3), []
    rest(model, CPU)
    home = places(model)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append({n for n, at in places(model).items() if at != home[n]}))
    for _ in range(2):
        assert torch.equal(model(x), alone(x)) and places(model) == home
    outer = {"head.weight", "head.bias"}
    assert seen[:2] == [outer | {f"blocks.{i}.weight", f"blocks.{i}.bias"} for i in (0, 1)]
    with pytest.raises(ArithmeticError):
        model(x * torch.nan)
    assert places(model) == home  # however a forward ends
    with torch.no_grad():
        model.head.weight.mul_(2)  # a reference that follows
        alone.head.weight.mul_(2)
    assert torch.equal(model(x), alone(x))


def test_weights_that_train_or_are_shared_stay():
    with pytest.raises(ValueError, match="weights that train cannot rest on the host"):
        rest(Model(), CPU)
    policy = Model()
    reference = copy.deepcopy(policy, {id(policy.head): policy.head}).requires_grad_(False)
    rest(reference, CPU, policy.parameters())
    home, seen = places(reference), {}
    inside: dict[str, int] = {}
    reference.head.register_forward_pre_hook(lambda *_: seen.update(places(reference)))
    reference.blocks[1].register_forward_pre_hook(lambda *_: inside.update(places(reference)))
    reference(torch.randn(1, 3))
    assert seen == home  # the policy's head is where it was
    assert {name for name, at in inside.items() if at != home[name]} == {"blocks.1.weight", "blocks.1.bias"}
