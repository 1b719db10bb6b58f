"""The examples in the docstrings run."""

import doctest
from types import ModuleType

import pytest

from fastalign.data import encode, loader, mismatch, pack, prompts


@pytest.mark.parametrize("module", [encode, loader, mismatch, pack, prompts], ids=lambda m: m.__name__)
def test_examples(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
