"""Self-verification: silent when all is well, and red for every way a packed row goes wrong without an error."""

import dataclasses
import logging

import pytest
import torch
from packed_cases import ARCHITECTURES, PAIRS, SIZES, make_batch, make_policy, nested_batch
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.models import policy as policy_module
from fastalign.models.policy import Policy
from fastalign.models.verify import stock_attention, unpack_group, verify_packed
from fastalign.ops import attention, dispatch
from fastalign.ops.backends.sdpa import attention as sdpa
from fastalign.types import Segments


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_passes_on_every_architecture(kind):
    policy = make_policy(kind, torch.float32)
    assert verify_packed(policy, make_batch(*PAIRS)[0])


@pytest.mark.parametrize("groups", [[(7, [5])], [(3, [1]), (4, [2])], [(2, [0, 3]), (4, [1, 1])]])
def test_passes_on_small_batches(groups):
    batch, _ = make_batch(*groups)
    assert verify_packed(make_policy("llama", torch.float32), batch)


def test_nothing_scored_is_nothing_to_verify():
    assert verify_packed(make_policy("llama", torch.float32), make_batch((3, []))[0])


def test_passes_in_bf16_and_under_autocast():
    batch, _ = make_batch(*PAIRS)
    # weights of the size of an initialised model, to which the tolerances belong
    small = make_policy("llama", torch.float32)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(0.3)
    with torch.autocast("cpu", torch.bfloat16):
        assert verify_packed(small, batch)
    assert verify_packed(small.bfloat16(), batch)


def test_prefers_a_shared_group_that_is_not_the_first():
    batch, sequences = make_batch((7, [5, 3]), (4, [6]), (2, [3, 1]))
    group = unpack_group(batch)
    assert [row[: len(p + r)] for row, (p, r) in zip(group.input_ids.tolist(), sequences[3:], strict=True)] == [
        p + r for p, r in sequences[3:]
    ]
    assert group.scored.tolist() == [14, 15, 16, 17]
    assert group.sequence.tolist() == [0, 0, 0, 1] and group.position.tolist() == [1, 2, 3, 1]


def test_prefers_the_group_that_shares_deepest():
    batch, sequences = nested_batch()
    group = unpack_group(batch)
    assert len(group.scored) == sum(len(r) for _, r in sequences[:6])
    for kind in ("llama", "gemma2", "gpt2"):
        assert verify_packed(make_policy(kind, torch.float32), batch)


def test_a_forgotten_grandparent_is_caught(monkeypatch):
    real = attention.layout

    def parents_alone(segments):
        plan = real(segments)
        calls = tuple(dataclasses.replace(call, prefix=call.prefix[-1:]) for call in plan.calls)
        return dataclasses.replace(plan, calls=calls)

    monkeypatch.setattr(policy_module, "layout", parents_alone)
    policy = make_policy("llama", torch.float32)
    assert verify_packed(policy, make_batch(*PAIRS)[0])  # prompts and responses have none
    with pytest.raises(ValueError, match="differ by"):
        verify_packed(policy, nested_batch()[0])


def forget_parents(monkeypatch):
    real = attention.layout
    monkeypatch.setattr(policy_module, "layout", lambda s: real(Segments(s.offsets, [-1] * len(s))))


def one_long_sequence(monkeypatch):
    real = attention.layout
    monkeypatch.setattr(policy_module, "layout", lambda s: real(Segments([0, s.offsets[-1]], [-1])))


def top_left_mask(monkeypatch):
    def mask(num_queries, num_keys, plan, device):
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril()

    monkeypatch.setattr(sdpa, "_corner_mask", mask)
    monkeypatch.setattr(dispatch, "choose_attention", lambda *_: "sdpa")  # the native attention has no mask


def no_scale(monkeypatch):
    monkeypatch.setattr(attention, "_scale", lambda q, scale: 1.0)


@pytest.mark.parametrize("breakage", [forget_parents, one_long_sequence, top_left_mask, no_scale])
def test_broken_attention_is_caught(breakage, monkeypatch, caplog):
    policy = make_policy("llama", torch.float32)
    batch, _ = make_batch(*PAIRS)
    breakage(monkeypatch)
    with pytest.raises(ValueError, match=r"differ by 0?\.?\d.* at most and .* on average .*allowed"):
        verify_packed(policy, batch)
    assert policy.model.config._attn_implementation == policy.attention
    with caplog.at_level(logging.WARNING):
        assert verify_packed(policy, batch, on_mismatch="fallback") is False
    assert "without sharing prefixes" in caplog.text


def test_positions_that_do_not_restart_are_caught():
    batch, _ = make_batch(*PAIRS)
    batch = dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens))
    with pytest.raises(ValueError, match="differ by"):
        verify_packed(make_policy("gpt2", torch.float32), batch)


def test_labels_shifted_by_one_over_the_row_are_caught():
    batch, _ = make_batch(*PAIRS)
    batch = dataclasses.replace(batch, labels=batch.input_ids[(batch.rows + 1) % batch.num_tokens])
    with pytest.raises(ValueError, match="not the next tokens of any sequence"):
        verify_packed(make_policy("llama", torch.float32), batch)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_forgotten_logit_transform_is_caught(kind):
    policy = make_policy(kind, torch.float32)
    policy.head_options = {}
    with pytest.raises(ValueError, match="differ by"):
        verify_packed(policy, make_batch(*PAIRS)[0])


def test_nan_in_the_packed_forward_alone_is_a_mismatch(monkeypatch):
    real = policy_module.gather_rows
    monkeypatch.setattr(policy_module, "gather_rows", lambda *arguments: real(*arguments) * torch.nan)
    with pytest.raises(ValueError, match="differ by nan"):
        verify_packed(make_policy("llama", torch.float32), make_batch(*PAIRS)[0])


def test_a_transform_between_backbone_and_head_is_caught():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, **SIZES))
    with pytest.raises(ValueError, match="differ by"):
        verify_packed(Policy(model), make_batch(*PAIRS)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_is_not_blamed_on_the_attention(value):
    policy = make_policy("llama", torch.float32)
    with torch.no_grad():
        policy.head.weight[3, 3] = value
    with pytest.raises(ValueError, match=r"the model's own log-probs are not finite on \d+ of \d+ tokens"):
        verify_packed(policy, make_batch(*PAIRS)[0], on_mismatch="fallback")


def test_implementation_is_restored_after_an_error():
    policy = make_policy("llama", torch.float32)
    with pytest.raises(RuntimeError, match="boom"), stock_attention(policy):
        assert policy.model.config._attn_implementation == "sdpa"
        raise RuntimeError("boom")
    assert policy.model.config._attn_implementation == policy.attention


def test_leaves_weights_mode_and_generator_as_they_were():
    policy = make_policy("gpt2", torch.float32).train()
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    batch, _ = make_batch(*PAIRS)
    state = torch.get_rng_state()
    verify_packed(policy, batch)
    assert policy.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in policy.state_dict().items())
    assert all(p.grad is None for p in policy.parameters())
