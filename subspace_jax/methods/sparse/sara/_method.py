"""`sara`: selects the smallest entries of a tree by one threshold, which a share of them lies below."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    Method,
    Params,
    PatternError,
    RankError,
    Role,
    check_int,
    check_number,
    is_tracer,
    leaves_with_paths,
    matches,
    nearest,
)
from subspace_jax.linalg import wide_dtype
from subspace_jax.weights import SparseDelta, entries_at, entries_on_host, flat_entries


def sara(threshold: float, *, slots: int | None = None, keep_formed: bool = False) -> Method:
    r"""Trains the entries that are smaller in magnitude than one threshold, \(|w| < \theta_t\), of any array.

    One threshold for all arrays, as published: how many entries of each learn follows from it, and is counted when
    `adapt` makes the weight. The released program selects over the whole denoiser, biases and norms included:
    `{"**": sj.sara(2e-3)}`; arrays that start at zero are selected whole, as intended. `sara.threshold_for` finds the
    threshold that a share of the entries lies below.

    Train with `sara_adam`, which adds the nuclear norm of the trained entries and, halfway, keeps of them those that
    are still small.

    Args:
      threshold: \(\theta_t\), positive; infinity selects everything. Published: 2e-3 for Stable Diffusion 1.5 (about
        50 of 860 million entries), 8e-4 and 2e-4 for smaller budgets.
      slots: entries of a layer that there is room for, where arrays are abstract and cannot be counted (under `jit` or
        `eval_shape`); a traced layer with more small entries keeps the first. None counts.
      keep_formed: give True where the model is rematerialized; see `SparseDelta`.

    Returns:
      A method whose weights are `SparseDelta` with values `[*stack, k]` that replace entries; layers of a stack that
      have fewer small entries than the one with most are padded. Nothing else of the array's size is kept.

    Raises:
      ValueError: `threshold` is not positive.
      RankError: `slots` is not a positive integer, or less than the small entries; the latter from `adapt`.
      SubspaceError: the array is abstract and `slots` was not given; raised by `adapt`.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.array([[0.5, -0.01, 2.0], [0.1, 0.0, 0.02]]), "b": jnp.zeros(3)}
      >>> adapted = sj.adapt(params, {"**": sj.methods.sara.sara(0.1)}, key=jax.random.key(0))
      >>> adapted["w"].indices.tolist(), adapted["b"].indices.tolist()  # 0.1 itself is not below 0.1
      ([1, 4, 5], [0, 1, 2])
    """
    if threshold != math.inf:
        check_number("sara: threshold", threshold, above=0.0)
    if slots is not None:
        slots = check_int("sara: slots", slots)
    limit = np.float32(threshold)

    def room(array: jax.Array, role: Role) -> int:
        """How many positions a layer has: the small entries of the layer with most, or what was given."""
        if slots is not None and is_tracer(array):
            return slots
        counts = np.sum(np.abs(entries_on_host(array, role)) < limit, axis=-1)
        most = int(counts.max(initial=0))
        if slots is not None and most > slots:
            raise RankError(f"slots={slots}: {most} entries of a layer are smaller than {limit:g}; give as many.")
        return most if slots is None else slots

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> SparseDelta:
        del key, stats
        magnitudes = jnp.abs(flat_entries(jnp.asarray(array), role).astype(wide_dtype(array.dtype)))
        size = magnitudes.shape[-1]
        places = jnp.where(magnitudes < limit, jnp.arange(size, dtype=jnp.int32), size)
        indices = jnp.sort(places, axis=-1)[..., : min(room(array, role), size)]
        wide = wide_dtype(array.dtype)
        return SparseDelta(
            base=array,
            indices=indices,
            values=entries_at(array, indices, role).astype(wide),
            keep_formed=keep_formed,
            role=role,
            dtype=array.dtype,
            trainable=("values",),
        )

    return Method("sara", make)


def threshold_for(params: Params, share: float, *, select: str = "**") -> float:
    r"""Returns the threshold that a share of all selected entries together lies below.

    Of this library: the paper gives thresholds of one model. There is one for all arrays, so an array of small entries
    gives more of them than one of large entries.

    Args:
      params: a tree of arrays.
      share: of the entries, in (0, 1]; 0.1 to 0.2 are free of cost in the paper's models.
      select: a glob of the paths that count.

    Returns:
      A float: exactly `floor(share N)` entries are smaller in magnitude, fewer where several are equal to it.

    Raises:
      ValueError: `share` is not in (0, 1].
      PatternError: the glob matches no array.

    Example:
      >>> import jax.numpy as jnp
      >>> threshold_for({"w": jnp.array([4.0, -1.0, 3.0, 2.0])}, 0.5)
      3.0
    """
    check_number("threshold_for: share", share, above=0.0, most=1.0)
    leaves = leaves_with_paths(params)
    chosen = [np.abs(np.asarray(v, np.float32)).ravel() for path, v in leaves if matches(select, path)]
    if not chosen:
        raise PatternError(
            f"threshold_for: select={select!r} matches no array; nearest paths: "
            f"{nearest(select.replace('**/', ''), [path for path, _ in leaves])}."
        )
    magnitudes = np.concatenate(chosen)
    count = math.floor(share * magnitudes.size + 1e-6)
    return math.inf if count >= magnitudes.size else float(np.partition(magnitudes, count)[count])


def default_rate(threshold: float) -> float:
    r"""Returns the published learning rate of a threshold, \(10^{-3} \exp(-350\,\theta_t)\): less for larger sets.

    Raises:
      ValueError: the threshold is infinite, for which the formula gives 0, or not positive.

    Example:
      >>> [round(default_rate(t), 6) for t in (2e-3, 8e-4, 2e-4)]
      [0.000497, 0.000756, 0.000932]
    """
    check_number("sara: threshold of the published learning rate", threshold, above=0.0)
    return 1e-3 * math.exp(-350.0 * threshold)
