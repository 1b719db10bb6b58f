"""Deliberate faults, and the tests that must catch them; the faults are in the files ``mutants_of_*.py``.

A fault whose text is no longer in the source fails the test of this list: it must be rewritten, not forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: what is wrong.
        file: in the repository.
        original: text that occurs once in it.
        faulty: what takes its place.
        tests: a file of ``tests`` and pytest's options that select the tests which must fail.
        native: sources of ``csrc/cpu`` that are to be compiled again.
        quick: part of the default test run.
    """

    name: str
    file: str
    original: str
    faulty: str
    tests: str
    native: tuple[str, ...] = ()
    quick: bool = False


def matrix(selection: str) -> str:
    """Cases of the matrix on the torch backend, or on one that ``selection`` names."""
    others = "" if "cpp" in selection or "triton" in selection else " and not cpp and not triton"
    return f"ops/test_backends.py -k '{selection}{others}'"


def every_mutant() -> list[Mutant]:
    """All faults, in the order of their files."""
    from mutants_of_kernels import IN_CPP, IN_TRITON
    from mutants_of_losses import LOSSES, PACKED
    from mutants_of_ops import CALLS, HALF, LINEAR_OPS, SPLIT, SWEEPS

    return [*SWEEPS, *HALF, *LINEAR_OPS, *CALLS, *SPLIT, *LOSSES, *PACKED, *IN_TRITON, *IN_CPP]


def controls(mutants: list[Mutant]) -> list[Mutant]:
    """Every selection of tests on a copy without a fault: the copy itself must be green."""
    selections = dict.fromkeys((mutant.tests, mutant.native) for mutant in mutants)
    return [Mutant(f"control: {tests}", "", "", "", tests, native) for tests, native in selections]
