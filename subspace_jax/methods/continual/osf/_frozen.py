"""What OSF keeps a weight's trained factors orthogonal to: its frozen singular vectors, or what removes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, StructureError, leaves_with_paths
from subspace_jax.linalg import Remover, Side, make_remover, project, stack_is_whole
from subspace_jax.methods.low_rank.svfit import SplitSVD

# Values of a matrix from which those of a stack are projected one after the other.
LARGE = 2**20


class High(NamedTuple):
    r"""The frozen singular vectors of one weight.

    Attributes:
      left: \(L_h\), `[*stack, in, high]`.
      right: \(R_h\), `[*stack, high, out]`.
      live: 1 for the triples that learn, 0 for padding, `[*stack, low]`; None where all learn.
    """

    left: jax.Array
    right: jax.Array
    live: jax.Array | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Sizes of the weight's inputs and outputs."""
        return self.left.shape[-2], self.right.shape[-1]

    def remove(self, matrix: jax.Array, side: Side) -> jax.Array:
        """Returns a matrix without what lies in the frozen columns ("in") or rows ("out"), in float32 at least."""
        basis = self.left if side == "in" else jnp.swapaxes(self.right, -1, -2)
        return project(matrix, basis, mode="remove", side=side)


class Removers(NamedTuple):
    """What removes the frozen singular vectors of one weight; `osf.removers` makes it.

    Attributes:
      left: a `linalg.Remover` of the frozen columns.
      right: one of the frozen rows.
      live: 1 for the triples that learn, 0 for padding, `[*stack, low]`; None where all learn.
    """

    left: Remover
    right: Remover
    live: jax.Array | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Sizes of the weight's inputs and outputs."""
        return self.left.size, self.right.size

    def remove(self, matrix: jax.Array, side: Side) -> jax.Array:
        """Returns a matrix without what lies in the frozen columns ("in") or rows ("out"), in float32 at least."""
        return (self.left if side == "in" else self.right)(matrix, side)


def in_loops(given: Mapping[str, High | Removers]) -> frozenset[str]:
    """Returns the paths of stacks that may be projected in a loop: their first axis is not split between devices."""
    return frozenset(path for path, found in given.items() if all(map(stack_is_whole, jax.tree.leaves(found))))


def remove(found: High | Removers, matrix: jax.Array, *sides: Side, loop: bool) -> jax.Array:
    """Returns matrices without what lies in the frozen columns ("in"), rows ("out") or both, in float32 at least.

    In a loop over the layers, a mesh that splits factors both ways gathers those of one layer at a time, and not of
    all: up to 4 GiB for each kernel of a model of 70 billion parameters.

    Args:
      found: what is removed.
      matrix: `[*stack, in, out]`.
      sides: from which, one after the other.
      loop: whether one after the other where the matrices are large.
    """

    def one(pair: tuple[High | Removers, jax.Array]) -> jax.Array:
        found, matrix = pair
        for side in sides:
            matrix = found.remove(matrix, side)
        return matrix

    if loop and matrix.ndim > 2 and math.prod(matrix.shape[1:]) >= LARGE:
        return jax.lax.map(one, (found._replace(live=None), matrix))
    return one((found, matrix))


def removers(frozen: Params) -> dict[str, Removers]:
    r"""Builds the projections that remove every weight's frozen singular vectors, for `osf.projection`.

    A side of which at least half the directions are frozen, or have room to be, is held as \(I - L_h L_h^T\) and
    multiplied once; of the others the singular vectors are held; one without any costs nothing. See
    `linalg.make_remover`. At the common width this halves the operations of a projection, for
    \(d_{in}^2 + d_{out}^2\) more values in the optimizer's state.

    Args:
      frozen: the adapted tree, or its frozen part.

    Returns:
      `Removers` by path, to give `osf.projection` and `osf.next_task` in place of the tree. On a mesh the tree itself
      splits better: a projector is whole on every device.

    Raises:
      StructureError: there is no `SplitSVD` in the tree.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.eye(4)}, {"w": sj.osf(3)}, key=jax.random.key(0))
      >>> found = sj.methods.osf.removers(adapted)
      >>> found["w"].left.projector.shape, int(jnp.abs(found["w"].remove(jnp.eye(4), "in")).sum())
      ((4, 4), 1)
    """
    return {
        path: Removers(make_remover(high.left), make_remover(jnp.swapaxes(high.right, -1, -2)), high.live)
        for path, high in high_of(frozen).items()
    }


def high_of(frozen: Params) -> dict[str, Any]:
    """Returns the frozen singular vectors of every `SplitSVD` of a tree, by path; removers as they are.

    Args:
      frozen: an adapted tree, its frozen part, or what `removers` made.

    Raises:
      StructureError: there is none.
    """
    if isinstance(frozen, Mapping) and frozen and all(isinstance(v, Removers) for v in frozen.values()):
        return dict(frozen)
    found = {
        path: High(leaf.high_left, leaf.high_right, leaf.live)
        for path, leaf in leaves_with_paths(frozen)
        if isinstance(leaf, SplitSVD) and leaf.high_left is not None
    }
    if not found:
        raise StructureError(
            "osf.projection: no SplitSVD with frozen singular vectors in the given tree. Give the tree that sj.adapt "
            "made with sj.osf, or the frozen one of sj.partition."
        )
    return found
