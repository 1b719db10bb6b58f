"""Steps: the same on all ranks, every example once an epoch, and a resume that continues bit for bit."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.data.examples import TokenExample
from fastalign.data.loader import Loader, deal, evaluation_steps, rows_of, visited
from fastalign.data.pack import first_fit_decreasing
from fastalign.types import ForwardCost, PackedBatch

Step = list[PackedBatch]


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


def take(loader: Loader, number: int) -> list[Step]:
    return list(itertools.islice(loader, number))


def ids(steps: list[Step]) -> list[int]:
    return [i for step in steps for batch in step for i in batch.example_ids]


def assert_same(a: list[Step], b: list[Step]) -> None:
    assert [len(step) for step in a] == [len(step) for step in b]
    for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        for field in dataclasses.fields(PackedBatch):
            left, right = getattr(x, field.name), getattr(y, field.name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


def test_every_step_has_its_size_and_every_epoch_every_example() -> None:
    loader = Loader(Pairs(23), size=5, tokens=200, share_prefix=True)
    steps = take(loader, 23)
    assert [len(ids([step])) for step in steps] == [5] * 23
    assert sorted(ids(steps)) == sorted(list(range(23)) * 5), "5 epochs of 23 are 23 steps of 5"
    first = set(ids(steps[:4]))
    assert len(first) == 20, "no example comes back within an epoch"


@pytest.mark.parametrize(
    ("number", "size", "epochs", "sizes"),
    [
        (9, 8, 3, [8, 8, 8, 3]),
        (9, 8, 1, [8, 1]),
        (9, 8, 2.5, [8, 8, 7]),
        (9, 8, 0.5, [5]),
        (9, 2, 0.5, [2, 2, 1]),
        (3, 8, 1, [3]),
        (3, 8, 3, [8, 1]),
        (10, 5, 1.1, [5, 5, 1]),  # as floats 1.1 * 10 is above 11
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_passes_read_every_example_equally_often(number, size, epochs, sizes, world_size) -> None:
    rows = rows_of(epochs, number)
    ends = {"rows": rows, "world_size": world_size}
    shares = [list(Loader(Pairs(number), size, 200, True, rank=rank, **ends)) for rank in range(world_size)]
    steps = [[batch for step in ranks for batch in step] for ranks in zip(*shares, strict=True)]
    assert [len(ids([step])) for step in steps] == sizes
    drawn = ids(steps)
    counts = [drawn.count(i) for i in range(number)]
    assert max(counts) - min(counts) <= (rows % number > 0) and sum(counts) == rows
    assert visited(number, 0, rows) == [i for i in range(number) if counts[i]]


def test_a_short_dataset_is_one_short_step_without_repetition(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        steps = list(Loader(Pairs(3), size=8, tokens=500, share_prefix=True, rows=rows_of(1, 3)))
    assert sorted(ids(steps)) == [0, 1, 2] and not caplog.text


def test_a_resumed_loader_ends_where_the_whole_one_does() -> None:
    """Also with more epochs than before: the short step stays, and every pass is whole."""
    first = Loader(Pairs(9), 8, 200, True, rows=rows_of(1, 9))
    taken = list(first)
    more = Loader(Pairs(9), 8, 200, True, rows=rows_of(3, 9))
    more.load_state_dict(first.state_dict())
    rest = list(more)
    assert [len(ids([step])) for step in taken + rest] == [8, 1, 8, 8, 2]
    drawn = ids(taken + rest)
    assert [sorted(drawn[:9]), sorted(drawn[9:])] == [list(range(9)), sorted([*range(9)] * 2)]


def test_epochs_have_different_orders_and_seeds_too() -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = Loader(Pairs(16), size=1, tokens=200, share_prefix=True, seed=seed)
        return [ids(take(loader, 16)) for _ in range(2)]

    assert epochs(0) == epochs(0)
    assert len({tuple(order) for seed in (0, 1) for order in epochs(seed)}) == 4


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 11])
def test_a_resumed_loader_continues_bit_for_bit(stop: int) -> None:
    def fresh() -> Loader:
        return Loader(Pairs(23), size=5, tokens=150, share_prefix=True, seed=3)

    whole = fresh()
    take(whole, stop)
    resumed = fresh()
    resumed.load_state_dict(whole.state_dict())
    assert_same(take(whole, 7), take(resumed, 7))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_step_and_run_equally_many_micro_batches(world_size: int) -> None:
    alone = take(Loader(Pairs(23), 5, 100, True), 6)
    ranks = [take(Loader(Pairs(23), 5, 100, True, rank=r, world_size=world_size), 6) for r in range(world_size)]
    for number, step in enumerate(alone):
        shares = [rank[number] for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        assert sorted(ids(shares)) == sorted(ids([step]))


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(Loader(Pairs(9), 4, 100, True), 8)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_covers_every_example_once(world_size: int) -> None:
    ranks = [list(evaluation_steps(Pairs(23), 100, True, r, world_size, size=10)) for r in range(world_size)]
    assert sorted(i for rank in ranks for i in ids(rank)) == list(range(23))
    assert len({tuple(len(step) for step in rank) for rank in ranks}) == 1


def test_a_step_above_the_dataset_repeats_examples_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loader = Loader(Pairs(3), size=7, tokens=500, share_prefix=True)
    assert "a step of 7 examples repeats some of the dataset's 3" in caplog.text
    assert sorted(ids(take(loader, 3))) == sorted(list(range(3)) * 7)


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
        loaders = [Loader(examples, 4, 200, True, rank=r, world_size=2, cost=cost) for r in (0, 1)]
        assert [sum(b.num_tokens for b in next(loader)) for loader in loaders] == expected
    examples.examples[1:] = [TokenExample((s,), i + 1) for i, s in enumerate([short] * 6)]
    loaders = [Loader(examples, 7, 400, True, rank=r, world_size=2, cost=quadratic) for r in (0, 1)]
    assert [sum(b.num_tokens for b in next(loader)) for loader in loaders] == [90, 180]


def test_a_group_above_the_limit_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"example \d+ takes \d+ computed tokens, more than batch.max_group_tokens 99"):
        take(Loader(Pairs(23), 23, 100, True, max_group_tokens=99), 1)
    assert len(take(Loader(Pairs(23), 23, 100, True, max_group_tokens=150), 1)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": Pairs(0)}, "no examples"),
        ({"size": 0}, "size=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"seed": -1}, "must not be negative, got -1"),
        ({"rank": 2, "world_size": 2}, "rank=2, world_size=2"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(**{"dataset": Pairs(2), "size": 1, "tokens": 9, "share_prefix": True, **options})


def test_a_state_of_other_data_is_refused() -> None:
    state = Loader(Pairs(5), 2, 100, True).state_dict()
    with pytest.raises(ValueError, match="num_examples=5, this run has 6"):
        Loader(Pairs(6), 2, 100, True).load_state_dict(state)


@pytest.mark.parametrize("lost", ["seed", "num_examples", "drawn"])
def test_a_state_without_a_number_is_refused(lost: str) -> None:
    state = Loader(Pairs(5), 2, 100, True).state_dict()
    state.pop(lost)
    with pytest.raises(ValueError, match=f"damaged: it has no number '{lost}'; resume from another checkpoint"):
        Loader(Pairs(5), 2, 100, True).load_state_dict(state)
