"""Arrays that gather statistics of what they are multiplied with, in the backward pass.

The statistics come as the cotangents of zeros: a custom derivative rule returns the Gram matrix of the inputs in
place of a cotangent. What is differentiated passes through scan, remat and jit, so this does too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core._labels import placed_like, product
from subspace_jax.core._operations import Convolution, Dot
from subspace_jax.core._use import Use
from subspace_jax.core._weight import Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Probe:
    """Zeros whose cotangents are the statistics of the inputs that met the weight."""

    count: jax.Array
    gram: jax.Array | None = None
    total: jax.Array | None = None


@jax.custom_vjp
def _tap(y: jax.Array, rows: jax.Array, probe: _Probe) -> jax.Array:
    """Returns `y`; in the backward pass the probe receives statistics of `rows` in place of a cotangent."""
    del rows, probe
    return y


def _tap_forward(y: jax.Array, rows: jax.Array, probe: _Probe):
    return y, (rows, probe)


def _tap_backward(residual: tuple[jax.Array, _Probe], cotangent: jax.Array):
    rows, probe = residual
    wide = rows.astype(probe.count.dtype)
    count = jnp.full_like(probe.count, rows.shape[-2])
    stack = tuple(f"stack {i}" for i in range(rows.ndim - 2))
    gram = total = None
    if probe.gram is not None:
        left, right = (*stack, "row", "in"), (*stack, "row", "in again")
        gram = product(wide, left, wide, right, (*stack, "in", "in again"), precision=lax.Precision.HIGHEST)
        gram = placed_like(gram, probe.gram)
    if probe.total is not None:
        total = placed_like(jnp.sum(wide, axis=-2), probe.total)
    return cotangent, jnp.zeros_like(rows), _Probe(count, gram, total)


_tap.defvjp(_tap_forward, _tap_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Probed(Weight):
    """An array beside the probe that gathers statistics of its inputs."""

    value: jax.Array
    count: jax.Array
    gram: jax.Array | None = None
    total: jax.Array | None = None

    axes: ClassVar[Mapping[str, str]] = {
        "value": "array",
        "count": "stack",
        "gram": "stack in in",
        "total": "stack in",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def materialize(self, dtype: Any = None) -> jax.Array:
        return self.value if dtype is None else self.value.astype(dtype)

    def observe(self, primitive: str, path: tuple[int, ...]) -> jax.Array:
        del primitive, path
        return self.value

    def contract(self, x: jax.Array, use: Use) -> jax.Array:
        y = use.apply(x, self.value)
        rows = _input_rows(x, use)
        # A tied output embedding multiplies with the same array, but those rows are not its inputs.
        return y if rows is None else _tap(y, rows, _Probe(self.count, self.gram, self.total))


def _input_rows(x: jax.Array, use: Use) -> jax.Array | None:
    """The rows `[*stack, n, in]` that a weight is multiplied with; None where `use` is no such product."""
    if isinstance(use, Convolution):
        return _patches(x, use)
    if not isinstance(use, Dot) or not use.contracts_inputs:
        return None
    stack = [f"w{i}" for i in use.role.stack_axes]
    inputs = [f"w{i}" for i in use.role.in_axes]
    rest = [n for n in use.x_labels if n not in stack and n not in inputs]
    if any(n not in use.x_labels for n in stack):
        return None
    order = [use.x_labels.index(n) for n in (*stack, *rest, *inputs)]
    size, _ = use.role.sizes(use.shape)
    return jnp.transpose(x, order).reshape(*use.role.stack_shape(use.shape), -1, size)


def _patches(x: jax.Array, use: Convolution) -> jax.Array | None:
    """The window under each output pixel as a row, in the order of the kernel's own axes."""
    p = use.parameters
    spec = p["dimension_numbers"]
    if p["feature_group_count"] > 1 or p["batch_group_count"] > 1:
        return None
    shape = [use.shape[i] for i in use.permutation]
    window = [shape[i] for i in spec.rhs_spec[2:]]
    patches = lax.conv_general_dilated_patches(
        x,
        window,
        p["window_strides"],
        p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=spec,
        precision=p["precision"],
    )
    patches = jnp.moveaxis(patches, spec.out_spec[1], -1).reshape(-1, shape[spec.rhs_spec[1]], *window)
    # Patches come as (feature, *window); the kernel's input axes follow the role's order.
    made = [use.permutation[i] for i in (spec.rhs_spec[1], *spec.rhs_spec[2:])]
    order = [1 + made.index(i) for i in use.role.in_axes]
    return jnp.transpose(patches, (0, *order)).reshape(patches.shape[0], -1)
