"""Align language models: fused kernels, packed batches, one training loop."""
