"""Objectives as pure functions of log-probs: formula and source in each docstring, a dict at the foot of each file."""

from fastalign.losses.traits import Loss

__all__ = ["Loss"]
