"""Triton kernels, one file per op; knows torch and triton only."""
