"""`dora`: wraps another method."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import InitFn, Leaf, Method, PlanFn, Role, Weight
from subspace_jax.methods.low_rank.dora._weight import Magnitude
from subspace_jax.weights import LowRank


def dora(method: Method, *, norm: Literal["detached", "exact"] = "detached") -> Method:
    r"""Trains the lengths of a weight's output columns apart from their directions.

    \(W' = V\,\mathrm{diag}(m / \|V\|)\), where \(V\) is the weight that `method` makes, and \(m\) starts as the column
    lengths of the original, so that nothing changes at the start.

    Args:
      method: makes the directions, a low-rank method such as `lora(rank=8)` or `pissa(rank=16)`.
      norm: "detached" treats \(\|V\|\) as a constant in the backward pass, as the authors advise; "exact"
        differentiates it.

    Returns:
      A method whose weights are `Magnitude` over those of `method`, with `magnitude` `[*stack, out]`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.dora(sj.pissa(rank=2))}, key=jax.random.key(0))
      >>> adapted["w"].magnitude.shape, adapted["w"].method
      ((4,), 'dora(pissa)')
    """
    if norm not in ("detached", "exact"):
        raise ValueError(f'dora: norm is "detached" or "exact", not {norm!r}.')
    if not isinstance(method, Method):
        raise TypeError(f"dora: takes a method such as dora(lora(rank=8)), not {type(method).__name__} {method!r}.")

    def make(init: InitFn, key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Magnitude:
        direction = init(key, array, role, stats)
        if isinstance(direction, LowRank) and not isinstance(direction.base, Weight):
            # The frozen part of the lengths, once, so that no step reads every weight for it.
            direction = dataclasses.replace(direction, base_squares=_squares(direction.base, role))
        return Magnitude(
            direction=direction,
            magnitude=jnp.sqrt(_squares(array, role)),
            detach_norm=norm == "detached",
            role=role,
            dtype=array.dtype,
            trainable=("magnitude",),
        )

    def plan(inner: PlanFn, key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        return {path: functools.partial(make, init) for path, init in inner(key, leaves).items()}

    init = functools.partial(make, method.init)
    return Method(f"dora({method.name})", init, method.needs, method.plan and functools.partial(plan, method.plan))


def _squares(array: jax.Array, role: Role) -> jax.Array:
    """Squared norms of the output columns, `[*stack, out]`."""
    matrix = role.matrix(array).astype(jnp.promote_types(array.dtype, jnp.float32))
    return jnp.sum(matrix * matrix, axis=-2)
