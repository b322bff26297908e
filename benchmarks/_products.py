"""Operations of a traced program's matrix products: a GPU's compiler makes them calls of libraries, and counts none."""

from __future__ import annotations

import math
from typing import Any


def product_flops(jaxpr: Any) -> float:
    """Returns two for every number that is multiplied and added in a product, in all iterations of scans.

    Of a conditional the cheapest branch counts, which is what steps between two refreshes take; of other loops one
    iteration. Decompositions and kernels of libraries count nothing.

    Args:
      jaxpr: of `jax.make_jaxpr`, or `jax.jit(...).trace(...).jaxpr`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> product_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 5))))
      60.0
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * math.prod(shape[axis] for axis in contracted) * equation.outvars[0].aval.size
            continue
        values = [v for p in equation.params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
        inner = [product_flops(value) for value in values if hasattr(value, "eqns")]
        if equation.primitive.name == "cond":
            total += min(inner)
        elif inner:
            total += equation.params.get("length", 1) * sum(inner)
    return total
