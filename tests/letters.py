"""Small on-policy runs on sorted letters, with a reward function of one's own."""

from pathlib import Path

from fastalign.config import (
    AlgorithmConfig,
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplerConfig,
)

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 32}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LIKES = """
def reward(completion_ids, **columns):
    return [sum(ids) % 7 / 7 + len(ids) / 10 for ids in completion_ids]
"""


def configure(
    folder: Path, method: str = "grpo", name: str = "run", *, reward: str = LIKES, steps: int = 6, **algorithm
):
    """A run of a Llama with random weights; ``reward`` is Python with a function of that name."""
    file = folder / f"rewards_of_{name}.py"
    file.write_text(reward)
    return Config(
        method,
        model=ModelConfig(config=dict(LLAMA), tokenizer="builtin:letters"),
        data=DataConfig(path="builtin:sort_letters", limit=40, max_length=24, cache_dir=str(folder / "cache")),
        batch=BatchConfig(size=4, tokens=200),
        optim=OptimConfig(lr=3e-3, schedule="constant"),
        run=RunConfig(output_dir=str(folder / name), steps=steps, save_every=2, show_example=False),
        algorithm=AlgorithmConfig(**algorithm),
        sampler=SamplerConfig(max_new_tokens=6),
        rewards=[{"function": f"{file}:reward"}],
    )
