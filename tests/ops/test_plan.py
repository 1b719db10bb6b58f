"""The planner is a pure function: every row once, the bound kept, the mode that costs least."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops.head.plan import CPU_BYTES, CPU_ROWS, GPU_ROWS, MIN_ROWS, make_plan

H200 = {"device": "cuda", "total_memory": 140 << 30, "itemsize": 2}


@settings(max_examples=200, deadline=None)
@given(
    units=st.lists(st.integers(0, 900), max_size=40),
    vocab=st.integers(1, 200_000),
    width=st.integers(1, 5000),
    memory=st.none() | st.integers(1, 1 << 31),
    coefficients=st.sampled_from(["none", "token", "unit", "upstream"]),
    head_gradient=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_chunks_cover_every_row_and_unit_once(units, vocab, width, memory, coefficients, head_gradient, device):
    rows = sum(units)
    plan = make_plan(
        rows,
        vocab,
        width,
        coefficients=coefficients,
        units=units if coefficients == "unit" else None,
        head_gradient=head_gradient,
        memory=memory,
        device=device,
        total_memory=80 << 30,
    )
    assert [row for start, stop in plan.chunks for row in range(start, stop)] == list(range(rows))
    if plan.unit_spans is not None:
        assert [unit for start, stop in plan.unit_spans for unit in range(start, stop)] == list(range(len(units)))
        for span, group in zip(plan.unit_spans, plan.groups, strict=True):
            assert sum(units[slice(*span)]) == group[-1][1] - group[0][0]
            assert len(group) == 1 or plan.mode == "retained"
    assert plan.slab >= 1 and plan.block >= 1
    # The workspace holds the logits of the largest chunk, and is within the bound unless one row is too much for it.
    assert plan.workspace_bytes >= 4 * vocab * plan.held_rows >= 4 * vocab * plan.chunk_rows
    if memory is not None and plan.mode in ("stats", "one_pass", "retained", "frozen") and plan.chunk_rows > 1:
        assert plan.workspace_bytes <= memory


def test_chunks_are_balanced():
    plan = make_plan(1025, 32000, 512)
    sizes = [stop - start for start, stop in plan.chunks]
    assert len(sizes) == 3 and max(sizes) - min(sizes) <= 1 and max(sizes) <= CPU_ROWS
    units = make_plan(1000, 32000, 512, coefficients="unit", units=[50] * 20)
    assert [stop - start for start, stop in units.chunks] == [500, 500]


def test_few_rows_are_one_chunk():
    for device in ("cpu", "cuda"):
        assert make_plan(MIN_ROWS, 1 << 20, 4096, device=device, total_memory=8 << 30).chunks == ((0, MIN_ROWS),)


def test_modes():
    assert make_plan(100, 1000, 64, coefficients="none").mode == "stats"
    assert make_plan(100, 1000, 64, coefficients="upstream", head_gradient=False).mode == "frozen"
    assert make_plan(100, 1000, 64, coefficients="upstream", head_gradient=False, entropy=True).mode == "slabs"
    assert make_plan(100, 1000, 64, coefficients="upstream").mode == "slabs"
    assert [make_plan(100, 1000, 64, head_gradient=x).flops for x in (True, False)] == [6, 4]
    assert make_plan(8000, 32000, 64, coefficients="unit", units=[3900, 4100]).mode == "slabs"
    assert make_plan(900, 32000, 64, coefficients="unit", units=[400, 0, 500]).mode == "one_pass"


def test_long_units_keep_what_the_budget_holds():
    """128 MiB hold 1032 rows of 32128 fp32 columns: four pieces of 258, of which a unit of 1500 rows needs six."""
    plan = make_plan(2000, 32000, 64, coefficients="unit", units=[100, 1500, 400])
    assert plan.mode == "retained" and [len(group) for group in plan.groups] == [1, 6, 1]
    assert plan.slots == 4 and plan.held_rows == 4 * 250 and plan.workspace_bytes < CPU_BYTES + 64 * 2000
    assert plan.phi == 1 - 2 * 250 / 2000 and plan.flops == 6 + 2 * (1 - plan.phi)
    whole = make_plan(1000, 32000, 64, coefficients="unit", units=[1000])
    assert whole.mode == "retained" and whole.phi == 1 and whole.flops == 6
    assert make_plan(1000, 32000, 64, coefficients="unit", units=[1000], head_gradient=False).flops == 4
    gpu = make_plan(20000, 151936, 4096, coefficients="unit", units=[20000], memory=4 << 30, **H200)
    assert gpu.mode == "retained" and gpu.slots == 3 and gpu.chunk_rows == 4000 and "60% of the logits" in gpu.reason
    assert make_plan(20000, 151936, 4096, coefficients="unit", units=[20000], memory=1 << 30, **H200).mode == "slabs"


def test_a_gpu_takes_slabs_rather_than_thin_chunks():
    plan = make_plan(32768, 151936, 4096, **H200)
    assert plan.mode == "one_pass" and plan.chunk_rows >= GPU_ROWS
    starved = make_plan(32768, 151936, 4096, memory=512 << 20, **H200)
    assert starved.mode == "slabs" and starved.slab < 151936


def test_chunks_do_not_depend_on_what_trains():
    """A reference pass without gradients sees the same GEMM shapes as the policy's."""
    plans = [make_plan(3000, 32000, 512, head_gradient=x, entropy=y) for x in (True, False) for y in (True, False)]
    assert len({plan.chunks for plan in plans}) == 1


@pytest.mark.parametrize("coefficients", ["token", "unit", "upstream", "none"])
def test_a_bound_too_small_degrades_and_never_fails(coefficients):
    units = [3, 4] if coefficients == "unit" else None
    plan = make_plan(7, 50257, 256, coefficients=coefficients, units=units, memory=1)
    assert plan.chunks == tuple(pairwise(range(8))) and plan.block == 1


def test_it_prints_what_it_will_do():
    text = str(make_plan(1024, 32000, 512))
    assert text.startswith("one_pass (coefficients are known per token): 2 chunks, up to 512 rows, 6 NVD, workspace")
