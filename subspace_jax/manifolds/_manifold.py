"""The interface of manifolds of matrices."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subspace_jax.core import StructureError
from subspace_jax.linalg import wide_dtype
from subspace_jax.manifolds._frames import frobenius, gram_error, polar_frame, qr_frame, widened

Retraction = Literal["exponential", "qr", "polar"]
RETRACTIONS = ("exponential", "qr", "polar")


@dataclasses.dataclass(frozen=True)
class Manifold(abc.ABC):
    """Matrices with orthonormal columns, `[*stack, n, k]`: every matrix of the stack is a point of its own.

    Functions are pure, work under jit, vmap and grad, and compute in float32 (float64 for float64 input): narrower
    input is widened, because a point in bfloat16 is off the manifold by some thousandths.
    """

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def project(self, matrix: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        r"""Returns the nearest point to a matrix: \(U V^T\) of its SVD.

        Args:
          matrix: `[*stack, n, k]` of full rank.

        Returns:
          A point of the same shape.
        """
        self._check_shapes(matrix)
        return polar_frame(*widened(matrix))

    @abc.abstractmethod
    def to_tangent(
        self, point: Float[Array, "*stack n k"], vector: Float[Array, "*stack n k"]
    ) -> Float[Array, "*stack n k"]:
        """Returns the orthogonal projection of a matrix onto the tangent space.

        It turns a Euclidean gradient into the Riemannian one.

        Args:
          point: `[*stack, n, k]`.
          vector: any matrices, of the point's shape.
        """

    def retract(
        self, point: Float[Array, "*stack n k"], tangent: Float[Array, "*stack n k"], method: Retraction = "exponential"
    ) -> Float[Array, "*stack n k"]:
        r"""Returns the point that is reached by going along a tangent vector: \(X + V + O(|V|^2)\).

        Args:
          point: \(X\), `[*stack, n, k]`.
          tangent: \(V\), of the same shape.
          method: "exponential" follows the geodesic for time one; "qr" and "polar" take the orthonormal factor of
            \(X + V\).

        Raises:
          ValueError: another method.
          StructureError: shapes differ, or no point of this manifold has them.
        """
        self._check_shapes(point, tangent)
        if method not in RETRACTIONS:
            raise ValueError(f"{self.name}.retract: method={method!r}; expected one of {', '.join(RETRACTIONS)}.")
        point, tangent = widened(point, tangent)
        if method == "exponential":
            return self._exponential(point, tangent)
        return (qr_frame if method == "qr" else polar_frame)(point + tangent)

    @abc.abstractmethod
    def _exponential(
        self, point: Float[Array, "*stack n k"], tangent: Float[Array, "*stack n k"]
    ) -> Float[Array, "*stack n k"]:
        """The geodesic from `point` in direction `tangent` at time one; both wide and whole."""

    @abc.abstractmethod
    def transport(
        self,
        point: Float[Array, "*stack n k"],
        tangent: Float[Array, "*stack n k"],
        new_point: Float[Array, "*stack n k"],
    ) -> Float[Array, "*stack n k"]:
        """Returns the tangent vector at `new_point` that stands for one at `point`.

        Args:
          point: `[*stack, n, k]`.
          tangent: a tangent vector there.
          new_point: where to bring it.
        """

    def inner(
        self, point: Float[Array, "*stack n k"], a: Float[Array, "*stack n k"], b: Float[Array, "*stack n k"]
    ) -> Float[Array, " *stack"]:
        r"""Returns \(\langle A, B \rangle = \mathrm{tr}(A^T B)\) of two tangent vectors, `[*stack]`.

        Args:
          point: `[*stack, n, k]`; the metric is the same everywhere.
          a: tangent vector.
          b: tangent vector.
        """
        self._check_shapes(point, a, b)
        return frobenius(*widened(a, b))

    @abc.abstractmethod
    def distance(self, a: Float[Array, "*stack n k"], b: Float[Array, "*stack n k"]) -> Float[Array, " *stack"]:
        """Returns the distance of two points, `[*stack]`.

        Args:
          a: `[*stack, n, k]`.
          b: of the same shape.
        """

    def random_point(
        self, key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
    ) -> Float[Array, "*stack n k"]:
        """Returns points drawn uniformly: orthonormal factors of Gaussian matrices.

        Args:
          key: a random key; it is consumed.
          shape: `(*stack, n, k)`.
          dtype: float32 or float64.

        Raises:
          StructureError: no shape of this manifold, or a narrower dtype.
        """
        self.check_shape(tuple(shape))
        if jnp.dtype(dtype) != wide_dtype(dtype):
            raise StructureError(f"{self.name}.random_point: dtype={jnp.dtype(dtype)}; points need float32 or float64.")
        return self._oriented(qr_frame(jax.random.normal(key, shape, dtype)))

    def _oriented(self, frame: Float[Array, "*stack n k"]) -> Float[Array, "*stack n k"]:
        return frame

    @overload
    def check_point(self, matrix: Any, *, explain: Literal[False] = ..., tolerance: float = ...) -> bool: ...
    @overload
    def check_point(self, matrix: Any, *, explain: Literal[True], tolerance: float = ...) -> tuple[bool, str]: ...

    def check_point(self, matrix: Any, *, explain: bool = False, tolerance: float = 1e-4) -> bool | tuple[bool, str]:
        """Tells whether every matrix of a stack is a point; not for use under jit.

        Args:
          matrix: `[*stack, n, k]`, concrete.
          explain: also return what is wrong; empty if nothing is.
          tolerance: largest error of an inner product of two columns.
        """
        reason = self._reason(jnp.shape(matrix)) or self._why_not(matrix, tolerance)
        return (not reason, reason) if explain else not reason

    def _why_not(self, matrix: Any, tolerance: float) -> str:
        array = jnp.asarray(matrix)
        if array.dtype != wide_dtype(array.dtype):
            return f"dtype {array.dtype} cannot hold a point of {self.name}; expected float32 or float64."
        array = widened(array)[0]
        if not bool(jnp.isfinite(array).all()):
            return "it has entries that are not finite."
        error = float(gram_error(array))
        if error > tolerance:
            return (
                f"columns are not orthonormal: X^T X differs from I by {error:.3g}, allowed is {tolerance:g}. "
                f"{self.name}().project(matrix) gives the nearest point."
            )
        return ""

    def _check_shapes(self, first: Float[Array, "... n k"], *others: Float[Array, "... n k"]) -> None:
        self.check_shape(jnp.shape(first))
        for other in others:
            if jnp.shape(other)[-2:] != jnp.shape(first)[-2:]:
                raise StructureError(
                    f"{self.name}: shapes {jnp.shape(first)} and {jnp.shape(other)} differ; points and tangent "
                    "vectors have one shape."
                )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises StructureError if no point has this shape."""
        reason = self._reason(shape)
        if reason:
            raise StructureError(f"{self.name}: {reason}")

    def _reason(self, shape: tuple[int, ...]) -> str:
        """Why no point of this manifold has a shape; empty if one has."""
        if len(shape) < 2 or not 1 <= shape[-1] <= shape[-2]:
            return f"shape {shape} is not a stack of matrices with at most as many columns as rows, and at least one."
        return ""
