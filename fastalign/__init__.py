"""fastalign aligns language models: fused losses, packed batches, shared prompts, on CPU and GPU."""

__version__ = "0.1.0"
