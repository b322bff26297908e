"""A weight whose output columns have trainable lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import PartitionSpec

from subspace_jax.core import Operation, RoleError, Weight, register_weight, static
from subspace_jax.weights import AsLowRank, LowRank, column_lengths


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Weight):
    r"""The directions of another weight's columns, with lengths of their own: \(V\,\mathrm{diag}(m / \|V\|)\).

    Used as the other weight's operation with its output scaled, so \(V\) is not formed where `direction` can tell
    its column norms without it.

    Attributes:
      direction: \(V\).
      magnitude: \(m\), `[*stack, out]`.
      lengths: \(\|V\|\), `[*stack, out]`, inside a rematerialized part, which would compute them twice; else None.
      detach_norm: treat \(\|V\|\) as a constant in the backward pass.
    """

    direction: Weight
    magnitude: jax.Array
    lengths: jax.Array | None = None
    detach_norm: bool = static(default=True)

    divisible: ClassVar[tuple[str, ...]] = ("out",)
    axes: ClassVar[Mapping[str, str]] = {"magnitude": "stack out", "lengths": "stack out"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `direction`."""
        return self.direction.shape

    @property
    def rank(self) -> int | None:
        """The rank of `direction`."""
        return self.direction.rank

    def factors(self) -> jax.Array:
        r"""Returns \(m / \|V\|\), `[*stack, out]`; a column of zeros counts as of length 1."""
        norm = column_lengths(self.direction, detach=self.detach_norm) if self.lengths is None else self.lengths
        return self.magnitude.astype(norm.dtype) / norm

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the array with every column of its own length."""
        one = self.with_frozen_stopped()
        factors = one.factors()
        matrix = one.role.matrix(one.direction.materialize(factors.dtype)) * factors[..., None, :]
        return one.role.unmatrix(matrix, one.shape).astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the scaled operation; with dropout, the base's part of it sees the undropped input."""
        inner = self.direction.plain() if isinstance(self.direction, AsLowRank) else self.direction
        if not isinstance(inner, LowRank) or inner.dropout_key is None:
            return operation.scale_outputs(x, self.factors(), lambda x: inner.contract(x, operation))
        dropped = inner.drop(x, operation)
        clean = dataclasses.replace(inner, dropout_key=None)
        scaled = operation.scale_outputs(dropped, self.factors(), lambda x: clean.contract(x, operation))
        return inner.contract_base(x, operation) - inner.contract_base(dropped, operation) + scaled

    def before_checkpoint(self) -> Magnitude:
        """Returns the weight with the lengths of its columns, which are constants to the backward pass."""
        if not self.detach_norm or self.lengths is not None:
            return self
        return dataclasses.replace(self, lengths=column_lengths(self.direction, detach=True))

    def with_key(self, key: jax.Array) -> Magnitude:
        """Returns the weight with keys in `direction`."""
        return dataclasses.replace(self, direction=self.direction.with_key(key))

    def partition_specs(self, spec: PartitionSpec, *, exact: bool = False) -> Magnitude:
        """Returns the specs of the parts; a split of the input axes would cut columns whose length is needed."""
        entries = (*spec, *(None,) * (len(self.role.order) - len(spec)))  # a part of a partition has no shape
        if exact and any(entries[i] is not None for i in self.role.in_axes):
            raise RoleError(
                f"Magnitude of shape {self.shape}: split {spec} on input axes {self.role.in_axes} inside a "
                "shard_map, where the length of a whole column cannot be told. Split the output axes, or leave the "
                "placement to the compiler."
            )
        return super().partition_specs(spec, exact=exact)
