"""What goes over the wire: the collectives that run inside a context, how often and with how many bytes."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

RECEIVED = {
    "_allgather_base_": lambda output, input_: output.nbytes - input_.nbytes,
    "_reduce_scatter_base_": lambda output, input_: input_.nbytes - output.nbytes,
    "allreduce_": lambda tensors, group: sum(x.nbytes for x in tensors),
}


class Collectives(TorchDispatchMode):
    """Counts calls and the bytes that a rank receives of them, by the collective's name.

    Of a gather it receives what the others have; in a reduce-scatter, which is its inverse, it sends that much. Of a
    sum over ranks it is what is summed.
    """

    def __enter__(self) -> "Collectives":
        self.calls, self.bytes, self.sizes = Counter[str](), Counter[str](), Counter[tuple[str, int]]()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            self.calls[name] += 1
            if name in RECEIVED:
                size = RECEIVED[name](*args[:2])
                self.bytes[name] += size
                self.sizes[name, size] += 1
        return func(*args, **(kwargs or {}))


def elements(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
