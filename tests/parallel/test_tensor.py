"""Layers that are split over a tensor axis."""

from contextlib import nullcontext
from pathlib import Path

import forks
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.models.policy import Policy
from fastalign.parallel.tensor import check_complete, check_sizes, plan_of

RANKS = Path(__file__).with_name("ranks_tensor.py")


@pytest.mark.slow
@pytest.mark.parametrize("shape, ranks", [("1x1x2", 2), ("1x2x2", 4)])
def test_split_layers_have_the_losses_and_gradients_of_one_process(shape, ranks):
    assert forks.run(RANKS, shape, ranks=ranks).count("agreed on all") == ranks


@pytest.mark.parametrize(
    "kind, words",
    [
        ("gpt2", "transformers has no plan for splitting the layers of gpt2 models"),
        ("mixtral", "of mixtral models is split as '[a-z_]+' by transformers' plan, which is not served"),
        ("phi3", "of phi3 models is split as '[a-z_]+' by transformers' plan, which is not served"),
    ],
)
def test_models_that_cannot_be_split_are_refused(kind, words):
    with pytest.raises(ValueError, match=rf"^parallel\.tp: .*{words}.*: set parallel\.tp to 1$"):
        plan_of(AutoConfig.for_model(kind))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "granite"])
def test_transformers_has_a_plan_that_is_served(kind):
    assert len(plan_of(AutoConfig.for_model(kind))) >= 7


def test_a_weight_inside_that_the_plan_leaves_out_is_refused():
    """Cohere's norms of heads are cut with the heads, which transformers' plan does not say."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    for norms in (False, True):
        config = AutoConfig.for_model("cohere", vocab_size=37, use_qk_norm=norms, pad_token_id=0, **sizes)
        policy = Policy(AutoModelForCausalLM.from_config(config))
        words = r"^parallel\.tp: layers\.0\.self_attn\.q_norm of cohere models is not in transformers' plan"
        with pytest.raises(ValueError, match=words) if norms else nullcontext():
            check_complete(policy, plan_of(config))


def test_numbers_of_parts_that_do_not_divide_are_refused():
    sizes = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 176}
    config = AutoConfig.for_model("llama", **sizes)
    for parts in (1, 2, 4):
        check_sizes(config, parts)
    sizes = "12 attention heads, 4 key/value heads, 176 units of an MLP"
    words = f"does not divide the model's {sizes}: set it to one of 1, 2, 4"
    for parts in (3, 8, 12):
        with pytest.raises(ValueError, match=rf"^parallel\.tp {parts} {words}$"):
            check_sizes(config, parts)
    with pytest.raises(ValueError, match=r"^parallel\.tp 4 leaves a rank without any of 9 tokens: lower it$"):
        check_sizes(AutoConfig.for_model("llama", vocab_size=9), 4)
