"""Which kinds of models run on packed rows: seen from a config alone, with no weight in memory."""

import time

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from fastalign.config import ModelConfig
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.models import outline
from fastalign.models.inline import known_keys
from fastalign.models.load import check_model, load_policy
from fastalign.models.policy import Policy
from fastalign.models.verify import verify_packed

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64, "moe_intermediate_size": 16},
    **{"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
    **{"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "shared_expert_intermediate_size": 16},
    **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe")
RUN = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt", "cohere2", *MIXTURES)
LATENT = "has keys of 16 and values of 8 numbers (multi-head latent attention); the packed attention takes both of one"
STATE = "layers carry state or read spans across sequence boundaries"
REFUSED = {
    "deepseek_v2": f"DeepseekV2Attention {LATENT}",
    "deepseek_v3": f"DeepseekV3Attention {LATENT}",
    "gpt_oss": "GptOssAttention passes attention sinks (s_aux), which the packed attention does not compute",
    "nemotron": "its layers do not pass on the keywords of a forward, by which attention learns of packed rows",
    "bert": "BertSelfAttention is bidirectional; packed rows are causal",
    "roberta": "RobertaSelfAttention is bidirectional; packed rows are causal",
    "modernbert": "transformers has no class that makes a causal LM of it",
    "t5": "it is an encoder-decoder; a decoder-only causal LM is expected",
    "bart": "it is an encoder-decoder; a decoder-only causal LM is expected",
    "mamba": f"linear_attention {STATE}",
    "jamba": f"linear_attention {STATE}",
    "qwen3_next": f"linear_attention {STATE}",
    "falcon_h1": f"hybrid {STATE}",
    "rwkv": f"recurrent {STATE}",
    "llama4_text": f"chunked_attention {STATE}",
    "gemma3": "it reads more than text; load its text model",
    "qwen2_5_vl": "it reads more than text; load its text model",
    "bloom": "its attention is not behind transformers' AttentionInterface",
}


def described(kind):
    """A small config of any kind."""
    return {name: value for name, value in SIZES.items() if name in known_keys(CONFIG_MAPPING[kind])}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_cannot_run_is_refused_by_its_config_in_one_line(kind):
    with pytest.raises(ValueError) as raised:
        check_model(ModelConfig(config={"model_type": kind, **described(kind)}))
    said = str(raised.value)
    assert said.startswith(f"model.config: a {kind} model cannot run on packed rows: {REFUSED[kind]}")
    assert "\n" not in said and len(said) < 220


@pytest.mark.parametrize("kind", RUN)
def test_a_kind_that_is_let_through_runs_exactly(kind):
    config = AutoConfig.for_model(kind, **described(kind))
    before = config.to_dict()
    assert outline.why_not(config, False, False) is None and config.to_dict() == before
    torch.manual_seed(0)
    draw, examples = np.random.default_rng(0), []
    for i in range(3):
        prompt, ends = draw.integers(0, 61, 6), (draw.integers(0, 61, 5), draw.integers(0, 61, 3))
        sequences = tuple((np.concatenate([prompt, end]), np.arange(6 + len(end)) >= 6) for end in ends)
        examples.append(TokenExample(sequences, i))
    assert verify_packed(Policy(AutoModelForCausalLM.from_config(config)), build_batch(examples, True))


def test_a_directory_is_refused_by_its_config_and_named(tmp_path):
    AutoConfig.for_model("bert", **described("bert")).save_pretrained(tmp_path)  # there are no weights to load
    for setting in ("model.path", "reference.path"):
        with pytest.raises(ValueError, match=f"^{setting}: '{tmp_path}': a bert model cannot run on packed rows: Bert"):
            check_model(ModelConfig(path=str(tmp_path)), setting=setting)


def test_a_kind_without_a_scalar_head_makes_no_reward_model():
    section = ModelConfig(config={"model_type": "smollm3", **described("smollm3")})
    check_model(section, scalar_head=True)
    section.config = {"model_type": "olmoe", **described("olmoe")}
    with pytest.raises(ValueError, match=r"a olmoe model .*: transformers has no class that makes a sequence classif"):
        check_model(section, scalar_head=True)


def test_an_outline_of_a_large_model_takes_neither_memory_nor_long():
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=8, vocab_size=128256)
    started = time.perf_counter()
    assert outline.why_not(config, False, False) is None
    assert time.perf_counter() - started < 30  # 280 GB of weights would take longer to draw


def test_a_policy_is_refused_as_before_where_nobody_asked():
    with pytest.raises(ValueError, match="cannot run on packed rows: linear_attention layers"):
        load_policy(ModelConfig(config={"model_type": "qwen3_next", **described("qwen3_next")}))
