"""Whether all entries of an array are finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core._compat import is_tracer

# Entries that numpy looks through in a fraction of the time that it takes to compile a program for their shape.
FEW = 2**22


def is_finite(array: jax.Array | np.ndarray) -> jax.Array | np.bool:
    """Tells whether no entry is NaN or infinity; abstract where the array is.

    By numpy where it is small and on the host anyway, else by one program for each shape, which `adapt` and `merge`
    share.
    """
    if array.size <= FEW and (isinstance(array, np.ndarray) or _is_on_host(array)):
        return np.isfinite(np.asarray(array)).all()
    return _is_finite(array)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _is_on_host(array: jax.Array) -> bool:
    return not is_tracer(array) and [device.platform for device in array.devices()] == ["cpu"]
