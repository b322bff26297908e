"""Turns a merged tree into low-rank adapters on the base."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from subspace_jax.core import Params, Role, check_int, map_with_paths
from subspace_jax.merging._change import Change, Factored
from subspace_jax.merging._site import Site
from subspace_jax.merging._thin import thin_svd
from subspace_jax.merging._walk import Selector, merge_leaves
from subspace_jax.weights import LowRank


def to_low_rank(
    merged: Params,
    base: Params,
    rank: int,
    *,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Returns the nearest low-rank adapters: of every matrix's change the `rank` largest singular triples.

    A merged tree in full weights, or in factors of a large rank, becomes one that `save_adapter` and `save_peft` write
    small. LoRAs of at most this rank, and leaves that are no matrices, stay as they are.

    Args:
      merged: a tree of arrays or of stand-in weights.
      base: the tree that it was made from; unchanged leaves stay arrays.
      rank: largest rank of an adapter; a smaller side of a matrix is the limit.
      select: which leaves are turned; the others are the base's.
      roles: how plain arrays of other than two axes are read as matrices.

    Returns:
      A tree of the base's structure with `LowRank` weights, both factors carrying the root of the singular values.

    Raises:
      RankError: the rank is no positive integer.
      StructureError: the trees differ; the message has the path.
      NonFiniteError: `merged` holds NaN or infinity; likewise.
      PatternError: a glob of `select` or a path of `roles` matches nothing.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> found = sj.merging.to_low_rank({"w": jnp.diag(jnp.array([3.0, 1.0]))}, {"w": jnp.zeros((2, 2))}, rank=1)
      >>> found["w"].materialize().round(4).tolist()
      [[3.0, 0.0], [0.0, 0.0]]
    """
    rank = check_int("to_low_rank: rank", rank)
    kept: dict[str, object] = {}

    def rule(site: Site) -> Change:
        leaf = site.leaves[0]
        change = site.change(0)
        small = isinstance(leaf, LowRank) and (leaf.rank or 0) <= rank
        if change is None or site.role is None or small:
            kept[site.path] = leaf
            return None
        found = thin_svd(change, site, min(rank, *site.role.sizes(site.base.shape)))
        root = jnp.sqrt(found.s)[..., None, :]
        return Factored(a=found.u * root, b=jnp.swapaxes(found.v * root, -1, -2), role=site.role)

    turned = merge_leaves([merged], base, rule, select=select, roles=roles, least=1)
    return map_with_paths(lambda path, leaf: kept.get(path, leaf), turned)
