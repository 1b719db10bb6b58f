"""Every published test vector, values and coefficients: 1e-9 in float64, 1e-5 relative in float32.

The file is ``$FASTALIGN_VECTORS``, or ``vectors/vectors.json`` of the shared folder.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import vector_pairs
import vector_policy
import vector_rest
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PATH = Path(os.environ.get("FASTALIGN_VECTORS", ROOT.parent / "shared" / "vectors" / "vectors.json"))
if not PATH.exists():
    pytest.skip(f"{PATH} is absent: set FASTALIGN_VECTORS to the file of test vectors", allow_module_level=True)

CASES = {**vector_pairs.CASES, **vector_policy.CASES, **vector_rest.CASES}
"""By name: a function of the inputs and parameters that returns at least the expected values and coefficients."""
NOT_HERE = {"trpo_fisher_vp", "lima_schedule"}
"""What no method of this package computes."""
VECTORS = {case["name"]: case for case in json.loads(PATH.read_text()) if case["name"] not in NOT_HERE}
TOLERANCE = {torch.float64: (1e-9, 1e-15), torch.float32: (1e-5, 1e-7)}
"""Relative, and absolute: the rounding of a sum of terms of about 1 that cancel."""


def tensors(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs as tensors; ragged lists stay lists."""
    return {name: tensor_or_list(value, dtype) for name, value in inputs.items()}


def tensor_or_list(value: Any, dtype: torch.dtype) -> Any:
    ragged = isinstance(value, list) and isinstance(value[0], list) and len({*map(len, flat_rows(value))}) > 1
    return value if ragged else torch.tensor(value, dtype=dtype)


def flat_rows(value: list) -> list:
    return value if not isinstance(value[0][0], list) else [row for rows in value for row in rows]


def check(actual: Any, expected: Any, dtype: torch.dtype, key: str) -> None:
    if isinstance(expected, dict):
        for name, value in expected.items():
            check(actual[name], value, dtype, f"{key}.{name}")
        return
    want = torch.tensor(expected, dtype=torch.float64)
    got = torch.as_tensor(actual, dtype=torch.float64).detach()
    assert got.shape == want.shape, (key, got.shape, want.shape)
    relative, absolute = TOLERANCE[dtype]
    assert ((got - want).abs() <= relative * want.abs() + absolute).all(), (
        f"{key}: got {got.tolist()}, expected {want.tolist()}"
    )


def dtype_of_results(value: Any) -> set[torch.dtype]:
    if isinstance(value, dict):
        return set().union(*map(dtype_of_results, value.values()))
    return {value.dtype} if isinstance(value, Tensor) and value.is_floating_point() else set()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("name", VECTORS)
def test_values_and_coefficients(name, dtype):
    case = VECTORS[name]
    result = CASES[name](tensors(case["inputs"], dtype), case["params"])
    assert case["expected"].keys() <= result.keys()
    for key, expected in case["expected"].items():
        check(result[key], expected, dtype, key)
    if dtype == torch.float32 and "loss" in result:
        assert result["loss"].dtype == torch.float32  # nothing was computed wider than it would be in training


def test_every_case_is_mapped_and_every_pair_loss_has_one():
    assert len(VECTORS) == 117 and VECTORS.keys() <= CASES.keys()
    unused = {name for name in CASES if not name.endswith(("/hand", "/extreme", "/ragged"))} - VECTORS.keys()
    assert not unused


@pytest.mark.parametrize("name", ["dpo_sigmoid/ragged", "kto/ragged", "ppo_clip/token_mean", "adv_grpo_outcome"])
def test_a_case_can_fail(name):
    case = json.loads(json.dumps(VECTORS[name]))
    key = next(iter(case["expected"]))
    expected = torch.tensor(case["expected"][key], dtype=torch.float64) * (1 + 1e-7)
    result = CASES[name](tensors(case["inputs"], torch.float64), case["params"])
    with pytest.raises(AssertionError):
        check(result[key], expected.tolist(), torch.float64, key)
