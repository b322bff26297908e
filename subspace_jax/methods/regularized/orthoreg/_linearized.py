"""Fine-tuning in the tangent space of the pretrained model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params


def linearized(fn: Callable[..., Any], base: Params) -> Callable[..., Any]:
    r"""Returns a model's linearization at its pretrained parameters: \(f(x; \theta_0) + J\,(\theta - \theta_0)\).

    One forward-mode product a call. Its task vectors are merged as those of any model, and the merged tree is called
    through the same function.

    Args:
      fn: `fn(params, *args)`.
      base: \(\theta_0\), floating-point arrays.

    Returns:
      A function like `fn`, of trees of arrays of the base's structure; `merge` stand-in weights before.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> square = sj.methods.orthoreg.linearized(lambda p: p["w"] ** 2, {"w": jnp.array(3.0)})
      >>> float(square({"w": jnp.array(4.0)}))  # 9 + 2 * 3 * 1
      15.0
    """

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        tangent = jax.tree.map(lambda p, b: jnp.subtract(p, b).astype(b.dtype), params, base)
        value, slope = jax.jvp(lambda p: fn(p, *args, **kwargs), (base,), (tangent,))
        return jax.tree.map(jnp.add, value, slope)

    return apply
