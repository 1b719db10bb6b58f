"""What goes over the wire: the collectives that run inside a context, how often and with how many bytes."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

RECEIVED = {
    "_allgather_base_": lambda output, input_: output.nbytes - input_.nbytes,
    "_reduce_scatter_base_": lambda output, input_: input_.nbytes - output.nbytes,
}


class Collectives(TorchDispatchMode):
    """Counts calls and the bytes that a rank receives of them, by the collective's name.

    Of a gather it receives what the others have; in a reduce-scatter, which is its inverse, it sends that much.
    """

    def __enter__(self) -> "Collectives":
        self.calls, self.bytes = Counter[str](), Counter[str]()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            self.calls[name] += 1
            if name in RECEIVED:
                self.bytes[name] += RECEIVED[name](*args[:2])
        return func(*args, **(kwargs or {}))


def elements(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
