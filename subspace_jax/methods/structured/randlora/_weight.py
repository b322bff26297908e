"""A frozen array plus shared random bases under small trained scales."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Dot, Lookup, Operation, Scalar, StructureError, Weight, product, register_weight, static
from subspace_jax.linalg import is_narrow, wide_dtype
from subspace_jax.weights import Route, draw_basis, drop_inputs, step_keys

Pairing = Literal["paper", "peft"]


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomBases(Weight):
    r"""A frozen array plus frozen random bases under trained diagonals: \(W + s \sum_n \Gamma_n A^T \Lambda_n B_n^T\).

    So for an output side no smaller than the input side \(d\); else \(W + s \sum_n B_n \Lambda_n A\,\Gamma_n\). Every
    matrix of the sum has a small rank and the sum has the full one. The bases are the largest that any weight of the
    model needs; this one reads the leading part. They have no stacked axes: all layers read the same.

    Attributes:
      base: \(W\), of the weight's shape, or a weight that stands for it.
      rank_scales: diagonals of \(\Lambda_n\), `[*stack, bases, rank]`.
      feature_scales: diagonals of \(\Gamma_n\), `[*stack, bases, d]`.
      basis_a: \(A\), `[rank, largest d]`; None where another weight stores it.
      basis_b: \(B_n^T\), `[most bases, rank, largest larger side]`; likewise. Transposed, because so no product has
        to copy it.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      bases_shape: shape of `basis_b`, then the length of `basis_a`.
      basis_dtype: dtype of both.
      sparsity: of their entries; None where they are dense. See `draw_basis`.
      seed: what they are drawn from.
      scale: \(s\).
      pairing: "paper" pairs row \(k\) of \(A\) with column \(k\) of \(B_n\). "peft" pairs them as PEFT does, which
        counts the rows of all scaled copies of \(A\) by rank and then by basis, and the columns the other way round.
      route: "factored" multiplies with the bases one after the other, "materialized" forms the sum first, "auto"
        takes what costs fewer operations for the input at hand, backward pass included.
      dropout: probability of dropping an input of the sum of bases, where `dropout_key` is set.
      sides: inputs and outputs of a matrix, which the part of a partition without `base` cannot tell; those of the
        shape if None, as in files of earlier releases.
    """

    base: jax.Array | Weight
    rank_scales: jax.Array
    feature_scales: jax.Array
    basis_a: jax.Array | None = None
    basis_b: jax.Array | None = None
    dropout_key: jax.Array | None = None
    bases_shape: tuple[int, int, int, int] = static()
    basis_dtype: np.dtype = static()
    sparsity: float | None = static(default=None)
    seed: int = static(default=0)
    scale: Scalar = 1.0
    pairing: Pairing = static(default="paper")
    route: Route = static(default="auto")
    dropout: float = static(default=0.0)
    sides: tuple[int, int] | None = static(default=None)

    regenerated: ClassVar[tuple[str, ...]] = ("basis_a", "basis_b")

    @property
    def axes(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Names of the axes; which side of the weight the scales and bases follow depends on its shape."""
        inputs, outputs = self.sides or self.role.sizes(self.shape)
        small, large = ("in", "out") if inputs <= outputs else ("out", "in")
        _, _, largest, smallest = self.bases_shape
        # A basis that other weights need longer is not split as this one's side is.
        return {
            "base": "array",
            "rank_scales": "stack basis rank",
            "feature_scales": f"stack basis {small}",
            "basis_a": f"rank {small if smallest == min(inputs, outputs) else 'feature'}",
            "basis_b": f"basis rank {large if largest == max(inputs, outputs) else 'feature'}",
            "dropout_key": "stack",
            "scale": "",
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def rank(self) -> int:
        """The rank that the sum can have: the smaller side, or what fewer bases reach."""
        bases, rank = self.rank_scales.shape[-2:]
        return min(bases * rank, *self.role.sizes(self.shape))

    def regenerate(self) -> dict[str, jax.Array]:
        """Returns both bases as `seed` gives them."""
        bases, rank, larger, smaller = self.bases_shape
        a = draw_basis(self.seed, 0, (rank, smaller), self.sparsity, self.basis_dtype)
        b = draw_basis(self.seed, 1, (bases, rank, larger), self.sparsity, self.basis_dtype)
        return {"basis_a": a, "basis_b": b}

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array plus the sum over bases, added in float32."""
        one = self.with_frozen_stopped()
        wide = wide_dtype(one.dtype)
        base = one.base.materialize(wide) if isinstance(one.base, Weight) else one.base.astype(wide)
        return (base + one.update(wide)).astype(self.dtype if dtype is None else dtype)

    def update(self, dtype: Any) -> jax.Array:
        """Returns the scaled sum over bases alone, of the weight's shape, by products of this dtype."""
        left, right = self.factors(dtype)
        total = jnp.matmul(left, right, precision=None if is_narrow(dtype) else jax.lax.Precision.HIGHEST)
        return self.role.unmatrix(total, self.shape)

    def factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns two matrices whose product is the scaled sum: the scaled copies of one basis, and the other.

        Returns:
          `[*stack, in, bases rank]` and `[bases rank, out]`, or `[in, bases rank]` and `[*stack, bases rank, out]`:
          whichever is at the smaller side depends on the layer.
        """
        if self.basis_a is None or self.basis_b is None:
            stored = " and ".join(dict.fromkeys(owner for _, owner, _ in self.links)) or "no weight"
            raise StructureError(
                f"The bases of this weight of shape {self.shape} are stored at {stored}. Use merge() or "
                "with_adapters() on the whole tree, or fill them in by subspace_jax.core.resolve_links(tree)."
            )
        inputs, outputs = self.role.sizes(self.shape)
        *stack, bases, rank = self.rank_scales.shape
        smaller, larger = sorted((inputs, outputs))
        a = self.basis_a[:, :smaller].astype(wide_dtype(self.dtype))
        scaled = _scaled_copies(a, self.rank_scales * self.scale.astype(self.rank_scales.dtype), self.feature_scales)
        if self.pairing == "peft":
            scaled = jnp.swapaxes(scaled, -2, -3)
        scaled = scaled.reshape(*stack, bases * rank, smaller).astype(dtype)
        fixed = self.basis_b[:bases, :, :larger].reshape(bases * rank, larger).astype(dtype)
        return (jnp.swapaxes(scaled, -1, -2), fixed) if inputs <= outputs else (fixed.T, scaled)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `base` plus that on the bases, or that on the formed sum of both."""
        drops = self.dropout_key is not None and self.dropout > 0 and not isinstance(operation, Lookup)
        formed = self.route == "materialized" or (
            self.route == "auto" and self._forming_is_cheaper(x, operation, drops)
        )
        if formed and not drops:
            return operation.apply(x, self._formed(operation.dtype))
        base = self.base.contract(x, operation) if isinstance(self.base, Weight) else operation.apply(x, self.base)
        kept = drop_inputs(x, operation, self.dropout_key, self.dropout)
        return base + (
            operation.apply(kept, self.update(operation.dtype)) if formed else self._factored(kept, operation)
        )

    def _formed(self, dtype: Any) -> jax.Array:
        """The array plus the sum, for one step: in a narrow dtype as it is, so that nothing large is converted."""
        one = self.with_frozen_stopped()
        base = one.base
        if not is_narrow(dtype) or isinstance(base, Weight):
            return self.materialize(dtype)
        return base.astype(dtype) + one.update(dtype)

    def _factored(self, x: jax.Array, operation: Operation) -> jax.Array:
        """The operation on the bases, one after the other; the backward pass keeps no scaled copies."""

        def run(weight: RandomBases, x: jax.Array) -> jax.Array:
            if not weight.role.stack_axes:
                return operation.product(x, weight.factors(operation.dtype))
            # Stacked weights share a basis, so their factors are not each a stack of matrices.
            y = operation.linear(
                x, lambda rows: weight.multiply(rows, operation), lambda rows: weight.multiply(rows, operation, True)
            )
            return operation.apply(x, weight.update(operation.dtype)) if y is None else y

        # The scaled copies are as large as a square kernel: made again from the scales, at no product's cost.
        again = jax.checkpoint(run, policy=jax.checkpoint_policies.dots_saveable)
        return again(dataclasses.replace(self, dropout_key=None), x)

    def multiply(self, rows: jax.Array, operation: Operation, transposed: bool = False) -> jax.Array:
        """Returns rows `[*stack, n, in]` times the scaled sum over bases (transposed: rows `[*stack, n, out]`)."""
        stack = tuple(f"stack{i}" for i in range(len(self.role.stack_axes)))
        chain = [
            (factor, (*stack[: factor.ndim - 2], *names))
            for factor, names in zip(self.factors(operation.dtype), (("in", "h"), ("h", "out")), strict=True)
        ]
        current, end = (chain[::-1], "in") if transposed else (chain, "out")
        precision = operation.parameters.get("precision") if isinstance(operation, Dot) else None
        labels = (*stack, "row", "out" if transposed else "in")
        for (factor, names), made in zip(current, ("h", end), strict=True):
            given = (*stack, "row", made)
            rows = product(rows, labels, factor, names, given, precision=precision)
            labels = given
        return rows

    def _forming_is_cheaper(self, x: jax.Array, operation: Operation, drops: bool) -> bool:
        """Compares multiplications of both routes, forward and backward, for `x` of this size.

        Factored: rows times both bases forward, their gradient times both backward, and the gradient of the copies
        is one more product at the smaller side. Formed: the sum and its gradient, and the gradient of the whole
        weight; where the input of the sum is dropped, two more products, since base and sum have other inputs.
        """
        if isinstance(operation, Lookup):
            return False
        if not isinstance(operation, Dot):
            return True
        inputs, outputs = self.role.sizes(self.shape)
        met = inputs if operation.contracts_inputs else outputs if operation.contracts_outputs else None
        if met is None:
            return False
        stack = {f"w{i}" for i in self.role.stack_axes}
        layers = int(np.prod(self.role.stack_shape(self.shape))) if stack <= set(operation.x_labels) else 1
        smaller, larger = sorted((inputs, outputs))
        rows, width = x.size // (met * layers), int(np.prod(self.rank_scales.shape[-2:]))
        factored = rows * width * (4 * larger + 6 * smaller)
        formed = 4 * width * smaller * larger + (6 if drops else 2) * rows * smaller * larger
        return formed < factored

    def with_key(self, key: jax.Array) -> RandomBases:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.dropout:
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.rank_scales.shape[:-2]))


@jax.checkpoint
def _scaled_copies(a: jax.Array, rank_scales: jax.Array, feature_scales: jax.Array) -> jax.Array:
    r"""Returns \(\Lambda_n A\,\Gamma_n\) for all bases, `[*stack, bases, rank, d]`; the backward pass keeps no copy."""
    return rank_scales[..., :, :, None] * a * feature_scales[..., :, None, :]
