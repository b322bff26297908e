"""What is told of one matrix before and after a training."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.linalg import wide_matmul
from subspace_jax.methods.analysis.intruder_dimensions import match_directions

# Share of a change's energy that its counted directions hold.
ENERGY = 0.9


@functools.partial(jax.jit, static_argnames=("k", "dtype"))
def compare(
    base: jax.Array, tuned: jax.Array, other: jax.Array | None = None, *, k: int, threshold: float, dtype: Any
) -> dict[str, jax.Array]:
    """Returns what is told of one matrix.

    Args:
      base: the pretrained matrix, `[in, out]` in at least float32.
      tuned: the tuned one, exact.
      other: another tuned one; without it nothing is told of two changes.
      k: how many leading tuned directions may be intruders.
      threshold: the largest cosine below which a direction is one.
      dtype: of the leaf, whose rounding is told.
    """
    change = tuned - base
    _, values, vt = jnp.linalg.svd(change, full_matrices=False)
    _, _, base_vt = jnp.linalg.svd(base, full_matrices=False)
    _, tuned_values, tuned_vt = jnp.linalg.svd(tuned, full_matrices=False)
    held = _directions(values)
    # All directions are made, and those that do not count are set to zero: their number is known at run time only.
    lead = jnp.arange(len(values)) < held
    onto = wide_matmul(change, (base_vt * lead[:, None]).T)
    _, intruders = match_directions(tuned_vt[:k], tuned_values[:k], base_vt, threshold)
    energy = jnp.sum(values**2)
    found = {
        "norm": jnp.linalg.norm(base),
        "rounding": jnp.linalg.norm(tuned.astype(dtype).astype(tuned.dtype) - tuned),
        "values": values,
        "directions": held,
        "inside": jnp.sum(onto**2) / jnp.where(energy > 0, energy, 1.0),
        "intruders": jnp.sum(intruders),
    }
    if other is None:
        return found
    theirs = other - base
    _, their_values, their_vt = jnp.linalg.svd(theirs, full_matrices=False)
    their_lead = jnp.arange(len(values)) < _directions(their_values)
    shared = wide_matmul(vt * lead[:, None], (their_vt * their_lead[:, None]).T)
    norms = jnp.linalg.norm(change) * jnp.linalg.norm(theirs)
    return found | {
        "cosine": jnp.sum(change * theirs) / jnp.where(norms > 0, norms, 1.0),
        "overlap": jnp.sum(shared**2) / jnp.maximum(jnp.sum(their_lead), 1),
    }


def _directions(values: jax.Array) -> jax.Array:
    """How many singular values hold the counted share of the energy; none of a change of zero."""
    share = jnp.cumsum(values**2)
    return jnp.where(share[-1] > 0, jnp.sum(share < ENERGY * share[-1]) + 1, 0)
