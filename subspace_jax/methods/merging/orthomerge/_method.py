"""`orthomerge`: OFT adapters on the manifold, all others after taking a rotation out of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Role, Weight, check_choice, check_number, is_weight, leaves_with_paths
from subspace_jax.linalg import wide_dtype, wide_matmul
from subspace_jax.merging import (
    Change,
    Deferred,
    Dense,
    Merger,
    Selector,
    Site,
    check_base,
    formed,
    sites,
    task_arithmetic,
    write,
)
from subspace_jax.methods.merging.orthomerge._group import (
    TINY,
    Aggregate,
    procrustes,
    scaled_mean,
    to_algebra,
    to_group,
)
from subspace_jax.methods.structured.oft import Rotated

Direction = Literal["theta", "uniform"]
Side = Literal["in", "out", "auto"]

# Coordinates found by decompositions are no nearer to zero than this, in float32.
_DUST = 1e-5
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
    turns = {s.path: _Turns(s, limit, aggregate, direction, side) for s in found if not _all_oft(s)}
    merged = _merge_residuals(turns, len(experts), merger)
    written: dict[str, Any] = {}
    for site in found:
        if site.path in turns:
            written[site.path] = write(site, turns[site.path].merged(jnp.asarray(scale) * merged.pop(site.path)))
        else:
            written[site.path] = merge_oft(site, aggregate, direction)
    leaves = [written.get(path, leaf) for path, leaf in leaves_with_paths(base)]
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), leaves)


def _merge_residuals(turns: Mapping[str, _Turns], count: int, merger: Merger) -> dict[str, Any]:
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
    terms = [_directed(v, n, direction) for v, n in zip(wide, lengths, strict=True)]
    return scaled_mean(sum(terms[1:], terms[0]), lengths, aggregate, (-2, -1)).astype(entries[0].dtype)


def _directed(coordinate: jax.Array, length: jax.Array, direction: Direction, dust: float = TINY) -> jax.Array:
    if direction == "theta":
        return coordinate
    # What rounding leaves of no rotation is not blown up to a direction.
    real = length > dust
    return coordinate * jnp.where(real, 1.0 / jnp.where(real, length, 1.0), 0.0)[..., None, None]


class _Turns:
    """The rotations of one leaf: one expert's at a time, and what is kept of each for the merged one."""

    def __init__(
        self, site: Site, threshold: float | None, aggregate: Aggregate, direction: Direction, side: Side
    ) -> None:
        self.site = site
        self._threshold, self._aggregate, self._direction = threshold, aggregate, direction
        self._flipped = False
        if site.role is not None:
            inputs, outputs = site.role.sizes(site.base.shape)
            wanted = "out" if site.role.kind == "embedding" else side
            self._flipped = wanted == "out" or (wanted == "auto" and outputs < inputs)
        self._total: Any = 0.0
        self._lengths: dict[int, jax.Array] = {}
        self._mean: jax.Array | None = None

    def residual(self, expert: int) -> Change:
        """Returns what the expert's rotation does not explain of it."""
        change = self.site.change(expert)
        if self.site.role is None:
            return change
        delta = self._matrix(formed(change, self.site.base))
        start = self._start()
        coordinate, rest = _decouple(start, delta, self._mean_change(), self._threshold or 0.0)
        if expert not in self._lengths:  # a merger may ask several times
            self._lengths[expert] = jnp.sqrt(jnp.sum(coordinate * coordinate, axis=(-2, -1)))
            self._total = self._total + _directed(coordinate, self._lengths[expert], self._direction, _DUST)
        return Dense(array=self._back(rest))

    def merged(self, residual: jax.Array) -> Change:
        """Returns the change of the merged rotation and the merged residual."""
        count = len(self.site.leaves)
        if self.site.role is None:
            return Dense(array=residual)
        for i in range(count):
            if i not in self._lengths:
                self.residual(i)
        lengths = jnp.stack([self._lengths[i] for i in range(count)])
        turned = _turn(self._start(), self._total, lengths, self._aggregate)
        return Dense(array=self._back(turned) + residual)

    def _mean_change(self) -> jax.Array | None:
        if self._threshold is None:
            return None
        if self._mean is None:
            count = len(self.site.leaves)
            total: Any = 0.0
            for i in range(count):
                total = total + self._matrix(self.site.array(i)) / count
            self._mean = total
        return self._mean

    def _start(self) -> jax.Array:
        base = self.site.base
        wide = wide_dtype(base.dtype)
        return self._matrix(base.materialize(wide) if isinstance(base, Weight) else jnp.asarray(base).astype(wide))

    def _matrix(self, array: jax.Array) -> jax.Array:
        matrix = self.site.matrix_of(array)
        return jnp.swapaxes(matrix, -1, -2) if self._flipped else matrix

    def _back(self, matrix: jax.Array) -> jax.Array:
        role: Any = self.site.role
        return role.unmatrix(jnp.swapaxes(matrix, -1, -2) if self._flipped else matrix, self.site.base.shape)


@jax.jit
def _decouple(
    start: jax.Array, delta: jax.Array, mean: jax.Array | None, threshold: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the coordinate of the rotation that explains the change best, and what it leaves."""
    explained = delta
    if mean is not None:
        norms = jnp.linalg.norm(delta, axis=-2) * jnp.linalg.norm(mean, axis=-2)
        cosine = jnp.clip(jnp.sum(delta * mean, axis=-2) / jnp.maximum(norms, 1e-6), -1.0, 1.0)
        explained = delta * (cosine < threshold)[..., None, :]
    coordinate = to_algebra(procrustes(start + explained, start))
    # The rotation is read again, so that it is the one that is merged.
    return coordinate, delta - (wide_matmul(to_group(coordinate), start) - start)


@functools.partial(jax.jit, static_argnums=3)
def _turn(start: jax.Array, total: jax.Array, lengths: jax.Array, aggregate: Aggregate) -> jax.Array:
    coordinate = scaled_mean(total, lengths, aggregate, (-2, -1))
    return wide_matmul(to_group((coordinate - jnp.swapaxes(coordinate, -1, -2)) / 2), start) - start
