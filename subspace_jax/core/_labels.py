"""Products of two arrays with named axes, in the bracketing and operand order of the caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

Labels = tuple[str, ...]


def product(
    left: jax.Array,
    left_labels: Labels,
    right: jax.Array,
    right_labels: Labels,
    out_labels: Labels,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Multiplies two labeled arrays, summing over every label that both have and the result has not.

    One `dot_general` in the given operand order, or in the other one where that saves the transpose of the
    result; a product with nothing to sum over is elementwise. A label of one operand only must be in the result.

    Args:
      left: array with one axis per label of `left_labels`.
      left_labels: names of its axes.
      right: array with one axis per label of `right_labels`.
      right_labels: names of its axes.
      out_labels: labels of the result, in order.
      precision: as `lax.dot_general` takes it.
      preferred_element_type: dtype of the sums and of the result.

    Example:
      >>> import jax.numpy as jnp
      >>> product(jnp.ones((2, 3)), ("b", "i"), jnp.ones((3, 4)), ("i", "o"), ("b", "o")).shape
      (2, 4)
    """
    shared = [n for n in left_labels if n in right_labels]
    summed = [n for n in shared if n not in out_labels]
    if not summed:
        both = _elementwise(left, left_labels, right, right_labels, out_labels)
        return both if preferred_element_type is None else both.astype(preferred_element_type)
    batch = [n for n in shared if n in out_labels]
    left_free = [n for n in left_labels if n not in shared]
    right_free = [n for n in right_labels if n not in shared]
    if (*batch, *right_free, *left_free) == out_labels and left_free and right_free:
        left, left_labels, left_free, right, right_labels, right_free = (
            *(right, right_labels, right_free),
            *(left, left_labels, left_free),
        )
    made = (*batch, *left_free, *right_free)
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": preferred_element_type}
    joinable = not batch and jax.device_count() == 1 and not jax.sharding.get_abstract_mesh().explicit_axes
    left_matrix = _matrix(left, left_labels, summed) if joinable else None
    right_matrix = _matrix(right, right_labels, summed) if joinable else None
    if left_matrix is not None and right_matrix is not None:
        sizes = dict(zip(left_labels + right_labels, left.shape + right.shape, strict=True))
        right_matrix = _thin_first(*right_matrix)
        axes = ((left_matrix[1],), (right_matrix[1],)), ((), ())
        out = lax.dot_general(left_matrix[0], right_matrix[0], axes, **options).reshape([sizes[n] for n in made])
        return out if made == out_labels else jnp.transpose(out, [made.index(n) for n in out_labels])
    out = lax.dot_general(
        left,
        right,
        (
            ([left_labels.index(n) for n in summed], [right_labels.index(n) for n in summed]),
            ([left_labels.index(n) for n in batch], [right_labels.index(n) for n in batch]),
        ),
        **options,
        out_sharding=_explicit_spec(left, left_labels, right, right_labels, made),
    )
    return out if made == out_labels else jnp.transpose(out, [made.index(n) for n in out_labels])


def _elementwise(
    left: jax.Array, left_labels: Labels, right: jax.Array, right_labels: Labels, out_labels: Labels
) -> jax.Array:
    """The product of two arrays that share some labels or none, each broadcast along what only the other has."""
    spec = _explicit_spec(left, left_labels, right, right_labels, out_labels)
    factors = aligned(left, left_labels, out_labels), aligned(right, right_labels, out_labels)
    if spec is not None:
        # One mesh axis may split both, each along a label of its own; the result has it once.
        factors = _split_at_most(factors[0], spec), _split_at_most(factors[1], spec)
    return factors[0] * factors[1]


def _split_at_most(array: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The array whole along what `spec` does not split, and otherwise as it is."""
    entries = tuple(jax.typeof(array).sharding.spec)
    kept = tuple(None if allowed is None else entry for entry, allowed in zip(entries, spec, strict=False))
    return array if kept == entries else jax.sharding.reshard(array, PartitionSpec(*kept))


def placed_like(array: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns `array` laid out as `reference`, where mesh axes are explicit and the layout is part of the type."""
    wanted = jax.typeof(reference).sharding
    if not wanted.mesh.explicit_axes or jax.typeof(array).sharding == wanted:
        return array
    return jax.sharding.reshard(array, wanted)


def map_rows(
    array: jax.Array, function: Callable[[jax.Array], jax.Array], *, depth: int, width: int, shape: Sequence[int]
) -> jax.Array:
    """Applies a function of rows `[*stack, n, width]` to an array whose rows may have several axes each way.

    Args:
      array: `[*stack, *between, *inputs]`.
      function: maps `[*stack, n, in]` to `[*stack, n, out]`.
      depth: number of stacked axes.
      width: number of input axes.
      shape: shape of the result, `[*stack, *between, *outputs]`.
    """
    joined = (*array.shape[:depth], -1, math.prod(array.shape[array.ndim - width :]))
    sharding = jax.typeof(array).sharding
    if not sharding.mesh.explicit_axes:
        return function(array.reshape(joined)).reshape(shape)
    # Explicit axes: rows may be split along their first axis and the stack; what mixes inputs needs them whole.
    between = array.ndim - depth - width
    split = (*sharding.spec, *(None,) * (array.ndim - len(sharding.spec)))[: depth + min(between, 1)]

    def spec(ndim: int) -> PartitionSpec:
        return PartitionSpec(*split, *(None,) * (ndim - len(split)))

    whole = jax.sharding.reshard(array, spec(array.ndim))
    rows = jnp.reshape(whole, joined, out_sharding=PartitionSpec(*split[:depth], *(split[depth:] or (None,)), None))
    return jnp.reshape(function(rows), shape, out_sharding=spec(len(shape)))


def placed_by_label(array: jax.Array, labels: Labels, reference: jax.Array, reference_labels: Labels) -> jax.Array:
    """Returns `array` split along its labels as `reference` is along the same, where mesh axes are explicit."""
    sharding = jax.typeof(reference).sharding
    if not sharding.mesh.explicit_axes:
        return array
    entries = dict(zip(reference_labels, sharding.spec, strict=False))
    return jax.sharding.reshard(array, PartitionSpec(*(entries.get(n) for n in labels)))


def _matrix(array: jax.Array, labels: Labels, summed: Sequence[str]) -> tuple[jax.Array, int] | None:
    """The array as a matrix without moving anything, and its summed axis; None where axes lie in another order.

    In the backward pass a product over several axes of activations sums over all of them, for which the CPU
    compiler copies the activations transposed; over one axis it does not. Activations that are split along more than
    one of these axes cannot be joined without communication, so this is for one device.
    """
    count, total = len(summed), math.prod(array.shape[labels.index(n)] for n in summed)
    if labels[-count:] == tuple(summed):
        return array.reshape(-1, total), 1
    if labels[:count] == tuple(summed):
        return array.reshape(total, -1), 0
    return None


def _thin_first(matrix: jax.Array, summed: int) -> tuple[jax.Array, int]:
    """A thin matrix `[summed, free]` turned, which on a CPU makes its gradient a product with long rows.

    The gradient of a factor sums over all tokens. As `[summed, free]` the CPU compiler makes it with its few columns
    last, a slow product; turned, and held apart so that the turn is not undone, it has them first: a LoRA step of
    MiniLM takes 0.93 of the time.
    """
    if summed or 4 * matrix.shape[1] > matrix.shape[0] or jax.default_backend() != "cpu":
        return matrix, summed
    return lax.optimization_barrier(matrix.T), 1


def aligned(array: jax.Array, labels: Labels, out_labels: Labels) -> jax.Array:
    """Transposes and pads `array` with axes of size one so that it broadcasts against `out_labels`."""
    present = [n for n in out_labels if n in labels]
    array = jnp.transpose(array, [labels.index(n) for n in present])
    return jnp.expand_dims(array, [i for i, n in enumerate(out_labels) if n not in labels])


def _explicit_spec(
    left: jax.Array, left_labels: Labels, right: jax.Array, right_labels: Labels, out_labels: Labels
) -> PartitionSpec | None:
    """The sharding that the result inherits label by label, needed where mesh axes are explicit."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit}
    if not explicit:
        return None
    by_label: dict[str, Any] = {}
    for array, labels in ((right, right_labels), (left, left_labels)):
        entries: Sequence[Any] = tuple(jax.typeof(array).sharding.spec)
        by_label |= {n: e for n, e in zip(labels, entries, strict=False) if e is not None}
    used: set[Any] = set()
    entries = []
    for name in out_labels:
        axes = by_label.get(name)
        axes = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
        # A mesh axis shards one axis of the result only; the first label that claims it wins.
        kept = tuple(a for a in axes if a in explicit and a not in used)
        used.update(kept)
        entries.append(kept or None)
    return PartitionSpec(*entries)


def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Groups of old and new axes of equal products, in order; axes of size one beside others join a neighbor."""
    if not old or not new:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        first, second, left, right = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif right < left and j < len(new):
                right, j = right * new[j], j + 1
            else:
                return None
        groups.append((tuple(range(first, i)), tuple(range(second, j))))
    if not groups:
        return None
    last_old, last_new = groups[-1]
    groups[-1] = ((*last_old, *range(i, len(old))), (*last_new, *range(j, len(new))))
    return groups
