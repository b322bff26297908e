"""Runnable experiments: one file per published system, and the quickstart. `python -m experiments --help`."""
