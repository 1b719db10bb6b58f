"""Small real architectures and packed rows of random tokens, laid out by hand."""

from itertools import accumulate

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.models.policy import Policy
from fastalign.models.verify import stock_implementation
from fastalign.types import PackedBatch

VOCAB = 61
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ONE_HEAD_EACH = {**SIZES, "num_key_value_heads": 4}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "vocab_size": VOCAB,
    "bos_token_id": None,
    "eos_token_id": None,
}

ARCHITECTURES = {
    "llama": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "mistral": {**SIZES, "sliding_window": 64},
    # soft caps low enough that they bend the scores and logits of random weights
    "gemma2": {
        **SIZES,
        "head_dim": 8,
        "final_logit_softcapping": 0.5,
        "attn_logit_softcapping": 0.5,
        "sliding_window": 64,
    },
    "gemma3_text": {**SIZES, "head_dim": 8, "sliding_window": 64},
    "gpt2": GPT2,
    "gpt_neox": {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
    "cohere": {**SIZES, "logit_scale": 0.5},
    "granite": {**SIZES, "logits_scaling": 4.0, "attention_multiplier": 0.5, "residual_multiplier": 0.5},
    "phi": ONE_HEAD_EACH,  # its head has a bias
}


class WideRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input: the Hugging Face one computes in fp32, which caps agreement near 1e-7.

    Gemma's weights are offsets from 1.
    """

    def __init__(self, norm):
        super().__init__()
        self.weight, self.offset = nn.Parameter(norm.weight.detach().clone()), 1.0 if hasattr(norm, "eps") else 0.0
        self.eps = norm.eps if self.offset else norm.variance_epsilon

    def forward(self, x):
        return (self.offset + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def plain_attention(module, query, key, value, attention_mask, scaling, softcap=None, **other):
    """Causal attention of ordinary rows by its definition, in the dtype of its inputs."""
    repeat = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeat, 1).transpose(-1, -2) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    out = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ value.repeat_interleave(repeat, 1)
    return out.transpose(1, 2), None


AttentionInterface.register("plain", plain_attention)


def make_model(kind, dtype=torch.float64, **options):
    """A model whose weights are large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**ARCHITECTURES[kind], **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.to(dtype)


def make_policy(kind, dtype=torch.float64, gradient_checkpointing=False, **options):
    return Policy(make_model(kind, dtype, **options), gradient_checkpointing=gradient_checkpointing)


def widen_norms(module):
    for name, child in module.named_children():
        if "RMSNorm" in type(child).__name__:
            setattr(module, name, WideRMSNorm(child))
        else:
            widen_norms(child)


def make_batch(*groups, share=True):
    """Groups `(P, [R1, R2, ...])` in one row, every response token scored; and the sequences `(prompt, response)`."""
    torch.manual_seed(len(groups))
    ids, positions, offsets, parents, rows, labels, cu, sequences = [], [], [0], [], [], [], [0], []

    def segment(tokens, first, parent):
        ids.extend(tokens)
        positions.extend(range(first, first + len(tokens)))
        offsets.append(len(ids))
        parents.append(parent)
        return len(parents) - 1

    for length, responses in groups:
        prompt = torch.randint(VOCAB, (length,)).tolist()
        root = segment(prompt, 0, -1) if share else None
        last_prompt_row = len(ids) - 1
        for count in responses:
            response = torch.randint(VOCAB, (count,)).tolist()
            if share:
                segment(response, length, root)
                rows.extend([last_prompt_row, *range(len(ids) - count, len(ids) - 1)][:count])
            else:
                segment(prompt + response, 0, -1)
                rows.extend(range(len(ids) - count - 1, len(ids) - 1))
            labels.extend(response)
            cu.append(len(labels))
            sequences.append((prompt, response))
    batch = PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        cu_segments=torch.tensor(offsets, dtype=torch.int32),
        parents=torch.tensor(parents, dtype=torch.int32),
        rows=torch.tensor(rows, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        cu_seqlens=torch.tensor(cu, dtype=torch.int32),
        example_ids=tuple(range(len(groups))),
        logical_tokens=sum(len(p) + len(r) for p, r in sequences),
        cu_groups=torch.tensor([0, *accumulate(len(responses) for _, responses in groups)], dtype=torch.int32),
    )
    return batch, sequences


PAIRS = ((7, [5, 3]), (4, [1, 6]), (1, [2, 2]), (5, [3, 4, 2, 1]), (3, [6]))


def logps_head(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0):
    logits = logit_scale * nn.functional.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def nested_batch(least=1):
    """A conversation that branches at each turn beside a pair, packed by the engine; and the sequences."""
    torch.manual_seed(3)

    def turn(length, first):
        return [first, *torch.randint(VOCAB, (length - 1,)).tolist()]

    opening, reply, other = turn(6, 1), turn(4, 2), turn(5, 3)
    deep = opening + reply + turn(3, 4)
    group = [
        (deep, turn(2, 5)),
        (deep, turn(4, 6)),
        (opening + reply, turn(3, 7)),
        (opening, other),
        (deep, turn(1, 8)),
    ]
    group += [(opening, other + turn(2, 9))]  # goes on where another ends
    prompt = turn(5, 1)
    sequences = [group, [(prompt, turn(3, 2)), (prompt, turn(6, 3))]]
    examples = [
        TokenExample(tuple((np.array(p + r), np.arange(len(p + r)) >= len(p)) for p, r in one), i)
        for i, one in enumerate(sequences)
    ]
    return build_batch(examples, True, least), [s for one in sequences for s in one]


def separate_logps(policy, sequences, attention=None):
    """Each sequence alone in a row, by the model's own forward and PyTorch's attention (eager if it has no other)."""
    policy.model.set_attn_implementation(attention or stock_implementation(policy.model))
    logps = []
    for prompt, response in sequences:
        logits = policy.model(torch.tensor([prompt + response]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(rows.gather(1, torch.tensor(response)[:, None])[:, 0])
    policy.model.set_attn_implementation(policy.attention)
    return torch.cat(logps)


def gradients(policy, logps):
    torch.manual_seed(1)
    weights = torch.randn(logps.shape, dtype=torch.float64)
    return torch.autograd.grad(
        (weights * logps).sum(), list(policy.parameters()), allow_unused=True, materialize_grads=True
    )


def relative_error(got, want):
    """Largest difference over all tensors, relative to the largest element of any."""
    scale = max(x.abs().max().item() for x in want)
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True)) / scale
