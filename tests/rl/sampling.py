"""Small models to sample from, and what is compared of what they sample."""

from functools import cache

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.config import ModelConfig, SamplerConfig
from fastalign.models import lora
from fastalign.models.native import use_native_layers
from fastalign.models.policy import Policy
from fastalign.rl.sampler import NativeSampler, Stops
from fastalign.types import Prompt

VOCAB = 300
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "max_position_embeddings": 128}
EVERYWHERE = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"]}


@cache
def make_policy(kind="llama", dtype=torch.float32, attention="auto", adapter=False, **options):
    """A model whose distributions are neither flat nor sharp; with an adapter also on its head."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.to(dtype)
    adapted = lora.adapt(model, ModelConfig(lora=EVERYWHERE), None, 0) if adapter else model
    policy = Policy(adapted, attention=attention)
    if adapter:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn(parameter.shape) * 0.1)
    use_native_layers(model)
    return policy


def make_sampler(policy, stops=None, **settings):
    return NativeSampler(policy, SamplerConfig(**{"max_new_tokens": 10, **settings}), stops or Stops())


def make_prompts(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [Prompt(random.integers(VOCAB, size=length), 10 + i) for i, length in enumerate(lengths)]


def in_order(rollouts):
    return sorted(rollouts, key=lambda rollout: (rollout.row, rollout.sample))


def told(rollouts):
    """What was sampled, by prompt and sample: tokens, log-probs bit by bit, and the end."""
    return {(r.row, r.sample): (r.tokens.tolist(), r.sampler_logps.tobytes(), r.finish) for r in rollouts}
