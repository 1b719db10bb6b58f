"""Steps: the same on all ranks, every example once an epoch, and a resume that continues bit for bit."""

import dataclasses
import logging
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.data import pack as packing
from fastalign.data.examples import TokenExample
from fastalign.data.loader import Rows, evaluation_steps, rows_after, rows_of, steps_until, visited
from fastalign.data.pack import build_batch, deal, first_fit_decreasing, share
from fastalign.types import ForwardCost, PackedBatch

Step = list[TokenExample]


class Pairs:
    """Random pairs of many lengths, as a dataset."""

    def __init__(self, number: int) -> None:
        draw = np.random.default_rng(1)
        self.examples = [self.pair(draw, i) for i in range(number)]

    @staticmethod
    def pair(draw: np.random.Generator, index: int) -> TokenExample:
        prompt = draw.integers(0, 50, draw.integers(1, 30))
        answers = [draw.integers(0, 50, draw.integers(1, 60)) for _ in range(2)]
        ids = [np.concatenate([prompt, answer]) for answer in answers]
        return TokenExample(tuple((x, np.arange(len(x)) >= len(prompt)) for x in ids), index)

    def __len__(self) -> int:
        return len(self.examples)

    def fetch(self, indices: list[int]) -> list[TokenExample]:
        return [self.examples[i] for i in indices]


def take(source: Rows, number: int) -> list[Step]:
    return [source.next() for _ in range(number)]


def rest(source: Rows) -> list[Step]:
    """All steps up to the end."""
    steps = []
    with suppress(StopIteration):
        while True:
            steps.append(source.next())
    return steps


def ids(steps: list[Step]) -> list[int]:
    return [example.example_id for step in steps for example in step]


SIZES = [
    (9, 8, 1, [8, 1]),
    (9, 8, 2, [8, 1, 8, 1]),
    (9, 8, 2.5, [8, 1, 8, 1, 5]),
    (9, 8, 0.5, [5]),
    (9, 2, 0.5, [2, 2, 1]),
    (8, 4, 2, [4, 4, 4, 4]),
    (3, 8, 1, [3]),
    (3, 8, 3, [3, 3, 3]),
    (10, 5, 1.1, [5, 5, 1]),  # as floats 1.1 * 10 is above 11
]


@pytest.mark.parametrize(("number", "size", "epochs", "sizes"), SIZES)
def test_every_epoch_reads_every_example_once_and_its_last_step_is_what_is_left(number, size, epochs, sizes) -> None:
    rows = rows_of(epochs, number)
    steps = rest(Rows(Pairs(number), size, rows=rows))
    assert [len(step) for step in steps] == sizes
    drawn = ids(steps)
    for start in range(0, rows - number + 1, number):
        assert sorted(drawn[start : start + number]) == list(range(number))
    assert len(set(drawn[rows // number * number :])) == rows % number
    assert visited(number, 0, rows) == sorted(set(drawn))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 40), st.integers(0, 40))
def test_steps_are_counted_as_they_are_drawn(number: int, size: int, drawn: int, rows: int) -> None:
    source = Rows(Pairs(number), size, rows=drawn + rows)
    source.load_state_dict({"drawn": drawn, "seed": 0, "num_examples": number})
    steps = rest(source)
    assert steps_until(drawn + rows, number, size, drawn) == len(steps)
    for count in range(len(steps)):
        assert rows_after(count, number, size, drawn) == drawn + sum(map(len, steps[:count]))
    endless = Rows(Pairs(number), size)
    assert rows_after(5, number, size) == sum(map(len, take(endless, 5))) == endless.drawn


def test_a_resumed_source_goes_on_with_more_epochs() -> None:
    first = Rows(Pairs(9), 8, rows=rows_of(1.5, 9))
    taken = rest(first)
    more = Rows(Pairs(9), 8, rows=rows_of(3, 9))
    more.load_state_dict(first.state_dict())
    every = taken + rest(more)
    assert [len(step) for step in every] == [8, 1, 5, 4, 8, 1]
    assert [sorted(ids(every)[start : start + 9]) for start in (0, 9, 18)] == [list(range(9))] * 3


@pytest.mark.parametrize(
    ("number", "size", "rows", "drawn", "text"),
    [
        (9, 8, 9, 0, "8 examples each, the last of each epoch of 1: 1 epochs of 9"),
        (9, 8, 23, 0, "8 examples each, the last of each epoch of 1, the last of the run of 5: 2.56 epochs of 9"),
        (9, 8, 23, 18, "8 examples each, the last of the run of 5: 2.56 epochs of 9"),
        (8, 4, 16, 0, "4 examples each: 2 epochs of 8"),
        (3, 8, 9, 0, "3 examples each: 3 epochs of 3"),
        (1000, 8, 80, 0, "8 examples each: 0.08 epochs of 1,000"),
    ],
)
def test_it_says_how_large_its_steps_are(number: int, size: int, rows: int, drawn: int, text: str) -> None:
    source = Rows(Pairs(number), size, rows=rows)
    source.drawn = drawn
    assert source.describe() == f"{text} examples"


def test_epochs_have_different_orders_and_seeds_too() -> None:
    def epochs(seed: int) -> list[list[int]]:
        source = Rows(Pairs(16), size=1, seed=seed)
        return [ids(take(source, 16)) for _ in range(2)]

    assert epochs(0) == epochs(0)
    assert len({tuple(order) for seed in (0, 1) for order in epochs(seed)}) == 4


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 11])
def test_a_resumed_source_continues_with_the_same_examples(stop: int) -> None:
    whole, resumed = (Rows(Pairs(23), size=5, seed=3) for _ in range(2))
    take(whole, stop)
    resumed.load_state_dict(whole.state_dict())
    assert [ids([step]) for step in take(whole, 7)] == [ids([step]) for step in take(resumed, 7)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_step_and_run_equally_many_micro_batches(world_size: int) -> None:
    for step in take(Rows(Pairs(23), 5), 6):
        shares = [share(step, 100, True, rank, world_size) for rank in range(world_size)]
        assert len({len(mine) for mine in shares}) == 1
        assert sorted(packed_ids(shares)) == sorted(ids([step]))


def packed_ids(steps: list[list[PackedBatch]]) -> list[int]:
    return [i for step in steps for batch in step for i in batch.example_ids]


def test_a_share_is_packed_alike_however_often_and_its_forests_are_grown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    step, grown = Rows(Pairs(23), 7).next(), []
    want = [build_batch([step[i] for i in range(7)], True)]
    monkeypatch.setattr(packing, "grow", lambda *given, real=packing.grow: grown.append(1) or real(*given))
    assert_same(share(step, 10**6, True, 0, 1), want)
    assert len(grown) == 7


def assert_same(a: list[PackedBatch], b: list[PackedBatch]) -> None:
    for x, y in zip(a, b, strict=True):
        for field in dataclasses.fields(PackedBatch):
            left, right = getattr(x, field.name), getattr(y, field.name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    share(take(Rows(Pairs(9), 4), 8)[-1], 100, True, 0, 1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_covers_every_example_once(world_size: int) -> None:
    ranks = [list(evaluation_steps(Pairs(23), 100, True, r, world_size, size=10)) for r in range(world_size)]
    assert sorted(i for rank in ranks for i in packed_ids(rank)) == list(range(23))
    assert len({tuple(len(step) for step in rank) for rank in ranks}) == 1


def test_a_dataset_smaller_than_a_step_is_one_step_per_epoch_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        source = Rows(Pairs(3), size=7)
    assert caplog.messages == ["batch.size is 7 and there are 3 training examples: every step has 3"]
    assert [sorted(ids([step])) for step in take(source, 3)] == [[0, 1, 2]] * 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=24), st.integers(1, 60), st.integers(1, 4))
def test_ranks_are_dealt_everything_once_within_the_budget(sizes: list[int], capacity: int, num_ranks: int) -> None:
    hands = deal(sizes, [size**2 for size in sizes], capacity, num_ranks)
    assert sorted(i for hand in hands for members in hand for i in members) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in m) <= capacity or len(m) == 1 for hand in hands for m in hand)
    assert {len(hand) for hand in hands} == {-(-len(first_fit_decreasing(sizes, capacity)) // num_ranks)}


def test_micro_batches_of_a_rank_are_alike() -> None:
    """The largest decides what memory is needed: 120 tokens in two of 60, not in 99 and 21."""
    sizes = [33, 31, 29, 27]
    assert [sum(sizes[i] for i in members) for members in deal(sizes, sizes, capacity=99, num_ranks=1)[0]] == [60, 60]


def test_ranks_wait_little_for_each_other() -> None:
    """Where attention of 1536 tokens costs as much as all else, equal tokens are unequal work."""
    waits = []
    for seed in range(8):
        sizes = np.random.default_rng(seed).lognormal(5.3, 0.8, 64).astype(int).clip(1, 2048)
        costs = sizes + sizes**2 / 1536
        waits.append([waiting(deal(sizes, known, 4096, 4), costs) for known in (costs, sizes)])
    by_cost, by_tokens = np.mean(waits, 0)
    assert by_cost < 1.04 < by_tokens, "1.02 and 1.10"


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_as_much_work_for_each_of_more_ranks_takes_no_longer(num_ranks: int) -> None:
    """Weak scaling of counted work: within 5 % of ideal balance on average."""
    waits = []
    for seed in range(8):
        sizes = np.random.default_rng(seed).lognormal(5.3, 0.8, 16 * num_ranks).astype(int).clip(1, 2048)
        costs = sizes + sizes**2 / 1536
        waits.append(waiting(deal(sizes, costs, 4096, num_ranks), costs))
    assert np.mean(waits) < 1.05, waits


def waiting(hands: list[list[list[int]]], costs: np.ndarray) -> float:
    """Time until the slowest rank is done in every round, relative to perfect balance."""
    work = np.array([[costs[members].sum() for members in hand] for hand in hands])
    return work.max(0).sum() / work.mean(0).sum()


def test_the_cost_of_a_step_is_shared_out_not_its_tokens() -> None:
    long, short = [(np.arange(n), np.arange(n) >= n - 1) for n in (90, 30)]
    examples = Pairs(0)
    examples.examples = [TokenExample((s,), i) for i, s in enumerate([long, short, short, short])]
    quadratic = ForwardCost(per_token=0.0, per_attended=1.0)
    for cost, expected in ((ForwardCost(), [90, 90]), (quadratic, [90, 90])):
        shares = [share(examples.examples, 200, True, r, 2, cost) for r in (0, 1)]
        assert [sum(b.num_tokens for b in mine) for mine in shares] == expected
    examples.examples[1:] = [TokenExample((s,), i + 1) for i, s in enumerate([short] * 6)]
    shares = [share(examples.examples, 400, True, r, 2, quadratic) for r in (0, 1)]
    assert [sum(b.num_tokens for b in mine) for mine in shares] == [90, 180]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": Pairs(0)}, "no examples"),
        ({"size": 0}, r"batch\.size must be at least 1, got 0"),
        ({"seed": -1}, "must not be negative, got -1"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows(**{"dataset": Pairs(2), "size": 1, **options})


def test_a_state_of_other_data_is_refused() -> None:
    state = Rows(Pairs(5), 2).state_dict()
    with pytest.raises(ValueError, match="num_examples=5, this run has 6"):
        Rows(Pairs(6), 2).load_state_dict(state)


@pytest.mark.parametrize("lost", ["seed", "num_examples", "drawn"])
def test_a_state_without_a_number_is_refused(lost: str) -> None:
    state = Rows(Pairs(5), 2).state_dict()
    state.pop(lost)
    with pytest.raises(ValueError, match=f"damaged: it has no number '{lost}'; resume from another checkpoint"):
        Rows(Pairs(5), 2).load_state_dict(state)
