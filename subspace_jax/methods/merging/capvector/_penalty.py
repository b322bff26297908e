"""What keeps later training from undoing a capability: penalties on the part of the change along the vector."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, StructureError, check_choice, check_rank, leaves_with_paths, map_with_paths
from subspace_jax.linalg import truncated_svd, wide_matmul
from subspace_jax.merging import wide_array
from subspace_jax.weights import LowRank

Kind = Literal["abs_inner", "sq_inner", "abs_elem", "cosine"]


def capability_penalty(params: Params, start: Params, vector: Params, kind: Kind = "abs_inner") -> jax.Array:
    r"""Returns how much a training moves along a capability vector, summed over leaves; zero at the start.

    With \(\Delta = \theta - \theta_{meta}\): "abs_inner" \(\sum_l |\langle \gamma_l, \Delta_l \rangle|\), "sq_inner"
    \(\sum_l \langle \gamma_l, \Delta_l \rangle^2\), "abs_elem" \(\sum_i |\gamma_i \Delta_i|\), "cosine"
    \(\sum_l (\langle \gamma_l, \Delta_l \rangle / (\|\gamma_l\| \|\Delta_l\| + 10^{-8}))^2\).

    The publication's own form was not to be had. Only "sq_inner" is smooth; the gradient of "cosine" grows as the
    inverse of the change, so it is dear at the start. A LoRA on the start's array enters by its factors, of which the
    product is not formed for inner products. Add it to the loss with a weight of about 1e-3.

    Args:
      params: \(\theta\), arrays or stand-in weights.
      start: \(\theta_{meta}\), as `add_capability` returned it.
      vector: \(\gamma\), None where a leaf does not count.
      kind: which sum.

    Returns:
      A scalar in float32.

    Raises:
      StructureError: the vector has a leaf that the parameters or the start have not.
      ValueError: an unknown kind. A signed sum has no lower bound, and is none of them.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> start, vector = {"w": jnp.zeros(3)}, {"w": jnp.array([1.0, 0.0, -2.0])}
      >>> float(sj.methods.capvector.capability_penalty({"w": jnp.array([1.0, 5.0, 1.0])}, start, vector))
      1.0
    """
    check_choice("capability_penalty: kind", kind, ("abs_inner", "sq_inner", "abs_elem", "cosine"))
    leaves, starts = dict(leaves_with_paths(params)), dict(leaves_with_paths(start))
    total = jnp.zeros(())
    for path, gamma in leaves_with_paths(vector):
        if gamma is None:
            continue
        for name, tree in (("parameters", leaves), ("start", starts)):
            if path not in tree or tuple(tree[path].shape) != tuple(gamma.shape):
                raise StructureError(
                    f"{path}: the {name} have no leaf of the vector's shape {tuple(gamma.shape)} here."
                )
        total = total + _of_leaf(leaves[path], starts[path], gamma, kind)
    return total


def _of_leaf(leaf: Any, start: Any, gamma: jax.Array, kind: Kind) -> jax.Array:
    gamma = jax.lax.stop_gradient(gamma.astype(jnp.float32))
    if kind in ("abs_inner", "sq_inner") and type(leaf) is LowRank and leaf.start_a is None:
        one = leaf.with_frozen_stopped()
        onto = wide_matmul(one.role.matrix(gamma), jnp.swapaxes(one.b, -1, -2))
        inner = jnp.sum(onto * one.a) * one.scale
    else:
        change = wide_array(leaf) - jax.lax.stop_gradient(wide_array(start))
        if kind == "abs_elem":
            return jnp.sum(jnp.abs(gamma * change))
        inner = jnp.sum(gamma * change)
        if kind == "cosine":
            square = jnp.sum(change * change)
            # The root has no derivative at zero, where the change is.
            size = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
            inner = inner / (jnp.linalg.norm(gamma) * size + 1e-8)
    return jnp.abs(inner) if kind == "abs_inner" else inner * inner


def input_directions(vector: Params, rank: int, roles: Mapping[str, Any] | None = None) -> dict[str, jax.Array]:
    r"""Returns the input directions of a capability vector's matrices, for LoRA: \(U_{r} \mathrm{diag}(s / \sum s)\).

    Args:
      vector: \(\gamma\).
      rank: how many leading left singular vectors; at most the shorter side counts.
      roles: how arrays are read as matrices, by path; two axes are (in, out) without it.

    Returns:
      `[*stack, in, rank]` by path of every matrix.

    Raises:
      RankError: `rank` is no positive integer.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> sj.methods.capvector.input_directions({"w": jnp.diag(jnp.array([3.0, 1.0]))}, 1)["w"].shape
      (2, 1)
    """
    check_rank(rank, what="input_directions: rank")
    found = {}
    for path, gamma in leaves_with_paths(vector):
        role = (roles or {}).get(path)
        if gamma is None or (role is None and gamma.ndim != 2) or (role is not None and not role.is_matrix):
            continue
        matrix = gamma if role is None else role.matrix(gamma)
        u, s, _ = truncated_svd(matrix, min(rank, *matrix.shape[-2:]))
        share = s / jnp.maximum(jnp.sum(s, axis=-1, keepdims=True), jnp.finfo(s.dtype).tiny)
        found[path] = u * share[..., None, :]
    return found


def factor_penalty(adapted: Params, directions: Mapping[str, jax.Array]) -> jax.Array:
    r"""Returns the overlap of LoRA's input factors with a capability's input directions: \(\sum |\Gamma^T A|\).

    It is zero at the start if `avoid_directions` took the overlap out of the random factors.

    Args:
      adapted: a tree with weights of `lora`.
      directions: \(\Gamma\), as `input_directions` gives them.

    Returns:
      A scalar in float32.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.eye(2)}, {"w": sj.lora(1)}, key=jax.random.key(0))
      >>> home, gamma = sj.methods.capvector, {"w": jnp.array([[1.0], [0.0]])}
      >>> float(home.factor_penalty(home.avoid_directions(adapted, gamma), gamma))
      0.0
    """
    total = jnp.zeros(())
    for path, leaf in leaves_with_paths(adapted):
        if path in directions and isinstance(leaf, LowRank):
            columns = jnp.swapaxes(jax.lax.stop_gradient(directions[path]), -1, -2)
            total = total + jnp.sum(jnp.abs(wide_matmul(columns, leaf.a)))
    return total


def avoid_directions(adapted: Params, directions: Mapping[str, jax.Array]) -> Params:
    """Takes a capability's input directions out of LoRA's input factors, once, before training.

    Args:
      adapted: a tree with weights of `lora`, as they start.
      directions: as `input_directions` gives them; directions of no size do not count.

    Returns:
      The tree, whose `factor_penalty` is zero.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.eye(2)}, {"w": sj.lora(1)}, key=jax.random.key(0))
      >>> gamma = {"w": jnp.array([[1.0], [0.0]])}
      >>> float(sj.methods.capvector.avoid_directions(adapted, gamma)["w"].a[0, 0])
      0.0
    """

    def one(path: str, leaf: Any) -> Any:
        if path not in directions or not isinstance(leaf, LowRank):
            return leaf
        sizes = jnp.linalg.norm(directions[path], axis=-2, keepdims=True)
        q = jnp.where(sizes > 0, directions[path] / jnp.where(sizes > 0, sizes, 1.0), 0.0)
        a = leaf.a.astype(jnp.float32)
        for _ in range(2):  # a second time, for what rounding left
            a = a - wide_matmul(q, wide_matmul(jnp.swapaxes(q, -1, -2), a))
        return dataclasses.replace(leaf, a=a.astype(leaf.a.dtype))

    return map_with_paths(one, adapted)
