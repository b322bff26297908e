"""Memories of the subspaces that earlier tasks' inputs span, extended task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import StructureError, placed_like
from subspace_jax.linalg import project, to_coordinates, whole_matrices, wide_dtype


class GPMMemory(NamedTuple):
    """Directions of a layer's inputs that earlier tasks use.

    Attributes:
      basis: `[*stack, d, k]` float32; the first `rank` columns are orthonormal, the others zero.
      rank: `[*stack]` int32.
    """

    basis: jax.Array
    rank: jax.Array


def init_memory(size: int, columns: int | None = None, stack: Sequence[int] = ()) -> GPMMemory:
    """Returns an empty memory.

    Args:
      size: number of inputs \\(d\\) of the layer; of a convolution the window times the input channels.
      columns: how many directions it can ever hold; `size` if None.
      stack: sizes of stacked axes, of layers that are scanned.

    Raises:
      ValueError: `columns` is not in 1 .. `size`.

    Example:
      >>> init_memory(4, 2).basis.shape
      (4, 2)
    """
    columns = size if columns is None else columns
    if not 1 <= columns <= size:
        raise ValueError(f"gpm.init_memory: columns={columns}; expected 1 to {size}, the number of inputs.")
    return GPMMemory(jnp.zeros((*stack, size, columns), jnp.float32), jnp.zeros(tuple(stack), jnp.int32))


def next_task(
    memory: GPMMemory,
    activations: jax.Array | None = None,
    threshold: Any = 0.97,
    *,
    gram: jax.Array | None = None,
    official_off_by_one: bool = False,
) -> GPMMemory:
    r"""Extends the memory by the leading directions of a task's inputs.

    With inputs \(R = [x_1 \dots x_n]\) and \(\hat R = R - U U^T R\) the leading left singular vectors of \(\hat R\) are
    added until \(\|R\|^2 - \|\hat R\|^2 + \sum_i \hat s_i^2 \ge \epsilon\,\|R\|^2\); none where that holds already.
    Shapes stay, so nothing compiles again. A memory that is full takes no more: see `rank`.

    In training of the next task, `project_orthogonal({path: memory.basis})` before plain SGD, or `sandwich` around
    an adaptive optimizer, keeps the layer's outputs for inputs in the span of the memory as they are. Biases and the
    scales of norms have no input axis; the authors freeze them after the first task.

    Args:
      memory: of the tasks before.
      activations: inputs of the layer as rows, `[*stack, n, d]`; about 300 suffice. Of a convolution all patches of a
        few images, as `conv_patches` orders them.
      threshold: \(\epsilon\) in (0, 1], a number or `[*stack]`; larger values keep more of the task and leave less
        room. Published: 0.95 to 0.99 per layer, rising slowly over tasks.
      gram: \(\sum_n x_n x_n^T\), `[*stack, d, d]`, in place of the rows; what `capture` streams over any number of
        batches. It squares the spectrum, so that directions below about 3e-4 of the largest singular value are lost.
      official_off_by_one: leave out one vector at the first task, as the authors' code does.

    Returns:
      A memory of the same shapes.

    Raises:
      ValueError: neither or both of `activations` and `gram`.
      StructureError: their shape is not that of the memory.

    Example:
      >>> import jax.numpy as jnp
      >>> memory = next_task(init_memory(3), jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), threshold=0.75)
      >>> int(memory.rank), abs(memory.basis[:, 0]).tolist()
      (1, [1.0, 0.0, 0.0])
    """
    _check(memory, activations, gram)
    threshold = jnp.asarray(threshold, jnp.float32)[..., None]
    vectors, energies, total, kept = _spectrum(memory.basis, activations, gram)
    # A vector is needed while what came before it does not suffice.
    before = kept[..., None] + jnp.cumsum(energies, axis=-1) - energies
    needed = before < threshold * total[..., None]
    # Rounding must not call for directions in which there is nothing.
    needed &= energies > _smallest_share(vectors.shape[-2], gram is not None) * total[..., None]
    count = jnp.sum(needed, axis=-1, dtype=jnp.int32)
    if official_off_by_one:
        count = jnp.where(memory.rank == 0, jnp.maximum(count - 1, 0), count)
    return _append(memory, vectors, count)


def _check(memory: GPMMemory, activations: jax.Array | None, gram: jax.Array | None) -> None:
    if (activations is None) == (gram is None):
        raise ValueError("gpm.next_task: give either the inputs as rows, activations=, or their Gram matrix, gram=.")
    *stack, size, _ = memory.basis.shape
    given: Any = activations if gram is None else gram
    fits = given.ndim == len(stack) + 2 and [*given.shape[:-2], given.shape[-1]] == [*stack, size]
    if not fits or (gram is not None and given.shape[-2] != size):
        axes = [*map(str, stack), "n" if gram is None else str(size), str(size)]
        raise StructureError(
            f"gpm.next_task: {'activations' if gram is None else 'gram'} of shape {given.shape}; a memory of {size} "
            f"inputs needs [{', '.join(axes)}]. Convolutions need patches, not pixels: see conv_patches."
        )


def _spectrum(
    basis: jax.Array, rows: jax.Array | None, gram: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Directions outside the basis `[*stack, d, m]`, largest first, their energies, the energy in all and inside."""
    if rows is not None:
        rows = whole_matrices(rows.astype(wide_dtype(rows.dtype)))
        total = jnp.sum(jnp.square(rows), axis=(-2, -1))
        kept = jnp.sum(jnp.square(to_coordinates(rows, basis, side="out")), axis=(-2, -1))
        _, s, vt = jnp.linalg.svd(project(rows, basis, mode="remove", side="out"), full_matrices=False)
        return jnp.swapaxes(vt, -1, -2), jnp.square(s), total, kept
    assert gram is not None
    gram = whole_matrices(gram.astype(wide_dtype(gram.dtype)))
    total = jnp.trace(gram, axis1=-2, axis2=-1)
    kept = jnp.sum(basis * to_coordinates(gram, basis, side="out"), axis=(-2, -1))
    left = project(project(gram, basis, mode="remove"), basis, mode="remove", side="out")
    values, vectors = jnp.linalg.eigh((left + jnp.swapaxes(left, -1, -2)) / 2)
    return vectors[..., ::-1], jnp.maximum(values[..., ::-1], 0.0), total, kept


def _smallest_share(size: int, squared: bool) -> float:
    """The share of the energy below which a direction is rounding."""
    rounding = size * float(jnp.finfo(jnp.float32).eps)
    return rounding if squared else rounding**2


def _append(memory: GPMMemory, vectors: jax.Array, count: jax.Array) -> GPMMemory:
    """The memory with the first `count` vectors after its live columns, while there is room."""
    columns = memory.basis.shape[-1]
    index = jnp.arange(columns) - memory.rank[..., None]  # of the vector that goes into a column
    count = jnp.minimum(count, columns - memory.rank)
    wanted = (index >= 0) & (index < count[..., None])
    places = jnp.clip(index, 0, vectors.shape[-1] - 1)[..., None, :]
    new = jnp.take_along_axis(vectors, jnp.broadcast_to(places, (*vectors.shape[:-1], columns)), axis=-1)
    joined = memory.basis + jnp.where(wanted[..., None, :], new, 0.0).astype(memory.basis.dtype)
    rank = memory.rank + count
    # Old and new are orthogonal to rounding, which would add up over tasks.
    q, r = jnp.linalg.qr(whole_matrices(joined))
    signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    live = jnp.arange(columns) < rank[..., None]
    basis = jnp.where(live[..., None, :], q * signs[..., None, :], 0.0)
    return GPMMemory(placed_like(basis, memory.basis), rank)


def conv_patches(
    images: jax.Array,
    window: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: Sequence[int] | None = None,
) -> jax.Array:
    """Returns the patches of images that a convolution multiplies its kernel with, as rows in the kernel's order.

    Args:
      images: `[batch, *space, channels]`.
      window: sizes of the kernel's window.
      strides: of the convolution; ones if None.
      padding: of the convolution.
      dilation: of the kernel; ones if None.

    Returns:
      `[n, d]`, where `d` runs over window and channels as in a Flax kernel `[*window, channels, out]`.

    Example:
      >>> import jax.numpy as jnp
      >>> conv_patches(jnp.ones((2, 5, 5, 3)), (2, 2), padding="VALID").shape
      (32, 12)
    """
    axes = len(window)
    letters = "".join(chr(ord("0") + i) for i in range(axes))
    numbers = lax.conv_dimension_numbers(
        images.shape, (*window, images.shape[-1], 1), (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    )
    patches = lax.conv_general_dilated_patches(
        images,
        tuple(window),
        tuple(strides or (1,) * axes),
        padding,
        rhs_dilation=tuple(dilation or (1,) * axes),
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,
    )
    # Features come as (channel, *window), a kernel has (*window, channel).
    rows = patches.reshape(-1, images.shape[-1], *window)
    return jnp.moveaxis(rows, 1, -1).reshape(rows.shape[0], -1)
