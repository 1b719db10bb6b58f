"""Benchmarks: every op and whole training steps beside their peers. The package itself never imports this."""
