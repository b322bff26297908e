"""KnOTS: merges task matrices in a basis that all of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Role, check_number, is_weight, leaves_with_paths
from subspace_jax.linalg import whole_matrices, wide_dtype, wide_matmul
from subspace_jax.merging._change import Change, Deferred, Dense, Factored
from subspace_jax.merging._dare import Merger
from subspace_jax.merging._site import Site
from subspace_jax.merging._spectral import in_factors
from subspace_jax.merging._ties import ties
from subspace_jax.merging._walk import Selector, sites, write


def knots(
    experts: Sequence[Params],
    base: Params,
    *,
    merger: Merger = ties,
    scale: float | jax.Array = 1.0,
    tolerance: float = 1e-6,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Merges task matrices by another merger in their common right singular basis.

    The stack \([\tau_1; \dots; \tau_n] = P S Q^T\) gives aligned parts \(T_i = \tau_i Q\). These are merged, all leaves
    together, to \(T\), and the result is \(\theta_0 + \lambda\,T Q^T\). A linear merger gives what it gives without
    alignment.

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      merger: takes the parts and a tree of zeros, such as `functools.partial(sj.merging.ties, density=0.2)`.
      scale: \(\lambda\).
      tolerance: directions whose singular value is at most this share of the largest are dropped; they are columns of
        zeros in the parts, which count among the entries that `ties` takes its share of.
      select: which leaves are merged; the others are the base's.
      roles: how plain arrays of other than two axes are read as matrices. Leaves that are none are merged unaligned.

    Returns:
      A tree of the base's structure, shapes and dtypes. LoRAs give a LoRA of the sum of their ranks,
        or of the smaller side where that is less.

    Raises:
      StructureError: the trees differ; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      PatternError: a glob of `select` or a path of `roles` matches nothing.
      ValueError: `scale` is not a finite number, or `tolerance` is not in [0, 1).

    Example:
      >>> import functools, jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.eye(2)}, {"w": jnp.eye(2)}]
      >>> mean = functools.partial(sj.merging.task_arithmetic, weights=0.5)
      >>> sj.merging.knots(experts, {"w": jnp.zeros((2, 2))}, merger=mean)["w"].round(4).tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    Source:
      Stoica et al.: Model merging with SVD to tie the Knots, 2025.
    """
    check_number("knots: scale", scale)
    check_number("knots: tolerance", tolerance, least=0.0, below=1.0)
    found = sites(experts, base, select=select, roles=roles)
    bases = {site.path: shared_basis(site, tolerance) for site in found if site.role is not None}
    zeros = {site.path: _zeros(site, bases.get(site.path)) for site in found}
    parts = [
        {site.path: Deferred(zeros[site.path].shape, zeros[site.path].dtype, _part(site, i, bases)) for site in found}
        for i in range(len(experts))
    ]
    merged = merger(parts, zeros)
    written = {}
    for site in found:
        basis = bases.get(site.path)
        written[site.path] = write(site, _back(site, jnp.asarray(scale) * merged.pop(site.path), basis))
    leaves = [written.get(path, leaf) for path, leaf in leaves_with_paths(base)]
    return jax.tree.unflatten(jax.tree.structure(base, is_leaf=is_weight), leaves)


def _zeros(site: Site, basis: jax.Array | None) -> jax.Array:
    wide = wide_dtype(site.base.dtype)
    if basis is None or site.role is None:
        return jnp.zeros(site.base.shape, wide)
    stack, inputs = site.role.stack_shape(site.base.shape), site.role.sizes(site.base.shape)[0]
    return jnp.zeros((*stack, inputs, basis.shape[-1]), wide)


def _part(site: Site, expert: int, bases: Mapping[str, jax.Array]) -> Any:
    def make() -> Change:
        change = site.change(expert)
        if change is None or site.path not in bases:
            return change
        basis = bases[site.path]
        if isinstance(change, Factored) and change.gain is None:
            return Dense(array=wide_matmul(change.a, wide_matmul(change.b, basis)))
        return Dense(array=wide_matmul(site.matrix_of(site.array(expert)), basis))

    return make


def _back(site: Site, merged: jax.Array, basis: jax.Array | None) -> Change:
    if basis is None or site.role is None:
        return Dense(array=merged)
    right = jnp.swapaxes(basis, -1, -2)
    if in_factors(site):
        return Factored(a=merged, b=right, role=site.role)
    return Dense(array=site.role.unmatrix(wide_matmul(merged, right), site.base.shape))


def shared_basis(site: Site, tolerance: float) -> jax.Array:
    """Returns the right singular vectors of all changes one below the other, `[*stack, out, k]`, zero where dropped.

    Only a triangle of the size of the outputs, or of the sum of ranks, goes from one expert to the next.

    Args:
      site: the leaf, which has a role.
      tolerance: singular values at most this share of the largest are dropped.
    """
    rows: jax.Array | None = None
    for i in range(len(site.leaves)):
        change = site.change(i)
        if change is None:
            continue
        if isinstance(change, Factored) and change.gain is None:
            new = wide_matmul(jnp.linalg.qr(whole_matrices(change.a), mode="r"), whole_matrices(change.b))
        else:
            new = site.matrix_of(site.array(i))
        rows = _triangle(new if rows is None else jnp.concatenate([rows, new], axis=-2))
    if rows is None:
        matrix = site.matrix_of(jnp.zeros(site.base.shape, wide_dtype(site.base.dtype)))
        return jnp.zeros((*matrix.shape[:-2], matrix.shape[-1], 1), matrix.dtype)
    return _right_vectors(rows, tolerance)


@jax.jit
def _triangle(rows: jax.Array) -> jax.Array:
    return jnp.linalg.qr(whole_matrices(rows), mode="r") if rows.shape[-2] > rows.shape[-1] else rows


@jax.jit
def _right_vectors(rows: jax.Array, tolerance: Any) -> jax.Array:
    _, s, vt = jnp.linalg.svd(whole_matrices(rows), full_matrices=False)
    real = s > tolerance * jnp.max(s, axis=-1, keepdims=True)
    return jnp.swapaxes(vt * real[..., None], -1, -2)
