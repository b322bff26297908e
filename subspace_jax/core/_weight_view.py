"""The value that the interpreter carries where a weight flows through a model's program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from subspace_jax.core._weight import Weight, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightView:
    """A weight as the model sees it: axes permuted and dtype cast, neither of them computed.

    Attributes:
      weight: the stand-in weight.
      permutation: axis `i` of the value is axis `permutation[i]` of the weight.
      dtype: dtype that the model has cast the value to.
      path: where the weight stands in the arguments, for messages.
    """

    weight: Weight
    permutation: tuple[int, ...] = static()
    dtype: np.dtype = static()
    path: str = static()

    @classmethod
    def of(cls, weight: Weight, path: str) -> WeightView:
        """Returns a weight as it enters the program."""
        return cls(weight, tuple(range(weight.ndim)), weight.dtype, path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        shape = self.weight.shape
        return tuple(shape[i] for i in self.permutation)

    @property
    def is_plain(self) -> bool:
        """Whether the value is the weight itself, neither permuted nor cast."""
        return self.permutation == tuple(range(self.weight.ndim)) and self.dtype == self.weight.dtype

    def array(self) -> jax.Array:
        """Forms the value."""
        formed = self.weight.materialize(self.dtype)
        return jnp.transpose(formed, self.permutation)

    def cast(self, dtype: Any) -> WeightView:
        """Returns the value cast to another floating dtype."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def transpose(self, permutation: tuple[int, ...]) -> WeightView:
        """Returns the value with its axes permuted once more."""
        return dataclasses.replace(self, permutation=tuple(self.permutation[i] for i in permutation))

    def split_stack(self, axis: int = 0):
        """Splits the value along one of its stacked axes, as `Weight.split_stack` does."""
        weight_axis = self.permutation[axis]
        mapped, rebuild = self.weight.split_stack(weight_axis)
        rest = (i for i in self.permutation if i != weight_axis)
        permutation = tuple(i - (i > weight_axis) for i in rest)

        def rebuild_value(one: dict[str, Any]) -> WeightView:
            return dataclasses.replace(self, weight=rebuild(one), permutation=permutation)

        return mapped, rebuild_value

    def partition_specs(self, spec: PartitionSpec, *, exact: bool = False) -> WeightView:
        """Returns a tree like this one with the partition spec of each array, for a spec of the value's own axes."""
        entries: list[Any] = [None] * self.weight.ndim
        for axis, entry in enumerate(spec):
            entries[self.permutation[axis]] = entry
        specs = self.weight.partition_specs(PartitionSpec(*entries), exact=exact)
        leaves = jax.tree.leaves(specs, is_leaf=lambda v: isinstance(v, PartitionSpec))
        return jax.tree.unflatten(jax.tree.structure(self), leaves)

    def is_stacked(self, axis: int, *, loop: bool) -> bool:
        """Tells whether an axis of the value runs over whole layers."""
        return self.weight.can_split(self.permutation[axis], loop=loop)
