"""Checks of the ops' arguments, with their error messages."""

from __future__ import annotations

import math
import os
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.types import IGNORE_INDEX

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = frozenset(FLOATS[:3])
"""Dtypes that attention may mix: it computes in fp32, or in the dtype of the queries."""
Lora = tuple[Tensor, Tensor, float]
"""An adapter of the head: A ``[r, D]``, B ``[V, r]`` and the factor of their product."""


def check_matrix(name: str, x: Tensor, shape: str) -> None:
    """``x`` is a floating matrix."""
    if x.dim() != 2:
        raise ValueError(
            f"{name} must be {shape}, got shape {list(x.shape)}; flatten the leading dimensions first: "
            f"{name}.flatten(0, -2), labels.flatten()"
        )
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_in_place(name: str, wanted: bool, x: Tensor) -> None:
    """Each element of ``x [N, V]`` has its own memory, so that a gradient can be written in its place.

    Elements ``i`` rows and ``j`` columns apart share memory where ``i`` row strides are ``j`` column strides; the first
    such distance is ``(column stride, row stride)`` over their greatest common divisor.
    """
    if not wanted or not x.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    (rows, columns), (down, right) = x.shape, x.stride()
    step = math.gcd(down, right)
    if x.numel() > 1 and (not step or (right // step < rows and down // step < columns)):
        raise ValueError(
            f"{name}=True writes a gradient for each element of logits, but some of these {list(x.shape)} share memory "
            f"(strides {list(x.stride())}, as of expand or as_strided): pass logits.contiguous() or {name}=False"
        )


def check_labels(labels: Tensor, rows: Tensor, name: str) -> None:
    """``labels`` is one integer per row of ``rows``, on the same device."""
    if labels.dim() != 1 or labels.shape[0] != rows.shape[0]:
        raise ValueError(f"labels must be [N] with N = {rows.shape[0]} rows of {name}, got shape {list(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    check_device("labels", labels, name, rows)


def check_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Both tensors live on one device."""
    if x.device != y.device:
        raise ValueError(f"{name} is on {x.device} but {other} on {y.device}; move them to one device")


def check_scaling(temperature: float | Tensor, softcap: float | None, labels: Tensor) -> None:
    """``temperature`` is a positive number or ``[N]``; ``softcap`` is positive or None."""
    if isinstance(temperature, Tensor):
        if temperature.shape != labels.shape or not temperature.is_floating_point():
            raise ValueError(
                f"temperature must be a number or a floating [N] with N = {labels.shape[0]}, "
                f"got {temperature.dtype} of shape {list(temperature.shape)}"
            )
        if temperature.requires_grad:
            raise ValueError("temperature gets no gradient; pass temperature.detach()")
        check_device("temperature", temperature, "labels", labels)
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def kernel_labels(labels: Tensor, vocab: int) -> Tensor:
    """Labels as the kernels read them: on CPU checked, elsewhere the reserved -1 turned into an invalid label.

    Raises:
        ValueError: a CPU label is neither -100 nor in [0, V).
    """
    if labels.device.type != "cpu":
        return torch.where(labels == -1, vocab, labels)
    if in_vocabulary(labels, vocab):
        return labels
    wrong = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"label {int(labels[row])} at row {row} is neither in [0, {vocab}) nor {IGNORE_INDEX}")
    return labels


def in_vocabulary(labels: Tensor, vocab: int) -> bool:
    """Whether each CPU label is a column: all rows are scored."""
    if not labels.shape[0]:
        return True
    least, largest = labels.aminmax()
    return least.item() >= 0 and largest.item() < vocab


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    """``hidden [N, D]``, ``weight [V, D]``, ``bias [V]`` and ``labels [N]`` fit together."""
    check_matrix("hidden", hidden, "[N, D]")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype not in FLOATS:
        raise ValueError(
            f"weight must be a floating [V, D] with D = {hidden.shape[1]}, "
            f"got {weight.dtype} of shape {list(weight.shape)}"
        )
    check_device("weight", weight, "hidden", hidden)
    if bias is not None:
        if bias.shape != weight.shape[:1] or bias.dtype not in FLOATS:
            raise ValueError(
                f"bias must be a floating [V] with V = {weight.shape[0]}, got {bias.dtype} of shape {list(bias.shape)}"
            )
        check_device("bias", bias, "hidden", hidden)
    check_labels(labels, hidden, "hidden")


def unpack_lora(lora: Lora | None) -> tuple[Tensor | None, Tensor | None, float]:
    """A, B and the scale; None, None and 1 without an adapter."""
    if lora is None:
        return None, None, 1.0
    if not isinstance(lora, tuple) or len(lora) != 3 or not all(isinstance(x, Tensor) for x in lora[:2]):
        raise ValueError(f"lora must be a tuple (A [r, D], B [V, r], scale) or None, got {type(lora).__name__}")
    if isinstance(lora[2], Tensor) or not math.isfinite(lora[2]):
        raise ValueError(f"lora: the scale must be a finite number, got {lora[2]}")
    return lora[0], lora[1], float(lora[2])


def check_lora(down: Tensor, up: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """A ``[r, D]`` and B ``[V, r]`` fit the head."""
    vocab, width = weight.shape
    fits = down.dim() == up.dim() == 2 and down.shape[1] == width and up.shape == (vocab, down.shape[0])
    if not fits or not {down.dtype, up.dtype} <= {*FLOATS}:
        raise ValueError(
            f"lora must be floating (A [r, D], B [V, r], scale) with D = {width} and V = {vocab}, "
            f"got A {down.dtype} {list(down.shape)} and B {up.dtype} {list(up.shape)}"
        )
    check_device("lora A", down, "hidden", hidden)
    check_device("lora B", up, "hidden", hidden)


def check_smoothing(label_smoothing: float) -> None:
    """``label_smoothing`` is a share of the probability that is spread over the vocabulary."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")


def check_memory(memory: int | None) -> None:
    """``memory`` is a positive number of bytes."""
    if memory is not None and memory <= 0:
        raise ValueError(f"memory must be a positive number of bytes or None, got {memory}")


def check_num_scored(num_scored: int | None, labels: Tensor) -> None:
    """``num_scored`` is a number of rows, or None."""
    if num_scored is not None and not 0 <= num_scored <= len(labels):
        raise ValueError(f"num_scored must lie between 0 and N = {len(labels)}, or be None, got {num_scored}")


def check_deterministic(device: torch.device, process_group: dist.ProcessGroup | None) -> None:
    """Refuse devices and settings under which equal calls may give different bits from run to run.

    On a CPU bits are equal for an equal number of threads (the GEMMs depend on it, our kernels do not). On CUDA only
    torch's deterministic mode covers the GEMMs and what ``loss_fn`` does.
    """
    if device.type == "cpu":
        return
    promise = "batch_invariant=True cannot be kept"
    if device.type != "cuda":
        raise ValueError(f"{promise} on {device.type}: move the tensors to the CPU or to CUDA")
    tracing = torch.compiler.is_compiling()  # it can trace only the first of these questions
    strict = torch.are_deterministic_algorithms_enabled()
    if not strict or (not tracing and torch.is_deterministic_algorithms_warn_only_enabled()):
        raise ValueError(f"{promise} outside torch's deterministic mode: call torch.use_deterministic_algorithms(True)")
    if not tracing and torch.cuda.is_available() and torch.cuda.tunable.is_enabled():
        raise ValueError(f"{promise} while TunableOp picks GEMMs by their time: call torch.cuda.tunable.enable(False)")
    if process_group is not None and process_group.size() > 2 and not _sums_in_fixed_order(process_group):
        raise ValueError(f"{promise} where NCCL may add in the switch: set NCCL_ALGO=^NVLS before the group is made")


def _sums_in_fixed_order(group: dist.ProcessGroup) -> bool:
    """Whether the sum over more than two ranks is the same in every run; in-network sums (NVLS) need not be."""
    if "nccl" not in dist.get_backend(group):
        return True
    algorithms = os.environ.get("NCCL_ALGO", "")
    excluded = algorithms.startswith("^") == ("NVLS" in algorithms.upper())
    return os.environ.get("NCCL_NVLS_ENABLE") == "0" or (algorithms != "" and excluded)


def check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses queries, keys and values of dtypes that do not go together, or on several devices."""
    dtypes, devices = [x.dtype for x in (q, k, v)], [x.device for x in (q, k, v)]
    if not ({*dtypes} <= NARROW or {*dtypes} == {torch.float64}):
        got = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"expected q, k and v all in fp64, or each in fp32, bf16 or fp16; got {got}")
    if len({*devices}) > 1:
        raise ValueError(f"expected q, k and v on one device, got {', '.join(map(str, devices))}")


def checked_offsets(name: str, offsets: Tensor, total: int, unit: str) -> list[int]:
    """Offsets as a list; they start at 0, never decrease and end at ``total``."""
    if offsets.dim() != 1 or offsets.is_floating_point() or offsets.numel() == 0:
        raise ValueError(f"{name} must be a 1-D integer tensor of offsets, got {offsets.dtype} {list(offsets.shape)}")
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in pairwise(values)):
        raise ValueError(
            f"{name} must rise from 0 to {total}, the number of {unit}; got {values[0]} ... {values[-1]}"
            f"{'' if values == sorted(values) else ', not in order'}"
        )
    return values


def stats_dtype(*inputs: Tensor | None) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    for x in inputs:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def split_temperature(temperature: float | Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """A number and an optional ``[N]`` tensor, one per row of ``rows``: operator schemas have no union.

    While tracing, a number other than 1 becomes a tensor: as an operator's argument every value of it is a new graph.
    """
    if torch.compiler.is_compiling() and not isinstance(temperature, Tensor) and temperature != 1:
        temperature = torch.full(rows.shape[:1], temperature, dtype=dtype, device=rows.device)
    if isinstance(temperature, Tensor):
        return 1.0, temperature.to(dtype).contiguous()
    return float(temperature), None
