"""What LoRAs hold at every rank."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Params, check_number
from subspace_jax.linalg import product_svd
from subspace_jax.methods.low_rank.lora_squeeze._squeeze import loras


def spectrum(adapted: Params) -> dict[str, jax.Array]:
    r"""Returns the singular values of what each LoRA adds, \(s\,a\,b\), without forming it.

    Args:
      adapted: a tree with weights of `lora`, also inside `dora`.

    Returns:
      By path `[*stack, k]` in float32, largest first, with \(k = \min(r, d_{in}, d_{out})\).

    Raises:
      StructureError: there is no LoRA, or one that is not of `lora`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.lora(rank=3)}, key=jax.random.key(0))
      >>> sj.methods.lora_squeeze.spectrum(adapted)["w"].tolist()
      [0.0, 0.0, 0.0]
    """
    return {path: product_svd(w.a, w.b).s * jnp.abs(w.scale) for path, w in loras(adapted).items()}


def retained(values: jax.Array) -> jax.Array:
    r"""Returns the share of squared singular values that each rank keeps: \(\sum_{i \le k} S_i^2 / \sum_i S_i^2\).

    Args:
      values: \(S\), `[*stack, r]`, largest first.

    Returns:
      `[*stack, r]` for \(k = 1 \dots r\); 1 where all values are zero, of which nothing can be lost.

    Example:
      >>> import jax.numpy as jnp
      >>> retained(jnp.array([2.0, 1.0, 0.0])).tolist()
      [0.800000011920929, 1.0, 1.0]
    """
    squares = jnp.cumsum(jnp.square(values), axis=-1)
    total = squares[..., -1:]
    return jnp.where(total > 0, squares / jnp.where(total > 0, total, 1.0), 1.0)


def recommend_rank(spectra: Params | Mapping[str, jax.Array], threshold: float = 0.95) -> int:
    r"""Returns the smallest rank that keeps a share of the squared singular values, on average over matrices.

    What is kept of the spectrum is not what is kept of the accuracy: choose a rank by validation where that matters.

    Args:
      spectra: what `spectrum` returned; every layer of a stack counts as a matrix.
      threshold: the share, in (0, 1].

    Raises:
      ValueError: `threshold` is not in (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> recommend_rank({"a": jnp.array([2.0, 1.0, 0.0]), "b": jnp.array([1.0, 1.0])})
      2
    """
    check_number("recommend_rank: threshold", threshold, above=0.0, most=1.0)
    kept = [np.asarray(retained(jnp.asarray(v))).reshape(-1, v.shape[-1]) for v in spectra.values()]
    longest = max(k.shape[-1] for k in kept)
    # Beyond its own rank a matrix keeps all.
    rows = [np.pad(k, ((0, 0), (0, longest - k.shape[-1])), constant_values=1.0) for k in kept]
    mean = np.concatenate(rows).mean(axis=0)
    return int(np.argmax(mean >= threshold - 1e-6)) + 1
