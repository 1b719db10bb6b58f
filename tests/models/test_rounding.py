"""Verification in every precision: rounding passes, whatever the model, and no fault hides in it."""

import contextlib
import dataclasses
import functools
import logging

import pytest
import torch
import torch.distributed as dist
from packed_cases import ARCHITECTURES, PAIRS, SIZES, VOCAB, make_batch, make_policy, nested_batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastalign.models import policy as policy_module
from fastalign.models.native import use_native_layers
from fastalign.models.policy import Policy
from fastalign.models.precision import roughened, trained_dtype, widened
from fastalign.models.verify import unpack_group, verify_packed
from fastalign.ops import attention, dispatch
from fastalign.types import Segments

CPU = torch.device("cpu")
PRECISIONS = ("autocast", "bfloat16", "float32")
MIXTURES = {
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
}


def fresh(kind="llama", seed=0, **options):
    """A model as transformers initialises it: its logits are small, and so is what a fault does to them."""
    torch.manual_seed(seed)
    sizes = ARCHITECTURES.get(kind) or MIXTURES[kind]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **options}))


@functools.cache
def trained_weights(seed):
    """Of a Llama after 60 steps of repeating what it has read, for which it needs positions and attention."""
    model = fresh(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        half = torch.randint(VOCAB, (16, 10))
        ids = torch.cat([half, half], 1)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def make(weights, precision, seed=0, **options):
    model = fresh(seed=seed)
    if weights == "trained":
        model.load_state_dict(trained_weights(seed))
    model = model.bfloat16() if precision == "bfloat16" else model
    policy = Policy(model, **options)
    use_native_layers(model)
    return policy


def running(precision):
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", ["fresh", "trained"])
def test_rounding_passes(weights, precision):
    with running(precision):
        for seed in range(3):
            for shape in (PAIRS, ((3, [1]), (4, [1])), ((9, [8, 12]), (11, [7, 9]))):
                assert verify_packed(make(weights, precision, seed), make_batch(*shape)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "cohere", *MIXTURES])
def test_rounding_of_large_logits_passes(kind, precision):
    model = fresh(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    policy = Policy(model.bfloat16() if precision == "bfloat16" else model)
    with running(precision):
        assert verify_packed(policy, make_batch(*PAIRS)[0])
        assert verify_packed(policy, nested_batch()[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_of_scores_passes(precision):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SIZES, "num_labels": 1, "pad_token_id": 0})
    model = AutoModelForSequenceClassification.from_config(config)
    policy = Policy(model.bfloat16() if precision == "bfloat16" else model)
    batch, _ = make_batch((7, [5, 3]), (4, [6, 2]))
    ends = batch.cu_seqlens[1:].long() - 1
    last = {"rows": torch.tensor([11, 14, 24, 26]), "cu_seqlens": torch.arange(5, dtype=torch.int32)}
    batch = dataclasses.replace(batch, labels=batch.labels[ends], **last)
    with running(precision):
        assert verify_packed(policy, batch)
        wrong = dataclasses.replace(batch, position_ids=shifted(batch, 18))
        with pytest.raises(ValueError, match="packed and plain scores in float32 differ by"):
            verify_packed(policy, wrong)


def shifted(batch, rows):
    positions = batch.position_ids.clone()
    positions[rows] += 1
    return positions


def one_position(batch):
    """Of one token in the middle of the compared group's last response."""
    group = unpack_group(batch)
    return dataclasses.replace(batch, position_ids=shifted(batch, batch.rows[group.scored[-2]]))


def a_response_one_further(batch):
    """The rotation of a response begins one too late."""
    segment = unpack_group(batch).segments[-1]
    rows = slice(*batch.cu_segments[segment : segment + 2].tolist())
    return dataclasses.replace(batch, position_ids=shifted(batch, rows))


def positions_that_go_on(batch):
    return dataclasses.replace(batch, position_ids=torch.arange(batch.num_tokens))


def lost_prompt(segments):
    return Segments(segments.offsets, [-1] * len(segments))


def leak(segments):
    """The compared group reads the prompt of the one before it."""
    parents = [s - 1 if parent < 0 < s else parent for s, parent in enumerate(segments.parents)]
    return Segments(segments.offsets, parents)


def one_long_sequence(segments):
    return Segments([0, segments.offsets[-1]], [-1])


@pytest.fixture
def plant(monkeypatch):
    """Changes the segments that attention is laid out by."""

    def change(fault):
        real = attention.layout
        monkeypatch.setattr(policy_module, "layout", lambda segments: real(fault(segments)))

    return change


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", ["fresh", "trained"])
@pytest.mark.parametrize("fault", [one_position, a_response_one_further, positions_that_go_on])
def test_wrong_positions_are_caught(fault, weights, precision):
    batch, _ = make_batch((7, [5, 3]), (9, [8, 12]), (6, [7, 9]))
    with running(precision):
        policy = make(weights, precision)
        assert verify_packed(policy, batch)
        with pytest.raises(ValueError, match=r"packed and plain log-probs in .* differ by"):
            verify_packed(policy, fault(batch))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", ["fresh", "trained"])
@pytest.mark.parametrize("fault", [lost_prompt, leak, one_long_sequence])
def test_wrong_segments_are_caught(fault, weights, precision, plant):
    batch, _ = make_batch((7, [5, 3]), (9, [8, 12]), (6, [7, 9]))
    plant(fault)
    with running(precision), pytest.raises(ValueError, match=r"packed and plain log-probs in .* differ by"):
        verify_packed(make(weights, precision), batch)


# --- remedies --------------------------------------------------------------------------------------------------------


def said(policy, batch):
    with pytest.raises(ValueError, match="is not computed exactly on packed rows") as error:
        verify_packed(policy, batch, name="the reference")
    return str(error.value).split("the reference is not computed exactly on packed rows; ")[1]


def broken_backend(monkeypatch, name="cpp", when=lambda q: True):
    kernels = dispatch.attention(name)
    real = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda q, *more: real(q, *more) * (-1 if when(q) else 1))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_attention_is_named_where_it_is_at_fault(precision, monkeypatch):
    batch, _ = make_batch(*PAIRS)
    broken_backend(monkeypatch)
    with running(precision):
        assert said(make("trained", precision), batch) == "it is with model.attention sdpa: set that"
        assert verify_packed(make("trained", precision, attention="sdpa"), batch)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_sharing_is_named_where_it_is_at_fault(precision, plant, caplog):
    batch, _ = make_batch(*PAIRS)
    plant(lost_prompt)
    with running(precision):
        policy = make("trained", precision)
        assert said(policy, batch) == "it is with batch.share_prefix false: set that"
        with caplog.at_level(logging.WARNING):
            assert not verify_packed(policy, batch, on_mismatch="fallback")
        assert "going on without sharing prefixes" in caplog.text
        assert verify_packed(policy, make_batch(*PAIRS, share=False)[0])


def test_the_precision_is_named_where_it_is_at_fault(monkeypatch):
    batch, _ = make_batch(*PAIRS)
    for name in ("cpp", "sdpa"):
        broken_backend(monkeypatch, name, when=lambda q: attention.out_dtype(q) == torch.bfloat16)
    for precision in ("autocast", "bfloat16"):
        with running(precision):
            expected = "it is with model.dtype float32 and model.autocast false: set that"
            assert said(make("trained", precision), batch) == expected
    assert verify_packed(make("trained", "float32"), batch)


def test_no_setting_is_named_where_none_helps(plant):
    plant(one_long_sequence)
    tried = "model.attention sdpa; batch.share_prefix false; model.dtype float32 and model.autocast false"
    with running("autocast"):
        policy = make("trained", "autocast")
        assert said(policy, make_batch(*PAIRS)[0]) == f"no setting helps (tried: {tried}): choose another model"
        assert policy.attention == policy.config._attn_implementation == "fastalign"
    unshared = make_batch(*PAIRS, share=False)[0]
    policy = make("trained", "float32", attention="sdpa")
    assert said(policy, unshared) == "no setting helps: choose another model"


def test_every_model_can_have_its_attention_set():
    """transformers takes "sdpa" in a name for its own attention, which gemma2 has not."""
    for backend in ("sdpa", "flash"):
        policy = make_policy("gemma2", torch.float32)
        model = AutoModelForCausalLM.from_config(policy.config)
        assert Policy(model, attention=backend).attention == model.config._attn_implementation


# --- wider -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widened_computes_what_a_wide_copy_would_and_leaves_no_trace(kind, dtype):
    ids, positions = torch.randint(VOCAB, (2, 9)), torch.arange(9)
    tied = {"tie_word_embeddings": True}
    model = fresh(kind, **tied).bfloat16()
    policy = Policy(model)
    copy = fresh(kind, **tied).bfloat16().to(dtype).eval()
    before = {name: (x, x.data_ptr(), x.clone()) for name, x in policy.state_dict(keep_vars=True).items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), widened(policy, torch.float32, CPU):
        assert trained_dtype(policy, CPU) == torch.float32
        with widened(policy, dtype, CPU):
            policy.model.set_attn_implementation("sdpa")
            assert torch.equal(policy.plain_logits(ids, positions), copy(ids).logits)
            policy.use_attention(policy.attention)
            verify_packed(policy, make_batch(*PAIRS)[0])
        assert policy.head.weight.dtype == torch.float32
    for name, x in policy.state_dict(keep_vars=True).items():
        same, place, value = before[name]
        assert x is same and x.data_ptr() == place and x.dtype == torch.bfloat16 and torch.equal(x, value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())


def test_widened_ends_with_an_error_inside_a_layer():
    policy = make("fresh", "bfloat16")
    policy.model.model.layers[1].mlp.forward = None
    with torch.no_grad(), pytest.raises(TypeError), widened(policy, torch.float32, CPU):
        policy.use_attention(policy.attention)
        policy(make_batch(*PAIRS)[0], lambda hidden, *more, **options: hidden)
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}


def test_a_model_that_cannot_be_widened_says_how_rounding_was_measured(monkeypatch, caplog):
    class NarrowAlone(torch.nn.Linear):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise RuntimeError("no kernel\nfor this dtype")
            return super().forward(x)

    policy = make("trained", "float32")
    policy.model.model.layers[0].mlp.down_proj.__class__ = NarrowAlone
    batch, state = make_batch(*PAIRS)[0], torch.get_rng_state()
    with caplog.at_level(logging.INFO, "fastalign"):
        assert verify_packed(policy, batch)
    reason = "measured with one rounding more in each layer, as it cannot run in float64 (no kernel)"
    assert reason in caplog.text and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="differ by"):
        verify_packed(policy, positions_that_go_on(batch))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_rounding_more_is_of_the_size_of_rounding(precision):
    batch = make_batch((9, [8, 12]), (6, [7, 9]))[0]
    with running(precision):
        policy = make("trained", precision)
        assert verify_packed(policy, batch)
        group = unpack_group(batch)
        ids, positions = group.input_ids, torch.arange(group.input_ids.shape[1])
        policy.model.set_attn_implementation("sdpa")
        with torch.no_grad(), roughened(policy, trained_dtype(policy, CPU)):
            rough = policy.plain_logits(ids, positions).float().log_softmax(-1)
        with torch.no_grad():
            moved = (rough - policy.plain_logits(ids, positions).float().log_softmax(-1)).abs().mean().item()
    assert 0.25 < moved / policy.rounding.distance.mean < 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sharded_policy_is_verified_too(precision, tmp_path, caplog, plant):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        policy = make("trained", precision)
        for block in policy.model.model.layers:
            fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        batch = make_batch(*PAIRS)[0]
        with running(precision), caplog.at_level(logging.INFO, "fastalign"):
            assert verify_packed(policy, batch)
            exact = (
                "measured against float32" if precision != "float32" else "in each layer, as its weights are sharded"
            )
            assert exact in caplog.text
            plant(lost_prompt)
            with pytest.raises(ValueError, match=r"it is with batch\.share_prefix false"):
                verify_packed(policy, batch)
    finally:
        dist.destroy_process_group()
