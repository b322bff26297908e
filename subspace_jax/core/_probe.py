"""Arrays that gather statistics of their inputs in the backward pass.

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

from subspace_jax.core._errors import StatisticsError
from subspace_jax.core._labels import placed_like
from subspace_jax.core._need import ScaleExamples, input_statistics
from subspace_jax.core._operation import Operation
from subspace_jax.core._operations import Convolution, Dot
from subspace_jax.core._register_weight import register_weight
from subspace_jax.core._weight import Weight, static


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Probe:
    """Zeros whose cotangents are the statistics of the weight's inputs."""

    count: jax.Array
    examples: jax.Array
    sums: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Inputs:
    """Inputs of the weight.

    Attributes:
      rows: `[*stack, n, in]`.
      count: number of rows that count, a scalar.
      examples: number of examples that count, a scalar.
      factor: what every row is multiplied with, `[*stack, n]`; None for one.
    """

    rows: jax.Array
    count: jax.Array
    examples: jax.Array
    factor: jax.Array | None = None


@jax.custom_vjp
def _tap(y: jax.Array, inputs: _Inputs, probe: _Probe) -> jax.Array:
    """Returns `y`; in the backward pass the probe receives statistics of the inputs in place of a cotangent."""
    del inputs, probe
    return y


def _tap_forward(y: jax.Array, inputs: _Inputs, probe: _Probe):
    return y, (inputs, probe)


def _tap_backward(residual: tuple[_Inputs, _Probe], cotangent: jax.Array):
    inputs, probe = residual
    rows = inputs.rows
    wide = rows.astype(probe.count.dtype)
    if inputs.factor is not None:
        wide = wide * inputs.factor[..., None]
    count, examples = (jnp.full_like(p, v) for p, v in ((probe.count, inputs.count), (probe.examples, inputs.examples)))
    known = input_statistics()
    sums = {name: placed_like(known[name].sum(wide), zeros) for name, zeros in probe.sums.items()}
    return cotangent, jax.tree.map(jnp.zeros_like, inputs), _Probe(count, examples, sums)


_tap.defvjp(_tap_forward, _tap_backward)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Probed(Weight):
    """An array beside the probe that gathers statistics of its inputs."""

    value: jax.Array
    count: jax.Array
    examples: jax.Array
    sums: dict[str, jax.Array]
    mask: jax.Array | None = None
    scale_examples: ScaleExamples | None = static(default=None)

    axes: ClassVar[Mapping[str, str]] = {
        "value": "array",
        "count": "stack",
        "examples": "stack",
        "sums": "stack",
        "mask": "batch",
    }

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def materialize(self, dtype: Any = None) -> jax.Array:
        return self.value if dtype is None else self.value.astype(dtype)

    def observe(self, primitive: str, path: tuple[int, ...]) -> jax.Array:
        del primitive, path
        return self.value

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        y = operation.apply(x, self.value)
        found = _input_rows(x, operation)
        if found is None:  # a tied output embedding: those rows are not its inputs
            return y
        inputs = _inputs(*found, self.mask, self.scale_examples, self.count.dtype)
        return _tap(y, inputs, _Probe(self.count, self.examples, self.sums))


def _inputs(
    rows: jax.Array, between: tuple[int, ...], mask: jax.Array | None, scale: ScaleExamples | None, dtype: Any
) -> _Inputs:
    """Counts rows and examples, and finds what each row is multiplied with.

    Args:
      rows: `[*stack, n, in]`.
      between: sizes of the axes that were joined to `n`; the first one counts examples.
      mask: true where a row counts.
      scale: what an example is divided by, if by anything.
      dtype: of the result.
    """
    examples = between[0] if between else 1
    counts = None if mask is None else _mask_rows(mask, between, rows.shape[-2]).reshape(examples, -1)
    factor = None if counts is None else counts.astype(dtype).reshape(-1)
    if scale is not None:
        divisor = _divisor(rows.reshape(*rows.shape[:-2], examples, -1, rows.shape[-1]), counts, scale).astype(dtype)
        divisor = _repeat(divisor, rows.shape[-2] // examples)
        factor = 1.0 / divisor if factor is None else factor / divisor
    if factor is not None:
        factor = lax.stop_gradient(jnp.broadcast_to(factor, rows.shape[:-1]))
    if counts is None:
        return _Inputs(rows, jnp.asarray(rows.shape[-2], dtype), jnp.asarray(examples, dtype), factor)
    return _Inputs(rows, jnp.sum(counts, dtype=dtype), jnp.sum(jnp.any(counts, axis=-1), dtype=dtype), factor)


def _mask_rows(mask: jax.Array, between: tuple[int, ...], count: int) -> jax.Array:
    """The mask of each of `count` rows, which are all those of `between`."""
    mask = mask.astype(bool)
    if mask.shape == between[: mask.ndim]:
        return _repeat(mask.ravel(), count // mask.size)
    if between == (mask.size,):
        return mask.ravel()
    if between == mask.shape[:1]:  # a pooled input: an example counts if anything of it does
        return jnp.any(mask.reshape(len(mask), -1), axis=-1)
    raise StatisticsError(
        f"The mask has shape {mask.shape}, but an input has rows {between}; expected rows that begin with the mask's "
        "axes. Narrow select to weights whose inputs do."
    )


def _repeat(array: jax.Array, times: int) -> jax.Array:
    """Every entry of the last axis several times; unlike `jnp.repeat` it keeps the layout of explicit mesh axes."""
    return jnp.broadcast_to(array[..., None], (*array.shape, times)).reshape(*array.shape[:-1], -1)


def _divisor(rows: jax.Array, counts: jax.Array | None, scale: ScaleExamples) -> jax.Array:
    """The largest entry of each example of `[*stack, examples, n, in]`, `[*stack, examples]`; one for zeros."""
    where = True if counts is None else counts[..., None]
    largest = jnp.max(jnp.abs(rows), axis=(-2, -1), where=where, initial=0.0)
    found = largest
    if scale == "signed_max":
        found = jnp.abs(jnp.max(rows, axis=(-2, -1), where=where, initial=-jnp.inf))
    return jnp.where(largest == 0, 1.0, found)


def _input_rows(x: jax.Array, operation: Operation) -> tuple[jax.Array, tuple[int, ...]] | None:
    """The rows `[*stack, n, in]` that a weight is multiplied with, and the sizes of the axes that were joined to `n`.

    None where the operation is not a product over the weight's inputs.
    """
    if isinstance(operation, Convolution):
        return _patches(x, operation)
    if not isinstance(operation, Dot) or not operation.contracts_inputs:
        return None
    stack = [f"w{i}" for i in operation.role.stack_axes]
    inputs = [f"w{i}" for i in operation.role.in_axes]
    rest = [n for n in operation.x_labels if n not in stack and n not in inputs]
    if any(n not in operation.x_labels for n in stack):
        return None
    order = [operation.x_labels.index(n) for n in (*stack, *rest, *inputs)]
    size, _ = operation.role.sizes(operation.shape)
    rows = jnp.transpose(x, order).reshape(*operation.role.stack_shape(operation.shape), -1, size)
    return rows, tuple(x.shape[operation.x_labels.index(n)] for n in rest)


def _patches(x: jax.Array, operation: Convolution) -> tuple[jax.Array, tuple[int, ...]] | None:
    """The window under each output pixel as a row, in the order of the kernel's own axes."""
    p = operation.parameters
    spec = p["dimension_numbers"]
    if p["feature_group_count"] > 1 or p["batch_group_count"] > 1:
        return None
    shape = [operation.shape[i] for i in operation.permutation]
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
    patches = jnp.moveaxis(patches, spec.out_spec[:2], (0, -1))
    between = patches.shape[:-1]
    patches = patches.reshape(-1, shape[spec.rhs_spec[1]], *window)
    # Patches come as (feature, *window); the kernel's input axes follow the role's order.
    made = [operation.permutation[i] for i in (spec.rhs_spec[1], *spec.rhs_spec[2:])]
    order = [1 + made.index(i) for i in operation.role.in_axes]
    return jnp.transpose(patches, (0, *order)).reshape(patches.shape[0], -1), between
