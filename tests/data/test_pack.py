"""The packed layout says exactly what the sequences say: same contexts, same labels, same positions."""

from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastalign.data.examples import TokenExample
from fastalign.data.forest import LEAST_SHARED, grow
from fastalign.data.pack import build_batch, empty_batch, first_fit_decreasing, group_forest, group_tokens, pack
from fastalign.types import PackedBatch

# Three tokens only, so that groups share prefixes, contain each other and are equal often.
sequences = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=7)
groups = st.lists(sequences, min_size=1, max_size=5)
leasts = st.sampled_from([1, 2, 3, LEAST_SHARED])


def make(group: list[list[tuple[int, bool]]], example_id: int = 0) -> TokenExample:
    return TokenExample(tuple((np.array([t for t, _ in s]), np.array([m for _, m in s])) for s in group), example_id)


def pair(first: str, second: str, prompt: int) -> TokenExample:
    """Two sequences, a letter a token, scored from ``prompt`` on."""
    return make([[(ord(c), i >= prompt) for i, c in enumerate(text)] for text in (first, second)])


def context(batch: PackedBatch, row: int) -> list[int]:
    """The tokens that a row sees by the layout, itself the last: its segment's, after those of the ancestors."""
    offsets, parents = batch.cu_segments.tolist(), batch.parents.tolist()
    segment = max(s for s in range(len(parents)) if offsets[s] <= row)
    tokens = batch.input_ids[offsets[segment] : row + 1].tolist()
    while (segment := parents[segment]) >= 0:
        tokens = batch.input_ids[offsets[segment] : offsets[segment + 1]].tolist() + tokens
    return tokens


def predictions(batch: PackedBatch) -> list[list[tuple[list[int], int]]]:
    """For each sequence what is predicted from what."""
    rows, labels, ends = batch.rows.tolist(), batch.labels.tolist(), batch.cu_seqlens.tolist()
    return [[(context(batch, rows[n]), labels[n]) for n in range(a, b)] for a, b in pairwise(ends)]


def expected(examples: list[TokenExample]) -> list[list[tuple[list[int], int]]]:
    return [
        [(ids[:t].tolist(), int(ids[t])) for t in range(1, len(ids)) if scored[t]]
        for e in examples
        for ids, scored in e.sequences
    ]


@settings(max_examples=300, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4), st.booleans(), leasts)
@example([[[(1, True)], [(1, True)]]], True, 1)  # one equal token each: nothing to predict
@example([[[(0, False), (1, True)], [(0, False), (1, True)]]], True, 1)  # equal responses: only the prefix remains
def test_a_batch_predicts_what_its_sequences_say(raw: list, share: bool, least: int) -> None:
    examples = [make(group, i) for i, group in enumerate(raw)]
    batch = build_batch(examples, share, least)
    assert predictions(batch) == expected(examples)
    assert batch.num_tokens == sum(group_tokens(e, share, least) for e in examples)
    assert batch.logical_tokens == sum(len(ids) for e in examples for ids, _ in e.sequences)
    assert batch.example_ids == tuple(range(len(examples)))


@settings(max_examples=100, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4), st.booleans(), leasts)
def test_scalar_heads_read_the_rows_of_the_scored_tokens_themselves(raw: list, share: bool, least: int) -> None:
    examples = [replace(make(group, i), own_rows=True) for i, group in enumerate(raw)]
    batch = build_batch(examples, share, least)
    read = [[context(batch, row) for row in batch.rows[a:b].tolist()] for a, b in pairwise(batch.cu_seqlens.tolist())]
    assert read == [
        [ids[: t + 1].tolist() for t in np.flatnonzero(scored)] for e in examples for ids, scored in e.sequences
    ]
    assert batch.cu_groups.tolist() == [0, *accumulate(len(e.sequences) for e in examples)]


@settings(max_examples=300, deadline=None)
@given(st.lists(groups, min_size=1, max_size=4), st.booleans(), leasts)
def test_positions_and_segments_give_back_every_sequence(raw: list, share: bool, least: int) -> None:
    examples = [make(group, i) for i, group in enumerate(raw)]
    batch = build_batch(examples, share, least)
    offsets, parents = batch.cu_segments.tolist(), batch.parents.tolist()
    assert offsets[0] == 0 and offsets[-1] == batch.num_tokens and len(offsets) == len(parents) + 1
    assert all(a < b for a, b in pairwise(offsets)), "no segment is empty"
    assert all(parent < s for s, parent in enumerate(parents))
    assert batch.position_ids.tolist() == [len(context(batch, row)) - 1 for row in range(batch.num_tokens)]
    chains = [context(batch, offsets[s + 1] - 1) for s in range(len(parents))]
    leaves = sorted(chains[s] for s in range(len(parents)) if s not in parents)
    assert leaves == sorted(c for e in examples for c in distinct_ends(e, share, least))


def distinct_ends(e: TokenExample, share: bool, least: int) -> list[list[int]]:
    """The sequences that end in a leaf of the forest: each of them but those that another continues or repeats."""
    nodes, ends = group_forest(e, share, least)
    inner = {node.parent for node in nodes}
    return [e.sequences[ends.index(end)][0].tolist() for end in dict.fromkeys(ends) if end not in inner]


@settings(max_examples=300, deadline=None)
@given(groups, leasts)
def test_every_agreement_that_is_long_enough_is_computed_once(raw: list, least: int) -> None:
    """Computed tokens by the definition: a prefix tree over the tokens, its short shared stretches multiplied out."""
    sequences = [[t for t, _ in s] for s in raw]

    def tokens(members: list[list[int]], start: int, at: int) -> int:
        going, ended = [s for s in members if len(s) > at], [s for s in members if len(s) == at]
        branches = [[s for s in going if s[at] == t] for t in dict.fromkeys(s[at] for s in going)]
        if len(branches) == 1 and not ended:
            return tokens(going, start, at + 1)  # they still agree
        shared = len(members) == 1 or at - start >= least
        rest = sum(tokens(branch, at if shared else start, at) for branch in branches)
        return rest + (at - start) * (1 if shared else len(ended))

    nodes, _ = grow([np.array(s) for s in sequences], least)
    assert sum(node.length for node in nodes) == tokens(sequences, 0, 0)
    assert all(node.parent < i for i, node in enumerate(nodes))
    first_children = {node.parent: i for i, node in reversed(list(enumerate(nodes))) if node.parent >= 0}
    assert all(child == parent + 1 for parent, child in first_children.items()), "attention would not fuse them"


def test_turns_of_a_conversation_share_all_that_went_before() -> None:
    """A group that branches at every turn: one path through the longest conversation, one segment per answer."""
    texts = ("SYSTEM:hi.REPLY_A:more.TURN2a", "SYSTEM:hi.REPLY_A:more.TURN2b", "SYSTEM:hi.REPLY_B", "SYSTEM:hello")
    example = make([[(ord(c), i >= 8) for i, c in enumerate(text)] for text in texts])
    batch = build_batch([example], True)
    assert batch.parents.tolist() == [-1, 0, 1, 2, 2, 1, 0]
    assert batch.cu_segments.diff().tolist() == [8, 8, 12, 1, 1, 1, 4]
    assert batch.logical_tokens == sum(map(len, texts))
    assert predictions(batch) == expected([example])


def test_short_agreements_below_a_shared_prefix_are_computed_twice() -> None:
    example = make([[(ord(c), True) for c in text] for text in ("prompt_abX", "prompt_abY", "prompt_cd")])
    assert build_batch([example], True, least=3).cu_segments.diff().tolist() == [7, 3, 3, 2]
    assert build_batch([example], True, least=2).cu_segments.diff().tolist() == [7, 2, 1, 1, 2]
    assert build_batch([example], True, least=8).parents.tolist() == [-1, 0, 0, -1]
    assert build_batch([example], True, least=10).parents.tolist() == [-1] * 3


def test_a_shared_pair_is_a_prompt_and_two_children() -> None:
    batch = build_batch([pair("pqrab", "pqrxyz", prompt=3)], True, least=1)
    assert batch.cu_segments.tolist() == [0, 3, 5, 8]
    assert batch.parents.tolist() == [-1, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.rows.tolist() == [2, 3, 2, 5, 6], "the last prompt row predicts both first tokens"
    assert batch.labels.tolist() == [ord(c) for c in "abxyz"]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_leftover_prompt_tokens_go_unscored_into_the_response() -> None:
    batch = build_batch([pair("pqrab", "pqxyz", prompt=3)], True, least=1)
    assert batch.cu_segments.tolist() == [0, 2, 5, 8]
    assert batch.labels.tolist() == [ord(c) for c in "abyz"]


def test_a_response_that_ends_within_the_other_has_no_segment() -> None:
    batch = build_batch([pair("pqab", "pqabcd", prompt=2)], True, least=1)
    assert batch.cu_segments.tolist() == [0, 4, 6]
    assert batch.rows.tolist() == [1, 2, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 2, 6]


@pytest.mark.parametrize(("first", "second"), [("abc", "xyz"), ("a", "x")])
def test_without_a_common_token_each_sequence_is_a_root(first: str, second: str) -> None:
    batch = build_batch([pair(first, second, prompt=0)], True)
    assert batch.parents.tolist() == [-1, -1]
    assert batch.labels.tolist() == [ord(c) for c in first[1:] + second[1:]], "a first token has no predictor"


def test_dtypes_are_those_of_the_contract() -> None:
    for batch in (build_batch([pair("pqab", "pqx", 2)], True), empty_batch()):
        dtypes = {name: str(getattr(batch, name).dtype) for name in ("input_ids", "position_ids", "rows", "labels")}
        assert set(dtypes.values()) == {"torch.int64"}, dtypes
        assert {str(t.dtype) for t in (batch.cu_segments, batch.parents, batch.cu_seqlens)} == {"torch.int32"}


def test_what_the_data_say_travels_with_the_examples() -> None:
    scores, logps = np.array([0.5, 0], dtype=np.float32), np.array([-1, -2, -3], dtype=np.float32)
    other = make([[(ord(c), i >= 2) for i, c in enumerate("abq")]])
    first = replace(pair("abx", "abyz", prompt=2).fill(scores=scores, ref_logps=logps), mismatched=other)
    batch = build_batch([first] * 2, share_prefix=True)
    assert batch.columns.scores.tolist() == [0.5, 0, 0.5, 0] and batch.columns.ref_logps.tolist() == [-1, -2, -3] * 2
    assert batch.companion.labels.tolist() == [ord(c) for c in "xyzq"] * 2 and batch.companion.companion is None
    assert batch.companion.columns.ref_logps is None  # known of one side alone
    assert build_batch([first, pair("c", "d", 0)], True).columns.ref_logps is None  # known of one example alone
    known = replace(first, mismatched=other.fill(ref_logps=np.float32([-9])))
    assert build_batch([known], True).companion.columns.ref_logps.tolist() == [-1, -2, -3, -9]


def test_a_reference_reads_both_completions_behind_one_prompt() -> None:
    examples = [
        replace(
            make([[(ord(c), i >= 5) for i, c in enumerate(own)]]),
            mismatched=make([[(ord(c), i >= 5) for i, c in enumerate(other)]]),
        )
        for own, other in (("abcdexy", "abcdez"), ("fghijk", "fghijlmn"))
    ]
    batch = build_batch(examples, share_prefix=True)
    both = predictions(batch.companion)
    assert both[0::2] == predictions(batch) and len(both) == 2 * len(predictions(batch))
    assert batch.companion.num_tokens == batch.num_tokens + 4, "their prompt is computed once"


def test_an_empty_batch_computes_one_token_and_scores_none() -> None:
    batch = empty_batch()
    assert (batch.num_tokens, batch.num_scored, batch.num_sequences, batch.example_ids) == (1, 0, 0, ())
    assert batch.segments.offsets == [0, 1] and batch.segments.parents == [-1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=20), st.integers(1, 25))
def test_bins_hold_everything_once_and_only_giants_exceed_the_budget(sizes: list[int], capacity: int) -> None:
    bins = first_fit_decreasing(sizes, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in members) <= capacity or len(members) == 1 for members in bins)
    loads = [sum(sizes[i] for i in members) for members in bins if sum(sizes[i] for i in members) <= capacity]
    assert sum(load <= capacity / 2 for load in loads) <= 1, "two half-empty bins would be one"


def test_a_group_is_never_split() -> None:
    examples = [pair("pqrsab", "pqrsxyz", 4), make([[(1, True)] * 30]), pair("pqrsa", "pqrsb", 4)]
    batches = pack(examples, tokens=15, share_prefix=True)
    assert sorted(b.num_tokens for b in batches) == [15, 30]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"at least 1, got 0: set batch\.tokens"):
        pack([pair("pa", "pb", 1)], 0, True)
    with pytest.raises(ValueError, match="example 7 has a sequence without tokens"):
        build_batch([TokenExample(((np.array([], dtype=np.int64), np.array([], dtype=bool)),), 7)], True)
