"""An adapter of which each training pass uses one part, and which all its parts together are afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from subspace_jax.core import Operation, product, register_weight, static
from subspace_jax.modules import ACTIVATIONS, Bottleneck
from subspace_jax.weights import drop_inputs, step_keys


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedAdapter(Bottleneck):
    r"""A bottleneck whose kernels are split into parts by entry: part \(e\) is \(K_0 + (K - K_0) \odot [own = e]\).

    With a key, that is in a training pass, one part of each split kernel is used, drawn for the whole batch. Without,
    all parts are merged: \(K_0 + (K - K_0) / N\) and the mean of the biases, a plain adapter.

    Attributes:
      down_bias: \(d\), `[*stack, parts or 1, size]`: one for each part of a split kernel.
      up_bias: \(u\), `[*stack, parts or 1, out]`.
      down_owner: which part owns an entry of `down`, int8, `[*stack, in, size]`; None where all parts share it.
      up_owner: likewise of `up`, `[*stack, size, out]`; its parts start from zero.
      down_start: \(K_0\) of a split `down`.
      norm_scale: of the adapter's own layer norm, `[*stack, in]`; None without.
      norm_bias: likewise.
      dropout_key: keys `[*stack]` for one training pass, set by `with_dropout`.
      parts: \(N\).
      dropout: probability of dropping a hidden feature in a training pass.
    """

    down_owner: jax.Array | None = None
    up_owner: jax.Array | None = None
    down_start: jax.Array | None = None
    norm_scale: jax.Array | None = None
    norm_bias: jax.Array | None = None
    dropout_key: jax.Array | None = None
    parts: int = static(default=1)
    dropout: float = static(default=0.0)

    axes: ClassVar[Mapping[str, str]] = {
        **Bottleneck.axes,
        "down_bias": "stack part size",
        "up_bias": "stack part out",
        "down_owner": "stack feature size",
        "up_owner": "stack size out",
        "down_start": "stack feature size",
        "norm_scale": "stack feature",
        "norm_bias": "stack feature",
        "dropout_key": "stack",
    }

    def with_key(self, key: jax.Array) -> MixedAdapter:
        """Returns the weight for one training pass, with keys of its own for each stacked layer."""
        return dataclasses.replace(self, dropout_key=step_keys(key, self.down.shape[:-2]))

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the kernel gives and the adapter, or its drawn part, adds."""
        y = self.contract_base(x, operation)
        few = self._down(self._normed(self.read(y, operation)))
        few = ACTIVATIONS[self.activation](few)
        few = drop_inputs(few, operation, self.dropout_key, self.dropout)
        return y + self._up(few).astype(y.dtype).reshape(y.shape)

    def drawn(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns the parts of `down` and `up` that this pass uses, int32 scalars; None where all are merged."""
        if self.dropout_key is None:
            return None, None
        keys = (jax.random.fold_in(self.dropout_key, number) for number in (1, 2))
        down, up = (jax.random.randint(key, (), 0, self.parts) for key in keys)
        return down, up

    def kernels(self) -> tuple[jax.Array, jax.Array]:
        """Returns both kernels, of one layer, as this pass uses them."""
        down, up = self.drawn()
        return (
            _part(self.down, self.down_start, self.down_owner, down, self.parts),
            _part(self.up, None, self.up_owner, up, self.parts),
        )

    def biases(self) -> tuple[jax.Array, jax.Array]:
        """Returns both biases, of one layer, as this pass uses them."""
        return tuple(
            jnp.mean(bias, axis=0) if part is None or len(bias) == 1 else bias[part]
            for bias, part in zip((self.down_bias, self.up_bias), self.drawn(), strict=True)
        )  # pyright: ignore[reportReturnType]

    def _normed(self, hidden: jax.Array) -> jax.Array:
        if self.norm_scale is None or self.norm_bias is None:
            return hidden
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centered * jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + 1e-6)
        return (normed * self.norm_scale + self.norm_bias).astype(hidden.dtype)

    def _down(self, hidden: jax.Array) -> jax.Array:
        return _rows(hidden, self.kernels()[0]) + self.biases()[0].astype(hidden.dtype)

    def _up(self, few: jax.Array) -> jax.Array:
        out = _rows(few, self.kernels()[1]) + self.biases()[1].astype(few.dtype)
        return out * jnp.asarray(self.scale, few.dtype)


def _part(kernel: jax.Array, start: Any, owner: jax.Array | None, part: Any, parts: int) -> jax.Array:
    """A kernel as one pass uses it; all parts merged if none is drawn."""
    if owner is None:
        return kernel
    learned = kernel if start is None else kernel - start
    used = learned / parts if part is None else jnp.where(owner == part, learned, 0)
    return used if start is None else start + used


def _rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows = tuple(f"r{i}" for i in range(x.ndim - 1))
    return product(x, (*rows, "in"), kernel.astype(x.dtype), ("in", "out"), (*rows, "out"))
