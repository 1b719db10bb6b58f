"""Packed rows against separate sequences, to the rounding of the dtype: log-probs, gradients, nested prefixes."""

from contextlib import contextmanager

import pytest
import torch
from packed_cases import (
    PAIRS,
    gradients,
    logps_head,
    make_batch,
    make_policy,
    nested_batch,
    relative_error,
    separate_logps,
    widen_norms,
)

from fastalign.models.policy import recompute_mlps

EXACT = 1e-12
"""float64: sums of a few dozen terms of order one, in two layers."""
KINDS = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text"]
LAYOUTS = {
    "unshared": lambda: make_batch(*PAIRS, share=False),
    "shared": lambda: make_batch(*PAIRS),
    "nested": nested_batch,
    "nested, short agreements apart": lambda: nested_batch(least=4),
}


def test_nested_layouts_are_nested():
    batch, sequences = nested_batch()
    assert len(sequences) == 8 and batch.logical_tokens == sum(len(p) + len(r) for p, r in sequences)
    parents = batch.parents.tolist()
    assert max(depth(parents, s) for s in range(len(parents))) == 3
    apart, _ = nested_batch(least=4)
    assert batch.num_tokens < apart.num_tokens < batch.logical_tokens


def depth(parents, segment):
    return 0 if parents[segment] < 0 else 1 + depth(parents, parents[segment])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_in_float64(kind, layout):
    policy = make_policy(kind)
    widen_norms(policy)
    batch, sequences = LAYOUTS[layout]()
    packed, plain = policy(batch, logps_head), separate_logps(policy, sequences, "plain")
    assert (packed - plain).abs().max() < EXACT
    assert relative_error(gradients(policy, packed), gradients(policy, plain)) < EXACT
    assert plain.std() > 0.1, "a uniform model agrees with everything"


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_exact_however_many_query_heads_share_a_key(heads):
    policy = make_policy("llama", num_key_value_heads=heads)
    widen_norms(policy)
    batch, sequences = nested_batch()
    packed, plain = policy(batch, logps_head), separate_logps(policy, sequences, "plain")
    assert (packed - plain).abs().max() < EXACT
    assert relative_error(gradients(policy, packed), gradients(policy, plain)) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_bit(kind):
    batch, _ = nested_batch()
    results, sizes = [], []
    for on in (False, True, "mlp"):
        policy = make_policy(kind, torch.float32, gradient_checkpointing=on).train()
        with kept_bytes() as kept:
            logps = policy(batch, logps_head)
        results.append([logps, *gradients(policy, logps)])
        sizes.append(sum(kept.values()))
    assert all(torch.equal(x, want) for got in results[1:] for x, want in zip(got, results[0], strict=True))
    assert sizes[1] < sizes[2] < 0.8 * sizes[0]


@contextmanager
def kept_bytes():
    """The memory that a forward keeps for its backward, by where it is."""
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield kept


def test_a_model_without_mlps_is_told_so():
    with pytest.raises(
        ValueError, match=r"model\.gradient_checkpointing mlp: the layers of Linear have no mlp: set it to"
    ):
        recompute_mlps(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["shared", "nested"])
def test_bf16_is_as_exact_as_the_separate_sequences_are(kind, layout):
    """The model's own bf16 forward sets the tolerance, in log-probs and gradients."""
    batch, sequences = LAYOUTS[layout]()
    policy = make_policy(kind, torch.bfloat16)
    packed, plain = policy(batch, logps_head), separate_logps(policy, sequences)
    own = gradients(policy, packed), gradients(policy, plain)
    policy = policy.double()
    exact = separate_logps(policy, sequences)
    best = gradients(policy, exact)
    assert error([packed], [exact]) < 1.3 * error([plain], [exact])
    assert error(own[0], best) < 1.3 * error(own[1], best)


def error(got, want):
    """Root of the summed squared differences."""
    return sum((a.double() - b).square().sum() for a, b in zip(got, want, strict=True)) ** 0.5
