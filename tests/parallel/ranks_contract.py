"""Run as four ranks: a step is that of one process on every mesh, however its examples are cut, shared and recomputed.

Every two choices of two factors come up together.
"""

import sys
from itertools import combinations, product
from typing import Any

import torch
from ranks_tensor import COST, laid_out, make_policy, spread, steps

from fastalign.config import ParallelConfig
from fastalign.data.pack import share
from fastalign.engine.forward import Models
from fastalign.parallel.mesh import World, world

FACTORS: dict[str, list[Any]] = {
    "mesh": [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)],
    "tokens": [1, 50, 10**6],  # of a micro-batch: each example alone, many that gradients are added up over, one
    "sharing": [True, False],
    "reduces": [False, True],  # gradients after every micro-batch
    "recompute": [False, True, "mlp"],
    "method": ["sft", "dpo", "kto"],
}

NUMBER = 15
"""Of examples: on four data ranks one has fewer."""


def chosen() -> list[dict[str, Any]]:
    """Few settings that cover all pairs: each the one with most pairs that have not come up."""
    every, found = [dict(zip(FACTORS, values, strict=True)) for values in product(*FACTORS.values())], []
    missing = {pair for setting in every for pair in pairs(setting)}
    while missing:
        found.append(max(every, key=lambda setting: len(missing & pairs(setting))))
        missing -= pairs(found[-1])
    return sorted(found, key=lambda setting: setting["mesh"])


def pairs(setting: dict[str, Any]) -> set[Any]:
    return {*combinations(setting.items(), 2)}


def check(ranks: World, setting: dict[str, Any], expected: Any) -> None:
    """Metrics, and gradients to 1e-5 of the largest: norms compute in fp32."""
    method, examples = setting["method"], steps.make_examples(setting["method"], setting["method"], NUMBER)
    policy = make_policy(gradient_checkpointing=setting["recompute"]).train()
    reference = make_policy(seed=1).requires_grad_(False)
    models = Models(spread(policy, ranks), spread(reference, ranks), False)
    mine = share(examples, setting["tokens"], setting["sharing"], ranks.data.rank, ranks.data.size, COST)
    assert len(mine) > 1 or setting["tokens"] > 50
    got = steps.run_step(models, mine, method, method, ranks, setting["reduces"])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5, msg=lambda text: f"{setting}: {text}")
    largest = max(gradient.abs().max() for gradient in expected[1])
    error = max((a - b).abs().max() for a, b in zip(got[1], expected[1], strict=True))
    assert largest > 1e-4 and error <= 1e-5 * largest, f"{setting}: gradients differ by {error} of {largest}"


def alone(method: str) -> Any:
    """What one process has of all examples at once."""
    models = Models(make_policy().train(), make_policy(seed=1).requires_grad_(False), False)
    examples = steps.make_examples(method, method, NUMBER)
    return steps.run_step(models, steps.packed(examples, 10**6, False), method, method)


if __name__ == "__main__":
    with world(ParallelConfig()) as ranks:
        expected, settings = {method: alone(method) for method in FACTORS["method"]}, chosen()
        meshes = {shape: laid_out(ranks, shape) for shape in FACTORS["mesh"]}
        for setting in settings:
            check(meshes[setting["mesh"]], setting, expected[setting["method"]])
    print("agreed on", len(settings), "settings", file=sys.stderr)
