"""Matrices with the shorter side last, as optimizers that choose columns of a fixed basis see them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import check_choice, placed_like
from subspace_jax.optim import MatrixView


def check_columns(what: str, transform: Any, norm: Any, basis: Any) -> None:
    """Refuses unknown ways to choose columns, and a fast transform to another basis than cosines."""
    check_choice(f"{what}: transform", transform, ("matmul", "fft"))
    check_choice(f"{what}: norm", norm, (1, 2))
    check_choice(f"{what}: basis", basis, ("dct", "random_qr"))
    if transform == "fft" and basis != "dct":
        raise ValueError(f'{what}: transform="fft" is of cosines; basis={basis!r} needs transform="matmul".')


def is_compressed(leaf: Any, view: MatrixView | None, largest: int) -> bool:
    """Tells whether an array is a stack of matrices of which no side is longer than `largest`."""
    return view is not None and not view.is_vector and max(view.unfold(leaf).shape[-2:]) <= largest


def oriented(view: MatrixView | None, array: jax.Array) -> jax.Array:
    """Returns an array's matrices with the shorter side last; of equal sides that of the inputs."""
    assert view is not None
    matrix = view.unfold(array)
    return jnp.swapaxes(matrix, -1, -2) if matrix.shape[-2] <= matrix.shape[-1] else matrix


def restored(view: MatrixView, matrix: jax.Array, like: jax.Array) -> jax.Array:
    """Returns the array of oriented matrices; the inverse of `oriented`."""
    matrix_shape = view.unfold(like).shape
    matrix = jnp.swapaxes(matrix, -1, -2) if matrix_shape[-2] <= matrix_shape[-1] else matrix
    return placed_like(view.fold(matrix).astype(like.dtype), like)


def wide_zeros(array: jax.Array) -> jax.Array:
    """Zeros of an array's shape and layout in float32."""
    return jnp.zeros_like(array, jnp.float32)
