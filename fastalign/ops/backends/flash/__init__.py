"""The flash-attn package, on CUDA in half precision."""
