"""Whether all entries of an array are finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.jit
def is_finite(array: jax.Array) -> jax.Array:
    """Tells whether no entry is NaN or infinity; one program a shape, which `adapt` and `merge` share."""
    return jnp.isfinite(array).all()
