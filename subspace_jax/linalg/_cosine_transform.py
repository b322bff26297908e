"""The orthonormal discrete cosine transform (DCT-II): basis vectors, transforms, and approximations by few terms."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.fft import dctn, idctn
from jaxtyping import Array, Float, Int


def cosine_vectors(index: Int[Array, " *stack"], size: int, dtype=jnp.float32) -> Float[Array, "*stack size"]:
    r"""Returns rows of the orthonormal DCT-II matrix: \(c_i \cos(\pi (2 j + 1)\, i / 2 N)\) over \(j\).

    Args:
      index: \(i\), integers `[...]` from 0 to `size - 1`.
      size: \(N\), at most half a million.
      dtype: of the result.

    Returns:
      `[..., size]`, each a vector of length 1.

    Example:
      >>> import jax.numpy as jnp
      >>> (2.0 * cosine_vectors(jnp.array([0, 2]), 4)).round(3).tolist()
      [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, -1.0, 1.0]]
    """
    index = jnp.asarray(index, jnp.int32)[..., None]
    odd = 2 * jnp.arange(size, dtype=jnp.int32) + 1
    # The angle in whole steps of pi / 2N, reduced to one turn in integers: in float32 the product has too few digits.
    # Two parts of the index keep every product within 32 bits.
    period = 4 * size
    steps = ((((index >> 8) * odd) % period << 8) + (index & 255) * odd) % period
    wave = jnp.cos(steps.astype(dtype) * (math.pi / (2 * size)))
    return wave * jnp.where(index == 0, math.sqrt(1.0 / size), math.sqrt(2.0 / size)).astype(dtype)


def cosine_matrix(size: int, dtype=jnp.float32) -> Float[Array, "size size"]:
    r"""Returns the orthonormal DCT-II matrix \(C\): `C @ x` is the transform of `x`, and \(C C^T = I\).

    Args:
      size: number of rows.
      dtype: of the result.

    Example:
      >>> cosine_matrix(2).round(3).tolist()[1][0] > 0
      True
    """
    return cosine_vectors(jnp.arange(size), size, dtype)


@functools.partial(jax.jit, static_argnames="fft")
def cosine_transform(matrix: Float[Array, "m n"], *, fft: bool = True) -> Float[Array, "m n"]:
    r"""Returns the two-dimensional DCT \(C_m M C_n^T\) of `[m, n]`, orthonormal.

    Args:
      matrix: `[m, n]`.
      fft: by fast Fourier transforms; else by two products.

    Example:
      >>> import jax.numpy as jnp
      >>> cosine_transform(jnp.ones((2, 2))).round(3).tolist()
      [[2.0, 0.0], [0.0, 0.0]]
    """
    if fft:
        return dctn(matrix, norm="ortho")
    left, right = (cosine_matrix(size, matrix.dtype) for size in matrix.shape)
    return _product(_product(left, matrix), right.T)


@functools.partial(jax.jit, static_argnames="fft")
def inverse_cosine_transform(spectrum: Float[Array, "m n"], *, fft: bool = True) -> Float[Array, "m n"]:
    r"""Returns the inverse two-dimensional DCT \(C_m^T S C_n\): the matrix whose transform is `spectrum`.

    Args:
      spectrum: `[m, n]`.
      fft: by fast Fourier transforms; else by two products.

    Example:
      >>> import jax.numpy as jnp
      >>> inverse_cosine_transform(jnp.array([[2.0, 0.0], [0.0, 0.0]])).round(3).tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    if fft:
        return idctn(spectrum, norm="ortho")
    left, right = (cosine_matrix(size, spectrum.dtype) for size in spectrum.shape)
    return _product(_product(left.T, spectrum), right)


class Residuals(NamedTuple):
    """Shares of a matrix's energy that approximations of one size leave.

    Attributes:
      cosine: of the best terms of the cosine transform.
      low_rank: of the best low-rank matrix.
      random_cosine: of randomly located terms of the cosine transform.
    """

    cosine: float
    low_rank: float
    random_cosine: float


def best_cosine_terms(matrix: Float[Array, "m n"], count: int) -> tuple[Float[Array, "m n"], float]:
    """Returns the best approximation by `count` terms of the cosine transform, and the share of energy it leaves.

    Args:
      matrix: `[m, n]`.
      count: number of terms, at most `m n`.

    Returns:
      The approximation `[m, n]`, and what is missing of the squared Frobenius norm, from 0 to 1.

    Example:
      >>> import jax.numpy as jnp
      >>> best_cosine_terms(jnp.ones((2, 2)), 1)[1]
      0.0
    """
    spectrum = cosine_transform(matrix)
    _, largest = lax.top_k(jnp.abs(spectrum.ravel()), count)
    kept = jnp.zeros(spectrum.size, spectrum.dtype).at[largest].set(spectrum.ravel()[largest]).reshape(spectrum.shape)
    return inverse_cosine_transform(kept), _missing(kept, spectrum)


def compare_residuals(key: jax.Array, matrix: Float[Array, "in out"], rank: int) -> Residuals:
    r"""Compares cosine terms, best and random, with a low rank of as many values, \(n = r\,(d_{in} + d_{out})\).

    Args:
      key: draws the random locations; consumed.
      matrix: `[in, out]`.
      rank: \(r\).

    Example:
      >>> import jax
      >>> found = compare_residuals(jax.random.key(0), jax.random.normal(jax.random.key(1), (32, 48)), 1)
      >>> found.cosine < found.low_rank < found.random_cosine
      True

    References:
      Du et al., LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning, 2025.
    """
    count = min(rank * sum(matrix.shape), matrix.size)
    values = jnp.linalg.svd(matrix, compute_uv=False)
    spectrum = cosine_transform(matrix)
    drawn = jax.random.permutation(key, matrix.size) < count
    return Residuals(
        best_cosine_terms(matrix, count)[1],
        float(jnp.sum(values[rank:] ** 2) / jnp.sum(values**2)),
        _missing(spectrum * drawn.reshape(spectrum.shape), spectrum),
    )


def _missing(kept: Float[Array, "m n"], spectrum: Float[Array, "m n"]) -> float:
    return float(jnp.sum((spectrum - kept) ** 2) / jnp.sum(spectrum**2))


def _product(left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.matmul(left, right, precision=lax.Precision.HIGHEST)
