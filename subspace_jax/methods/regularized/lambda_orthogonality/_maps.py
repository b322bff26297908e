"""Maps between the embedding spaces of an old and a new model.

λ-Orthogonality Regularization for Compatible Representation Learning (Ricci, Biondi, Pernici, Patras, Del Bimbo, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from subspace_jax.core import check_choice, check_int
from subspace_jax.linalg import cayley, skew, skew_size

BackwardKind = Literal["lambda", "affine", "orthogonal", "cayley"]
StrictKind = Literal["orthogonal", "cayley"]
STRICT: tuple[StrictKind, ...] = ("orthogonal", "cayley")


def orthogonal_kernel(entries: jax.Array, size: int, kind: StrictKind = "orthogonal") -> jax.Array:
    r"""Returns the rotation that a strict `BackwardMap` multiplies by: \(\exp(T - T^T)\), or its Cayley transform.

    Args:
        entries: those of \(T\) above its diagonal, row by row, `[size (size - 1) / 2]`.
        size: number of rows.
        kind: `"orthogonal"` for the matrix exponential. Its gradient in float32 is good to about a norm of 10 of
            \(T - T^T\); `"cayley"` stays good, but does not reach rotations by 180 degrees.

    Returns:
        `[size, size]` in float32, orthogonal with determinant one.

    Raises:
        ValueError: `kind` is unknown, or `entries` are not as many as `size` needs.

    Example:
        >>> import jax.numpy as jnp
        >>> orthogonal_kernel(jnp.array([jnp.pi / 2]), 2).round(4).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    check_choice("orthogonal_kernel: kind", kind, STRICT)
    if entries.shape != (skew_size(size),):
        raise ValueError(f"orthogonal_kernel: entries {entries.shape}; expected ({skew_size(size)},) for size={size}")
    generator = skew(entries.astype(jnp.promote_types(entries.dtype, jnp.float32)), size)
    return jax.scipy.linalg.expm(generator) if kind == "orthogonal" else cayley(generator)


def initial_kernel(kind: BackwardKind) -> Callable[..., jax.Array]:
    """Returns the initializer of a backward map's kernel."""
    if kind == "affine":
        return nn.initializers.lecun_normal()
    return lambda key, shape, dtype=jnp.float32: jnp.eye(shape[0], dtype=dtype)


def multiply(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the product in at least float32 and in full precision."""
    features = features.astype(jnp.promote_types(features.dtype, kernel.dtype))
    return jnp.matmul(features, kernel, precision=lax.Precision.HIGHEST)


class BackwardMap(nn.Module):
    r"""Maps new features into a space where they can be compared with old ones, \(g W + b\); Flax Linen.

    Kinds:

    - `"lambda"`: \(W\) and \(b\) free, from the identity; hold the kernel near orthogonality with
      `sj.methods.lambda_orthogonality.add_lambda_orthogonality` or `sj.lambda_orthogonality`. For adapters trained on
      other data than the models.
    - `"affine"`: the same from a random kernel.
    - `"orthogonal"`: \(W = \exp(T - T^T)\), no bias, from the identity: all distances between new features stay as
      they are. For adapters trained on the models' own data.
    - `"cayley"`: the same with the Cayley transform for the exponential; see `orthogonal_kernel`.

    Parameters: `kernel` `(width, width)` and `bias` `(width,)`, or `entries` `(width (width - 1) / 2,)`.

    Attributes:
        kind: as above.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> new = jnp.ones((4, 6))
        >>> params = BackwardMap("orthogonal").init(jax.random.key(0), new)["params"]
        >>> params["entries"].shape, BackwardMap("orthogonal").apply({"params": params}, new).shape
        ((15,), (4, 6))
    """

    kind: BackwardKind = "lambda"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features `[*batch, width]` to features of the same shape, in at least float32."""
        check_choice("BackwardMap.kind", self.kind, ("lambda", "affine", *STRICT))
        width = features.shape[-1]
        if self.kind in STRICT:
            entries = self.param("entries", nn.initializers.zeros, (skew_size(width),))
            return multiply(features, orthogonal_kernel(entries, width, self.kind))
        kernel = self.param("kernel", initial_kernel(self.kind), (width, width))
        return multiply(features, kernel) + self.param("bias", nn.initializers.zeros, (width,))


class ForwardMap(nn.Module):
    """Maps old features to where the backward map brings new ones; Flax Linen.

    Affine, or with ReLU layers in between. A gallery is adapted by it without its images.

    Parameters: `hidden_0` ... and `out`, each with `kernel` and `bias`.

    Attributes:
        features: width of the new model's features.
        hidden: widths of layers in between.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> adapter = ForwardMap(6, hidden=(8,))
        >>> variables = adapter.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> sorted(variables["params"]), adapter.apply(variables, jnp.ones((4, 3))).shape
        (['hidden_0', 'out'], (4, 6))
    """

    features: int
    hidden: Sequence[int] = ()

    @nn.compact
    def __call__(self, old: jax.Array) -> jax.Array:
        """Maps old features `[*batch, old width]` to features `[*batch, features]`."""
        check_int(f"{type(self).__name__}.features", self.features)
        for i, width in enumerate(self.hidden):
            old = nn.relu(nn.Dense(width, name=f"hidden_{i}")(old))
        return nn.Dense(self.features, name="out")(old)
