"""GRPO from scratch: a whole run of reinforcement learning on fastalign's ops and sampler, without its engine.

A small Llama with random weights first imitates words with their letters in order, `listen -> eilnst`, until some
answers are right. Then it samples eight answers to each word, is rewarded for the right ones, and makes those likelier.

    python examples/grpo_from_scratch.py

prints the share of right answers, among the sampled ones and of held-out words, as it rises: about a minute on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fastalign.config import SamplerConfig
from fastalign.data.builtin import letter_tokenizer, sort_letters
from fastalign.data.examples import TokenExample
from fastalign.data.pack import build_batch
from fastalign.losses.policy import ppo
from fastalign.models.native import use_native_layers
from fastalign.models.policy import Policy
from fastalign.ops import linear_loss
from fastalign.rl.advantages import grpo
from fastalign.rl.sampler import NativeSampler, Stops
from fastalign.types import Columns, Prompt, Rollout, TokenStats

WORDS, GENERATIONS = 64, 8


def make_policy(tokenizer) -> Policy:
    """A Llama of 0.6 million parameters with random weights, whose forward takes packed rows."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
    settings = LlamaConfig(**sizes, vocab_size=len(tokenizer), tie_word_embeddings=True, max_position_embeddings=64)
    policy = Policy(AutoModelForCausalLM.from_config(settings))
    use_native_layers(policy.model)  # the same layers in fewer, larger calls
    return policy


def train(policy: Policy, optimizer: torch.optim.Optimizer, examples: list[TokenExample], loss: Callable) -> float:
    """One update of a mean over scored tokens; the log-probs are made in the head, chunk by chunk.

    Args:
        examples: groups of sequences; what a group begins with, its prompt, is computed once.
        loss: from statistics of tokens and their columns to a loss per token.
    """
    batch = build_batch(examples, share_prefix=True)

    def share(stats: TokenStats) -> Tensor:  # of the step's loss, of one chunk
        return loss(stats.logps, batch.columns.at(stats)).sum() / batch.num_scored

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, **options) -> Tensor:
        return linear_loss(hidden, weight, labels, share, **options)[0]

    value = policy(batch, head)
    value.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def sequence(prompt: np.ndarray, completion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and which of them are scored."""
    return np.concatenate([prompt, completion]), np.arange(len(prompt) + len(completion)) >= len(prompt)


def imitate(policy: Policy, tokenizer, rows: Sequence[dict], steps: int) -> None:
    """Supervised fine-tuning: the warm-up, since a model that is never right has nothing to learn from rewards."""
    optimizer = torch.optim.AdamW(policy.parameters(), 2e-3)
    draws = np.random.default_rng(0)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 10) * (1 - (step - 1) / steps)
        chosen = [rows[i] for i in draws.integers(len(rows), size=128).tolist()]
        encoded = [(tokenizer(r["prompt"])["input_ids"], tokenizer(r["answer"])["input_ids"]) for r in chosen]
        pairs = [sequence(np.array(p), np.array([*a, tokenizer.eos_token_id])) for p, a in encoded]
        examples = [TokenExample((pair,), i) for i, pair in enumerate(pairs)]
        loss = train(policy, optimizer, examples, lambda logps, columns: -logps)
        if step % 25 == 0 or step == steps:
            print(f"imitate {step:3}: loss {loss:.3f}", flush=True)


def reward(tokenizer, row: dict, rollout: Rollout) -> float:
    """1 for the letters in order, 0 for anything else."""
    return float(tokenizer.decode(rollout.tokens, skip_special_tokens=True) == row["answer"])


def prompts_of(tokenizer, rows: Sequence[dict], indices: Sequence[int]) -> list[Prompt]:
    """The prompts of some rows; a sample depends on the row's number, not on where it stands in a batch."""
    return [Prompt(np.array(tokenizer(rows[i]["prompt"])["input_ids"]), i) for i in indices]


def reinforce(policy: Policy, tokenizer, rows: Sequence[dict], held_out: Sequence[dict], steps: int) -> list[float]:
    """GRPO: sample, score, compare within the word, update; returns the mean reward of every step."""
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-4, weight_decay=0.0)
    sampler = NativeSampler(policy, SamplerConfig(max_new_tokens=12), Stops(frozenset([tokenizer.eos_token_id])))
    draws, means = np.random.default_rng(1), []

    def right(answers: Sequence[dict], indices: Sequence[int]) -> float:
        found = sampler.generate(prompts_of(tokenizer, answers, indices), 1, seed=0)
        return float(np.mean([reward(tokenizer, answers[one.row], one) for one in found]))

    print(f"held-out words right: {right(held_out, range(len(held_out))):.3f}", flush=True)
    for step in range(1, steps + 1):
        chosen = draws.choice(len(rows), WORDS, replace=False).tolist()
        found = list(sampler.generate(prompts_of(tokenizer, rows, chosen), GENERATIONS, seed=step))
        found.sort(key=lambda one: (one.row, one.sample))  # they come as they end
        rewards = torch.tensor([reward(tokenizer, rows[one.row], one) for one in found])
        advantages = grpo(rewards, torch.tensor([one.row for one in found]))
        train(policy, optimizer, groups(found, advantages), lambda logps, c: ppo(logps, c.old_logps, c.advantages))
        means.append(rewards.mean().item())
        if step % 20 == 0 or step == steps:
            print(f"step {step:3}: reward {np.mean(means[-20:]):.3f}", flush=True)
    print(f"held-out words right: {right(held_out, range(len(held_out))):.3f}", flush=True)
    return means


def groups(rollouts: Sequence[Rollout], advantages: Tensor) -> list[TokenExample]:
    """The answers to each word as one example, with the advantage and the sampling log-prob of every token."""
    examples = []
    for start in range(0, len(rollouts), GENERATIONS):
        some = rollouts[start : start + GENERATIONS]
        lengths = torch.tensor([len(one.tokens) for one in some])
        each = advantages[start : start + GENERATIONS].repeat_interleave(lengths)
        old = torch.from_numpy(np.concatenate([one.sampler_logps for one in some]))
        sequences = tuple(sequence(one.prompt, one.tokens) for one in some)
        examples.append(TokenExample(sequences, some[0].row, columns=Columns(advantages=each, old_logps=old)))
    return examples


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Both stages; returns the mean reward of every step of the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imitate", type=int, default=100, help="updates of the first stage")
    parser.add_argument("--steps", type=int, default=200, help="steps of the second")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokenizer = letter_tokenizer()
    policy, rows = make_policy(tokenizer), sort_letters().to_list()
    imitate(policy, tokenizer, rows, options.imitate)
    return reinforce(policy, tokenizer, rows, sort_letters("test").to_list(), options.steps)


if __name__ == "__main__":
    main()
