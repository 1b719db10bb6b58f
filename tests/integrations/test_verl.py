"""verl's two functions: signatures and shapes of verl 0.8, values against float64, and the patch of its modules.

The contract is read from ``verl/utils/experimental/torch_functional.py`` (``FusedLinearForPPO.forward``) and
``verl/utils/kernel/linear_cross_entropy.py`` (``linear_cross_entropy``); verl itself is not needed.
"""

import inspect
import sys
from types import ModuleType

import pytest
import torch

from fastalign.integrations import verl
from fastalign.integrations.verl import FusedLinearForPPO, linear_cross_entropy

EXPERIMENTAL, KERNEL = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 8, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(37, 8, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(37, (2, 7))


def exact(hidden, weight, labels, temperature):
    """Log-probs, entropies and gradients of a weighted sum of both, in float64."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.T / (temperature if isinstance(temperature, float) else temperature.double()[..., None])
    logps = logits.log_softmax(-1)
    log_probs, entropy = logps.gather(-1, labels[..., None])[..., 0], -(logps.exp() * logps).sum(-1)
    return log_probs, entropy, torch.autograd.grad((2 * log_probs + 3 * entropy).sum(), (h, w))


def test_signatures_are_verls():
    forward = inspect.signature(FusedLinearForPPO().forward)
    assert list(forward.parameters) == ["hidden_states", "vocab_weights", "input_ids", "temperature"]
    assert forward.parameters["temperature"].default == 1.0
    assert list(inspect.signature(FusedLinearForPPO).parameters) == ["chunk_size", "impl_backend"]
    function = inspect.signature(linear_cross_entropy).parameters
    assert {name: p.default for name, p in list(function.items())[3:]} == {
        "temperature": 1.0,
        "reduction": "none",
        "dist_process_group": None,
    }
    assert list(function)[:3] == ["hidden", "weight", "labels"]


@pytest.mark.parametrize("shape", [(2, 7), (14,)])
@pytest.mark.parametrize("temperature", [0.7, torch.tensor(0.7), torch.full((2, 7), 0.7)], ids=["float", "one", "each"])
def test_the_torch_backend_gives_log_probs_entropy_and_gradients(shape, temperature):
    hidden, weight, labels = inputs()
    log_probs, entropy = FusedLinearForPPO()(
        hidden.view(*shape, 8), weight, labels.view(shape).int(), temperature=temperature
    )
    assert log_probs.shape == entropy.shape == shape
    wanted = exact(hidden, weight, labels, 0.7)
    for found, true in zip((log_probs, entropy), wanted[:2], strict=True):
        torch.testing.assert_close(found.double(), true.view(shape), rtol=1e-6, atol=1e-6)
    made = torch.autograd.grad((2 * log_probs + 3 * entropy).sum(), (hidden, weight))
    for found, true in zip(made, wanted[2], strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


def test_log_probs_of_half_precision_are_fp32_and_entropy_is_not():
    hidden, weight, labels = inputs(torch.bfloat16)
    log_probs, entropy = FusedLinearForPPO(chunk_size=3)(hidden, weight, labels)
    assert log_probs.dtype == torch.float32 and entropy.dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["none", "sum", "MEAN", None])
def test_the_kernel_backend_flattens_and_reduces(reduction):
    hidden, weight, labels = inputs()
    log_probs, entropy = linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
    true, entropies, _ = exact(hidden, weight, labels, 0.7)
    true = true.flatten() if reduction in ("none", None) else getattr(true, reduction.lower())()
    torch.testing.assert_close(log_probs.double(), true, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), entropies.flatten(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(hidden, weight, labels, 1.0, "median")


@pytest.fixture
def fake_verl(monkeypatch):
    """The modules that verl's forwards import from."""
    for name in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel", EXPERIMENTAL, KERNEL):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[EXPERIMENTAL].FusedLinearForPPO = theirs = type("FusedLinearForPPO", (), {})
    sys.modules[KERNEL].linear_cross_entropy = len
    return lambda: (sys.modules[EXPERIMENTAL].FusedLinearForPPO, sys.modules[KERNEL].linear_cross_entropy), (
        theirs,
        len,
    )


def test_the_patch_replaces_both_names_and_is_undone(fake_verl):
    names, theirs = fake_verl
    with pytest.raises(KeyError), verl.patch():
        assert names() == (FusedLinearForPPO, linear_cross_entropy)
        raise KeyError
    assert names() == theirs
    handle = verl.patch()
    handle.undo()
    handle.undo()
    assert names() == theirs


def test_a_part_that_is_missing_leaves_nothing_replaced(fake_verl):
    _, theirs = fake_verl
    del sys.modules[KERNEL].linear_cross_entropy
    with pytest.raises(AttributeError, match="linear_cross_entropy"):
        verl.patch()
    assert sys.modules[EXPERIMENTAL].FusedLinearForPPO is theirs[0]
