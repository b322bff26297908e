"""Singular values of a convolution as an operator on images, exactly, by Fourier transforms of its kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from subspace_jax.core import RankError
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.regularized.orthogonal_conv._penalty import Strides, orthogonality, sizes_of


def conv_singular_values(kernel: jax.Array, size: int | Sequence[int], strides: Strides = 1) -> jax.Array:
    r"""Returns all singular values of a circular convolution on images of a size, largest first.

    At each of the \(N\) output frequencies the layer is a matrix of its output features by its inputs at the \(S\)
    phases of the stride; their singular values together are the layer's.

    Args:
      kernel: `[*window, in, out]`; of a grouped layer pass one group after the other.
      size: of the image along each spatial axis, a multiple of the stride and not below the window.
      strides: of the layer.

    Returns:
      \(\min(out \cdot N^d, in \cdot (S N)^d)\) values in float32 at least; differentiable where they are distinct.

    Raises:
      RankError: the size is no multiple of the stride, or below the window.

    Example:
      >>> import jax.numpy as jnp
      >>> conv_singular_values(jnp.array([[[1.0]], [[1.0]]]), 4).round(3)
      Array([2.   , 1.414, 1.414, 0.   ], dtype=float32)
    """
    sizes = sizes_of(kernel.shape, strides)
    axes = len(sizes.window)
    image = (size,) * axes if isinstance(size, int) else tuple(size)
    bad = len(image) != axes or any(n % s or n < k for n, s, k in zip(image, sizes.strides, sizes.window, strict=False))
    if bad:
        raise RankError(
            f"conv_singular_values: size={size} for a window of {sizes.window} and strides={sizes.strides}: expected a "
            "multiple of the stride, not below the window, for each axis."
        )
    pads = [(0, n - k) for n, k in zip(image, sizes.window, strict=True)]
    whole = jnp.pad(kernel.astype(wide_dtype(kernel.dtype)), [*pads, (0, 0), (0, 0)])
    frequencies = [n // s for n, s in zip(image, sizes.strides, strict=True)]
    split = [m for pair in zip(frequencies, sizes.strides, strict=True) for m in pair]
    phases = whole.reshape(*split, sizes.inputs, sizes.outputs)
    # [*frequencies, *phases, in, out]
    order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2), 2 * axes, 2 * axes + 1]
    transformed = jnp.fft.fftn(phases.transpose(order), axes=tuple(range(axes)))
    matrices = transformed.reshape(math.prod(frequencies), -1, sizes.outputs)
    return jnp.sort(jnp.linalg.svd(matrices, compute_uv=False).ravel())[::-1]


def singular_value_bounds(kernel: jax.Array, strides: Strides = 1) -> tuple[jax.Array, jax.Array]:
    r"""Returns bounds of the singular values on images of any size from \(2 k - 1\) on: \(\sqrt{1 \mp \epsilon}\).

    \(\epsilon = \sqrt{\alpha L_{orth}}\) with \(\alpha = (2 q + 1)^d\,out\) where rows are to be orthonormal and
    \((2 k - 1)^d\,in\) where columns are. The lower one is zero from \(\epsilon = 1\) on.

    Args:
      kernel: `[*window, in, out]`.
      strides: of the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> [float(v) for v in singular_value_bounds(jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2)))]
      [1.0, 1.0]
    """
    sizes = sizes_of(kernel.shape, strides)
    if sizes.has_orthogonal_rows:
        alpha = math.prod(2 * q + 1 for q in sizes.reach) * sizes.outputs
    else:
        alpha = math.prod(2 * k - 1 for k in sizes.window) * sizes.inputs
    epsilon = jnp.sqrt(alpha * jnp.maximum(orthogonality(kernel, strides), 0.0))
    return jnp.sqrt(jnp.maximum(1 - epsilon, 0.0)), jnp.sqrt(1 + epsilon)
