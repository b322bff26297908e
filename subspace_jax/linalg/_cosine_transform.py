"""The orthonormal discrete cosine transform (DCT-II) of matrices, and approximations by few of its terms."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.fft import dctn, idctn
from jaxtyping import Array, Float

from subspace_jax.linalg._folded_cosine import cosine_rows


@functools.partial(jax.jit, static_argnames="fft")
def cosine_transform(matrix: Float[Array, "m n"], *, fft: bool = True) -> Float[Array, "m n"]:
    r"""Returns the two-dimensional DCT \(C_m M C_n^T\) of `[m, n]`, orthonormal.

    Args:
      matrix: `[m, n]`.
      fft: by fast Fourier transforms; else by products, see `cosine_rows`.

    Example:
      >>> import jax.numpy as jnp
      >>> cosine_transform(jnp.ones((2, 2))).round(3).tolist()
      [[2.0, 0.0], [0.0, 0.0]]
    """
    if fft:
        return dctn(matrix, norm="ortho")
    return cosine_rows(cosine_rows(matrix).T).T


@functools.partial(jax.jit, static_argnames="fft")
def inverse_cosine_transform(spectrum: Float[Array, "m n"], *, fft: bool = True) -> Float[Array, "m n"]:
    r"""Returns the inverse two-dimensional DCT \(C_m^T S C_n\): the matrix whose transform is `spectrum`.

    Args:
      spectrum: `[m, n]`.
      fft: by fast Fourier transforms; else by products, see `cosine_rows`.

    Example:
      >>> import jax.numpy as jnp
      >>> inverse_cosine_transform(jnp.array([[2.0, 0.0], [0.0, 0.0]])).round(3).tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    if fft:
        return idctn(spectrum, norm="ortho")
    return cosine_rows(cosine_rows(spectrum, inverse=True).T, inverse=True).T


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
