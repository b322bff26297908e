"""DARE: drops entries of task vectors at random and rescales the rest, before any merger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, check_number, is_weight, key_for, leaves_with_paths
from subspace_jax.merging._change import Change, Deferred, Dense
from subspace_jax.merging._linear import task_arithmetic
from subspace_jax.merging._site import Site
from subspace_jax.merging._walk import Selector, sites

Merger = Callable[..., Params]


def dare(
    experts: Sequence[Params],
    base: Params,
    *,
    key: jax.Array,
    drop: float = 0.5,
    rescale: bool = True,
    merger: Merger = task_arithmetic,
    select: Selector | None = None,
) -> Params:
    r"""Merges task vectors of which a random share is dropped: \(\tau_i \mapsto \tau_i \odot b_i / (1 - p)\).

    \(b_i\) is 1 with probability \(1 - p\), else 0, drawn for every entry and expert; on average nothing changes.

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      key: draws what is dropped, by expert and path: another order of leaves draws the same.
      drop: \(p\), below 1.
      rescale: divide by \(1 - p\).
      merger: called as `merger(changed, base, select=...)`, such as
        `functools.partial(sj.merging.ties, density=0.2)`.
      select: which leaves are merged; the others are the base's.

    Returns:
      What `merger` returns. Where experts have adapters the leaf is formed.

    Raises:
      StructureError: the trees differ; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      PatternError: a glob of `select` matches nothing.
      ValueError: `drop` is not in [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.ones(1000)}, {"w": jnp.ones(1000)}]
      >>> merged = sj.merging.dare(experts, {"w": jnp.zeros(1000)}, key=jax.random.key(0), drop=0.9)
      >>> sorted({round(v, 3) for v in merged["w"].tolist()})
      [0.0, 3.0, 6.0]

    Source:
      Yu et al.: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, 2023.
    """
    check_number("dare: drop", drop, least=0.0, below=1.0)
    factor = 1.0 / (1.0 - drop) if rescale else 1.0

    def thin(site: Site, expert: int) -> Change:
        one = key_for(jax.random.fold_in(key, expert), site.path)
        return Dense(array=_thinned(one, site.array(expert), drop, factor))

    return with_changes(experts, base, thin, merger, select=select)


def with_changes(
    experts: Sequence[Params],
    base: Params,
    change: Callable[[Site, int], Change],
    merger: Merger,
    *,
    select: Selector | None = None,
    roles: Any = None,
) -> Params:
    """Merges experts after a function has replaced each one's change, leaf by leaf as it is merged.

    Args:
      experts: trees of arrays or of stand-in weights.
      base: the tree that they were trained from.
      change: takes the leaf and the number of an expert, and returns what that one is to change there.
      merger: called as `merger(changed, base, select=...)`.
      select: which leaves are merged; the others are the base's.
      roles: how plain arrays are read as matrices.

    Returns:
      What the merger returns.

    Raises:
      StructureError: the trees differ; the message has the path.
      NonFiniteError: an expert, or what `change` returns, holds NaN or infinity; likewise.
      PatternError: a glob of `select` or a path of `roles` matches nothing.
    """
    found = {site.path: site for site in sites(experts, base, select=select, roles=roles)}
    treedef = jax.tree.structure(base, is_leaf=is_weight)

    def leaf(path: str, value: Any, expert: int) -> Any:
        site = found.get(path)
        if site is None:
            return value
        return Deferred(tuple(value.shape), value.dtype, lambda: change(site, expert), of=site.leaves[expert])

    changed = [
        jax.tree.unflatten(treedef, [leaf(path, value, i) for path, value in leaves_with_paths(base)])
        for i in range(len(experts))
    ]
    chosen = set(found)
    return merger(changed, base, select=lambda path, _: path in chosen)


@jax.jit
def _thinned(key: jax.Array, array: jax.Array, drop: Any, factor: Any) -> jax.Array:
    kept = jax.random.bernoulli(key, 1.0 - drop, array.shape)
    return jnp.where(kept, array * factor, 0.0)
