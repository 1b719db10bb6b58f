"""Example inputs for every op and the tolerance that decides whether a backend is right: for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.token_logps import reference as _token_reference
from fastalign.types import IGNORE_INDEX, Segments

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
    "smoothing": {"label_smoothing": 0.1},
    "smoothed_level": {"label_smoothing": 0.3, "level": 60.0, "temperature": 1.7},
    "lse": {"lse": True},
    "everything": {
        **{"masked": True, "softcap": 8.0, "row_temperature": True, "entropy": True, "bias": 10.0, "logit_scale": 0.5}
    },
    "objectives": {
        **{
            "masked": True,
            "softcap": 8.0,
            "row_temperature": True,
            "entropy": True,
            "label_smoothing": 0.2,
            "lse": True,
        }
    },
}
"""name -> what is special about the case."""

HIDDEN_ONLY = ("bias", "logit_scale")
"""What the path from logits does not know."""


@dataclass(frozen=True)
class Example:
    """Inputs of an op: differentiable tensors, labels, options, and an upstream gradient of both signs per row.

    ``constants`` are tensors of the inputs' dtype that get no gradient: a reference's logits, a critic's values.
    """

    tensors: dict[str, Tensor]
    labels: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    grad_logps: Tensor = field(default_factory=lambda: torch.empty(0))
    grad_entropy: Tensor = field(default_factory=lambda: torch.empty(0))
    constants: dict[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Example:
        """The same values in another dtype, ready for autograd."""
        tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in self.tensors.items()}
        return replace(self, tensors=tensors, constants={name: x.to(dtype) for name, x in self.constants.items()})

    def on(self, device: str) -> Example:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("labels", "grad_logps", "grad_entropy")}
        for name in ("tensors", "constants", "options"):
            values = getattr(self, name).items()
            moved[name] = {key: x.detach().to(device) if isinstance(x, Tensor) else x for key, x in values}
        for x in moved["tensors"].values():
            x.requires_grad_()
        return replace(self, **moved)


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


def two_stream_example(
    case: str, num_rows: int, vocab: int, dtype: torch.dtype, width: int = 0, seed: int = 0
) -> Example:
    """The logits, or with a ``width`` the linear example, of a policy and of a reference of another cap."""
    if width:
        ours, theirs = (linear_example(case, num_rows, width, vocab, dtype, seed=seed + i) for i in (0, 1))
    else:
        ours, theirs = (logits_example(case, num_rows, vocab, dtype, seed=seed + i) for i in (0, 1))
    masked = ours.labels == IGNORE_INDEX
    constants = {f"ref_{name}": x.detach().clone() for name, x in theirs.tensors.items()}
    rows = constants["ref_hidden" if width else "ref_logits"].nan_to_num_(0.5)
    rows[masked] = torch.nan
    options = {name: x for name, x in ours.options.items() if name != "entropy"}
    options |= {"ref_softcap": 2 * options["softcap"]} if "softcap" in options else {}
    return replace(ours, options={**options, "labels": ours.labels}, constants=constants)


RATIOS = (0.5, 0.9, 1.1, 1.5, 4.0)
"""Between and beyond the bounds 0.8 and 1.2."""


def policy_example(case: str, num_rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Example:
    """A logits example with what a policy loss is given: every ratio under both signs of the advantage, a reference
    up to a nat away, weights; all of it NaN on masked rows."""
    example = logits_example(case, num_rows, vocab, dtype, seed=seed)
    new = torch.Generator().manual_seed(seed + 1)
    scaling = {name: example.options[name] for name in ("temperature", "softcap") if name in example.options}
    logps, _ = _token_reference(example.tensors["logits"].detach().double(), example.labels, **scaling)
    ratios = torch.tensor(RATIOS, dtype=torch.float64).repeat_interleave(2).repeat(num_rows // 2 + 1)[:num_rows]
    rows = {
        "old_logps": logps - ratios.log(),
        "advantages": torch.tensor([1.0, -1.0]).repeat(num_rows)[:num_rows]
        * (0.5 + torch.rand(num_rows, generator=new)),
        "ref_logps": logps + torch.rand(num_rows, generator=new) - 0.5,
        "weights": torch.rand(num_rows, generator=new),
    }
    rows = {name: x.float().masked_fill(example.labels == IGNORE_INDEX, torch.nan) for name, x in rows.items()}
    return replace(example, options={**scaling, **rows, "labels": example.labels})


def pairs_example(case: str, vocab: int, dtype: torch.dtype, seed: int = 0) -> Example:
    """A logits example of four preference pairs, one of them with an empty completion, and reference log-probs."""
    offsets = torch.tensor([0, 3, 7, 7, 9, 14, 21, 23, 24])
    example = policy_example(case, int(offsets[-1]), vocab, dtype, seed)
    options = {name: x for name, x in example.options.items() if name not in ("old_logps", "advantages", "weights")}
    return replace(example, options={**options, "cu_seqlens": offsets})


SEGMENT_LENGTHS = (0, 5, 1, 70, 0, 17, 33, 2, 0)


def scan_example(decay: float | None, dtype: torch.dtype, names: tuple[str, ...] = ("x",), seed: int = 0) -> Example:
    """Packed vectors over segments, empty ones included; ``decay`` None: one per token, NaN at the segments' ends."""
    new, cu_seqlens = torch.Generator().manual_seed(seed), torch.tensor([0, *SEGMENT_LENGTHS]).cumsum(0)
    num_tokens = int(cu_seqlens[-1])
    tensors = {name: torch.randn(num_tokens, generator=new).to(dtype).requires_grad_() for name in names}
    per_token = 0.8 + 0.2 * torch.rand(num_tokens, generator=new)
    per_token[cu_seqlens[1:][cu_seqlens.diff() > 0] - 1] = torch.nan
    options = {"cu_seqlens": cu_seqlens, "decay": per_token if decay is None else decay}
    return Example(tensors, torch.zeros(num_tokens), options)


def attention_example(num_heads: int, num_kv_heads: int, size: int, dtype: torch.dtype, seed: int = 0) -> Example:
    """Queries, keys and values of a packed row: a group of four responses to one prompt, then a pair."""
    segments = Segments([0, 4, 7, 8, 14, 16, 21, 23, 26], [-1, 0, 0, 0, 0, -1, 5, 5])
    new = torch.Generator().manual_seed(seed)
    shapes = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
    drawn = {name: torch.randn(segments.offsets[-1], heads, size, generator=new) for name, heads in shapes.items()}
    tensors = {name: x.to(dtype).requires_grad_() for name, x in drawn.items()}
    return Example(tensors, torch.zeros(segments.offsets[-1]), {"segments": segments})


def _finish(tensors: dict[str, Tensor], rows: str, special: dict, vocab: int, new: torch.Generator) -> Example:
    """Labels, mask, options and upstream gradients."""
    num_rows = tensors[rows].shape[0]
    labels = torch.randint(0, vocab, (num_rows,), generator=new)
    if special.get("masked"):
        labels[torch.rand(num_rows, generator=new) < 0.4] = IGNORE_INDEX
        tensors[rows][labels == IGNORE_INDEX] = torch.nan
    names = ("softcap", "temperature", "entropy", "label_smoothing", "lse")
    options = {name: special[name] for name in names if name in special}
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
    """Outputs by name, and the gradients of the example's tensors under its upstream gradients.

    The result is what the ops and their references return: logps, then entropy, then lse, as asked for.
    """
    found = dict(zip(_names(example), [x for x in _all(result) if x is not None], strict=False))
    upstream = {"logps": example.grad_logps, "entropy": example.grad_entropy, "lse": example.grad_logps.flip(0)}
    score = torch.stack([(value * upstream[name].to(value.dtype)).sum() for name, value in found.items()]).sum()
    grads = torch.autograd.grad(score, list(example.tensors.values()))
    made = {f"d_{name}": g for name, g in zip(example.tensors, grads, strict=True)}
    return {**{name: value.detach() for name, value in found.items()}, **made}


def _all(result: Any) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def _names(example: Example) -> list[str]:
    """What a result holds, in order; a second output that no option asks for is the entropy."""
    second = [] if example.options.get("lse") and not example.options.get("entropy") else ["entropy"]
    return ["logps", *second, "lse"]


def with_gradients(outputs: dict[str, Tensor], example: Example, seed: int = 0) -> dict[str, Tensor]:
    """Outputs by name, and the gradients of the example's tensors, those that have one, under random upstream ones."""
    new = torch.Generator().manual_seed(seed)
    score = torch.zeros((), dtype=torch.float64)
    for value in outputs.values():
        score = score + (value.double() * torch.randn(value.shape, generator=new, dtype=torch.float64)).sum()
    trained = {name: x for name, x in example.tensors.items() if x.requires_grad}
    grads = torch.autograd.grad(score, list(trained.values())) if score.requires_grad else ()
    made = {f"d_{name}": grad for name, grad in zip(trained, grads, strict=bool(grads))}
    return {**{name: value.detach() for name, value in outputs.items()}, **made}


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
