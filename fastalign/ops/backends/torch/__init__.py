"""PyTorch's own operations, anywhere."""
