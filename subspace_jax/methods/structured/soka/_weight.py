"""A frozen array plus a sum of Kronecker products."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Dot, Operation, Weight, register_weight
from subspace_jax.linalg import KroneckerSplit, kronecker_rows, kronecker_sum, wide_dtype


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class KroneckerSum(Weight):
    r"""A frozen array plus a sum of trainable Kronecker products: \(W + \sum_c \mu_c\,\sigma_c\,U_c \otimes V_c\).

    A row read as a matrix \(X\) is multiplied by each term as \(\sigma_c U_c^T X V_c\), so the sum is not formed where
    the operation is a product over all inputs; convolutions and lookups form it.

    Attributes:
      base: \(W\), of the weight's shape.
      left: \(U\), `[*stack, terms, m, n]`.
      right: \(V\), `[*stack, terms, p, q]`; `in` is \(m p\) and `out` is \(n q\).
      sigma: \(\sigma\), `[*stack, terms]`.
      mask: \(\mu\), 1 for a term in use and 0 for one that is not, `[*stack, terms]`.
      start_left: `left` at the start, kept where `base` is a residual.
      start_right: likewise `right`.
      start_sigma: likewise `sigma`, zero where a term was never in use.
    """

    base: jax.Array
    left: jax.Array
    right: jax.Array
    sigma: jax.Array
    mask: jax.Array
    start_left: jax.Array | None = None
    start_right: jax.Array | None = None
    start_sigma: jax.Array | None = None

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "left": "stack term m n",
        "right": "stack term p q",
        "sigma": "stack term",
        "mask": "stack term",
        "start_left": "stack term m n",
        "start_right": "stack term p q",
        "start_sigma": "stack term",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The number of terms, masked ones included."""
        return self.sigma.shape[-1]

    @property
    def split(self) -> KroneckerSplit:
        """The sizes of both factors."""
        m, n = self.left.shape[-2:]
        p, q = self.right.shape[-2:]
        return KroneckerSplit(m, p, n, q)

    @property
    def scales(self) -> jax.Array:
        """The scales of the terms in use, zero for the others, `[*stack, terms]`."""
        return self.sigma * jax.lax.stop_gradient(self.mask)

    def learning_size(self, name: str) -> int | None:
        """Returns the values of the terms in use."""
        if name not in ("left", "right", "sigma") or self.mask is None:
            return None
        return int(jnp.sum(self.mask != 0)) * (math.prod(getattr(self, name).shape[-2:]) if name != "sigma" else 1)

    def importance(self) -> jax.Array:
        r"""Returns \(|\sigma_c|\,\|U_c\|_F\,\|V_c\|_F\), the Frobenius norm of every term in use, `[*stack, terms]`."""
        left, right = (jnp.sqrt(jnp.sum(v * v, axis=(-2, -1))) for v in (self.left, self.right))
        return jnp.abs(self.scales) * left * right

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with all terms added, in float32."""
        one = self.with_frozen_stopped()
        wide = wide_dtype(one.dtype)
        scales, left, right = (v.astype(wide) for v in (one.scales, one.left, one.right))
        total = one.base.astype(wide) + one.role.unmatrix(kronecker_sum(scales, left, right), one.shape)
        return total.astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the terms, the smaller intermediate first."""
        scales, left, right = (v.astype(operation.dtype) for v in (self.scales, self.left, self.right))
        precision = operation.parameters.get("precision") if isinstance(operation, Dot) else None

        def rows(turn: bool):
            factors = (jnp.swapaxes(v, -1, -2) if turn else v for v in (left, right))
            u, v = factors
            return lambda x: kronecker_rows(x, scales, u, v, precision=precision)

        y = operation.linear(x, rows(False), rows(True))
        return operation.apply(x, self.materialize(operation.dtype)) if y is None else operation.apply(x, self.base) + y
