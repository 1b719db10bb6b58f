"""Example inputs for every op and the tolerance that decides whether a backend is right: for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.types import IGNORE_INDEX

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"masked": True},
    "softcap": {"softcap": 5.0},
    "temperature": {"temperature": 0.7},
    "row_temperature": {"row_temperature": True},
    "entropy": {"entropy": True},
    "bias": {"bias": 100.0},
    "logit_scale": {"logit_scale": 0.25},
    "level": {"level": 60.0},
    "everything": {
        **{"masked": True, "softcap": 8.0, "row_temperature": True, "entropy": True, "bias": 10.0, "logit_scale": 0.5}
    },
}
"""name -> what is special about the case; ``bias`` and ``logit_scale`` exist on the hidden path only."""

HIDDEN_ONLY = ("bias", "logit_scale")


@dataclass(frozen=True)
class Example:
    """Inputs of an op: differentiable tensors, labels, options, and an upstream gradient of both signs per row."""

    tensors: dict[str, Tensor]
    labels: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    grad_logps: Tensor = field(default_factory=lambda: torch.empty(0))
    grad_entropy: Tensor = field(default_factory=lambda: torch.empty(0))

    def to(self, dtype: torch.dtype) -> Example:
        """The same values in another dtype, ready for autograd."""
        tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in self.tensors.items()}
        return replace(self, tensors=tensors)


def linear_example(
    case: str, num_rows: int, width: int, vocab: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Example:
    """``hidden [N, D]``, ``weight [V, D]`` and, in some cases, ``bias [V]``; masked hidden states are NaN."""
    special, new = CASES[case], torch.Generator().manual_seed(seed)
    tensors = {
        "hidden": torch.randn(num_rows, width, generator=new),
        "weight": torch.randn(vocab, width, generator=new) * 2 / width**0.5,
    }
    if "bias" in special:
        tensors["bias"] = torch.randn(vocab, generator=new) * special["bias"]
    if "level" in special:  # one direction shared by all rows lifts every logit far above zero
        tensors["hidden"][:, 0], tensors["weight"][:, 0] = 8.0, special["level"] / 8.0
    example = _finish(tensors, "hidden", special, vocab, new)
    if "logit_scale" in special:
        example.options["logit_scale"] = special["logit_scale"]
    return _place(example, dtype, device)


def logits_example(
    case: str, num_rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Example:
    """``logits [N, V]``; masked rows are NaN."""
    special, new = CASES[case], torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab, generator=new) * 3 + special.get("level", 0.0)
    return _place(_finish({"logits": logits}, "logits", special, vocab, new), dtype, device)


def _finish(tensors: dict[str, Tensor], rows: str, special: dict, vocab: int, new: torch.Generator) -> Example:
    """Labels, mask, options and upstream gradients."""
    num_rows = tensors[rows].shape[0]
    labels = torch.randint(0, vocab, (num_rows,), generator=new)
    if special.get("masked"):
        labels[torch.rand(num_rows, generator=new) < 0.4] = IGNORE_INDEX
        tensors[rows][labels == IGNORE_INDEX] = torch.nan
    options = {name: special[name] for name in ("softcap", "temperature", "entropy") if name in special}
    if special.get("row_temperature"):
        options["temperature"] = 0.5 + torch.rand(num_rows, generator=new)
    grads = torch.randn(2, num_rows, generator=new)
    return Example(tensors, labels, options, grads[0], grads[1])


def _place(example: Example, dtype: torch.dtype, device: str) -> Example:
    tensors = {name: x.to(device, dtype).requires_grad_() for name, x in example.tensors.items()}
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in example.options.items()}
    upstream = example.grad_logps.to(device), example.grad_entropy.to(device)
    return Example(tensors, example.labels.to(device), options, *upstream)


def outputs_and_grads(result: Any, example: Example) -> dict[str, Tensor]:
    """Outputs by name, and the gradients of the example's tensors under its upstream gradients."""
    logps, entropy = result if isinstance(result, tuple) else (result, None)
    score = (logps * example.grad_logps.to(logps.dtype)).sum()
    if entropy is not None:
        score = score + (entropy * example.grad_entropy.to(entropy.dtype)).sum()
    grads = torch.autograd.grad(score, list(example.tensors.values()))
    found = {"logps": logps.detach(), **{f"d_{name}": g for name, g in zip(example.tensors, grads, strict=True)}}
    return found if entropy is None else {**found, "entropy": entropy.detach()}


def assert_matches(
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    *,
    name: str = "result",
    factor: float = 2.0,
    budget: float | None = None,
) -> None:
    """``actual`` errs at most ``factor`` times as much as ``eager``, both against ``oracle``, in norm and in maximum.

    A few units in the last place of the largest value are granted on top: eager may be right by luck. In float64 the
    oracle is no better than the result and intermediate values may be larger: many units, which still catch any error
    of formula.

    Args:
        actual, eager: results of one shape and dtype.
        oracle: the result in float64 from the same rounded inputs.
        budget: an absolute bound on the largest error as well.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    if oracle.numel() == 0:
        return
    ours, theirs = (actual.double() - oracle.double()), (eager.double() - oracle.double())
    unit = torch.finfo(actual.dtype).eps * oracle.abs().max().item() * (512 if actual.dtype == torch.float64 else 1)
    for measure, slack in ((_maximum, 4 * unit), (_rms, unit / 2)):
        error, allowed = measure(ours), factor * measure(theirs) + slack
        assert error <= allowed, f"{name}: {measure.__name__[1:]} error {error:.3g}, allowed {allowed:.3g}"
    if budget is not None:
        assert _maximum(ours) <= budget, f"{name}: maximum error {_maximum(ours):.3g}, budget {budget:.3g}"


def _maximum(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
