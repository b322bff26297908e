"""The modules of SPT: low-rank factors with stochastic depth, and an adapter after a layer whose bias may learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Operation, register_weight, static
from subspace_jax.modules import Bottleneck, features_last
from subspace_jax.weights import LowRank, drop_examples, drop_inputs, step_keys


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthLowRank(LowRank):
    """`LowRank` whose addition is left out for some examples of a training step.

    Attributes:
      drop_path: probability of leaving it out, where `dropout_key` is set.
    """

    drop_path: float = static(default=0.0)

    def with_key(self, key: jax.Array) -> DepthLowRank:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not (self.dropout or self.drop_path):
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.a.shape[:-2]))

    def drop(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the factors' input with entries dropped, and whole examples, which the factors map to zero."""
        return drop_examples(super().drop(x, operation), operation, self.dropout_key, self.drop_path)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAdapter(Bottleneck):
    r"""A frozen kernel and an adapter on the layer's output with its bias, or on its input.

    Attributes:
      bias_indices: positions of the bias that learn, linked; None where the bias is frozen or learns as a whole.
      bias_values: what is added there, linked.
      dropout_key: keys `[*stack]` for one training step, set by `with_dropout`.
      own_input: the adapter reads the kernel's input.
      dropout: probability of dropping an input of the adapter.
      drop_path: probability of leaving its output out for an example.
    """

    bias_indices: jax.Array | None = None
    bias_values: jax.Array | None = None
    dropout_key: jax.Array | None = None
    own_input: bool = static(default=False)
    dropout: float = static(default=0.0)
    drop_path: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        **Bottleneck.axes,
        "bias_indices": "stack entry",
        "bias_values": "stack entry",
        "dropout_key": "stack",
    }

    def with_key(self, key: jax.Array) -> LayerAdapter:
        """Returns the weight with keys for one step of dropout, one per stacked layer."""
        if not (self.dropout or self.drop_path):
            return self
        return dataclasses.replace(self, dropout_key=step_keys(key, self.down.shape[:-2]))

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the kernel gives and the adapter adds."""
        y, role = self.contract_base(x, operation), operation.role
        if self.own_input:
            hidden = features_last(x, operation.x_labels, role.in_axes, self.shape)
        else:
            hidden = features_last(y, operation.out_labels, role.out_axes, self.shape)
            if self.bias is not None:
                hidden = hidden + self._trained_bias(self.bias.reshape(-1)).astype(hidden.dtype)
        hidden = drop_inputs(hidden.astype(operation.dtype), operation, self.dropout_key, self.dropout)
        added = drop_examples(self.module(hidden), operation, self.dropout_key, self.drop_path)
        return y + added.astype(y.dtype).reshape(y.shape)

    def _trained_bias(self, bias: jax.Array) -> jax.Array:
        if self.bias_values is None or self.bias_indices is None:
            return bias
        values = self.bias_values
        return bias.astype(jnp.promote_types(bias.dtype, values.dtype)).at[self.bias_indices].add(values, mode="drop")
