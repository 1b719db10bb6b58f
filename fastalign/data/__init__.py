"""Data: rows to token examples to packed batches."""
