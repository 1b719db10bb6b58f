"""Decoding against a forest: float64 on every backend, and on a CPU the bits of the packed attention."""

from dataclasses import dataclass
from itertools import accumulate, product

import pytest
import torch
from op_table import serving
from test_determinism import LEVELS, settings

from fastalign.ops import dispatch, forest_decode, packed_attention
from fastalign.ops.forest_decode import BLOCK, Forest, reference
from fastalign.testing import assert_matches
from fastalign.types import Segments

pytestmark = pytest.mark.usefixtures("nan_memory")

HERE = serving("forest_decode")
native = pytest.mark.skipif("cpp" not in HERE, reason=f"cpp: {dispatch.missing('cpp')}")


def place(backend):
    return "cuda" if backend != "cpp" and torch.cuda.is_available() else "cpu"


# --- sequences that share prompts -------------------------------------------------------------------------------------


@dataclass
class Grove:
    """Packed queries, keys and values of prompts and what rows add to them, in the order of `segments`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    segments: Segments

    @property
    def prompts(self):
        return [s for s, parent in enumerate(self.segments.parents) if parent < 0]

    @property
    def rows(self):
        return [s for s, parent in enumerate(self.segments.parents) if parent >= 0]

    def places(self, segment):
        return range(*self.segments.offsets[segment : segment + 2])


def grove(prompts, num_own, *, heads=4, key_heads=2, size=24, dtypes=(torch.float32,) * 3, seed=0):
    """Prompts of these lengths, rows of so many own tokens, dealt to the prompts in turn."""
    lengths, parents = list(prompts), [-1] * len(prompts)
    for row, length in enumerate(num_own):
        lengths.append(length)
        parents.append(row % len(prompts))
    offsets, new = [0, *accumulate(lengths)], torch.Generator().manual_seed(seed)
    counts = (heads, key_heads, key_heads)
    q, k, v = (
        torch.randn(offsets[-1], n, size, generator=new).to(dtype) for n, dtype in zip(counts, dtypes, strict=True)
    )
    return Grove(q, k, v, Segments(offsets, parents))


def decoded(x, dtype=None, device="cpu", late=3, **options):
    """What the op gives for each own token, at its packed place; rows begin one after the other and leave at their end.

    What leaves is filled with NaN, and so is the rest of the store at the start.
    """
    q, k, v = (t.to(device) for t in (x.q, x.k, x.v))
    forest = Forest(1, *k.shape[1:], dtype or torch.promote_types(k.dtype, v.dtype), device)
    prompts = dict(zip(x.prompts, forest.add_prompts([len(x.places(s)) for s in x.prompts]), strict=True))
    for segment, prompt in prompts.items():
        forest.write_prompts(0, [prompt], k[x.places(segment)], v[x.places(segment)])
    out, waiting, live = {}, [s for s in x.rows if x.places(s)], {}
    while waiting or live:
        for segment in [waiting.pop() for _ in range(min(late, len(waiting)))]:
            live[segment] = forest.add_row(prompts[x.segments.parents[segment]]), iter(x.places(segment))
        at = [next(tokens) for _, tokens in live.values()]
        step = forest.step([row for row, _ in live.values()])
        out.update(zip(at, forest_decode(q[at], k[at], v[at], forest, 0, step, **options).cpu(), strict=True))
        forest.advance(step)
        for segment, place in zip(list(live), at, strict=True):
            if place == x.places(segment)[-1]:
                forest.drop_row(live.pop(segment)[0])
                for arena in (*forest.keys, *forest.values):
                    arena[forest._free] = torch.nan
    for prompt in prompts.values():
        forest.drop_prompt(prompt)
    assert forest.num_free == forest.num_blocks
    return torch.stack([out[i] for i in range(x.segments.offsets[len(prompts)], x.segments.offsets[-1])])


def defined(x, dtype, **options):
    """The same by the definition."""
    q, k, v = (t.to(dtype) for t in (x.q, x.k, x.v))
    chains = [[*x.places(x.segments.parents[s]), *range(x.places(s)[0], i + 1)] for s in x.rows for i in x.places(s)]
    own = q[x.segments.offsets[len(x.prompts)] :]
    return reference(own, [k[c] for c in chains], [v[c] for c in chains], **{"scale": q.shape[-1] ** -0.5, **options})


SHAPES = [(4, 2, 24), (3, 3, 33), (4, 1, 64), (14, 2, 128), (2, 1, 5)]
"""Heads, key heads and size: a size that fills no vector, one that is odd, grouped heads of odd number."""


def worthwhile(backend, shape, dtype):
    """fp64 is not the native kernel's; interpreted, large heads and the other dtypes are tried once."""
    few = backend == "triton" and not torch.cuda.is_available()
    if few and (shape[2] > 64 or (dtype != torch.float32 and shape[2] != 24)):
        return False
    return (backend, dtype) != ("cpp", torch.float64)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MATRIX = [x for x in product(HERE, SHAPES, DTYPES) if worthwhile(*x)]


@pytest.mark.parametrize(("backend", "shape", "dtype"), MATRIX, ids=str)
def test_it_is_right(backend, shape, dtype):
    heads, key_heads, size = shape
    x = grove([5, 16, 33], [2, 3, 1, 2], heads=heads, key_heads=key_heads, size=size, dtypes=(dtype,) * 3)
    options = {"softcap": 3.0} if size == 64 else {"scale": 0.3} if size == 33 else {}
    got = decoded(x, device=place(backend), backend=backend, **options)
    eager, oracle = (defined(x, wide, **options) for wide in (dtype, torch.float64))
    assert_matches(got, eager, oracle, factor=4.0 if backend == "triton" else 2.0)  # the interpreter rounds towards 0


# --- the bits of the packed attention ---------------------------------------------------------------------------------

FP32, BF16 = torch.float32, torch.bfloat16
MIXTURES = {"fp32": (FP32,) * 3, "bf16": (BF16,) * 3, "rotated": (FP32, FP32, BF16)}
LENGTHS = torch.randint(0, 71, (48,), generator=torch.Generator().manual_seed(1)).tolist()


def assert_same_bits(x, softcap=None, **options):
    together = packed_attention(x.q, x.k, x.v, x.segments, softcap=softcap, backend="cpp")
    assert torch.equal(decoded(x, softcap=softcap, **options), together[x.segments.offsets[len(x.prompts)] :])


ROWS = [(1, (4, 2, 32), 1), (2, (3, 3, 33), 2), (5, (2, 1, 128), 1), (16, (14, 2, 24), 2), (48, (8, 4, 32), 2)]


@native
@pytest.mark.parametrize(("level", "dtypes"), [("avx512", "bf16"), ("avx512", "rotated"), *product(LEVELS, ["fp32"])])
@pytest.mark.parametrize(("num_rows", "shape", "threads"), ROWS, ids=str)
def test_the_bits_are_those_of_the_packed_attention(num_rows, shape, threads, level, dtypes):
    heads, key_heads, size = shape
    prompts = [1, 16, 37, 70, 9][: 1 + num_rows // 4]
    x = grove(
        prompts, LENGTHS[:num_rows], heads=heads, key_heads=key_heads, size=size, dtypes=MIXTURES[dtypes], seed=num_rows
    )
    with settings(threads, level):
        assert_same_bits(x, late=num_rows if num_rows < 16 else 7)


@native
@pytest.mark.parametrize("level", LEVELS)
def test_softcap_has_the_same_bits_too(level):
    with settings(level=level):
        assert_same_bits(grove([5, 37], [20, 3, 33]), softcap=2.0)


@native
def test_one_prompt_of_many_rows_fills_several_tasks_and_nothing_else_changes():
    x = grove([40], [3] * 60, heads=8, key_heads=4, size=32)
    for threads in (1, 2):
        with settings(threads):
            assert_same_bits(x, late=60)
    alone = Segments([0, 40, 43], [-1, 0])
    rows = [*range(40), *x.places(60)]  # the prompt copied to where its last row stands
    together = packed_attention(x.q[rows], x.k[rows], x.v[rows], alone, backend="cpp")[40:]
    assert torch.equal(decoded(x)[-3:], together)


@native
def test_a_wider_store_changes_no_bit():
    x = grove([5, 20], [4, 20], dtypes=(BF16,) * 3)
    assert torch.equal(decoded(x), decoded(x, dtype=FP32))


@native
def test_equal_bits_are_no_matter_of_course():
    x = grove([5, 20], [4, 20])
    with pytest.raises(AssertionError):
        assert_same_bits(x, backend="torch")


@native
def test_autocast_rounds_the_result_alone():
    x = grove([5, 20], [4, 20])
    with torch.autocast("cpu", BF16):
        got = {backend: decoded(x, backend=backend) for backend in ("cpp", "torch")}
        assert_same_bits(x)
    assert torch.equal(got["cpp"], decoded(x).bfloat16())
    torch.testing.assert_close(got["cpp"], got["torch"], rtol=0.01, atol=0.01)


# --- the store --------------------------------------------------------------------------------------------------------


def planted(num_layers=1, lengths=(20,), rows=(0, 0), backend="torch"):
    """A forest of K 2 and d 8 with random prompts, and its rows."""
    forest = Forest(num_layers, 2, 8, torch.float32, place(backend))
    prompts = forest.add_prompts(lengths)
    for layer in range(num_layers):
        forest.write_prompts(layer, prompts, *(torch.randn(sum(lengths), 2, 8, device=forest.device) for _ in "kv"))
    return forest, prompts, [forest.add_row(prompts[i]) for i in rows]


def token(num_rows, forest):
    return [torch.randn(num_rows, heads, 8, device=forest.device) for heads in (4, 2, 2)]


@pytest.mark.parametrize("backend", HERE)
def test_a_step_writes_its_own_rows_next_place_and_no_other(backend):
    forest, _, rows = planted(2, (20, 3), (0, 1, 0, 1), backend)
    step = forest.step([rows[2], rows[1]])
    for arena in (*forest.keys, *forest.values):
        arena.nan_to_num_(7.0)
    before = [arena.clone() for arena in (*forest.keys, *forest.values)]
    q, k, v = token(2, forest)
    forest_decode(q, k, v, forest, 1, step, backend=backend)
    for row, (length, chain) in enumerate(zip(step.lengths.tolist(), step.chains.tolist(), strict=True)):
        block, at = chain[(length - 1) // BLOCK], (length - 1) % BLOCK
        assert length == (21, 4)[row]
        assert torch.equal(forest.keys[1][block, :, :, at], k[row])
        assert torch.equal(forest.values[1][block, :, at], v[row])
        before[1][block, :, :, at], before[3][block, :, at] = k[row], v[row]
    assert all(torch.equal(a, b) for a, b in zip((*forest.keys, *forest.values), before, strict=True))


def test_layers_and_rows_keep_what_is_theirs_while_the_store_grows():
    forest, (prompt,), rows = planted(3, (17,), ())
    before = [arena[forest._prompt(prompt).blocks].clone() for arena in (*forest.keys, *forest.values)]
    rows = [forest.add_row(prompt) for _ in range(40)]
    forest.add_prompts([300])
    forest.step(rows)
    for arena, old in zip((*forest.keys, *forest.values), before, strict=True):
        assert torch.equal(arena[forest._prompt(prompt).blocks].nan_to_num(7), old.nan_to_num(7))
        own = [int(chain[1]) for chain in forest._chains[rows]]
        assert len({*own}) == 40 and all(torch.equal(arena[i].nan_to_num(7), old[1].nan_to_num(7)) for i in own)


def test_dropped_blocks_are_used_again():
    forest, (prompt,), rows = planted()
    for _ in range(30):
        forest.advance(forest.step(rows))
    size = forest.num_blocks
    for _ in range(10):
        forest.drop_row(rows.pop(0))
        rows.append(forest.add_row(prompt))
        for _ in range(5):
            forest.advance(forest.step(rows))
    assert forest.num_blocks == size
    with pytest.raises(ValueError, match="continued by 2 rows: drop them first"):
        forest.drop_prompt(prompt)
    for row in rows:
        forest.drop_row(row)
    forest.drop_prompt(prompt)
    assert forest.num_free == size


def test_two_steps_may_be_open_for_rows_apart():
    forest, _, (a, b) = planted()
    first, second = forest.step([a]), forest.step([b])
    outs = [forest_decode(*token(1, forest), forest, 0, step) for step in (first, second)]
    assert all(out.isfinite().all() for out in outs)


def refusals():
    forest, (prompt,), rows = planted(2)
    q, k, v = token(2, forest)
    step, zeros = forest.step(rows), torch.zeros
    other = planted()[0]
    wants = q.clone().requires_grad_()
    yield "no backward: call it under torch.no_grad", lambda: forest_decode(wants, k, v, forest, 0, step)
    yield "q must be [B, H, d] with B = 2", lambda: forest_decode(q[:1], k, v, forest, 0, step)
    yield "H a multiple of 2 and d = 8, got shape [2, 3, 8]", lambda: forest_decode(q[:, :3], k, v, forest, 0, step)
    yield "k must be [2, 2, 8] for 2 rows of the step", lambda: forest_decode(q, k[:, :1], v, forest, 0, step)
    yield "v must be [2, 2, 8] for 2 rows of the step", lambda: forest_decode(q, k, q, forest, 0, step)
    yield "expected q, k and v all in fp64", lambda: forest_decode(q, k.double(), v.double(), forest, 0, step)
    yield "layer must lie in [0, 2), got 2", lambda: forest_decode(q, k, v, forest, 2, step)
    yield "made by another forest", lambda: forest_decode(q, k, v, other, 0, step)
    yield "backend 'none' is not available", lambda: forest_decode(q, k, v, forest, 0, step, backend="none")
    yield "k must be [20, 2, 8] for 20 tokens", lambda: forest.write_prompts(0, [prompt], k, v)
    yield "no prompt 9", lambda: forest.add_row(9)
    yield "at least one token", lambda: forest.add_prompts([3, 0])
    yield "no row 99", lambda: forest.step([99])
    yield "no row -1", lambda: forest.step([-1])
    yield "no row 7", lambda: forest.drop_row(7)
    yield "the same row twice", lambda: forest.step([rows[0], rows[0]])
    yield "expected ids of rows", lambda: forest.step([])
    yield "at least one layer, head and column", lambda: Forest(0, 2, 8, torch.float32, "cpu")
    yield "holds float32, bfloat16, float16 or float64", lambda: Forest(1, 2, 8, torch.int64, "cpu")
    narrow = Forest(1, 2, 8, torch.bfloat16, "cpu")
    yield (
        "would round: make the forest wider",
        lambda: narrow.write_prompts(0, narrow.add_prompts([2]), *zeros(2, 2, 2, 8)),
    )


def test_what_does_not_fit_is_refused_in_one_line():
    for words, call in refusals():
        with pytest.raises(ValueError) as refused:
            call()
        assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_step_that_is_over_is_refused():
    forest, _, rows = planted()
    step = forest.step(rows)
    forest.advance(step)
    with pytest.raises(ValueError, match="this step is over"):
        forest.advance(step)
    step = forest.step(rows)
    forest.drop_row(rows[0])
    with pytest.raises(ValueError, match="this step is over"):
        forest_decode(*token(2, forest), forest, 0, step)
