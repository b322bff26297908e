"""Matrices with orthonormal columns.

The Geometry of Algorithms with Orthogonality Constraints (Edelman, Arias, Smith, 1998).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from subspace_jax.manifolds._frames import exponential, frobenius, gram, product, symmetric, widened
from subspace_jax.manifolds._manifold import Manifold


@dataclasses.dataclass(frozen=True)
class Stiefel(Manifold):
    r"""The Stiefel manifold of \(X\), `[*stack, n, k]`, with \(X^T X = I\) and the Euclidean metric.

    Tangent vectors have \(X^T V + V^T X = 0\). The distance is the length of the straight line \(|X - Y|_F\), since the
    geodesic one has no closed form. Transport is the projection onto the new tangent space, which may shorten.

    Example:
      >>> import jax, subspace_jax as sj
      >>> point = sj.manifolds.Stiefel().random_point(jax.random.key(0), (5, 3, 2))
      >>> sj.manifolds.Stiefel().check_point(point), sj.manifolds.Stiefel().check_point(2 * point)
      (True, False)

    References:
      Edelman, Arias, Smith, The Geometry of Algorithms with Orthogonality Constraints, 1998.
    """

    def to_tangent(
        self, point: Float[Array, "*stack n k"], vector: Float[Array, "*stack n k"]
    ) -> Float[Array, "*stack n k"]:
        r"""Returns \(A - X\,\mathrm{sym}(X^T A)\).

        Args:
          point: \(X\), `[*stack, n, k]`.
          vector: \(A\), of the same shape.
        """
        self._check_shapes(point, vector)
        point, vector = widened(point, vector)
        return vector - product(point, symmetric(gram(point, vector)))

    def _exponential(
        self, point: Float[Array, "*stack n k"], tangent: Float[Array, "*stack n k"]
    ) -> Float[Array, "*stack n k"]:
        inside, squares = gram(point, tangent), gram(tangent, tangent)
        eye = jnp.zeros_like(inside) + jnp.eye(point.shape[-1], dtype=point.dtype)  # placed as the others
        generator = jnp.block([[inside, -squares], [eye, inside]])
        columns = exponential(generator)[..., :, : point.shape[-1]]
        return product(jnp.concatenate([point, tangent], -1), columns, exponential(-inside))

    def transport(
        self,
        point: Float[Array, "*stack n k"],
        tangent: Float[Array, "*stack n k"],
        new_point: Float[Array, "*stack n k"],
    ) -> Float[Array, "*stack n k"]:
        """Returns the projection of the vector onto the tangent space of the new point.

        Args:
          point: where the vector is tangent.
          tangent: the vector.
          new_point: where to bring it.
        """
        self._check_shapes(point, tangent, new_point)
        return self.to_tangent(new_point, tangent)

    def distance(self, a: Float[Array, "*stack n k"], b: Float[Array, "*stack n k"]) -> Float[Array, " *stack"]:
        r"""Returns \(|A - B|_F\), `[*stack]`.

        Args:
          a: `[*stack, n, k]`.
          b: of the same shape.
        """
        self._check_shapes(a, b)
        a, b = widened(a, b)
        return jnp.sqrt(frobenius(a - b, a - b))
