"""PyTorch's own variable-length attention, on CUDA in half precision."""
