"""The error that stops a run."""


class RunError(ValueError):
    """A run cannot go on: its numbers are no longer finite, or a checkpoint could not be written."""
