"""What a run leaves: its directory, checkpoints, metrics, console and report."""
