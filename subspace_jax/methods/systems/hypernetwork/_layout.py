"""Which numbers of a flat output belong to which factor of which kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    Params,
    Role,
    RoleError,
    StructureError,
    check_rank,
    leaves_with_paths,
    matches,
    select_paths,
)
from subspace_jax.weights import lora_scale

B_SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A leaf that the hypernetwork writes an adapter for, as a matrix.

    Attributes:
      path: of the leaf.
      role: how it is a matrix.
      stack: sizes of the axes over which layers are stacked; each layer has factors of its own.
      inputs: rows of its matrix.
      outputs: columns.
    """

    path: str
    role: Role
    stack: tuple[int, ...]
    inputs: int
    outputs: int

    @property
    def layers(self) -> int:
        """The number of matrices."""
        return math.prod(self.stack)


@dataclasses.dataclass(frozen=True)
class Layout:
    r"""Places of all factors in an output \(o\): kernels in the order of their paths, of each `a`, then `b`.

    Attributes:
      kernels: what is adapted.
      rank: \(r\).
      scale: \(s = \alpha / r\).
    """

    kernels: tuple[Kernel, ...]
    rank: int
    scale: float

    @property
    def size(self) -> int:
        r"""Length of an output, \(P = \sum_l r\,(d_{in} + d_{out})\)."""
        return sum(k.layers * self.rank * (k.inputs + k.outputs) for k in self.kernels)


def layout_of(
    params: Params,
    select: str | Callable[[str, Any], bool] | list[str] | tuple[str, ...],
    rank: int = 4,
    alpha: float | None = None,
    *,
    roles: Mapping[str, Role] | None = None,
) -> Layout:
    r"""Returns the layout of LoRAs for a model's kernels.

    Args:
      params: the frozen model's.
      select: globs or a predicate of path and array; the publication's are the projections of attention.
      rank: \(r\).
      alpha: \(\alpha\); the rank if None, so that the scale is one.
      roles: how the model uses arrays with more than two axes, from `sj.roles`.

    Raises:
      PatternError: a glob matches nothing.
      RoleError: a leaf is not known to be a matrix.
      RankError: the rank is not a positive integer, or above a kernel's smaller side.

    Example:
      >>> import jax.numpy as jnp
      >>> layout_of({"q": jnp.ones((8, 6)), "v": jnp.ones((8, 4))}, "*", rank=2).size
      52
    """
    rank = check_rank(rank, what="layout_of: rank")
    chosen, kernels = set(select_paths(params, select)), []
    for path, leaf in sorted(leaves_with_paths(params)):
        if path not in chosen:
            continue
        given = next((r for pattern, r in (roles or {}).items() if pattern == path or matches(pattern, path)), None)
        role = Role.dense() if given is None and leaf.ndim == 2 else given
        if role is None or role.kind != "dense":
            raise RoleError(
                f"{path}: shape {tuple(leaf.shape)} is not known to be a dense kernel; leave it out of select=, or "
                "pass roles=sj.roles(fn, params, ...)."
            )
        inputs, outputs = role.sizes(leaf.shape)
        check_rank(rank, min(inputs, outputs), what=f"{path}: rank")
        kernels.append(Kernel(path, role, role.stack_shape(leaf.shape), inputs, outputs))
    return Layout(tuple(kernels), rank, lora_scale(rank, alpha))


def unflatten(layout: Layout, output: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    r"""Returns the factors that outputs stand for: \(A_l = o_A / \sqrt{d_{in}}\), \(B_l = 0.1\,o_B\).

    So every entry of an output is of order one.

    Args:
      layout: of the kernels.
      output: \(o\), `[n, size]`.

    Returns:
      By path `a` `[n, *stack, in, rank]` and `b` `[n, *stack, rank, out]`, in at least float32.

    Raises:
      StructureError: `output` is not `[n, size]`.

    Example:
      >>> import jax.numpy as jnp
      >>> layout = layout_of({"w": jnp.ones((4, 3))}, "w", rank=1)
      >>> a, b = unflatten(layout, jnp.arange(7.0)[None])["w"]
      >>> a[0, :, 0].tolist(), (10 * b[0, 0]).tolist()
      ([0.0, 0.5, 1.0, 1.5], [4.0, 5.0, 6.0])
    """
    if output.ndim != 2 or output.shape[1] != layout.size:
        raise StructureError(f"unflatten: output {output.shape}; expected [n, {layout.size}], as the layout says.")
    output, found, start = output.astype(jnp.promote_types(output.dtype, jnp.float32)), {}, 0
    for kernel in layout.kernels:
        each = layout.rank * (kernel.inputs + kernel.outputs)
        part = output[:, start : start + kernel.layers * each].reshape(-1, *kernel.stack, each)
        start += kernel.layers * each
        a, b = jnp.split(part, [layout.rank * kernel.inputs], axis=-1)
        a = a.reshape(*a.shape[:-1], kernel.inputs, layout.rank) / math.sqrt(kernel.inputs)
        found[kernel.path] = a, B_SCALE * b.reshape(*b.shape[:-1], layout.rank, kernel.outputs)
    return found


def flatten(layout: Layout, factors: Mapping[str, tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Returns the outputs that stand for factors; the inverse of `unflatten`.

    Args:
      layout: of the kernels.
      factors: by path `a` `[n, *stack, in, rank]` and `b` `[n, *stack, rank, out]`.

    Returns:
      `[n, size]`.

    Example:
      >>> import jax.numpy as jnp
      >>> layout = layout_of({"w": jnp.ones((4, 3))}, "w", rank=1)
      >>> jnp.round(flatten(layout, unflatten(layout, jnp.arange(7.0)[None]))).tolist()
      [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    """
    parts = []
    for kernel in layout.kernels:
        a, b = factors[kernel.path]
        lead = (a.shape[0], *kernel.stack, -1)
        joined = [(a * math.sqrt(kernel.inputs)).reshape(lead), (b / B_SCALE).reshape(lead)]
        parts.append(jnp.concatenate(joined, axis=-1).reshape(a.shape[0], -1))
    return jnp.concatenate(parts, axis=-1)
