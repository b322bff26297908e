"""Removers: what takes a fixed subspace out of many matrices, held in the form that multiplies least."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from subspace_jax.linalg._sharding import whole_matrices
from subspace_jax.linalg._subspace import Side, project, wide_matmul

BUCKETS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Remover:
    r"""A projection that removes a fixed subspace from matrices; `make_remover` builds it.

    At most one of both arrays is there; with neither, nothing is removed and nothing multiplied.

    Attributes:
      size: \(d\), the size of the side that the subspace lies in; static.
      basis: \(U\), `[*stack, d, k]` in float32: a product with n columns takes \(4 d k n\) operations.
      projector: \(I - U U^T\), `[*stack, d, d]` in float32: \(2 d^2 n\) operations.
    """

    size: int = dataclasses.field(metadata={"static": True})
    basis: jax.Array | None = None
    projector: jax.Array | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is removed."""
        return self.basis is None and self.projector is None

    def __call__(self, matrix: Float[Array, "*stack in out"], side: Side = "in") -> Float[Array, "*stack in out"]:
        r"""Returns \(G - U U^T G\) for side "in", \(G - G U U^T\) for "out".

        Args:
          matrix: \(G\), `[*stack, in, out]`.
          side: which axis the subspace lies in.

        Returns:
          A matrix like the given one, in float32 (float64 if it is that).
        """
        if self.basis is not None:
            return project(matrix, self.basis, mode="remove", side=side)
        if self.projector is None:
            return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
        return wide_matmul(self.projector, matrix) if side == "in" else wide_matmul(matrix, self.projector)


def make_remover(basis: Float[Array, "*stack d k"], columns: int | None = None) -> Remover:
    r"""Builds the projection that removes the span of a basis, in the cheaper of two forms.

    With fewer than \(d / 2\) columns that is the basis, \(G - U\,(U^T G)\); with more the projector \(I - U U^T\), made
    here once; with none nothing at all. Which one depends on shapes alone, so that programs with removers of the same
    columns are one program.

    A projector takes \(d^2\) values, up to twice those of the basis. It is squared once, so that a basis that is
    orthonormal to \(\delta\) removes to \(\delta^2\).

    Args:
      basis: \(U\), with orthonormal columns, or zero columns beyond its rank.
      columns: how many columns to keep, the first ones; the others must be zero. All of them if None. See
        `bucketed`.

    Returns:
      A `Remover`, in float32 (float64 if the basis is that).

    Raises:
      ValueError: the basis is no stack of matrices, has more columns than rows or a column beyond `columns` that is
        not zero, or `columns` is not in 0 .. k.

    Example:
      >>> import jax.numpy as jnp
      >>> make_remover(jnp.eye(3)[:, :1])(jnp.ones((3, 2))).tolist()
      [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
      >>> make_remover(jnp.eye(3)[:, :2]).projector.shape
      (3, 3)
    """
    if basis.ndim < 2 or basis.shape[-1] > basis.shape[-2]:
        raise ValueError(
            f"make_remover: a basis of shape {basis.shape}; expected [*stack, d, k] with at most d orthonormal columns."
        )
    size, held = basis.shape[-2:]
    columns = held if columns is None else columns
    if not 0 <= columns <= held:
        raise ValueError(f"make_remover: columns={columns}; expected 0 to {held}, the columns of the basis.")
    _refuse_lost(basis[..., columns:], columns)
    kept = basis[..., :columns].astype(jnp.promote_types(basis.dtype, jnp.float32))
    if not columns:
        return Remover(size=size)
    if 2 * columns < size:
        return Remover(size=size, basis=kept)
    kept = whole_matrices(kept)
    once = jnp.eye(size, dtype=kept.dtype) - wide_matmul(kept, jnp.swapaxes(kept, -1, -2))
    return Remover(size=size, projector=wide_matmul(once, once))


def _refuse_lost(rest: jax.Array, columns: int) -> None:
    """Refuses columns with entries among those that are left out, where their values are known."""
    if not rest.size or isinstance(rest, Tracer) or not rest.is_fully_addressable:
        return
    if np.any(np.asarray(rest)):
        raise ValueError(
            f"make_remover: columns={columns}, but a column beyond them is not zero and would not be removed."
        )


def bucketed(count: int, size: int, buckets: int = BUCKETS) -> int:
    """Returns a number of columns rounded up to a multiple of an eighth of the size.

    Shapes that grow from task to task then take few values, each with few columns of zeros.

    Args:
      count: of columns in use.
      size: the most there can be.
      buckets: number of parts of the size.

    Example:
      >>> [bucketed(count, 384) for count in (0, 1, 48, 49, 384)]
      [0, 48, 48, 96, 384]
    """
    step = max(1, -(-size // buckets))
    return min(-(-count // step) * step, size)
