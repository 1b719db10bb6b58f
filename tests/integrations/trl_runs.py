"""Short runs of TRL's trainers on tiny models and real text; equal seeds give equal runs."""

from functools import cache

import torch
import trl
from datasets import Dataset
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fastalign.data import builtin

VOCAB, STEPS = 300, 4
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
QUIET = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2}


def model(kind, seed):
    """Logits far from uniform, so that entropies, ratios and softcaps matter."""
    torch.manual_seed(seed)
    if kind == "gemma2":
        made = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0))
    else:
        made = LlamaForCausalLM(LlamaConfig(**SIZES))
    made.get_output_embeddings().weight.data.normal_(std=0.3)
    return made


@cache
def data(kind):
    """A dozen rows, some words long: pairs, completions, labelled completions or prompts."""
    cut = {"prompt": 3, "chosen": 3, "rejected": 6}  # words; sides of unequal lengths
    rows = builtin.docstring_pairs("test").select(range(12))
    pairs = [{name: " " + " ".join(row[name].split()[:n]) for name, n in cut.items()} for row in rows]
    both = [(pair["prompt"], pair[side], side == "chosen") for pair in pairs for side in ("chosen", "rejected")]
    made = {
        "pairs": pairs,
        "labels": [{"prompt": p, "completion": c, "label": good} for p, c, good in both],
        "completions": [{"prompt": p, "completion": c} for p, c, _ in both],
        "prompts": [{"prompt": pair["prompt"]} for pair in pairs],
    }
    return Dataset.from_list(made[kind])


def reward(completion_ids, **_):
    """Differs between the samples of a group, so that advantages are not zero."""
    return [sum(token % 7 for token in ids) / 7 for ids in completion_ids]


def run(cls, config, rows, directory, kind="llama", reference=True, peft_config=None, **options):
    """Losses, gradient norms and metrics of every step."""
    args = config(str(directory), **{**QUIET, **options})
    policy, other, extra = model(kind, 0), model(kind, 1), {"peft_config": peft_config}
    if rows == "prompts":  # its reference is loaded from where the policy came from
        other.save_pretrained(directory / "reference")
        policy.config._name_or_path, extra["reward_funcs"] = str(directory / "reference"), reward
    elif rows != "completions" and reference:
        extra["ref_model"] = other
    tokenizer = builtin.train_tokenizer(VOCAB)
    trainer = cls(model=policy, args=args, train_dataset=data(rows), processing_class=tokenizer, **extra)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


CASES = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, "completions", {}),
    "sft-dft": (trl.SFTTrainer, trl.SFTConfig, "completions", {"loss_type": "dft", "gradient_accumulation_steps": 2}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, "pairs", {}),
    "dpo-weighted": (
        *(trl.DPOTrainer, trl.DPOConfig, "pairs"),
        {"kind": "gemma2", "use_weighting": True, "loss_type": ["ipo", "sigmoid"], "loss_weights": [1.0, 0.5]},
    ),
    "kto": (trl.KTOTrainer, trl.KTOConfig, "labels", {}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, "prompts", {**SAMPLED, "temperature": 0.7, "loss_type": "grpo"}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, "prompts", SAMPLED),
}
"""Trainer, its config, its data and options."""


def losses_of(name, directory, trainer=None):
    """The steps of a case, by its own trainer or by a subclass of it."""
    cls, config, rows, options = CASES[name]
    return run(trainer or cls, config, rows, directory, **options)


def assert_equal_runs(one, other):
    """Losses within 1e-5, everything logged within 1e-5 of its size: both sides round in fp32."""
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and a["grad_norm"] == a["grad_norm"]
        assert abs(a["loss"] - b["loss"]) <= 1e-5, (a["loss"], b["loss"])
        apart = {key: (a[key], b[key]) for key in a if abs(a[key] - b[key]) > 1e-5 * max(1.0, abs(a[key]))}
        apart.pop("step_time", None)
        assert not apart, apart
    assert any(step["grad_norm"] > 0.01 for step in one)
