"""However the examples are packed, a step has the same loss and the same gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from steps import accumulate
from torch import Tensor

from fastalign.data.pack import pack
from fastalign.engine.forward import Models
from fastalign.engine.methods import make_objective
from fastalign.engine.prepare import first_carried, gather_rows
from fastalign.engine.reference.frozen import frozen_copy
from fastalign.engine.setup import load_data
from fastalign.engine.update import add_sums, measure_work
from fastalign.models.load import load_policy
from fastalign.parallel.mesh import Axis, World
from fastalign.types import AXES, Columns

WORLD = World(Axis(), torch.device("cpu"))


PAIR_LOSSES = ["dpo", "ipo", "simpo", "cpo", "orpo", "ld_dpo", "aot", "aot_unpaired", ["dpo", "sft"]]
"""One of each kind: summed, per token, without reference, with imitation, tails, coupled over the step, a sum."""


@pytest.mark.parametrize("method, loss", [("sft", "sft"), *(("dpo", loss) for loss in PAIR_LOSSES)], ids=str)
def test_one_by_one_equals_packed(configure, method, loss):
    config = configure(method, **{"loss.name": loss})
    tokenizer, dataset, _ = load_data(config)
    examples = dataset.fetch(list(range(10)))
    models = drifted(config, tokenizer)
    packed = [pack(examples, tokens, True) for tokens in (10_000, 400)]
    alone = [batch for example in examples for batch in pack([example], 1, False)]
    assert len(packed[0]) == 1 < len(packed[1]) < len(alone) == 10

    loss_one, grads_one = step(models, alone, make_objective(method, config.loss))
    for batches in packed:
        loss_packed, grads_packed = step(models, batches, make_objective(method, config.loss))
        torch.testing.assert_close(loss_packed, loss_one, rtol=1e-5, atol=1e-6)
        largest = max(g.abs().max() for g in grads_one.values())
        for name, gradient in grads_packed.items():  # fp32 reassociation, relative to the largest gradient
            assert (gradient - grads_one[name]).abs().max() <= 1e-5 * largest, name


def drifted(config, tokenizer) -> Models:
    """A policy and a reference that differ, so that no gradient vanishes by symmetry."""
    policy = load_policy(config.model, tokenizer=tokenizer)
    reference = frozen_copy(policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return Models(policy, reference, autocast=False)


def step(models: Models, batches: list, objective) -> tuple[Tensor, dict[str, Tensor]]:
    models.policy.zero_grad()
    sums = accumulate(models, batches, objective, WORLD, first_carried())
    total = add_sums(sums, objective.metric_names, WORLD.device)[objective.metric_names.index("loss")]
    unit = "num_scored" if objective.reduction == "token-mean" else "num_examples"
    assert total[1] == sum(getattr(batch, unit) for batch in batches)
    return total[0] / total[1], {name: p.grad.clone() for name, p in models.policy.named_parameters()}


def test_work_is_counted_in_logical_and_computed_tokens(configure):
    config = configure("dpo")
    _, dataset, _ = load_data(config)
    batches = pack(dataset.fetch(list(range(6))), 300, True)
    work = measure_work(batches, WORLD, 0)
    assert work.examples == 6 and work.imitated == sum(int(b.cu_seqlens.diff()[0::2].sum()) for b in batches)
    assert work.tokens == sum(b.logical_tokens for b in batches) > work.computed == sum(b.num_tokens for b in batches)


class TwoRanks(Axis):
    """One of two ranks that live in threads."""

    def gather(self, values):
        barrier, slots = EXCHANGE
        slots[self.rank] = torch.tensor(values, dtype=torch.float64)
        barrier.wait()
        everyone = torch.stack(slots)
        barrier.wait()
        return everyone


EXCHANGE = threading.Barrier(2), [torch.empty(0)] * 2


@pytest.mark.parametrize("axis", set(AXES.values()))
def test_columns_of_all_ranks_come_in_the_order_of_ranks(axis):
    names, counts = [name for name in AXES if AXES[name] == axis], (2, 3)  # unequal shares
    shares = [Columns(**{name: torch.rand(count) for name in names}) for count in counts]
    tables = [torch.stack(list(share.known().values()), dim=1) for share in shares]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(gather_rows, tables, [TwoRanks(rank, 2) for rank in (0, 1)]))
    for everyone, _ in results:
        for column, name in zip(everyone.unbind(1), names, strict=True):
            want = [x for share in shares for x in getattr(share, name).tolist()]
            assert column.tolist() == want and getattr(Columns.join(shares), name).tolist() == want
    assert [first for _, first in results] == [0, 2]
