"""Processes, shards and norms: what changes when a run has more than one rank."""
