"""Kernel functions of two sets of rows, and the competition of the entries that they make."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.linalg import kth_smallest_magnitude
from subspace_jax.weights import placed_as

Kernel = Literal["distance", "linear", "sigmoid", "rbf"]
Rule = Literal["soft", "hard"]


@functools.partial(jax.jit, inline=True)
def pieces_sum(a: jax.Array, b: jax.Array) -> jax.Array:
    r"""Returns the piecewise distance kernel \(\sum_p c_p \|a_{p,i} - b_{p,j}\|\), with \(c_p = 0.1\,(-1)^p\).

    Args:
      a: rows of the inputs, `[*stack, pieces, in, width]`.
      b: rows of the outputs, `[*stack, pieces, out, width]`.

    Returns:
      `[*stack, in, out]`, float32; its gradient is finite where two rows are equal.

    Example:
      >>> import jax.numpy as jnp
      >>> a = jnp.zeros((2, 1, 2))
      >>> pieces_sum(a, jnp.stack([jnp.ones((3, 2)), jnp.zeros((3, 2))])).round(4).tolist()
      [[0.14139999449253082, 0.14139999449253082, 0.14139999449253082]]
    """
    # One piece at a time, so that two arrays of the size of the result are held and not one for each piece.
    total = 0.1 * _distances(a[..., 0, :, :], b[..., 0, :, :])
    for piece in range(1, a.shape[-3]):
        total = total + 0.1 * (-1) ** piece * _distances(a[..., piece, :, :], b[..., piece, :, :])
    return total


def kernel_matrix(kernel: Kernel, a: jax.Array, b: jax.Array, scalars: Mapping[str, jax.Array]) -> jax.Array:
    r"""Returns the kernel of every pair of rows: "distance" as `pieces_sum`, the others of rows joined over pieces.

    "linear" \(x \cdot x'\); "sigmoid" \(\alpha / (1 + e^{-\beta x \cdot x'}) + \gamma\); "rbf"
    \(\alpha e^{-\beta \|x - x'\|^2} + \gamma\).

    Args:
      kernel: its name.
      a: `[*stack, pieces, in, width]`.
      b: `[*stack, pieces, out, width]`.
      scalars: alpha, beta and gamma, `[*stack]` each, for the two that have them.

    Returns:
      `[*stack, in, out]`, float32.
    """
    if kernel == "distance":
        return pieces_sum(a, b)
    if kernel == "linear":
        return jnp.sum(_products(a, b), axis=-3)
    alpha, beta, gamma = (scalars[name][..., None, None] for name in ("alpha", "beta", "gamma"))
    if kernel == "sigmoid":
        return alpha * jax.nn.sigmoid(beta * jnp.sum(_products(a, b), axis=-3)) + gamma
    return alpha * jnp.exp(-beta * jnp.sum(_squares(a, b), axis=-3)) + gamma


def compete(matrix: jax.Array, order: jax.Array, rule: Rule) -> jax.Array:
    r"""Returns a matrix of which the entries of small magnitude are set to zero, and the others scaled by magnitude.

    With \(t\) the magnitude of the given order, "soft": \(D\,(|D| - t)_+\); "hard": \(D\,|D|\) where \(|D| > t\). The
    second factor and \(t\) are held fixed in differentiation.

    Args:
      matrix: \(D\), `[*stack, in, out]`.
      order: \(k\), int32 `[*stack]`: \(t\) is the \(k\)-th smallest magnitude, 0 if \(k\) is 0. A traced value.
      rule: "soft" or "hard".

    Example:
      >>> import jax.numpy as jnp
      >>> compete(jnp.array([[1.0, -2.0], [3.0, 4.0]]), jnp.array(2), "soft").tolist()
      [[0.0, -0.0], [3.0, 8.0]]
    """
    fixed = lax.stop_gradient(matrix)
    limit = kth_smallest_magnitude(fixed, order)[..., None, None]
    if rule == "soft":
        return matrix * jnp.maximum(jnp.abs(fixed) - limit, 0.0)
    return matrix * jnp.where(jnp.abs(fixed) > limit, jnp.abs(fixed), 0.0)


def threshold_order(share: float, size: int, rule: Rule) -> int:
    r"""Returns the place, by ascending magnitude, of the threshold that sets a share of entries to zero.

    "soft": \(\lceil s S \rceil\), of the exact product. "hard": the linearly interpolated quantile of the release lies
    between two magnitudes, of which the lower one separates the same entries: \(\lfloor s (S - 1) \rfloor + 1\).

    Example:
      >>> threshold_order(0.55, 100, "soft"), threshold_order(0.55, 100, "hard")
      (55, 55)
    """
    return math.ceil(share * size - 1e-6) if rule == "soft" else math.floor(share * (size - 1) + 1e-6) + 1


@jax.custom_vjp
def _distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Distances of all pairs of rows, `[..., in, out]`."""
    return jnp.sqrt(_squares(a, b))


def _distances_forward(a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _distances(a, b), (a, b)


def _distances_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient, made of squares anew; 0 where two rows are equal, which have none."""
    a, b = saved
    squares = _squares(a, b)
    weights = jnp.where(squares > 0, cotangent * lax.rsqrt(squares), 0.0)

    def of_inputs(weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return a * jnp.sum(weights, axis=-1)[..., None] - jnp.matmul(weights, b, precision=lax.Precision.HIGHEST)

    def of_outputs(weights: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        # The weights are not turned in memory.
        turned = jnp.einsum("...io,...iw->...ow", weights, a, precision=lax.Precision.HIGHEST)
        return b * jnp.sum(weights, axis=-2)[..., None] - turned

    # Sums over an axis that a mesh splits: each gradient lies as its factor does.
    return placed_as(of_inputs, a)(weights, a, b), placed_as(of_outputs, b)(weights, a, b)


_distances.defvjp(_distances_forward, _distances_backward)


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, jnp.swapaxes(b, -1, -2), precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, inline=True)
def _squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances of all pairs of rows, by products and never below zero."""
    lengths = jnp.sum(a * a, axis=-1)[..., :, None] + jnp.sum(b * b, axis=-1)[..., None, :]
    return jnp.maximum(lengths - 2.0 * _products(a, b), 0.0)
