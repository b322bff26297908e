"""Projects or resets an optimizer's moments when the subspace changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import OptState, PyTree, Role
from subspace_jax.linalg import Mode
from subspace_jax.optim._bases import Side
from subspace_jax.optim._project import project_orthogonal

FIRST_MOMENTS = ("mu", "trace", "momentum", "m")
SECOND_MOMENTS = ("nu", "v", "nu_max")


def project_momentum(
    state: OptState, basis: Any, mode: Mode = "remove", side: Side = "in", *, roles: Mapping[str, Role] | None = None
) -> OptState:
    """Returns an optimizer state whose first moments are projected, to be called when the basis changes.

    Second moments are scales, not directions, and stay.

    Args:
      state: any optax state; fields called `mu`, `trace`, `momentum` or `m` are first moments.
      basis: orthonormal columns by path, `[*stack, d, k]`, or a tree with holes; a pair of them for side "both".
      mode: "remove" the subspaces, or "keep" them alone.
      side: which axis the subspaces lie in: "in", "out" or "both".
      roles: how the model uses plain arrays with more than two axes, from `sj.roles`.

    Raises:
      ValueError: `mode` or `side` is unknown.
      PatternError: a basis is for no leaf of the moments.
      StructureError: a basis does not fit its array, is not in float32 at least, or has columns that are neither
        orthonormal nor zero.
      RoleError: an array with a basis is not known to be a matrix.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> state = optax.trace(0.9).init({"w": jnp.ones((3, 2))})._replace(trace={"w": jnp.ones((3, 2))})
      >>> sj.optim.project_momentum(state, {"w": jnp.eye(3)[:, :1]}).trace["w"].tolist()
      [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    """
    projection = project_orthogonal(basis, mode, side, roles=roles)

    def moments(tree: PyTree) -> PyTree:
        return projection.update(tree, projection.init(tree))[0]

    return map_moments(state, dict.fromkeys(FIRST_MOMENTS, moments))


def reset_moments(state: OptState) -> OptState:
    """Returns an optimizer state whose moments start again.

    First and second moments become zero, and so does the count beside them that corrects their bias: with the old
    count Adam's next step would be 3 times its usual size. Counts of schedules and everything else stay.

    Args:
      state: any optax state; moments are the fields called `mu`, `trace`, `momentum`, `m`, `nu`, `v` and `nu_max`.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> state = optax.scale_by_adam().init({"w": jnp.ones(2)})
      >>> sj.optim.reset_moments(state._replace(nu={"w": jnp.ones(2)})).nu["w"].tolist()
      [0.0, 0.0]
    """

    def zeros(tree: PyTree) -> PyTree:
        return jax.tree.map(jnp.zeros_like, tree)

    return map_moments(state, dict.fromkeys((*FIRST_MOMENTS, *SECOND_MOMENTS, "count"), zeros))


def map_moments(state: OptState, functions: Mapping[str, Callable[[Any], Any]]) -> OptState:
    """Maps what the fields of named tuples with moments hold.

    Args:
      state: any optax state.
      functions: what to map a field of this name with; only named tuples with a moment among their fields count.

    Example:
      >>> import jax.numpy as jnp, optax, subspace_jax as sj
      >>> state = optax.trace(0.9).init({"w": jnp.ones(2)})
      >>> sj.optim.map_moments(state, {"trace": lambda tree: {"w": tree["w"] + 1}}).trace["w"].tolist()
      [1.0, 1.0]
    """
    moments = {*FIRST_MOMENTS, *SECOND_MOMENTS}

    def has_moments(value: Any) -> bool:
        return not moments.isdisjoint(getattr(value, "_fields", ()))

    def one(node: Any) -> Any:
        if not has_moments(node):
            return node
        fields = {}
        for name, value in zip(node._fields, node, strict=True):
            mapped = functions.get(name)
            if mapped is None:
                fields[name] = value if name in moments else map_moments(value, functions)
            else:
                fields[name] = mapped(value)
        return type(node)(**fields)

    return jax.tree.map(one, state, is_leaf=has_moments)
