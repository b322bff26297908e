"""`orthomerge`: OFT adapters on the manifold, all others after taking a rotation out of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Role, Weight, check_choice, check_number, is_weight, leaves_with_paths
from subspace_jax.linalg import wide_dtype
from subspace_jax.merging import (
    Deferred,
    Merger,
    Selector,
    Site,
    check_base,
    sites,
    task_arithmetic,
    write,
)
from subspace_jax.methods.merging.orthomerge._group import Aggregate, scaled_mean
from subspace_jax.methods.merging.orthomerge._turns import Direction, Side, Turns, directed
from subspace_jax.methods.structured.oft import Rotated

# The published setting of task arithmetic: a fifth of the sum of residuals.
_FIFTH = functools.partial(task_arithmetic, weights=0.2)


def orthomerge(
    experts: Sequence[Params],
    base: Params,
    *,
    merger: Merger = _FIFTH,
    scale: float | jax.Array = 1.0,
    targets: Literal["all", "conflicts"] = "all",
    threshold: float = 0.0,
    aggregate: Aggregate = "mean",
    direction: Direction = "theta",
    side: Side = "in",
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Merges experts as rotations of the base's weights, and what no rotation explains as ordinary updates.

    An OFT adapter is a rotation with the skew-symmetric coordinate \(A_i\). Several of one base are merged to
    \(A = \bar\theta\,S / \|S\|\) with \(S = \sum_i A_i\) and \(\bar\theta\) the mean of \(\|A_i\|\) over a layer's
    blocks, again an OFT adapter. Of every other expert the rotation \(R_i\) that brings the base's matrix nearest to
    its own is found by Procrustes; rotations are merged likewise, residuals \(\rho_i = W_i - R_i W_0\) by another
    merger: \(W = R W_0 + \lambda\,\rho\).

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      merger: merges residuals, all leaves together. It takes trees of them and a tree of zeros; by default a fifth of
        their sum. `functools.partial(sj.merging.ties, density=0.2)` and `sj.merging.tsv_m` are the other published
        ones.
      scale: \(\lambda\).
      targets: "all" explains the whole expert by a rotation, the published choice for task arithmetic; "conflicts"
        only updates of output units that disagree with the mean update, for `ties` and `tsv_m`.
      threshold: cosine with the mean update below which a unit's update is in conflict.
      aggregate: length of the merged coordinate from those of the experts.
      direction: "theta" adds coordinates as they are, "uniform" all at length 1.
      side: which side of a matrix is turned; "auto" the smaller one. Of embeddings it is that of the features.
      select: which leaves are merged; the others are the base's.
      roles: how plain arrays of other than two axes are read as matrices. Leaves that are none have residuals only.

    Returns:
      A tree of the base's structure, shapes and dtypes. Where all experts have OFT of one block size the leaf is OFT,
      else an array, or `Full` where an expert has an adapter.

    Warning:
      Long coordinates dominate the mean: one expert that turns a plane by nearly a half outweighs all others.

    Raises:
      StructureError: the trees differ, or an adapter stands on another base; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      ValueError: an option is none of those above.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> base = {"w": jax.random.normal(jax.random.key(0), (4, 6))}
      >>> turned = {"w": jnp.roll(base["w"], 1, axis=0) * jnp.array([[1.0], [1], [1], [-1]])}
      >>> merged = sj.methods.orthomerge.orthomerge([turned, turned], base)
      >>> bool(jnp.allclose(merged["w"], turned["w"], atol=1e-4))
      True
    """
    check_number("orthomerge: scale", scale)
    check_number("orthomerge: threshold", threshold)
    check_choice("orthomerge: targets", targets, ("all", "conflicts"))
    check_choice("orthomerge: aggregate", aggregate, ("mean", "median", "max"))
    check_choice("orthomerge: direction", direction, ("theta", "uniform"))
    check_choice("orthomerge: side", side, ("in", "out", "auto"))
    found = sites(experts, base, select=select, roles=roles)
    limit = threshold if targets == "conflicts" else None
    turns = {s.path: Turns(s, limit, aggregate, direction, side) for s in found if not _all_oft(s)}
    merged = _merge_residuals(turns, len(experts), merger)
    written: dict[str, Any] = {}
    for site in found:
        if site.path in turns:
            written[site.path] = write(site, turns[site.path].merged(jnp.asarray(scale) * merged.pop(site.path)))
        else:
            written[site.path] = merge_oft(site, aggregate, direction)
    leaves = [written.get(path, leaf) for path, leaf in leaves_with_paths(base)]
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), leaves)


def _merge_residuals(turns: Mapping[str, Turns], count: int, merger: Merger) -> dict[str, Any]:
    if not turns:
        return {}
    zeros = {p: jnp.zeros(t.site.base.shape, wide_dtype(t.site.base.dtype)) for p, t in turns.items()}
    residuals = [
        {p: Deferred(zeros[p].shape, zeros[p].dtype, functools.partial(t.residual, i)) for p, t in turns.items()}
        for i in range(count)
    ]
    return dict(merger(residuals, zeros))


def _all_oft(site: Site) -> bool:
    leaves = site.leaves
    if not all(isinstance(leaf, Rotated) for leaf in leaves):
        return False
    kinds = {(w.block_size, w.skew_entries.shape, w.output_scale is None, w.terms) for w in leaves}
    return len(kinds) == 1


def merge_oft(site: Site, aggregate: Aggregate = "mean", direction: Direction = "theta") -> Weight:
    """Returns the OFT adapter of several on one base; one length counts for all blocks of a layer.

    Args:
      site: a leaf where every expert has an OFT adapter of one block size.
      aggregate: length of the merged coordinate from those of the experts.
      direction: whether coordinates are added as they are or all at length 1.
    """
    for i, leaf in enumerate(site.leaves):
        check_base(site.path, leaf.base, site.base)
        site.check_finite(i, (leaf.skew_entries, leaf.output_scale))
    entries = _merge_entries([w.skew_entries for w in site.leaves], aggregate, direction)
    first = site.leaves[0]
    scales = [w.output_scale for w in site.leaves if w.output_scale is not None]
    mean = sum(scales[1:], scales[0]) / len(scales) if scales else None
    return dataclasses.replace(first, base=site.base, skew_entries=entries, output_scale=mean, dropout_key=None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _merge_entries(entries: list[jax.Array], aggregate: Aggregate, direction: Direction) -> jax.Array:
    # The matrix has every entry of its triangle twice; both lengths are those of the triangle.
    wide = [v.astype(wide_dtype(v.dtype)) for v in entries]
    lengths = jnp.stack([jnp.sqrt(jnp.sum(v * v, axis=(-2, -1))) for v in wide])
    terms = [directed(v, n, direction) for v, n in zip(wide, lengths, strict=True)]
    return scaled_mean(sum(terms[1:], terms[0]), lengths, aggregate, (-2, -1)).astype(entries[0].dtype)
