"""A toy actor-critic: one trunk, a policy loss through the LM head and a value loss beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign.data.examples import TokenExample
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.types import PackedBatch, TokenStats

VALUE_WEIGHT = 0.5


def make_policy(vocab: int) -> Policy:
    """GPT-2 in float64 with a value head that is not at 0 any more."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "vocab_size": vocab, "n_positions": 64}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", bos_token_id=None, eos_token_id=None, **sizes)
    policy = Policy(AutoModelForCausalLM.from_config(config).double(), value_head=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return policy


def targets(example: int, number: int) -> tuple[Tensor, Tensor]:
    """Advantages and returns of an example's scored tokens."""
    at = torch.arange(number, dtype=torch.float64)
    return torch.sin(5.0 * example + at), torch.cos(3.0 * example - at)


def total_of(examples: Sequence[TokenExample]) -> int:
    """Scored tokens."""
    return sum(int(scored.sum()) for example in examples for _, scored in example.sequences)


def accumulate(policy: Policy, batches: Sequence[PackedBatch], scale: float) -> Tensor:
    """Gradients of ``scale`` times the summed losses of tokens are left in the parameters; returns that sum."""
    return sum((backward(policy, batch, scale) for batch in batches), torch.zeros(2, dtype=torch.float64))


def backward(policy: Policy, batch: PackedBatch, scale: float) -> Tensor:
    """Of one micro-batch: policy loss and value loss."""
    lengths = batch.cu_seqlens.diff().tolist()
    made = [targets(*pair) for pair in zip(batch.example_ids, lengths, strict=True)] or [targets(0, 0)]
    advantages, returns = (torch.cat(each) for each in zip(*made, strict=True))

    def actor(stats: TokenStats) -> Tensor:
        return -(advantages[stats.rows] * stats.logps).sum() * scale

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, *, values: Tensor, **options: Tensor) -> tuple:
        return linear_loss(hidden, weight, labels, actor, **options)[0], (values - returns).square().sum() * scale

    losses = policy(batch, head, values=True)
    (losses[0] + VALUE_WEIGHT * losses[1]).backward()
    return torch.stack(losses).detach()


def plain(policy: Policy, examples: Sequence[TokenExample], scale: float) -> Tensor:
    """The same by the model's own forward on each sequence alone, whole logits and no head function."""
    total = torch.zeros(2, dtype=torch.float64)
    for example in examples:
        ids, scored = example.sequences[0]
        ids, rows = torch.from_numpy(ids)[None], torch.from_numpy(scored).nonzero()[:, 0] - 1
        output = policy.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        logps = -cross_entropy(output.logits[0, rows], ids[0, rows + 1], reduction="none")
        values = policy.value_head(output.hidden_states[-1][0, rows])[:, 0]
        advantages, returns = targets(example.example_id, len(rows))
        losses = torch.stack([-(advantages * logps).sum() * scale, (values - returns).square().sum() * scale])
        (losses[0] + VALUE_WEIGHT * losses[1]).backward()
        total += losses.detach()
    return total
