"""The policy on packed rows: equal to separate sequences, and closed to everything that would not be."""

import copy
import logging

import pytest
import torch
from packed_cases import (
    ARCHITECTURES,
    PAIRS,
    SIZES,
    gradients,
    logps_head,
    make_batch,
    make_model,
    make_policy,
    nested_batch,
    relative_error,
    separate_logps,
)
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from fastalign.models import support
from fastalign.models.policy import Policy, gather_rows
from fastalign.ops.attention import layout
from fastalign.types import Segments


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_separate_sequences(kind):
    policy = make_policy(kind)
    batch, sequences = make_batch(*PAIRS)
    packed, plain = policy(batch, logps_head), separate_logps(policy, sequences)
    # float64 weights; norms, softmax and rotary tables of these models compute in fp32 inside
    assert (packed - plain).abs().max() < 5e-6
    assert relative_error(gradients(policy, packed), gradients(policy, plain)) < 5e-6
    assert plain.std() > 0.1  # not a uniform model, where everything agrees


def test_gradient_checkpointing_changes_nothing():
    batch, _ = make_batch(*PAIRS)
    results = []
    for on in (False, True):
        policy = make_policy("llama", gradient_checkpointing=on).train()
        logps = policy(batch, logps_head)
        results.append([logps, *gradients(policy, logps)])
    assert policy.backbone.layers[0].gradient_checkpointing
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_only_scored_rows_reach_the_head():
    policy = make_policy("llama")
    batch, _ = make_batch(*PAIRS)
    seen = policy(batch, lambda hidden, weight, labels: (hidden, weight, labels))
    assert seen[0].shape == (batch.num_scored, 32) and batch.num_scored < batch.num_tokens
    assert seen[1] is policy.head.weight and torch.equal(seen[2], batch.labels)


def test_a_row_that_predicts_twice_gets_both_gradients():
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows, upstream = torch.tensor([2, 3, 2, 0, 2]), torch.randn(5, 3, dtype=torch.float64)
    gather_rows(hidden, rows).backward(upstream)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for row, gradient in zip(rows, upstream, strict=True):
        expected[row] += gradient
    assert torch.equal(hidden.grad, expected)


def test_batch_without_scored_rows():
    policy = make_policy("llama")
    batch, _ = make_batch((1, []))
    loss = policy(batch, logps_head).sum()
    assert loss == 0
    assert all(g.abs().max() == 0 for g in gradients(policy, loss))


def test_under_autocast():
    policy = make_policy("llama", torch.float32)
    batch, sequences = make_batch(*PAIRS)
    with torch.autocast("cpu", torch.bfloat16):
        packed, plain = policy(batch, logps_head), separate_logps(policy, sequences)
    exact = separate_logps(policy.double(), sequences)
    # the packed row is as far from float64 as PyTorch's own bf16 forward is
    assert (packed - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()


def test_a_copy_is_independent():
    policy = make_policy("llama")
    batch, _ = make_batch(*PAIRS)
    frozen = copy.deepcopy(policy).requires_grad_(False)
    assert torch.equal(policy(batch, logps_head), frozen(batch, logps_head))


def test_head_options_are_those_of_the_model():
    expected = {"gemma2": {"softcap": 0.5}, "cohere": {"logit_scale": 0.5}, "granite": {"logit_scale": 0.25}}
    for kind in ARCHITECTURES:
        assert make_policy(kind).head_options == expected.get(kind, {})
    assert make_policy("phi").head.bias is not None


# ---------------------------------------------------------------- silent failures, each with its guard


def test_trap_stock_attention_given_a_shared_layout():
    """transformers reads restarting position ids as a new document: the rejected response loses its prompt."""
    policy = make_policy("llama")
    batch, sequences = make_batch((7, [5, 3]))
    policy.model.set_attn_implementation("sdpa")
    output = policy.model(batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False)
    logps = output.logits[0, batch.rows].log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    error = (logps - separate_logps(policy, sequences)).abs()
    assert error[:5].max() < 1e-6 < 1e-2 < error[5:].max()
    policy.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="need the attention implementation 'fastalign'; the model has 'sdpa'"):
        policy(batch, logps_head)


def test_trap_attention_mask_on_a_packed_row():
    policy = make_policy("llama")
    batch, _ = make_batch((7, [5, 3]))
    with pytest.raises(ValueError, match="no attention mask"):
        policy.backbone(
            batch.input_ids[None],
            attention_mask=torch.ones(1, 1, 15, 15, dtype=torch.bool),
            position_ids=batch.position_ids[None],
            use_cache=False,
            packed_layout=layout(batch.segments),
        )


def test_trap_cache_on_a_packed_row():
    """`use_cache` is true by default, in training too; the policy says no whatever the config says."""
    policy = make_policy("llama", use_cache=True)
    assert policy.config.use_cache
    batch, _ = make_batch((7, [5, 3]))
    seen = []
    policy.backbone.register_forward_hook(lambda module, args, output: seen.append(dict(output)))
    policy(batch, logps_head)
    assert list(seen[0]) == ["last_hidden_state"]


def test_trap_call_without_layout():
    policy = make_policy("llama")
    with pytest.raises(ValueError, match="call it through Policy"):
        policy.model(torch.tensor([[1, 2, 3]]))


def test_trap_padding_token_never_learns():
    """An embedding with a padding id drops that row's gradient, and the pad id is often the EOS as well."""
    policy = make_policy("llama", pad_token_id=5)
    batch, _ = make_batch((7, [5, 3]))
    batch.input_ids[1] = 5
    policy(batch, logps_head).sum().backward()
    assert policy.model.get_input_embeddings().weight.grad[5].abs().max() > 0


def test_trap_dropout(caplog):
    with caplog.at_level(logging.WARNING):
        policy = make_policy("gpt2", torch.float32).train()
    assert "dropout set to zero" in caplog.text and "attn_dropout=0.1" in caplog.text
    batch, _ = make_batch(*PAIRS)
    assert torch.equal(policy(batch, logps_head), policy(batch, logps_head))


def test_sequence_longer_than_the_window_is_refused():
    batch, _ = make_batch((60, [5, 3]))
    for kind in ("mistral", "gemma2", "gemma3_text"):
        with pytest.raises(ValueError, match="65 tokens is longer than 64, the model's sliding window"):
            make_policy(kind)(batch, logps_head)
    with pytest.raises(ValueError, match="65 tokens is longer than 64, the positions the model has"):
        make_policy("gpt2", n_positions=64)(batch, logps_head)
    fits, sequences = make_batch((60, [4, 3]))
    policy = make_policy("mistral")
    assert (policy(fits, logps_head) - separate_logps(policy, sequences)).abs().max() < 5e-6


def test_window_is_refused_by_the_layer_too():
    policy = make_policy("mistral")
    policy.max_length = None
    with pytest.raises(ValueError, match="sees 64 tokens back and a sequence has 65"):
        policy(make_batch((60, [5, 3]))[0], logps_head)


def small(kind, **options):
    """A tiny model of any architecture."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options}))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("mamba", {}, "layers carry state or read spans across sequence boundaries"),
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention", "full_attention"]},
            "layers carry state",
        ),
        ("bloom", {}, "AttentionInterface"),
        ("mixtral", {"output_router_logits": True}, "auxiliary loss"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_a_model_that_cannot_be_exact_is_refused(kind, options, reason):
    with pytest.raises(ValueError, match=reason):
        Policy(small(kind, **options))


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("falcon", {"alibi": True}, "AttentionInterface"),
        ("llama", {"alibi": True}, "position biases"),
        ("llama", {"position_embedding_type": "relative_key"}, "position biases"),
        ("llama", {"is_causal": False}, "both directions"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv layers carry state"),
        ("recurrent_gemma", {}, "layers carry state"),
        ("llama4_text", {"attention_chunk_size": 8, "num_local_experts": 2}, "chunked_attention layers"),
    ],
)
def test_attention_of_another_shape_is_refused(kind, options, reason):
    assert reason in (support.refusal(small(kind, **options)) or "accepted")


def test_an_encoder_is_refused_at_its_first_layer():
    with pytest.raises(ValueError, match="BertSelfAttention is bidirectional"):
        Policy(small("bert"))(make_batch((7, [5, 3]))[0], logps_head)


def test_routed_experts_are_exact_without_their_auxiliary_loss():
    """A token's experts are its own affair, whoever shares its row."""
    policy = Policy(small("mixtral", num_local_experts=4, num_experts_per_tok=2))
    batch, sequences = nested_batch()
    packed, plain = policy(batch, logps_head), separate_logps(policy, sequences)
    assert (packed - plain).abs().max() < 5e-6  # fp32: the products of experts know no float64
    assert relative_error(gradients(policy, packed), gradients(policy, plain)) < 5e-6


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout": 0.1}, "LlamaAttention has dropout 0.1: copies of a shared prefix would draw different masks"),
        ({"sliding_window": 6}, "sees 6 tokens back and a sequence has 7"),
        ({"is_causal": False}, "bidirectional"),
        ({"position_bias": 1}, "passes position_bias, which the packed attention does not compute"),
        ({"attention_mask": torch.ones(1, 1, 7, 7)}, "take no attention mask"),
    ],
)
def test_each_call_refuses_what_it_would_leave_out(options, reason):
    module = make_policy("llama").backbone.layers[0].self_attn
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    arguments = {"attention_mask": None, "packed_layout": layout(Segments([0, 7], [-1])), **options}
    with pytest.raises(ValueError, match=reason):
        AttentionInterface()["fastalign"](module, q, k, k, **arguments)


def test_attention_sinks_are_refused():
    policy = Policy(small("gpt_oss", head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=64))
    with pytest.raises(ValueError, match=r"attention sinks \(s_aux\), which the packed attention does not compute"):
        policy(make_batch((7, [5, 3]))[0], logps_head)


def test_encoder_decoder_is_refused():
    model = make_model("llama")
    model.config.is_encoder_decoder = True
    assert "encoder-decoder" in support.refusal(model)


def test_a_head_that_is_not_linear_is_refused():
    model = make_model("llama")
    model.lm_head = torch.nn.Identity()
    assert "head is Identity" in support.refusal(model)


def test_unknown_attention_backend_is_refused():
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
        Policy(make_model("llama"), attention="magic")


def test_flash_attention_is_ours_to_refuse():
    """transformers would look for a kernel of its own behind any name with "flash" in it."""
    policy = Policy(make_model("llama"), attention="flash")
    assert "flash" not in policy.attention
