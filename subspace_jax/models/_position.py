"""Resizes a grid of position embeddings by bicubic interpolation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

CUBIC_A = -0.75


def _cubic(distance: np.ndarray) -> np.ndarray:
    near = ((CUBIC_A + 2) * distance - (CUBIC_A + 3)) * distance**2 + 1
    far = CUBIC_A * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def cubic_resize_matrix(old: int, new: int) -> np.ndarray:
    """Returns the matrix of one-dimensional cubic convolution from `old` to `new` samples.

    Half-pixel centers, edges repeated, no smoothing when shrinking, and the coefficient `a = -0.75` that
    vision models are trained with; `jax.image.resize` uses -0.5, which changes features visibly.

    Args:
        old: number of samples there are.
        new: number of samples wanted.

    Returns:
        `[new, old]` float64; every row sums to one.

    Raises:
        ValueError: a size below one.

    Source: Robert G. Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981.

    Example:
        >>> cubic_resize_matrix(4, 2).round(3).tolist()
        [[0.5, 0.594, -0.094, 0.0], [0.0, -0.094, 0.594, 0.5]]
    """
    if old < 1 or new < 1:
        raise ValueError(f"cannot resize {old} samples to {new}; expected positive sizes")
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centers).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(left + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), _cubic(np.abs(centers - (left + tap))))
    return matrix


def resize_positions(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resamples a grid of position embeddings.

    Args:
        table: `[height, width, features]`.
        grid: wanted `(height, width)`.

    Returns:
        `[*grid, features]`, the dtype of `table`; `table` itself where the grid is the same.

    Example:
        >>> import jax.numpy as jnp
        >>> resize_positions(jnp.ones((4, 4, 2)), (3, 5)).shape
        (3, 5, 2)
    """
    if tuple(table.shape[:2]) == tuple(grid):
        return table
    rows = jnp.asarray(cubic_resize_matrix(table.shape[0], grid[0]), jnp.float32)
    columns = jnp.asarray(cubic_resize_matrix(table.shape[1], grid[1]), jnp.float32)
    resized = jnp.einsum("ih,jw,hwf->ijf", rows, columns, table.astype(jnp.float32), precision="highest")
    return resized.astype(table.dtype)
