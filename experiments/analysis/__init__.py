"""Experiments of analyses."""
