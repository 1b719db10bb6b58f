"""Objectives as pure functions of log-probs: formula and source in each docstring, one dict at the foot of each file."""
