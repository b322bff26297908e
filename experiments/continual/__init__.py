"""Experiments of the methods in `subspace_jax.methods.continual`."""
