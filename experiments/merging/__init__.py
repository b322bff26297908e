"""Experiments of the methods in `subspace_jax.methods.merging`, and of the usual mergers."""
