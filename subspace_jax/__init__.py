"""Adapt pretrained JAX models: stand-in weights and subspace gradient transformations."""
