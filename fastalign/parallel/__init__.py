"""Data and tensor parallelism."""
