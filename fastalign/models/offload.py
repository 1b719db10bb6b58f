"""Activations in host memory: what backward needs of a forward leaves the GPU, and comes back before it is needed.

    forward     layer 1   layer 2   layer 3   ...            computes
                          1 leaves  2 leaves  3 leaves       on a stream of its own, at most `UNDER_WAY` behind
    backward    ...       layer 3   layer 2   layer 1
                3 comes   2 comes   1 comes                  at most `UNDER_WAY` ahead

With `model.gradient_checkpointing: true` the inputs of layers alone are kept, ``2 D`` bytes a token and layer in bf16,
which a bus carries while a layer computes; without it some twenty times as much, for which the GPU waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

UNDER_WAY = 1 << 28
"""Bytes that are on the device in either direction beside what is computed with."""
LEAST = 1 << 20
"""Bytes of the smallest tensor that leaves."""


class Offload:
    """Makes the contexts in which forwards leave in host memory what their backwards need.

    Args:
        device: that of the model; copies to and from a GPU run on streams of their own.
        least, under_way: as `LEAST` and `UNDER_WAY`.
    """

    def __init__(self, device: torch.device, least: int = LEAST, under_way: int = UNDER_WAY) -> None:
        self.least, self.under_way, cuda = least, under_way, device.type == "cuda"
        self.out, self.back = (torch.cuda.Stream(device) if cuda else None for _ in range(2))

    @contextmanager
    def __call__(self, tokens: int) -> Iterator[None]:
        """Of one forward over so many tokens; weights, which have none, stay where they are."""
        if not torch.is_grad_enabled():
            yield
            return
        trip = Trip(self, tokens)
        with saved_tensors_hooks(trip.leave, trip.come_back):
            yield
        trip.wait_for_all()


@dataclass(frozen=True, eq=False)
class Left:
    """A tensor that was copied to host memory, in the order of the forward."""

    number: int
    host: Tensor


class Trip:
    """The tensors of one forward, on their way out and back."""

    def __init__(self, offload: Offload, tokens: int) -> None:
        self.offload, self.tokens = offload, tokens
        self.left: list[Left] = []
        self.leaving: dict[Any, tuple[Left, Tensor, Any]] = {}
        self.here: dict[int, tuple[Tensor, Any]] = {}

    def leave(self, x: Tensor) -> Tensor | Left:
        """Copy a saved tensor to the host; one that is saved several times in a row once."""
        if self.tokens not in x.shape or x.nbytes < self.offload.least:
            return x
        key = x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x._version  # of one that is held
        if key not in self.leaving:
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            copied = beside(self.offload.out, lambda: host.copy_(x, non_blocking=True))
            self.left.append(Left(len(self.left), host))
            self.leaving[key] = self.left[-1], x, copied
        left = self.leaving[key][0]
        while sum(held.nbytes for _, held, _ in self.leaving.values()) > self.offload.under_way:
            self.wait_for(next(iter(self.leaving)))
        return left

    def wait_for(self, key: Any) -> None:
        """Let go of a tensor once it is on the host: what takes its memory comes after the copy."""
        _, _, copied = self.leaving.pop(key)
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)

    def wait_for_all(self) -> None:
        """At the end of the forward."""
        for key in list(self.leaving):
            self.wait_for(key)

    def come_back(self, left: Tensor | Left) -> Tensor:
        """A saved tensor on the device again, those that were saved before it already under way."""
        if isinstance(left, Tensor):
            return left
        self.fetch(left)
        ahead = 0
        for earlier in reversed(self.left[: left.number]):
            if (ahead := ahead + earlier.host.nbytes) > self.offload.under_way:
                break
            self.fetch(earlier)
        x, copied = self.here[left.number]
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
        self.forget(left.number)
        return x

    def fetch(self, left: Left) -> None:
        """Begin to copy a tensor back, unless it is here."""
        if left.number in self.here:
            return
        if self.offload.back is None:
            self.here[left.number] = left.host.clone(), None
            return
        x = torch.empty(left.host.shape, dtype=left.host.dtype, device=self.offload.back.device)
        copied = beside(self.offload.back, lambda: x.copy_(left.host, non_blocking=True))
        x.record_stream(self.offload.back)
        self.here[left.number] = x, copied

    def forget(self, number: int) -> None:
        """Let go of the latest tensors beyond `under_way`: backward is through with them, or has them."""
        later = sorted((n for n in self.here if n >= number), reverse=True)
        held = sum(self.here[n][0].nbytes for n in later)
        for n in later:
            if held <= self.offload.under_way:
                return
            held -= self.here.pop(n)[0].nbytes


def beside(stream: Any, copy: Callable[[], Any]) -> Any:
    """Copy on a stream of its own, behind what is computed so far; the event of its end. Without a stream at once."""
    if stream is None:
        copy()
        return None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copy()
    return stream.record_event()
