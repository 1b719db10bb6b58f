"""Adapters: the policy equals plain PEFT, is its own reference when that is exact, and is saved in PEFT's format."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from packed_cases import PAIRS, make_batch, make_model, widen_norms
from safetensors.torch import load_file, save_file
from test_load import inline, make_tokenizer

from fastalign.engine.methods import make_objective
from fastalign.engine.reference.frozen import frozen_copy, reference_logps
from fastalign.models import lora
from fastalign.models.head import head_of
from fastalign.models.load import load_policy, load_tokenizer, save_pretrained
from fastalign.models.lora import WithoutAdapter, switched_off, why_not_its_own_reference
from fastalign.models.policy import Policy
from fastalign.models.precision import trained_dtype, widened
from fastalign.models.verify import stock_implementation
from fastalign.ops import linear_logps

peft = pytest.importorskip("peft", reason="peft is not installed")

RANDOM = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
"""Equal weights: the policy's layers round otherwise than those of transformers."""
OBJECTIVE = make_objective("dpo", {})
HEAD = {"target_modules": ["q_proj", "lm_head"]}


def adapted(kind="llama", options=RANDOM, dtype=torch.float64, **model):
    base = make_model(kind, dtype, **model)
    if kind == "llama":  # the norms of others stay in fp32
        widen_norms(base)
    return lora.adapt(base, replace(inline(kind), lora=options), None, seed=0)


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def plain_logps(model, sequences):
    """Each sequence alone, by PEFT's own forward."""
    base, logps = model.get_base_model(), []
    base.set_attn_implementation(stock_implementation(base))  # eager rounds its softmax to fp32
    for prompt, response in sequences:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(rows.gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(logps)


def weighted_gradients(logps, parameters):
    torch.manual_seed(1)
    return torch.autograd.grad((torch.randn(len(logps), dtype=logps.dtype) * logps).sum(), parameters)


@pytest.mark.parametrize(
    "kind, options, tolerance",
    [
        ("llama", {}, 1e-12),
        ("llama", HEAD, 1e-12),
        ("llama", {**HEAD, "use_rslora": True}, 1e-12),
        ("llama", {"modules_to_save": ["lm_head", "norm"], "target_modules": ["v_proj"]}, 1e-12),
        ("llama", {"bias": "all", "use_dora": True}, 1e-12),
        ("llama", {"target_modules": ["lm_head"]}, 1e-12),
        ("gemma2", {"target_modules": ["q_proj", "lm_head"]}, 5e-6),  # tied, soft-capped; its rotary tables are fp32
        ("gpt2", {}, 5e-6),  # transposed layers, fp32 softmax
    ],
)
def test_log_probs_and_gradients_are_those_of_peft(kind, options, tolerance):
    model = adapted(kind, {**RANDOM, **options})
    batch, sequences = make_batch(*PAIRS)
    policy = Policy(model)
    packed = policy(batch, linear_logps)
    gradients = weighted_gradients(packed, trained(policy))
    plain = plain_logps(model, sequences)
    expected = weighted_gradients(plain, trained(model))
    assert (packed - plain).abs().max() < tolerance
    scale = max(g.abs().max() for g in expected)
    assert len(expected) >= 2 and all(g.abs().max() > 0 for g in expected)
    assert all((a - b).abs().max() < tolerance * scale for a, b in zip(gradients, expected, strict=True))
    with torch.no_grad(), switched_off(policy):
        assert (packed - plain_logps(model, sequences)).abs().max() > 1e-3  # the adapter is no ornament


def test_no_merged_weight_reaches_the_head():
    policy = Policy(adapted(options={**RANDOM, **HEAD}))
    batch, _ = make_batch(*PAIRS)
    weight, down, up, scale = policy(batch, lambda hidden, weight, labels, lora: (weight, *lora))
    layer = policy.model.lm_head
    assert weight is layer.base_layer.weight and not weight.requires_grad
    assert down is layer.lora_A["default"].weight and up is layer.lora_B["default"].weight and scale == 5 / 3


def test_gradient_checkpointing_changes_nothing():
    batch, results = make_batch(*PAIRS)[0], []
    for on in (False, True):
        policy = Policy(adapted(options={**RANDOM, **HEAD}), gradient_checkpointing=on).train()
        logps = policy(batch, linear_logps)
        results.append([logps, *weighted_gradients(logps, trained(policy))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, HEAD, {**HEAD, "init_lora_weights": "gaussian"}])
def test_a_zero_adapter_is_its_own_reference_to_the_bit(options, dtype):
    policy = Policy(adapted(options=options, dtype=dtype)).train()
    assert why_not_its_own_reference(policy) is None
    batch, _ = make_batch(*PAIRS[:3])
    off, on = (reference_logps(x, batch, OBJECTIVE) for x in (WithoutAdapter(policy), policy))
    assert torch.equal(off, on)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert torch.equal(reference_logps(WithoutAdapter(policy), batch, OBJECTIVE), off)
    assert not torch.equal(reference_logps(policy, batch, OBJECTIVE), off)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"modules_to_save": ["lm_head"]}, r"1 other tensors .*\(lm_head\.modules_to_save\.weight\)"),
        ({"modules_to_save": ["embed_tokens", "norm"]}, "6 other tensors .*embed_tokens"),  # "norm" ends five names
        ({"use_dora": True}, r"14 other tensors .*lora_magnitude_vector"),
        ({"init_lora_weights": False}, "does not start at zero"),
        ({"init_lora_weights": False, **HEAD}, "does not start at zero"),
        ({"target_modules": ["embed_tokens"], "init_lora_weights": False}, "does not start at zero"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, None),
        ({"lora_bias": True}, None),
    ],
)
def test_when_a_policy_is_no_reference_of_itself(options, reason):
    found = why_not_its_own_reference(Policy(adapted(options=options)))
    assert (found is None) == (reason is None) and re.search(reason or "", found or ""), found


def test_trained_biases_are_no_part_of_an_adapter():
    policy = Policy(adapted("gpt2", {"bias": "all"}))
    assert "other tensors train" in why_not_its_own_reference(policy)
    assert why_not_its_own_reference(Policy(make_model("llama"))) == "all weights train"


def test_one_layer_that_adds_something_is_enough():
    policy = Policy(adapted(options=HEAD))
    with torch.no_grad():
        policy.head.lora_B["default"].weight[3, 1] = 1e-30
    assert why_not_its_own_reference(policy) == "the adapter does not start at zero"


def test_switching_off_leaves_every_flag_as_it_is():
    policy = Policy(adapted(options={}))
    frozen = policy.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    flags = [p.requires_grad for p in policy.parameters()]
    with pytest.raises(KeyError), switched_off(policy):
        assert [p.requires_grad for p in policy.parameters()] == flags
        raise KeyError
    assert [p.requires_grad for p in policy.parameters()] == flags and not frozen.requires_grad
    assert not policy.head.training or not policy.model.model.layers[0].self_attn.q_proj.disable_adapters


def test_a_frozen_copy_holds_the_adapter_and_shares_the_base():
    policy = Policy(adapted(options={**RANDOM, "modules_to_save": ["lm_head"]}))
    reference, batch = frozen_copy(policy, share=True), make_batch(*PAIRS[:3])[0]
    before = reference_logps(reference, batch, OBJECTIVE)
    assert torch.equal(before, reference_logps(policy, batch, OBJECTIVE))
    mine, theirs = ({p.data_ptr() for p in x.parameters()} for x in (policy, reference))
    assert len(theirs - mine) == len(trained(policy)) and not trained(reference)
    assert reference.adapted.get_base_model() is reference.model is not policy.model
    with torch.no_grad():
        for parameter in trained(policy):
            parameter.add_(1.0)
    assert torch.equal(before, reference_logps(reference, batch, OBJECTIVE))
    assert not {p.data_ptr() for p in frozen_copy(policy).parameters()} & mine


# --- whole weights beside it -----------------------------------------------------------------------------------------

WHOLE = {**RANDOM, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens"]}


def half_before_it_was_raised(monkeypatch, kind, options):
    """The same adapter, its whole weights in half precision."""
    with monkeypatch.context() as patch:
        patch.setattr(lora, "raise_trained", lambda model: None)
        return adapted(kind, options, torch.bfloat16)


@pytest.mark.parametrize("kind, options", [("llama", WHOLE), ("gpt2", {**RANDOM, "bias": "all"})])
def test_whole_weights_beside_an_adapter_train_in_fp32_and_are_used_rounded(monkeypatch, kind, options):
    """As weights with masters: the same log-probs, and the same gradients before they are added up."""
    plain, model = half_before_it_was_raised(monkeypatch, kind, options), adapted(kind, options, torch.bfloat16)
    policies, (batch, _) = (Policy(plain), Policy(model)), make_batch(*PAIRS[:3])
    assert {p.dtype for p in trained(plain)} == {torch.float32, torch.bfloat16}
    assert {p.dtype for p in trained(model)} == {torch.float32}
    want, got = (policy(batch, linear_logps) for policy in policies)
    assert torch.equal(want, got)
    gradients = (weighted_gradients(x, trained(p)) for x, p in zip((want, got), policies, strict=True))
    pairs = list(zip(*gradients, strict=True))
    assert all(torch.equal(a.float(), b) and b.any() for a, b in pairs) and len(pairs) > 4


def test_a_step_too_small_for_half_precision_is_kept_but_not_exported(tmp_path):
    policy = Policy(adapted(options=WHOLE, dtype=torch.bfloat16))
    head = policy.head.modules_to_save["default"].weight
    before = head.detach().clone()
    with torch.no_grad():
        head += 1e-6
    assert not torch.equal(head, before)
    reference = frozen_copy(policy)
    assert reference.head.weight.dtype == torch.float32 and head_of(reference.head).weight.dtype == torch.bfloat16
    save_pretrained(policy, None, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (exported,) = (x for name, x in saved.items() if "lm_head" in name)
    assert exported.dtype == torch.bfloat16 and torch.equal(exported, head.bfloat16())
    assert {x.dtype for name, x in saved.items() if "lora_" in name} == {torch.float32}


def test_a_check_of_rounding_sees_whole_weights_as_they_are():
    policy, (batch, _) = Policy(adapted(options=WHOLE, dtype=torch.bfloat16)), make_batch(*PAIRS[:3])
    before = {name: x.clone() for name, x in policy.named_parameters()}
    device = torch.device("cpu")
    assert trained_dtype(policy, device) == torch.bfloat16
    with torch.no_grad(), widened(policy, torch.float64, device):
        wide = policy(batch, lambda hidden, weight, labels: (hidden.dtype, weight.dtype))
    assert wide == (torch.float64, torch.float64)
    assert all(x.dtype == before[n].dtype and torch.equal(x, before[n]) for n, x in policy.named_parameters())
    assert policy(batch, lambda hidden, weight, labels: weight.dtype) == torch.bfloat16


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 4}, r"unknown key 'rank' in model\.lora.*; expected one of r, lora_alpha, "),
        ({"lora_alfa": 4}, r"did you mean 'lora_alpha'\?"),
        ({"lora_dropout": 0.1}, r"model\.lora\.lora_dropout must be 0, got 0\.1: copies of a shared prompt"),
        ({"init_lora_weights": "pissa"}, "must be true, false or gaussian, got 'pissa'"),
        ({"trainable_token_indices": [1]}, "unknown key 'trainable_token_indices'"),
        ({"layer_replication": [[0, 2]]}, "unknown key 'layer_replication'"),
        ({"r": 0}, r"model\.lora makes no adapter: ValueError: .*positive"),
        ({"r": "many"}, r"model\.lora makes no adapter: TypeError"),
        ({"target_modules": ["nowhere"]}, r"model\.lora makes no adapter: .*Target modules .*nowhere"),
        ({**HEAD, "use_dora": True}, "of the LM head is not plain LoRA; leave the head out of target_modules"),
        ({**HEAD, "lora_bias": True}, "of the LM head is not plain LoRA"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, words):
    with pytest.raises(ValueError, match=words) as raised:
        load_policy(replace(inline(), lora=options))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"config": {"model_type": "llama"}, "quantization": {}}, r"needs model\.path"),
        ({"path": "some", "quantization": {"load_in_4bit": True}}, r"set model\.lora beside model\.quantization"),
        ({"path": "some", "quantization": {}, "lora": {}}, r"pip install 'fastalign\[qlora\]'"),
    ],
)
def test_quantised_weights_need_an_adapter_and_their_library(options, words, monkeypatch):
    without(monkeypatch, "bitsandbytes")
    section = replace(inline(), **{"config": None, **options})
    with pytest.raises(ValueError, match=words):
        lora.check(section)


def without(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a))


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    without(monkeypatch, "peft")
    with pytest.raises(ValueError, match=r"adapters need the peft library: pip install 'fastalign\[lora\]'"):
        lora.check(replace(inline(), lora={}))
    lora.check(inline())


def test_the_seed_gives_the_adapter_and_nothing_else_is_drawn():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (trained(load_policy(replace(inline(), lora={}), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A base in `base/`, and a random adapter of it with a head of its own in `adapter/`."""
    section = inline()
    where = save_pretrained(load_policy(section), make_tokenizer(), tmp_path / "base")
    options = {**RANDOM, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    policy = load_policy(replace(section, path=str(where), config=None, lora=options))
    with torch.no_grad():
        policy.head.weight.add_(0.1)
    save_pretrained(policy, None, tmp_path / "adapter")
    return policy, tmp_path / "adapter"


def logits(model):
    model.eval().set_attn_implementation("eager") if hasattr(model, "set_attn_implementation") else None
    return model(input_ids=torch.arange(10)[None], use_cache=False).logits


def of(where, **options):
    return replace(inline(), path=str(where), config=None, **options)


def test_peft_loads_what_is_saved(saved):
    policy, where = saved
    policy.model.set_attn_implementation("eager")
    expected = logits(policy.model)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(where, attn_implementation="eager")
    close(logits(again), expected)
    base = load_policy(of(where.parent / "base")).model
    base.set_attn_implementation("eager")
    assert (logits(base) - expected).abs().max() > 1e-3
    close(logits(peft.PeftModel.from_pretrained(base, where)), expected)
    names = load_file(where / "adapter_model.safetensors")
    assert len(names) == len(trained(policy)) and all("lora_" in n or "lm_head" in n for n in names)


def test_a_saved_adapter_goes_on_training(saved):
    policy, where = saved
    again, batch = load_policy(of(where)), make_batch(*PAIRS)[0]
    assert torch.equal(again(batch, linear_logps), policy(batch, linear_logps))
    assert [p.shape for p in trained(again)] == [p.shape for p in trained(policy)]
    assert "other tensors" in why_not_its_own_reference(again)
    assert load_tokenizer(of(where)).eos_token == "</s>"  # that of the base
    twice = save_pretrained(again, None, where.parent / "twice")
    assert torch.equal(load_policy(of(twice))(batch, linear_logps), policy(batch, linear_logps))


def test_the_base_of_an_inline_config_is_saved_beside_and_moves_along(tmp_path):
    section = replace(inline(), lora=RANDOM)
    policy, batch = load_policy(section), make_batch(*PAIRS)[0]
    from fastalign.models.load import load_base

    where = save_pretrained(policy, make_tokenizer(), tmp_path / "model", base=load_base(section))
    policy.model.set_attn_implementation("eager")
    expected = logits(policy.model)
    close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(where)), expected)
    policy.model.set_attn_implementation(policy.attention)
    moved = shutil.move(where, tmp_path / "moved")
    assert torch.equal(load_policy(of(moved))(batch, linear_logps), policy(batch, linear_logps))


def test_a_save_that_dies_leaves_the_old_adapter(saved, monkeypatch):
    policy, where = saved
    before = (where / "adapter_model.safetensors").read_bytes()

    def die(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(peft.LoraConfig, "save_pretrained", die)  # the last file that is written
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(policy, None, where)
    assert (where / "adapter_model.safetensors").read_bytes() == before


def edit(where, **changes):
    file = where / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"trainable_token_indices": [1]}, "unknown key 'trainable_token_indices' in .*adapter"),
        ({"init_lora_weights": "olora"}, r"adapter\.init_lora_weights must be true, false or gaussian"),
        ({"peft_type": "IA3"}, "adapter of type IA3: only LORA is served"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"r": 2}, "cannot be loaded: RuntimeError: .*size mismatch"),
    ],
)
def test_adapters_of_another_kind_are_refused(saved, changes, words):
    edit(saved[1], **changes)
    with pytest.raises(ValueError, match=words) as raised:
        load_policy(of(saved[1]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_refused(saved, damage):
    file = saved[1] / damage
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"the adapter .* cannot be loaded: "):
        load_policy(of(saved[1]))


@pytest.mark.parametrize("word, error", [("lora_B", "UserWarning: .*missing adapter keys"), ("lm_head", "KeyError")])
def test_an_adapter_that_lacks_weights_is_refused(saved, word, error):
    file = saved[1] / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if word in name)
    save_file({name: x for name, x in tensors.items() if name != lost}, file)
    with pytest.raises(ValueError, match=rf"cannot be loaded: {error}"):
        load_policy(of(saved[1]))


def test_an_adapter_on_an_adapter_is_refused(saved):
    with pytest.raises(ValueError, match=r"is an adapter already, which goes on training: leave model\.lora out"):
        load_policy(of(saved[1], lora={}))


def test_dropout_of_a_saved_adapter_is_switched_off_aloud(saved, caplog):
    edit(saved[1], lora_dropout=0.05)
    policy = load_policy(of(saved[1]))
    assert "lora_dropout 0.05" in caplog.text and policy.adapted.peft_config["default"].lora_dropout == 0
    assert not any(getattr(m, "p", 0) for m in policy.modules() if isinstance(m, torch.nn.Dropout))
