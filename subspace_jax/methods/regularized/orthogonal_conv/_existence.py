"""Which convolutions can be orthogonal, and kernels that are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import RankError
from subspace_jax.linalg import polar
from subspace_jax.methods.regularized.orthogonal_conv._penalty import Strides, sizes_of


def can_be_orthogonal(shape: Sequence[int], strides: Strides = 1, *, groups: int = 1) -> bool:
    r"""Tells whether an orthogonal kernel of a shape exists, with circular padding on images at least as large.

    With \(out \le in \cdot S^2\) rows are to be orthonormal, which needs \(out \le in \cdot k^2\); else columns, which
    needs \(S \le k\). So every layer of stride 1 can be orthogonal, and every one whose window is not below its stride.

    Args:
      shape: `[*window, in, out]`.
      strides: of the layer.
      groups: `feature_group_count`.

    Raises:
      RoleError: no window, strides of another number, or groups that do not divide the outputs.

    Example:
      >>> can_be_orthogonal((3, 3, 4, 8)), can_be_orthogonal((1, 1, 1, 2), strides=2)
      (True, False)
    """
    sizes = sizes_of(shape, strides, groups)
    if sizes.has_orthogonal_rows:
        # Along an axis with fewer taps than the stride the other inputs are never seen.
        return sizes.outputs <= sizes.inputs * math.prod(map(min, sizes.window, sizes.strides))
    return all(s <= k for k, s in zip(sizes.window, sizes.strides, strict=True))


def orthogonal_kernel(
    key: jax.Array, shape: Sequence[int], strides: Strides = 1, *, groups: int = 1, dtype: Any = jnp.float32
) -> jax.Array:
    """Returns a random orthogonal kernel: an orthonormal matrix on the taps of one stride, zeros elsewhere.

    Such taps never meet at another shift. Further training moves it to others; the penalty stays zero along them.

    Args:
      key: draws the matrix; consumed.
      shape: `[*window, in, out]`.
      strides: of the layer.
      groups: `feature_group_count`.
      dtype: of the kernel.

    Returns:
      The kernel, with the taps in the middle of the window.

    Raises:
      RankError: there is no orthogonal kernel of this shape; see `can_be_orthogonal`.

    Example:
      >>> import jax
      >>> from subspace_jax.methods.regularized.orthogonal_conv import orthogonality
      >>> kernel = orthogonal_kernel(jax.random.key(0), (3, 3, 4, 6), strides=2)
      >>> bool(abs(orthogonality(kernel, strides=2)) < 1e-5)
      True
    """
    sizes = sizes_of(shape, strides, groups)
    if not can_be_orthogonal(shape, strides, groups=groups):
        raise RankError(
            f"orthogonal_kernel: no kernel of shape {tuple(shape)} with strides={sizes.strides} is orthogonal: "
            f"{sizes.outputs} outputs from {sizes.inputs} inputs and a window of {sizes.window}. Take a window not "
            "below the stride, or fewer outputs."
        )
    block = tuple(map(min, sizes.window, sizes.strides))
    rows = sizes.inputs * math.prod(block)
    drawn = jax.random.normal(key, (groups, rows, sizes.outputs))
    taps = polar(drawn).reshape(groups, *block, sizes.inputs, sizes.outputs)
    first = [(k - b) // 2 for k, b in zip(sizes.window, block, strict=True)]
    place = (slice(None), *(slice(i, i + b) for i, b in zip(first, block, strict=True)))
    whole = jnp.zeros((groups, *sizes.window, sizes.inputs, sizes.outputs)).at[place].set(taps)
    return jnp.moveaxis(whole, 0, -2).reshape(tuple(shape)).astype(dtype)
