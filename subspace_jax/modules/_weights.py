"""A kernel that keeps its input for later, and a kernel after which a small network follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Operation, RoleError, Scalar, Weight, product, register_weight, static
from subspace_jax.modules._module import Module

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptInput(Weight):
    """A frozen kernel whose input is kept for a module further on in the same block.

    Attributes:
      base: the kernel.
      writes: name under which the input is kept.
    """

    base: jax.Array
    writes: str = static()

    axes: ClassVar[Mapping[str, str]] = {"base": "array"}
    uses_context: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return self.base.shape

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns the kernel."""
        return self.with_frozen_stopped().base.astype(self.dtype if dtype is None else dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the kernel's operation, and keeps the input with its features as one last axis."""
        operation.context.write(self.writes, features_last(x, operation.x_labels, operation.role.in_axes, self.shape))
        return operation.apply(x, self.base)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Module):
    r"""A frozen kernel and a small network beside it or after it: \(y + s\,U\,\phi(D\,h + d) + s\,u\).

    \(y\) is what the kernel gives; \(h\) is \(y\) with its bias (sequential) or an input kept before (parallel).

    Attributes:
      base: the kernel.
      down: \(D\), `[*stack, in, size]`.
      down_bias: \(d\), `[*stack, size]`.
      up: \(U\), `[*stack, size, out]`, zero at the start.
      up_bias: \(u\), `[*stack, out]`, zero at the start.
      bias: what the model adds to \(y\) afterwards, `[*stack, out]`, linked; None without.
      scale: \(s\), a scalar.
      reads: name of the kept input; empty for the kernel's own output.
      activation: \(\phi\).
    """

    down: jax.Array
    down_bias: jax.Array
    up: jax.Array
    up_bias: jax.Array
    bias: jax.Array | None = None
    scale: Scalar = 1.0
    reads: str = static(default="")
    activation: Activation = static(default="relu")

    axes: ClassVar[Mapping[str, str]] = {
        "base": "array",
        "down": "stack feature size",
        "down_bias": "stack size",
        "up": "stack size out",
        "up_bias": "stack out",
        "bias": "stack out",
        "scale": "",
    }
    padded: ClassVar[tuple[str, ...]] = ("size",)

    @property
    def rank(self) -> int:
        """The size of the hidden layer."""
        return self.down.shape[-1]

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the kernel gives and the module adds."""
        y = self.contract_base(x, operation)
        added = self.module(self.read(y, operation)).astype(y.dtype)
        return y + added.reshape(y.shape)

    def read(self, y: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the module reads, features last: the output `y` with its bias, or an input kept before.

        Raises:
          RoleError: nothing was kept, or the features are not the last axes.
        """
        own = features_last(y, operation.out_labels, operation.role.out_axes, self.shape)
        if not self.reads:
            hidden = own if self.bias is None else own + self.bias.reshape(-1).astype(own.dtype)
            return hidden.astype(operation.dtype)
        kept = operation.context.read(self.reads)
        if kept is None:
            raise RoleError(
                f"{operation.name}: the module reads an input that no kernel has kept before it in this block. "
                "Name by reads= a kernel that runs before this one, and let the rule match both."
            )
        return kept.astype(operation.dtype)

    def module(self, hidden: jax.Array) -> jax.Array:
        """Returns what the module makes of rows of features, `[..., in]` to `[..., out]`."""
        dtype = hidden.dtype
        rows = tuple(f"r{i}" for i in range(hidden.ndim - 1))
        few = product(hidden, (*rows, "in"), self.down.astype(dtype), ("in", "few"), (*rows, "few"))
        few = ACTIVATIONS[self.activation](few + self.down_bias.astype(dtype))
        out = product(few, (*rows, "few"), self.up.astype(dtype), ("few", "out"), (*rows, "out"))
        return (out + self.up_bias.astype(dtype)) * jnp.asarray(self.scale, dtype)


def features_last(x: jax.Array, labels: tuple[str, ...], axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Returns activations `[..., features]` with the features of a kernel's axes as one last axis.

    Args:
      x: what the model computes, the kernel's input or its output.
      labels: of its axes, as an `Operation` has them.
      axes: the kernel's axes whose features these are.
      shape: of the kernel.

    Raises:
      RoleError: they are not its last axes, as those of a convolution's input or of experts computed together.
    """
    names = tuple(f"w{i}" for i in axes)
    if not names or tuple(labels[-len(names) :]) != names:
        raise RoleError(
            f"A module on activations stands on a kernel of shape {shape} whose features {axes} are not the last axes "
            f"of what the model computes ({', '.join(labels)}). Choose a dense kernel."
        )
    return x.reshape(*x.shape[: x.ndim - len(names)], math.prod(shape[i] for i in axes))
