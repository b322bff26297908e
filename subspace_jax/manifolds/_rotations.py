"""Rotations of n-space.

The Geometry of Algorithms with Orthogonality Constraints (Edelman, Arias, Smith, 1998).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from subspace_jax.manifolds._frames import exponential, gram, product, skew_part, symmetric, widened
from subspace_jax.manifolds._manifold import Manifold


@dataclasses.dataclass(frozen=True)
class SpecialOrthogonal(Manifold):
    r"""The rotation group SO(n): \(X\), `[*stack, n, n]`, with \(X^T X = I\) and determinant one.

    Tangent vectors are \(X \Omega\) with skew-symmetric \(\Omega\). The distance is the geodesic one,
    \(|\log(X^T Y)|_F\). Transport keeps \(\Omega\), the group's own way (left translation), and with it inner products.

    Example:
      >>> import jax, subspace_jax as sj
      >>> turn = sj.manifolds.SpecialOrthogonal().random_point(jax.random.key(0), (3, 3))
      >>> sj.manifolds.SpecialOrthogonal().check_point(turn), sj.manifolds.SpecialOrthogonal().check_point(-turn)
      (True, False)

    References:
      Edelman, Arias, Smith, The Geometry of Algorithms with Orthogonality Constraints, 1998.
    """

    def project(self, matrix: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
        r"""Returns the nearest rotation: \(U D V^T\) of the SVD, where \(D\) flips the last direction if need be.

        Args:
          matrix: `[*stack, n, n]` of full rank.
        """
        self._check_shapes(matrix)
        u, _, vt = jnp.linalg.svd(widened(matrix)[0], full_matrices=False)
        sign = _determinant_sign(product(u, vt))
        flips = jnp.ones_like(u[..., 0, :]).at[..., -1].set(sign)
        return product(u * flips[..., None, :], vt)

    def to_tangent(
        self, point: Float[Array, "*stack n n"], vector: Float[Array, "*stack n n"]
    ) -> Float[Array, "*stack n n"]:
        r"""Returns \(X\,\mathrm{skew}(X^T A)\).

        Args:
          point: \(X\), `[*stack, n, n]`.
          vector: \(A\), of the same shape.
        """
        self._check_shapes(point, vector)
        point, vector = widened(point, vector)
        return product(point, skew_part(gram(point, vector)))

    def _exponential(
        self, point: Float[Array, "*stack n n"], tangent: Float[Array, "*stack n n"]
    ) -> Float[Array, "*stack n n"]:
        return product(point, exponential(skew_part(gram(point, tangent))))

    def transport(
        self,
        point: Float[Array, "*stack n n"],
        tangent: Float[Array, "*stack n n"],
        new_point: Float[Array, "*stack n n"],
    ) -> Float[Array, "*stack n n"]:
        r"""Returns \(Y X^T V\).

        Args:
          point: \(X\), where the vector is tangent.
          tangent: the vector \(V\).
          new_point: \(Y\), where to bring it.
        """
        self._check_shapes(point, tangent, new_point)
        point, tangent, new_point = widened(point, tangent, new_point)
        return product(new_point, gram(point, tangent))

    def distance(self, a: Float[Array, "*stack n n"], b: Float[Array, "*stack n n"]) -> Float[Array, " *stack"]:
        r"""Returns \(|\log(A^T B)|_F\), the root of twice the sum of squared angles of rotation, `[*stack]`.

        Args:
          a: `[*stack, n, n]`.
          b: of the same shape.
        """
        self._check_shapes(a, b)
        turn = gram(*widened(a, b))
        # The symmetric and the skew part of a rotation share eigenspaces, with cosines and sines of the angles.
        cosines, vectors = jnp.linalg.eigh(symmetric(turn))
        sines = jnp.sqrt(jnp.sum(jnp.square(product(skew_part(turn), vectors)), -2))
        return jnp.sqrt(jnp.sum(jnp.square(jnp.arctan2(sines, cosines)), -1))

    def _oriented(self, frame: Float[Array, "*stack n n"]) -> Float[Array, "*stack n n"]:
        return frame.at[..., -1].multiply(_determinant_sign(frame)[..., None])

    def _why_not(self, matrix: Any, tolerance: float) -> str:
        reason = super()._why_not(matrix, tolerance)
        if not reason and bool((_determinant_sign(jnp.asarray(matrix)) < 0).any()):
            reason = "the determinant is -1: a reflection, no rotation. Flip the sign of one column."
        return reason

    def _reason(self, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or shape[-1] != shape[-2] or not shape[-1]:
            return f"shape {shape} is not a stack of square matrices."
        return ""


def _determinant_sign(matrix: Float[Array, "*stack n n"]) -> Float[Array, " *stack"]:
    return jnp.where(jnp.linalg.det(widened(matrix)[0]) < 0, -1.0, 1.0)
