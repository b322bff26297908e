"""Selects a few columns of a fixed orthonormal matrix, in place of a decomposition."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.fft
from jax import lax
from jaxtyping import Array, Float, Int

from subspace_jax.linalg._cosine_matrix import cosine_matrix
from subspace_jax.linalg._folded_cosine import cosine_rows, is_folded
from subspace_jax.linalg._sharding import by_compiler, whole_rows
from subspace_jax.linalg._subspace import wide_matmul
from subspace_jax.linalg._svd import wide_dtype

FixedBasis = Literal["dct", "random_qr"]
Transform = Literal["matmul", "fft"]
# Columns of the basis that are multiplied at once where the product with all of them is not to be held.
BLOCK = 512
# Values of a stack from which its matrices are transformed one after the other.
LARGE = 2**22


class Selected(NamedTuple):
    """Coordinates of a matrix in the columns that fit it best.

    Attributes:
      indices: which columns, `[*stack, rank]` int32, ascending.
      coordinates: the matrix times them, `[*stack, N, rank]` in at least float32.
    """

    indices: jax.Array
    coordinates: jax.Array


def fixed_basis(size: int, basis: FixedBasis = "dct") -> Float[Array, "size size"]:
    """Returns an orthonormal matrix `[size, size]` that depends on nothing but its size.

    Args:
      size: number of rows and columns.
      basis: "dct" has cosine waves as columns, so that a product with it is the DCT-II of every row; "random_qr" is a
        random orthonormal matrix, to compare with.

    Example:
      >>> fixed_basis(4).shape
      (4, 4)
    """
    if basis == "dct":
        return cosine_matrix(size).T
    return jnp.linalg.qr(jax.random.normal(jax.random.key(size), (size, size)))[0]


def transform_rows(
    matrix: Float[Array, "*stack N n"], *, basis: FixedBasis = "dct", transform: Transform = "matmul"
) -> Float[Array, "*stack N n"]:
    """Returns `matrix @ fixed_basis`, by products or, for cosines, by fast Fourier transforms of the rows.

    By products a transform of cosines is folded on one device: see `cosine_rows`.

    Args:
      matrix: `[*stack, N, n]`.
      basis: "dct", or "random_qr".
      transform: "matmul" or "fft".
    """
    if transform == "fft":
        rows = whole_rows(matrix).astype(jnp.float32)
        return by_compiler(lambda v: jax.scipy.fft.dct(v, type=2, norm="ortho", axis=-1), rows)
    if basis == "dct" and is_folded(matrix.shape[-1]):
        return cosine_rows(matrix.astype(wide_dtype(matrix.dtype)))
    return wide_matmul(matrix, fixed_basis(matrix.shape[-1], basis), split=(-2, None))


def select_columns(
    matrix: Float[Array, "*stack N n"],
    rank: int,
    *,
    basis: FixedBasis = "dct",
    transform: Transform = "matmul",
    norm: Literal[1, 2] = 1,
) -> Selected:
    r"""Picks the columns of a fixed basis that hold most of a matrix: their indices, and its coordinates in them.

    With `norm=2` no other `rank` columns approximate the matrix better, and the squared error is at most
    \((1 - r / n)\,\|B\|^2\).

    Args:
      matrix: \(B\), `[*stack, N, n]`.
      rank: \(r\), at most n.
      basis: "dct", or "random_qr".
      transform: "matmul", or "fft" by fast transforms of the rows.
      norm: of the columns of \(B Q\), by which they are ranked.

    Returns:
      `Selected`: indices `[*stack, rank]` and coordinates `[*stack, N, rank]`.

    Example:
      >>> import jax.numpy as jnp
      >>> select_columns(jnp.ones((3, 4)), 1).indices.tolist()
      [0]
    """
    size, stack = matrix.shape[-1], matrix.shape[:-2]
    folded = basis == "dct" and is_folded(size)
    if transform == "matmul" and not folded and size >= 2 * BLOCK:
        indices = _largest(_scores_by_blocks(matrix, basis, norm), rank)
        return Selected(indices, wide_matmul(matrix, chosen_columns(indices, size, basis), split=(-2, None)))
    if folded and stack and matrix.size > LARGE:  # one device: a matrix after the other

        def one(matrix: jax.Array) -> Selected:
            return select_columns(matrix, rank, basis=basis, transform=transform, norm=norm)

        found = lax.map(one, matrix.reshape(-1, *matrix.shape[-2:]))
        return jax.tree.map(lambda v: v.reshape(*stack, *v.shape[1:]), found)
    spectrum = transform_rows(matrix, basis=basis, transform=transform)
    indices = _largest(_norms(spectrum, norm), rank)
    return Selected(indices, jnp.take_along_axis(spectrum, indices[..., None, :], axis=-1))


def _norms(spectrum: jax.Array, norm: Literal[1, 2]) -> jax.Array:
    return jnp.sum(jnp.abs(spectrum) if norm == 1 else spectrum * spectrum, axis=-2)


def _largest(scores: jax.Array, rank: int) -> jax.Array:
    """Indices of the largest, ascending, so that equal choices have equal coordinates."""
    return jnp.sort(lax.top_k(scores, rank)[1].astype(jnp.int32), axis=-1)


def _scores_by_blocks(matrix: jax.Array, basis: FixedBasis, norm: Literal[1, 2]) -> jax.Array:
    """Norms of the columns of the spectrum, which is never there as a whole: over a mesh its rows alone are split."""
    size = matrix.shape[-1]
    count = -(-size // BLOCK)
    padded = jnp.pad(fixed_basis(size, basis), ((0, 0), (0, count * BLOCK - size)))
    blocks = jnp.moveaxis(padded.reshape(size, count, BLOCK), 1, 0)

    def one(_: None, columns: jax.Array) -> tuple[None, jax.Array]:
        return None, _norms(wide_matmul(matrix, columns, split=(-2, None)), norm)

    scores = jnp.moveaxis(lax.scan(one, None, blocks)[1], 0, -2)
    return scores.reshape(*scores.shape[:-2], count * BLOCK)[..., :size]


def chosen_columns(
    indices: Int[Array, "*stack rank"], size: int, basis: FixedBasis = "dct"
) -> Float[Array, "*stack size rank"]:
    """Returns columns of the fixed basis, `[*stack, size, rank]`.

    Args:
      indices: `[*stack, rank]`.
      size: of the basis.
      basis: "dct", or "random_qr".
    """
    return jnp.swapaxes(jnp.take(fixed_basis(size, basis).T, indices, axis=0), -1, -2)
