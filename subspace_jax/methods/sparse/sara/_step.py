"""One update of SaRA's optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Updates
from subspace_jax.core import path_string as as_path
from subspace_jax.methods.sparse.sara import _nuclear
from subspace_jax.methods.sparse.sara._nuclear import PenaltyMode
from subspace_jax.optim import Leaves
from subspace_jax.weights import SparseDelta


class ScaleBySaraState(NamedTuple):
    """State of `scale_by_sara`: of an entry 8 bytes of moments, 1 of its mark, and 4 of its place for the penalty.

    Attributes:
      count: int32 scalar, updates made.
      since: int32 scalar, updates since the moments of the entries began anew.
      mu: first moments, as the parameters.
      nu: second moments, as the parameters.
      active: by path of a weight from `sara`, which of its values still move, bool.
      indices: by path of a weight that the penalty looks at, its positions.
    """

    count: jax.Array
    since: jax.Array
    mu: Any
    nu: Any
    active: dict[str, jax.Array]
    indices: dict[str, jax.Array]


class Options(NamedTuple):
    """What `sara_adam` was given; see there."""

    threshold: Any
    reselect_after: int | None
    penalty: Any
    mode: PenaltyMode
    min_side: int
    min_entries: int
    b1: Any
    b2: Any
    eps: Any
    weight_decay: Any
    reset_moments: bool
    seed: int


def value_paths(tree: Any, known: Mapping[str, Any]) -> list[str]:
    """For every array of a tree the path of the weight of SaRA whose values it is; empty for other arrays."""
    found = []
    for keys, _ in jax.tree_util.tree_leaves_with_path(tree):
        path = as_path(keys[:-1])
        found.append(path if path in known and as_path(keys[-1:]) == "values" else "")
    return found


def make_update(
    options: Options, weights: Mapping[str, SparseDelta], updates: Updates, state: Any, params: Params
) -> tuple[Updates, ScaleBySaraState]:
    """Returns the direction of every array and the next state."""
    leaves = Leaves(updates)
    if params is None:
        raise ValueError("sara_adam: update needs the parameters, whose size the selection and the penalty look at.")
    paths, values = value_paths(updates, weights), leaves.of(params)
    again = jnp.asarray(False) if options.reselect_after is None else state.count == options.reselect_after
    active = dict(state.active)
    for path, value in zip(paths, values, strict=True):
        if path:
            active[path] &= ~again | (jnp.abs(value) < options.threshold)
    anew = again & options.reset_moments
    since = jnp.where(anew, 0, state.since) + 1
    count = state.count + 1
    added = _penalties(options, weights, dict(zip(paths, values, strict=True)), active, state)
    new: list[tuple[jax.Array, ...]] = []
    for path, g, p, m, v in zip(paths, leaves.arrays, values, leaves.of(state.mu), leaves.of(state.nu), strict=True):
        moves = active[path] if path else True
        g = jnp.where(moves, g + options.penalty * added[path].astype(g.dtype) if path in added else g, 0)
        m, v = (jnp.where(anew, 0, old) if path else old for old in (m, v))
        m = (options.b1 * m + (1 - options.b1) * g).astype(g.dtype)
        v = (options.b2 * v + (1 - options.b2) * g * g).astype(g.dtype)
        step = since if path else count
        root = jnp.sqrt(v / (1 - options.b2**step)) + options.eps
        direction = m / (1 - options.b1**step) / root + options.weight_decay * p
        new.append((jnp.where(moves, direction, 0).astype(g.dtype), m, v))
    moved, mu, nu = (list(part) for part in zip(*new, strict=True)) if new else ([], [], [])
    kept = (leaves.kept(mu, state.mu), leaves.kept(nu, state.nu))
    return leaves.tree(moved), ScaleBySaraState(count, since, *kept, active, state.indices)


def _penalties(
    options: Options,
    weights: Mapping[str, SparseDelta],
    values: Mapping[str, jax.Array],
    active: Mapping[str, jax.Array],
    state: ScaleBySaraState,
) -> dict[str, jax.Array]:
    """The gradient of the nuclear norm, in the shape of the values, by path."""
    looked_at = [path for path in state.indices if path in values]
    entries = {p: _nuclear.as_layers(values[p], state.indices[p], weights[p]) for p in looked_at}
    flags = {p: active[p].reshape(entries[p].values.shape) for p in looked_at}
    key = jax.random.fold_in(jax.random.key(options.seed), state.count)
    found = _nuclear.gradients(entries, flags, options.mode, options.min_entries, key)
    return {path: g.reshape(values[path].shape) for path, g in found.items()}
