"""A frozen array whose inputs are rotated in blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import Operation, Weight, register_weight, static
from subspace_jax.linalg import cayley, cayley_neumann, is_narrow, skew, whole_matrices, wide_dtype


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotated(Weight):
    r"""A frozen array whose input axis is rotated block by block: \(R K\), with a block-diagonal rotation \(R\).

    Each block is the Cayley transform of a skew-symmetric matrix. A dense layer rotates its input, \((x R) K\), and
    \(R\) itself is never built; a convolution rotates its kernel.

    Attributes:
      base: \(K\), of the weight's shape.
      skew_entries: strict upper triangles of the skew-symmetric matrices, row by row, `[*stack, blocks, b (b-1) / 2]`;
        one block where all share it.
      output_scale: a factor for every output, `[*stack, out]`, or None.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      block_size: \(b\), a divisor of the input size.
      terms: terms of the Cayley-Neumann series; None for the exact transform.
      dropout: share of blocks that a training step replaces by the identity.
    """

    base: jax.Array
    skew_entries: jax.Array
    output_scale: jax.Array | None = None
    dropout_key: jax.Array | None = None
    block_size: int = static()
    terms: int | None = static(default=None)
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "skew_entries": "stack block entry",
        "output_scale": "stack out",
        "dropout_key": "stack",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `base`."""
        return self.base.shape

    @property
    def blocks(self) -> int:
        """The number of blocks along the input axis, shared or not."""
        return self.role.sizes(self.shape)[0] // self.block_size

    def rotations(self) -> jax.Array:
        """Returns the blocks, `[*stack, blocks, b, b]` in float32 (one block where all share it)."""
        entries = self.skew_entries.astype(wide_dtype(self.skew_entries.dtype))
        matrices = skew(entries, self.block_size)
        rotations = cayley(matrices) if self.terms is None else cayley_neumann(matrices, self.terms)
        count = int(self.dropout * rotations.shape[-3])
        if self.dropout_key is None or rotations.shape[-3] == 1 or count == 0:
            return rotations
        return _replace_some(self.dropout_key, rotations, count)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the rotated array, computed in float32."""
        one = self.with_frozen_stopped()
        wide = wide_dtype(one.dtype)
        matrix = whole_matrices(one.role.matrix(one.base)).astype(wide)
        turned = _rotate(jnp.swapaxes(matrix, -1, -2), jnp.swapaxes(one.rotations(), -1, -2))
        turned = jnp.swapaxes(turned, -1, -2)
        if one.output_scale is not None:
            turned = turned * one.output_scale[..., None, :]
        return one.role.unmatrix(turned, one.shape).astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the rotated input; convolutions and lookups take the rotated array."""
        rotations = self.rotations().astype(operation.dtype)

        def scaled(x: jax.Array) -> jax.Array:
            if self.output_scale is None:
                return operation.apply(x, self.base)
            return operation.scale_outputs(x, self.output_scale, lambda x: operation.apply(x, self.base))

        y = operation.transform_inputs(
            x,
            lambda rows: _rotate(rows, rotations),
            lambda rows: _rotate(rows, jnp.swapaxes(rotations, -1, -2)),
            scaled,
        )
        return operation.apply(x, self.materialize(operation.dtype)) if y is None else y

    def with_key(self, key: jax.Array) -> Rotated:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not self.dropout:
            return self
        stack = self.skew_entries.shape[:-2]
        return dataclasses.replace(self, dropout_key=jax.random.split(key, stack) if stack else key)


def _rotate(rows: jax.Array, rotations: jax.Array) -> jax.Array:
    """Multiplies `[*stack, n, in]` with the block-diagonal matrix of `[*stack, blocks or 1, b, b]`."""
    size = rotations.shape[-1]
    parts = rows.reshape(*rows.shape[:-1], -1, size)
    shared = rotations.shape[-3] == 1
    formula = "...nkb,...bc->...nkc" if shared else "...nkb,...kbc->...nkc"
    precision = None if is_narrow(rows.dtype) else lax.Precision.HIGHEST
    turned = jnp.einsum(formula, parts, rotations[..., 0, :, :] if shared else rotations, precision=precision)
    return turned.reshape(rows.shape)


def _replace_some(keys: jax.Array, rotations: jax.Array, count: int) -> jax.Array:
    """Puts the identity in place of `count` randomly chosen blocks of every layer."""
    blocks, size = rotations.shape[-3], rotations.shape[-1]
    kept = jnp.arange(blocks) >= count

    def chosen(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, kept)

    mask = chosen(keys) if keys.ndim == 0 else jax.vmap(chosen)(keys.ravel()).reshape(*keys.shape, blocks)
    return jnp.where(mask[..., None, None], rotations, jnp.eye(size, dtype=rotations.dtype))
