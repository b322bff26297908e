"""Measurements of the library beside its alternatives; `python -m benchmarks list` shows them."""
