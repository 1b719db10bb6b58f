"""What a call of the linear ops costs beside its kernels: the files and functions that it enters."""

import sys
from pathlib import Path

import torch

import fastalign
from fastalign.ops import linear_logps, linear_loss

PACKAGE = str(Path(fastalign.__file__).parent)
N, D, V = 64, 64, 256


def entered(call):
    """Files and functions of the package that a call enters, when it is not the first of its kind."""
    found = set()

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            found.add((code.co_filename, code.co_firstlineno, code.co_name))

    call()
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {file for file, *_ in found}, found


def test_a_small_call_enters_few_functions():
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    labels = torch.randint(V, (N,))
    files, functions = entered(lambda: linear_loss(hidden, weight, labels, lambda stats: -stats.logps.sum() / N))
    assert len(files) <= 8 and len(functions) <= 60, sorted(functions)
    files, functions = entered(lambda: linear_logps(hidden, weight, labels))
    assert len(files) <= 8 and len(functions) <= 60, sorted(functions)
