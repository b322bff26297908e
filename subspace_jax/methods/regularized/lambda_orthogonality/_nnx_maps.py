"""The maps for Flax NNX, in a file of their own: NNX takes long to import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from subspace_jax.core import check_choice, check_int
from subspace_jax.linalg import skew_size
from subspace_jax.methods.regularized.lambda_orthogonality._maps import (
    STRICT,
    BackwardKind,
    initial_kernel,
    multiply,
    orthogonal_kernel,
)


class NNXBackwardMap(nnx.Module):
    """`BackwardMap` for Flax NNX.

    Args:
        width: of the features.
        kind: "lambda", "affine", "orthogonal" or "cayley"; `BackwardMap` describes each.
        rngs: draws the kernel of an `"affine"` one, with its stream `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> NNXBackwardMap(6, rngs=nnx.Rngs(0))(jnp.ones((4, 6))).shape
        (4, 6)
    """

    def __init__(self, width: int, kind: BackwardKind = "lambda", *, rngs: nnx.Rngs) -> None:
        self.width, self.kind = width, kind
        check_int(f"{type(self).__name__}.width", self.width)
        check_choice("NNXBackwardMap.kind", kind, ("lambda", "affine", *STRICT))
        if kind in STRICT:
            self.entries = nnx.Param(jnp.zeros((skew_size(width),)))
        else:
            self.kernel = nnx.Param(initial_kernel(kind)(rngs.params(), (width, width)))
            self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, features: jax.Array) -> Any:
        """Maps features `[*batch, width]` to features of the same shape, in at least float32."""
        if self.kind in STRICT:
            return multiply(features, orthogonal_kernel(self.entries[...], self.width, self.kind))
        return multiply(features, self.kernel[...]) + self.bias[...]


class NNXForwardMap(nnx.Module):
    """`ForwardMap` for Flax NNX.

    Args:
        width: of the old features.
        features: width of the new model's features.
        hidden: widths of layers in between.
        rngs: draws the kernels, with its stream `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> NNXForwardMap(3, 6, hidden=(8,), rngs=nnx.Rngs(0))(jnp.ones((4, 3))).shape
        (4, 6)
    """

    def __init__(self, width: int, features: int, hidden: Sequence[int] = (), *, rngs: nnx.Rngs) -> None:
        self.width, self.features, self.depth = width, features, len(hidden)
        for name in ("width", "features"):
            check_int(f"{type(self).__name__}.{name}", getattr(self, name))
        for i, size in enumerate(hidden):
            setattr(self, f"hidden_{i}", nnx.Linear(width, size, rngs=rngs))
            width = size
        self.out = nnx.Linear(width, features, rngs=rngs)

    def __call__(self, old: jax.Array) -> Any:
        """Maps old features `[*batch, width]` to features `[*batch, features]`."""
        for i in range(self.depth):
            old = nnx.relu(getattr(self, f"hidden_{i}")(old))
        return self.out(old)
