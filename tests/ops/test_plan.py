"""The planner is a pure function: every row once, the bound kept, the mode that costs least."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.ops.plan import CPU_ROWS, GPU_ROWS, MIN_ROWS, make_plan

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
        for span, chunk in zip(plan.unit_spans, plan.chunks, strict=True):
            assert sum(units[slice(*span)]) == chunk[1] - chunk[0]
    assert plan.slab >= 1 and plan.block >= 1
    # The workspace holds the logits of the largest chunk, and is within the bound unless one row is too much for it.
    assert plan.workspace_bytes >= 4 * vocab * plan.chunk_rows
    if memory is not None and plan.mode in ("stats", "one_pass", "frozen") and plan.chunk_rows > 1:
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
    assert make_plan(2000, 32000, 64, coefficients="unit", units=[900, 1100]).mode == "slabs"
    assert make_plan(900, 32000, 64, coefficients="unit", units=[400, 0, 500]).mode == "one_pass"


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
