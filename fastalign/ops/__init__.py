"""Ops: the reference definitions, their backends and the choice among them."""
