"""Turns stand-in weights back into ordinary arrays."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core._compat import is_tracer
from subspace_jax.core._errors import NonFiniteError, NotMergeableError
from subspace_jax.core._finite import is_finite
from subspace_jax.core._links import resolve_links
from subspace_jax.core._paths import leaves_with_paths, map_with_paths
from subspace_jax.core._types import Params
from subspace_jax.core._weight import Weight, is_weight
from subspace_jax.linalg import wide_dtype


class Rounding(NamedTuple):
    """Rounding errors from casting a merged weight to its own dtype.

    Attributes:
      max_error: largest absolute difference to the float32 result.
      relative_error: Frobenius norm of the difference over that of the float32 result.
      dtype: the dtype cast to.
    """

    max_error: float
    relative_error: float
    dtype: str


def merge(adapted: Params, *, keep_float32: bool = False) -> Params:
    """Replaces every stand-in weight of a tree by the ordinary array that it stands for.

    Each array is computed in float32 and cast once to the dtype of the array that it replaces.

    Args:
      adapted: a tree with stand-in weights.
      keep_float32: leave merged arrays in float32 (float64 ones as they are).

    Returns:
      A tree of arrays, of the structure that `adapt` was given.

    Raises:
      NotMergeableError: a weight depends on the input.
      NonFiniteError: a merged array holds NaN or infinity.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((4, 3))}, {"w": sj.lora(rank=2)}, key=jax.random.key(0))
      >>> sj.merge(adapted)["w"].shape
      (4, 3)
    """
    _refuse_unmergeable(adapted)

    def one(path: str, leaf: Any) -> Any:
        if not is_weight(leaf):
            return leaf
        dtype = wide_dtype(leaf.dtype) if keep_float32 else leaf.dtype
        array = _materialize(leaf, np.dtype(dtype))
        if not is_tracer(array) and not bool(is_finite(array)):
            bad = int((~jnp.isfinite(array)).sum())
            raise NonFiniteError(
                f"{path}: {bad} of {array.size} entries of the merged {leaf.method or type(leaf).__name__} weight "
                "are not finite. Training diverged, or the values overflow this dtype: try keep_float32=True."
            )
        return array

    return map_with_paths(one, resolve_links(adapted))


# A weight is a pytree, so one compiled program serves every weight of one class and shape.
_materialize = jax.jit(lambda weight, dtype: weight.materialize(dtype), static_argnums=1)


def _is_mergeable(weight: Weight) -> bool:
    return weight.mergeable and all(_is_mergeable(v) for _, v in weight.data_items() if isinstance(v, Weight))


def _refuse_unmergeable(adapted: Params) -> None:
    stuck = [path for path, leaf in leaves_with_paths(adapted) if is_weight(leaf) and not _is_mergeable(leaf)]
    if stuck:
        raise NotMergeableError(
            f"{', '.join(stuck)}: the weight depends on the input, so no single array equals it. Keep the adapter "
            "and run the model through with_adapters."
        )


def merge_rounding(adapted: Params) -> dict[str, Rounding]:
    """Reports the rounding errors from casting each merged weight to its own dtype; zero for float32 weights.

    Args:
      adapted: a tree with stand-in weights.

    Returns:
      A dict from the path of each stand-in weight to its `Rounding`.

    Raises:
      NotMergeableError: a weight depends on the input.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> w = jnp.linspace(0.1, 1.0, 12, dtype=jnp.bfloat16).reshape(4, 3)
      >>> adapted = sj.adapt({"w": w}, {"w": sj.pissa(rank=2)}, key=jax.random.key(0))
      >>> merge_rounding(adapted)["w"].relative_error < 2**-8
      True
    """
    _refuse_unmergeable(adapted)
    report = {}
    for path, leaf in leaves_with_paths(resolve_links(adapted)):
        if is_weight(leaf):
            exact = _materialize(leaf, np.dtype(jnp.float32))
            error = exact.astype(leaf.dtype).astype(jnp.float32) - exact
            norm = float(jnp.linalg.norm(exact))
            report[path] = Rounding(
                float(jnp.max(jnp.abs(error), initial=0.0)),
                float(jnp.linalg.norm(error)) / norm if norm else 0.0,
                str(leaf.dtype),
            )
    return report
