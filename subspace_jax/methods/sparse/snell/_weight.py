"""A frozen array plus a sparse matrix that a kernel function makes of two small factors, formed when it is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax import lax

from subspace_jax.core import Operation, Weight, register_weight, static
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.sparse.snell._kernels import Kernel, Rule, compete, kernel_matrix
from subspace_jax.weights import drop_examples, drop_inputs, step_keys


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSparse(Weight):
    r"""A frozen array plus a kernel matrix of two factors after a competition of its entries.

    A use forms the matrix, applies the model's operation and forgets it; the backward pass forms it anew from the
    factors. Nothing of the array's size is kept, but the array itself.

    Attributes:
      base: \(W\), of the weight's shape.
      a: rows of the inputs, `[*stack, pieces, in, rank / pieces]`.
      b: rows of the outputs, `[*stack, pieces, out, rank / pieces]`.
      order: which magnitude is the threshold, int32 `[*stack]`; see `threshold_order`. An array, so that another
        sparsity compiles nothing.
      alpha: `[*stack]`, of the kernels that have it; None else.
      beta: likewise.
      gamma: likewise.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      kernel: the kernel function.
      rule: of the competition.
      competes: without, the kernel matrix is added as it is.
      dropout: probability of dropping an input of the addition.
      drop_path: probability of leaving the addition out for an example.
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    order: jax.Array
    alpha: jax.Array | None = None
    beta: jax.Array | None = None
    gamma: jax.Array | None = None
    dropout_key: jax.Array | None = None
    kernel: Kernel = static(default="distance")
    rule: Rule = static(default="soft")
    competes: bool = static(default=True)
    dropout: float = static(default=0.0)
    drop_path: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "a": "stack piece in rank",
        "b": "stack piece out rank",
        "order": "stack",
        "alpha": "stack",
        "beta": "stack",
        "gamma": "stack",
        "dropout_key": "stack",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The width of the factors, over all pieces."""
        return self.a.shape[-3] * self.a.shape[-1]

    def with_key(self, key: jax.Array) -> KernelSparse:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not (self.dropout or self.drop_path):
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.a.shape[:-3]))

    def parts(self) -> dict[str, Any]:
        """Returns the fields that the addition is made of."""
        names = ("a", "b", "order", "alpha", "beta", "gamma")
        return {n: v for n in names if (v := getattr(self, n)) is not None}

    def matrix(self, parts: Mapping[str, Any]) -> jax.Array:
        r"""Returns the kernel matrix \(D\) before the competition, `[*stack, in, out]`, in float32 or wider."""
        wide = {n: v.astype(wide_dtype(v.dtype)) for n, v in parts.items() if n != "order"}
        return kernel_matrix(self.kernel, wide["a"], wide["b"], wide)

    def addition(self, parts: Mapping[str, Any] | None = None) -> jax.Array:
        """Returns what is added to the array, `[*stack, in, out]`, in float32 or wider."""
        parts = self.parts() if parts is None else parts
        matrix = self.matrix(parts)
        return compete(matrix, parts["order"], self.rule) if self.competes else matrix

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with the addition, added in float32 and cast once."""
        one = self.with_frozen_stopped()
        added = one.role.unmatrix(one.addition(), one.shape)
        return (one.base.astype(added.dtype) + added).astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the array with its addition, of which nothing is kept for the backward pass."""
        dropped = None
        if self.dropout_key is not None:
            dropped = drop_inputs(x, operation, self.dropout_key, self.dropout)
            dropped = drop_examples(dropped, operation, self.dropout_key, self.drop_path)

        def compute(x: jax.Array, dropped: Any, base: jax.Array, parts: Mapping[str, Any]) -> jax.Array:
            added = self.role.unmatrix(self.addition(parts), self.shape)
            if dropped is None:
                return operation.apply(x, (base.astype(added.dtype) + added).astype(operation.dtype))
            return operation.apply(x, base.astype(operation.dtype)) + operation.apply(
                dropped, added.astype(operation.dtype)
            )

        @jax.custom_vjp
        def apply(x: jax.Array, dropped: Any, base: jax.Array, parts: Mapping[str, Any]) -> jax.Array:
            return forward(x, dropped, base, parts)[0]

        def forward(x: jax.Array, dropped: Any, base: jax.Array, parts: Mapping[str, Any]):
            # A barrier puts the forming of the matrix behind its input: left free, the compiler forms the matrices of
            # all layers first, and keeps them.
            first, second, these = lax.optimization_barrier((x, dropped, parts))
            return compute(first, second, base, these), (x, dropped, base, parts)

        def backward(saved: Any, cotangent: jax.Array):
            x, dropped, base, parts = saved
            parts, cotangent = lax.optimization_barrier((parts, cotangent))
            order = parts["order"]

            def again(x: jax.Array, dropped: Any, parts: Mapping[str, Any]) -> jax.Array:
                return compute(x, dropped, base, {**parts, "order": order})

            learned = {n: v for n, v in parts.items() if n != "order"}
            _, pull = jax.vjp(again, x, dropped, learned)
            x_cotangent, dropped_cotangent, found = pull(cotangent)
            return x_cotangent, dropped_cotangent, None, {**found, "order": None}

        apply.defvjp(forward, backward)
        return apply(x, dropped, self.base, self.parts())
