"""Linear subspaces, each held by an orthonormal basis.

The Geometry of Algorithms with Orthogonality Constraints (Edelman, Arias, Smith, 1998).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subspace_jax.manifolds._frames import gram, product, transposed, widened
from subspace_jax.manifolds._manifold import Manifold


class _PrincipalVectors(NamedTuple):
    """Principal vectors of two subspaces: `start` and `turned` rotate the bases to them."""

    start: jax.Array
    turned: jax.Array
    directions: jax.Array
    angles: jax.Array


@dataclasses.dataclass(frozen=True)
class Grassmann(Manifold):
    r"""The Grassmannian of subspaces \(\mathrm{span}(X)\), `[*stack, n, k]`, \(X^T X = I\); \(X Q\) is the same point.

    Tangent vectors have \(X^T V = 0\). The distance is the norm of the principal angles, and transport is parallel
    along the shortest geodesic, so that it keeps inner products. Where an angle is \(\pi/2\) there are several shortest
    geodesics and one is taken.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> first, second = jnp.eye(3)[:, :1], jnp.eye(3)[:, 1:2]
      >>> round(float(sj.manifolds.Grassmann().distance(first, second)), 4)
      1.5708

    References:
      Edelman, Arias, Smith, The Geometry of Algorithms with Orthogonality Constraints, 1998.
    """

    def to_tangent(
        self, point: Float[Array, "*stack n k"], vector: Float[Array, "*stack n k"]
    ) -> Float[Array, "*stack n k"]:
        r"""Returns \(A - X X^T A\).

        Args:
          point: \(X\), `[*stack, n, k]`.
          vector: \(A\), of the same shape.
        """
        self._check_shapes(point, vector)
        point, vector = widened(point, vector)
        return vector - product(point, gram(point, vector))

    def _exponential(
        self, point: Float[Array, "*stack n k"], tangent: Float[Array, "*stack n k"]
    ) -> Float[Array, "*stack n k"]:
        # With V = U S W^T the geodesic is X W cos(S) W^T + U sin(S) W^T; U = V W / S needs no SVD of a tall matrix.
        squares, w = jnp.linalg.eigh(gram(tangent, tangent))
        sizes = jnp.sqrt(jnp.maximum(squares, 0.0))
        tiny = sizes < 1e-4
        sines = jnp.where(tiny, 1.0 - squares / 6.0, jnp.sin(sizes) / jnp.where(tiny, 1.0, sizes))
        # cos - 1 rather than cos: a vector of zeros gives back the very same bits.
        inside = product(w * (-2.0 * jnp.square(jnp.sin(sizes / 2.0)))[..., None, :], transposed(w))
        outside = product(w * sines[..., None, :], transposed(w))
        return point + product(point, inside) + product(tangent, outside)

    def log(self, point: Float[Array, "*stack n k"], other: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        """Returns the shortest tangent vector whose exponential spans `other`.

        Args:
          point: `[*stack, n, k]`.
          other: of the same shape.
        """
        self._check_shapes(point, other)
        found = _principal_vectors(*widened(point, other))
        return product(found.directions * found.angles[..., None, :], transposed(found.start))

    def transport(
        self,
        point: Float[Array, "*stack n k"],
        tangent: Float[Array, "*stack n k"],
        new_point: Float[Array, "*stack n k"],
    ) -> Float[Array, "*stack n k"]:
        """Returns the vector carried in parallel along the shortest geodesic, in terms of the new basis.

        Args:
          point: where the vector is tangent.
          tangent: the vector.
          new_point: where to bring it.
        """
        self._check_shapes(point, tangent, new_point)
        point, tangent, new_point = widened(point, tangent, new_point)
        found = _principal_vectors(point, new_point)
        along = gram(found.directions, tangent)
        sines, halves = jnp.sin(found.angles)[..., None], jnp.sin(found.angles / 2)[..., None]
        moved = tangent - product(point, found.start, sines * along) - product(found.directions, 2 * halves**2 * along)
        return self.to_tangent(new_point, product(moved, found.start, transposed(found.turned)))

    def angles(self, a: Float[Array, "*stack n k"], b: Float[Array, "*stack n k"]) -> Float[Array, "*stack k"]:
        """Returns the principal angles of two subspaces, `[*stack, k]`, smallest first, precise also near zero.

        Args:
          a: `[*stack, n, k]`.
          b: of the same shape.
        """
        self._check_shapes(a, b)
        return _principal_vectors(*widened(a, b)).angles

    def distance(self, a: Float[Array, "*stack n k"], b: Float[Array, "*stack n k"]) -> Float[Array, " *stack"]:
        r"""Returns the geodesic distance \(\sqrt{\sum_i \theta_i^2}\) of the principal angles, `[*stack]`.

        Args:
          a: `[*stack, n, k]`.
          b: of the same shape.
        """
        return jnp.sqrt(jnp.sum(jnp.square(self.angles(a, b)), -1))


def _principal_vectors(a: Float[Array, "*stack n k"], b: Float[Array, "*stack n k"]) -> _PrincipalVectors:
    start, cosines, turned_t = jnp.linalg.svd(gram(a, b), full_matrices=False)
    turned = transposed(turned_t)
    outside = product(b, turned)
    outside = outside - product(a, gram(a, outside))
    sines = jnp.sqrt(jnp.sum(jnp.square(outside), -2))  # the arc cosine alone has no digits for small angles
    directions = outside / jnp.where(sines == 0, 1.0, sines)[..., None, :]
    return _PrincipalVectors(start, turned, directions, jnp.arctan2(sines, cosines))
