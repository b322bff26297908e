"""An array split by its singular values: the large part is frozen, the factors of the small part learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from subspace_jax.core import Dot, Operation, Weight, register_weight
from subspace_jax.weights import LowRankCore


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSVD(LowRankCore):
    r"""An array split by its singular values: \(K_h + L\,\mathrm{diag}(s)\,R\), with the large part \(K_h\) frozen.

    The singular vectors of the frozen part are kept beside it, so that the factors can be kept orthogonal to them.
    Columns of zeros pad the factors where there are fewer triples than columns: stacked layers with unequal ranks, or
    room for other ranks.

    The factors together are as large as the weight, so on a mesh `sj.shardings` splits their rank as well: a device
    holds as small a share of them as of the weight. A use gathers the rank of one layer, whose product with the other
    factor is then local.

    Attributes:
      base: \(K_h = L_h\,\mathrm{diag}(s_h)\,R_h\), of the weight's shape: formed once, so that no step multiplies
        frozen factors; None where nothing is frozen.
      high_left: \(L_h\), `[*stack, in, high]`, orthonormal columns.
      high_right: \(R_h\), `[*stack, high, out]`, orthonormal rows.
      left: \(L\), `[*stack, in, low]`, trainable.
      core: \(s\), `[*stack, low]`, trainable.
      right: \(R\), `[*stack, low, out]`, trainable.
      live: 1 for a triple in use, 0 for padding, `[*stack, low]`; None where all are in use.
      route: "factored" multiplies with the factors, "materialized" forms the sum first, "auto" takes the cheaper.
    """

    high_left: jax.Array
    high_right: jax.Array
    live: jax.Array | None = None

    axes: ClassVar[Mapping[str, str]] = {
        **LowRankCore.axes,
        "high_left": "stack in rank",
        "high_right": "stack rank out",
        "live": "stack rank",
    }
    spread: ClassVar[Mapping[str, int]] = {"left": -1, "right": -2, "high_left": -1, "high_right": -2}

    def materialize(self, dtype: Any = None) -> jax.Array:
        r"""Returns \(K_h + L\,\mathrm{diag}(s)\,R\), added in float32."""
        return LowRankCore.materialize(self.masked().with_whole_rank(), dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the sum, or on its parts where that costs less."""
        if not self.rank and self.base is not None and not isinstance(self.base, Weight):
            return operation.apply(x, jax.lax.stop_gradient(self.base))
        return LowRankCore.contract(self.masked().with_whole_rank(), x, operation)

    def learning_size(self, name: str) -> int | None:
        """Returns the values of the triples in use."""
        if name not in ("left", "core", "right") or self.live is None:
            return None
        inputs, outputs = self.role.sizes(self.shape)
        return int(jnp.sum(self.live != 0)) * {"left": inputs, "core": 1, "right": outputs}[name]

    def masked(self) -> SplitSVD:
        """Returns the weight with zeros for the values of padding, so that padding does not learn."""
        if self.live is None:
            return self
        return dataclasses.replace(self, core=self.core * jax.lax.stop_gradient(self.live), live=None)

    def with_whole_rank(self) -> SplitSVD:
        """Returns the weight with the rank of its trainable factors on every device, where mesh axes are explicit."""
        return dataclasses.replace(self, left=whole_axis(self.left, -1), right=whole_axis(self.right, -2))

    def _forming_is_cheaper(self, x: jax.Array, operation: Operation) -> bool:
        """Compares operations of both routes; the factors learn too, so that both pay for their gradients."""
        inputs, outputs = self.role.sizes(self.shape)
        if not isinstance(operation, Dot) or not operation.contracts_inputs:
            return False
        rows = x.size // inputs
        factored = 6 * rows * self.rank * (inputs + outputs)
        # Two products with `base` are part of both; without one they are only part of the formed route.
        formed = 2 * inputs * outputs * (3 * self.rank + rows * (1 if self.base is not None else 3))
        return formed < factored


def whole_axis(array: jax.Array, axis: int) -> jax.Array:
    """Returns the array with one axis whole on every device, where mesh axes are explicit.

    Under automatic axes the compiler gathers by itself, and the array comes back as it is.

    Args:
      array: any.
      axis: counted from the end, so negative.

    Example:
      >>> import jax.numpy as jnp
      >>> whole_axis(jnp.ones((3, 2)), -1).shape
      (3, 2)
    """
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.explicit_axes:
        return array
    entries = [*sharding.spec, *(None,) * (array.ndim - len(sharding.spec))]
    if entries[axis] is None:
        return array
    entries[axis] = None
    return jax.sharding.reshard(array, PartitionSpec(*entries))
