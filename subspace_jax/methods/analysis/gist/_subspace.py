"""The subspace that a target's validation gradients span, found from products of gradients alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Params, StructureError, check_choice, check_number, check_rank, combine, product

# loss(params, example), of one example without a batch axis; with `frozen`, of the whole tree.
ExampleLoss = Callable[[Any, Any], jax.Array]
Aggregate = Literal["subtask_mean", "example"]

# Directions below this share of the largest eigenvalue are what rounding left of a Gram matrix.
RESOLVED = 1e-7
_EPSILON = 1e-6


class TargetSubspace(NamedTuple):
    """The subspace of the validation examples' gradients, and each subtask's direction in it.

    Attributes:
      basis: a tree like the trainable parameters of orthonormal directions, `[rank, *shape]`.
      targets: unit coordinates of every subtask, `[subtasks, rank]`.
      singular_values: of the validation gradients, largest first, `[examples]`.
    """

    basis: Params
    targets: jax.Array
    singular_values: np.ndarray

    @property
    def rank(self) -> int:
        """The number of directions."""
        return self.targets.shape[-1]


def fit_subspace(
    loss: ExampleLoss,
    params: Params,
    validation: Any,
    *,
    frozen: Params | None = None,
    rank: int | Literal["energy"] = "energy",
    energy: float = 0.95,
    subtasks: int | Sequence[int] = 1,
    aggregate: Aggregate = "subtask_mean",
) -> TargetSubspace:
    r"""Finds the leading right singular vectors of per-example gradients of a target's validation set.

    With gradients \(G_v\), \(K = G_v G_v^T = U S^2 U^T\) and \(P = G_v^T U_k S_k^{-1}\): an isometry on the subspace,
    without any whitening. Coordinates of the validation examples \(U_k S_k\) are averaged by subtask, then normalized.

    Args:
      loss: `loss(params, example)`, the mean over tokens of one example, without dropout.
      params: what learns, after a warm-up: at LoRA's start the gradient of one factor is zero.
      validation: examples of the target, a tree whose leaves have them along axis 0; a few hundred at most, whose
        gradients are in memory together.
      frozen: the other tree of `sj.partition`, if `loss` is that of the whole adapted tree: an argument of the compiled
        program, where arrays that `loss` holds itself would be constants in it, whole on every device.
      rank: the number of directions, or "energy": as few as hold a share of the squared singular values.
      energy: that share.
      subtasks: number of contiguous groups of equal size, or the group of every example. A number that does not divide
        the examples makes each of them one.
      aggregate: "subtask_mean" as in the published code, or "example": every example is a target, as in its paper.

    Returns:
      The subspace and its targets.

    Raises:
      StructureError: there are no examples, all gradients are zero, or groups of another number.
      RankError: `rank` is no positive integer.
      ValueError: `energy` is not in (0, 1], or an unknown `aggregate`.

    Example:
      >>> import jax.numpy as jnp
      >>> loss = lambda p, e: p["w"] @ e
      >>> found = fit_subspace(loss, {"w": jnp.zeros(3)}, jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), rank=1)
      >>> jnp.abs(found.basis["w"]).round(4).tolist()
      [[1.0, 0.0, 0.0]]
    """
    check_choice("fit_subspace: aggregate", aggregate, ("subtask_mean", "example"))
    check_number("fit_subspace: energy", energy, above=0.0, most=1.0)
    if rank != "energy":
        check_rank(rank, what="fit_subspace: rank")
    count = count_examples(validation)
    gradients = example_gradients(loss, params, validation, frozen)
    values, vectors = np.linalg.eigh(np.asarray(_gram(gradients), np.float64))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    if values[0] == 0:
        raise StructureError("fit_subspace: all validation gradients are zero; warm up the adapter first.")
    kept = int(np.sum(values > RESOLVED * values[0]))
    if rank == "energy":
        share = np.cumsum(values) / np.sum(values)
        kept = min(kept, int(np.searchsorted(share, energy * (1 - 1e-12))) + 1)
    else:
        kept = min(kept, rank)
    singular = np.sqrt(values)
    into = vectors[:, :kept] / (singular[:kept] + _EPSILON * singular[0])
    basis = jax.tree.map(functools.partial(_sums, jnp.asarray(into.T, jnp.float32)), gradients)
    coordinates = _averaged(vectors[:, :kept] * singular[:kept], _groups(subtasks, count, aggregate))
    sizes = np.linalg.norm(coordinates, axis=1, keepdims=True)
    return TargetSubspace(
        basis, jnp.asarray(coordinates / np.maximum(sizes, 1e-12 * singular[0]), jnp.float32), singular
    )


def _groups(subtasks: int | Sequence[int], count: int, aggregate: Aggregate) -> np.ndarray:
    if aggregate == "example":
        return np.arange(count)
    if isinstance(subtasks, int):
        if subtasks < 1 or count % subtasks:
            return np.arange(count)
        return np.repeat(np.arange(subtasks), count // subtasks)
    groups = np.asarray(subtasks)
    if groups.shape != (count,):
        raise StructureError(f"fit_subspace: subtasks names {groups.shape} groups for {count} validation examples.")
    return np.unique(groups, return_inverse=True)[1]


def _averaged(coordinates: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.stack([coordinates[groups == g].mean(0) for g in range(groups.max() + 1)])


@functools.partial(jax.jit, static_argnames="loss")
def example_gradients(loss: ExampleLoss, params: Params, examples: Any, frozen: Params | None = None) -> Params:
    """Returns the gradient of every example, a tree like the parameters of `[examples, *shape]` in float32.

    Args:
      loss: `loss(params, example)`; one object for many calls, which compiles once.
      params: what learns.
      examples: a tree with examples along axis 0; split over devices along it, gradients are too.
      frozen: the other tree of `sj.partition`, if `loss` is that of the whole adapted tree.

    Example:
      >>> import jax.numpy as jnp
      >>> example_gradients(lambda p, e: p * e, jnp.float32(1.0), jnp.array([2.0, 3.0])).tolist()
      [2.0, 3.0]
    """

    def whole(learned: Params, example: Any) -> jax.Array:
        return loss(learned if frozen is None else combine(learned, frozen), example)

    found = jax.vmap(jax.grad(whole), in_axes=(None, 0))(params, examples)
    return jax.tree.map(lambda v: v.astype(jnp.float32), found)


@jax.jit
def _gram(gradients: Params) -> jax.Array:
    """Products of all pairs, summed over leaves."""
    return functools.reduce(jnp.add, map(all_products, jax.tree.leaves(gradients), jax.tree.leaves(gradients)))


def all_products(one: jax.Array, other: jax.Array) -> jax.Array:
    """Returns inner products of the entries of two stacks, `[len(one), len(other)]`.

    Without flattening: split axes stay where they are.
    """
    axes = _axes(one)
    return product(one, ("one", *axes), other, ("other", *axes), ("one", "other"), precision="highest")


def _sums(weights: jax.Array, gradients: jax.Array) -> jax.Array:
    """Sums gradients with weights `[sums, examples]`."""
    axes = _axes(gradients)
    return product(weights, ("sum", "one"), gradients, ("one", *axes), ("sum", *axes), precision="highest")


def _axes(stack: jax.Array) -> tuple[str, ...]:
    """Names of the axes of a stack's entries."""
    return tuple(f"axis {i}" for i in range(1, stack.ndim))


def count_examples(examples: Any) -> int:
    """Returns how many examples a tree holds along axis 0.

    Raises:
      StructureError: none, or leaves of different numbers.
    """
    found = {int(np.shape(v)[0]) if np.ndim(v) else 0 for v in jax.tree.leaves(examples)}
    if len(found) != 1 or 0 in found:
        raise StructureError(
            f"examples: leaves have {sorted(found)} entries along axis 0; expected one number above 0 for all."
        )
    return found.pop()


def share_of(fraction: float, count: int) -> int:
    """Returns the whole number of examples in a fraction, where 0.29 of 100 is 29.

    Example:
      >>> share_of(0.29, 100), share_of(0.05, 59)
      (29, 2)
    """
    return math.floor(round(fraction * count, 9))
