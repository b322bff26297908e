"""`dora`: wraps another method."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import InitFn, Leaf, Method, PlanFn, Role, Weight, check_choice
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.low_rank.dora._weight import Magnitude
from subspace_jax.weights import AsLowRank, LowRank


def dora(method: Method, *, norm: Literal["detached", "exact"] = "detached") -> Method:
    r"""Trains the length of each output column apart from its direction, which another method trains.

    \(W' = V\,\mathrm{diag}(m / \|V\|)\), where \(V\) is the weight that `method` makes, and \(m\) starts as the column
    lengths of the original, so that nothing changes at the start.

    Args:
      method: makes the directions, a low-rank method such as `lora(rank=8)` or `pissa(rank=16)`.
      norm: "detached" treats \(\|V\|\) as a constant in the backward pass, as the authors advise; "exact"
        differentiates it.

    Returns:
      A method whose weights are `Magnitude` over those of `method`, with `magnitude` `[*stack, out]`.

    Raises:
      TypeError: `method` is not a method.
      ValueError: `norm` is unknown.

    Warning:
      An output column of zeros has length zero and keeps it: neither magnitude nor direction ever gets a gradient.
      `adapt` warns of them.

    Note:
      The lengths of a low-rank sum come from squares that are expanded, so the sum is not formed; where the two parts
      cancel, a step forms it (see `LowRank.squared_norms`).

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jax.random.normal(jax.random.key(1), (6, 4))
      >>> adapted = sj.adapt({"w": w}, {"w": sj.dora(sj.pissa(rank=2))}, key=jax.random.key(0))
      >>> adapted["w"].magnitude.shape, adapted["w"].method
      ((4,), 'dora(pissa)')
    """
    check_choice("dora: norm", norm, ("detached", "exact"))
    if not isinstance(method, Method):
        raise TypeError(f"dora: takes a method such as dora(lora(rank=8)), not {type(method).__name__} {method!r}.")

    def make(init: InitFn, key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Magnitude:
        direction = init(key, array, role, stats)
        squares = _squares(array, role)
        _warn_of_zero_columns(squares, array.shape)
        if isinstance(direction, (LowRank, AsLowRank)) and not isinstance(direction.base, Weight):
            # The frozen part of the lengths, once, so that no step reads every weight for it.
            direction = dataclasses.replace(direction, base_squares=_squares(direction.base, role))
        return Magnitude(
            direction=direction,
            magnitude=jnp.sqrt(squares),
            detach_norm=norm == "detached",
            role=role,
            dtype=array.dtype,
            trainable=("magnitude",),
        )

    def plan(inner: PlanFn, key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        return {path: functools.partial(make, init) for path, init in inner(key, leaves).items()}

    init = functools.partial(make, method.init)
    planned = method.plan and functools.partial(plan, method.plan)
    settings = None if method.settings is None else (norm, method.settings)
    return Method(f"dora({method.name})", init, method.needs, planned, settings)


def _warn_of_zero_columns(squares: jax.Array, shape: tuple[int, ...]) -> None:
    """Warns of output columns that never learn, where values are known."""
    try:
        count = int(_zeros(squares))
    except jax.errors.ConcretizationTypeError:
        return
    if count:
        warnings.warn(
            f"dora: in a weight of shape {shape} {count} of {squares.size} output columns are zero. Their magnitude "
            "starts at zero, so they stay zero whatever is learned; give this weight the inner method alone if they "
            "are to learn.",
            stacklevel=2,
        )


@functools.partial(jax.jit, inline=True)
def _zeros(squares: jax.Array) -> jax.Array:
    return jnp.sum(squares == 0)


@functools.partial(jax.jit, static_argnames="role", inline=True)
def _squares(array: jax.Array, role: Role) -> jax.Array:
    """Squared norms of the output columns, `[*stack, out]`."""
    matrix = role.matrix(array).astype(wide_dtype(array.dtype))
    return jnp.sum(matrix * matrix, axis=-2)
