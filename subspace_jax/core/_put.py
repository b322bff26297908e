"""Places an array on a mesh that several processes share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding


def put(value: Any, sharding: Sharding) -> jax.Array:
    """Places an array by a sharding; of an array that every process holds whole, each process places its part.

    Nothing is sent then, where `jax.device_put` would compare all values between processes.

    Args:
      value: an array, of random keys too.
      sharding: where it shall be.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> put(jnp.ones(3), jax.sharding.SingleDeviceSharding(jax.devices()[0])).tolist()
      [1.0, 1.0, 1.0]
    """
    if sharding.is_fully_addressable or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(value), sharding), impl=jax.random.key_impl(value))
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
