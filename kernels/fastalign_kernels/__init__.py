"""Triton kernels, one file per op; needs torch and triton only."""
