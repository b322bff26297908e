"""Mergers by singular vectors: TSV-M, Iso-C and KnOTS. Factors of LoRA stay factors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Role, check_number
from subspace_jax.linalg import wide_matmul
from subspace_jax.merging._change import Change, Dense, Factored
from subspace_jax.merging._linear import linear, mean
from subspace_jax.merging._site import Site
from subspace_jax.merging._thin import Thin, polar, thin_svd
from subspace_jax.merging._walk import Selector, merge_leaves


def tsv_m(
    experts: Sequence[Params],
    base: Params,
    *,
    scale: float | jax.Array = 1.0,
    tolerance: float = 1e-6,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Merges the leading singular triples of every task matrix, made orthogonal between tasks.

    Of each \(\tau_i = U_i S_i V_i^T\) the \(\lfloor \min(d_{in}, d_{out}) / n \rfloor\) largest triples are kept;
    \([U_1 \dots U_n]\) and \([V_1 \dots V_n]\) are replaced by their orthogonal polar factors:
    \(\theta_0 + \alpha\,U_\perp\,\mathrm{diag}(S)\,V_\perp^T\).

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      scale: \(\alpha\).
      tolerance: singular values at most this share of the largest count as zero. Their vectors are arbitrary, and
        would tilt the others.
      select: which leaves are merged; the others are the base's.
      roles: how plain arrays of other than two axes are read as matrices. Leaves that are none get the mean change.

    Returns:
      A tree of the base's structure, shapes and dtypes. LoRAs give a LoRA whose rank is the number of triples.

    Warning:
      Experts that share singular directions are not told apart: two identical ones merge to something else than
      either, since no orthogonal pair is near two equal vectors.

    Raises:
      StructureError: the trees differ; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      PatternError: a glob of `select` or a path of `roles` matches nothing.
      ValueError: `scale` is not a finite number, or `tolerance` is not in [0, 1).

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.diag(jnp.array([3.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 2.0]))}]
      >>> sj.merging.tsv_m(experts, {"w": jnp.zeros((2, 2))})["w"].round(4).tolist()
      [[3.0, 0.0], [0.0, 2.0]]

    Source:
      Gargiulo et al.: Task Singular Vectors: Reducing Task Interference in Model Merging, 2025.
    """
    check_number("tsv_m: scale", scale)
    check_number("tsv_m: tolerance", tolerance, least=0.0, below=1.0)
    count = len(experts)

    def rule(site: Site) -> Change:
        if site.role is None:
            return mean(site)
        rank = max(1, min(site.role.sizes(site.base.shape)) // count)
        found = [thin_svd(change, site, rank) for change in site.changes() if change is not None]
        if not found:
            return None
        parts = _joined(found, tolerance)
        u, v = polar(parts.u), polar(parts.v)
        return _change(site, u * (scale * parts.s)[..., None, :], jnp.swapaxes(v, -1, -2))

    return merge_leaves(experts, base, rule, select=select, roles=roles)


def iso_c(
    experts: Sequence[Params],
    base: Params,
    *,
    scale: float | jax.Array = 1.0,
    tolerance: float = 1e-6,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Merges the sum of task matrices with a flat spectrum: \(\theta_0 + \alpha\,\bar\sigma\,U V^T\).

    \(U S V^T = \sum_i \tau_i\), and \(\bar\sigma\) is the mean of its singular values that are not zero.

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      scale: \(\alpha\).
      tolerance: singular values at most this share of the largest are zero and stay so.
      select: which leaves are merged; the others are the base's.
      roles: how plain arrays of other than two axes are read as matrices. Leaves that are none get the mean change.

    Returns:
      A tree of the base's structure, shapes and dtypes. LoRAs give a LoRA of the sum of their ranks,
        or of the smaller side where that is less.

    Raises:
      StructureError: the trees differ; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      PatternError: a glob of `select` or a path of `roles` matches nothing.
      ValueError: `scale` is not a finite number, or `tolerance` is not in [0, 1).

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.diag(jnp.array([3.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 1.0]))}]
      >>> sj.merging.iso_c(experts, {"w": jnp.zeros((2, 2))})["w"].round(4).tolist()
      [[2.0, 0.0], [0.0, 2.0]]

    Source:
      Marczak et al.: No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, 2025.
    """
    check_number("iso_c: scale", scale)
    check_number("iso_c: tolerance", tolerance, least=0.0, below=1.0)

    def rule(site: Site) -> Change:
        if site.role is None:
            return mean(site)
        total = linear(site, [1.0] * len(experts))
        if total is None:
            return None
        found = thin_svd(total, site)
        real = _is_real(found.s, tolerance)
        value = jnp.sum(found.s * real, axis=-1) / jnp.maximum(jnp.sum(real, axis=-1), 1)
        left = found.u * (scale * value[..., None] * real)[..., None, :]
        return _change(site, left, jnp.swapaxes(found.v, -1, -2))

    return merge_leaves(experts, base, rule, select=select, roles=roles)


@functools.partial(jax.jit, static_argnums=1)
def _joined(found: list[Thin], tolerance: float) -> Thin:
    """The triples of all tasks side by side, those of zero singular values set to zero."""

    def clean(one: Thin) -> Thin:
        real = _is_real(one.s, tolerance)
        return Thin(one.u * real[..., None, :], one.s * real, one.v * real[..., None, :])

    return Thin(*(jnp.concatenate(parts, axis=-1) for parts in zip(*map(clean, found), strict=True)))


def _is_real(s: jax.Array, tolerance: float) -> jax.Array:
    return (s > tolerance * jnp.max(s, axis=-1, keepdims=True)).astype(s.dtype)


def _change(site: Site, left: jax.Array, right: jax.Array) -> Change:
    """A product in factors where all experts are in factors, else formed."""
    role: Any = site.role
    if in_factors(site):
        return Factored(a=left, b=right, role=role)
    return Dense(array=role.unmatrix(wide_matmul(left, right), site.base.shape))


def in_factors(site: Site) -> bool:
    """Whether every expert has an adapter here whose change is in factors; full weights want a full result."""
    changes = (site.change(i) for i in range(len(site.leaves)))
    return bool(site.weights()) and all(c is None or (isinstance(c, Factored) and c.gain is None) for c in changes)
