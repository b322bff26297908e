"""`do_merging`: magnitudes and directions of updates are averaged apart."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Role, check_choice, check_number
from subspace_jax.linalg import whole_matrices, wide_matmul
from subspace_jax.merging import Change, Dense, Factored, Selector, Site, formed, mean, merge_leaves
from subspace_jax.methods.merging.do_merging._orthogonalize import check_options, in_factors, orthogonal_factors

Granularity = Literal["output", "input", "matrix"]
TINY = 1e-12


def do_merging(
    experts: Sequence[Params],
    base: Params,
    *,
    scale: float | jax.Array = 1.0,
    granularity: Granularity = "output",
    steps: int = 300,
    gamma: float = 0.1,
    learning_rate: float = 0.05,
    power: int = 2,
    renormalize: bool = False,
    tolerance: float = 1e-6,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Merges LoRA experts by the mean of their magnitudes times the mean of their directions.

    First the factors are made nearly orthogonal between experts, without data; see `orthogonalize`. Then every update
    \(D_i\) is split into lengths \(m_i\) and directions \(V_i = D_i / m_i\), and the merged one is
    \(s\,\bar m \odot \bar V\), so an expert with a large update does not drown the others.

    Args:
      experts: trees with low-rank adapters, two or more. Leaves with other updates, formed, are split and merged
        without the first stage; leaves that are no matrices get the mean change.
      base: the tree that they were trained from.
      scale: \(s\); tune it among 1, 1.4, 2, 2.8 and 4 where there is a validation set.
      granularity: of lengths: one for every output, one for every input, or one for the matrix. A secondary source
        reads the publication as "input"; there the random start of LoRA fills inputs that no task uses.
      steps: of the first stage; 0 skips it.
      gamma: pull of the first stage toward the factors as they are.
      learning_rate: of its Adam, as a share of the size of a factor's entries.
      power: of its norms, 1 or 2.
      renormalize: bring the mean direction back to length 1.
      tolerance: lengths at most this share of an expert's largest are no direction.
      select: which leaves are merged; the others are the base's.
      roles: how plain arrays of other than two axes are read as matrices.

    Returns:
      A tree of the base's structure, shapes and dtypes. LoRAs give a LoRA of the sum of their ranks: lengths only
      rescale their factors.

    Warns:
      UserWarning: two experts are nearly parallel somewhere.

    Raises:
      StructureError: the trees differ, or an adapter stands on another base; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      ValueError: an option is none of those above.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.diag(jnp.array([1.0, 0.0]))}, {"w": jnp.diag(jnp.array([0.0, 3.0]))}]
      >>> merged = sj.methods.do_merging.do_merging(experts, {"w": jnp.zeros((2, 2))}, granularity="matrix")
      >>> merged["w"].round(4).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    check_number("do_merging: scale", scale)
    check_choice("do_merging: granularity", granularity, ("output", "input", "matrix"))
    check_number("do_merging: tolerance", tolerance, least=0.0, below=1.0)
    check_choice("do_merging: renormalize", renormalize, (True, False))
    options = check_options("do_merging", steps, gamma, learning_rate, power)
    count = len(experts)

    def rule(site: Site) -> Change:
        if site.role is None:
            return mean(site)
        changes = site.changes()
        if all(c is None for c in changes):
            return None
        if in_factors(changes):
            factors = orthogonal_factors(site, changes, *options)
            found = [(c.a, c.b) for c in factors if c is not None]
            a, b = _in_factors(found, scale, count, granularity, renormalize, tolerance)
            return Factored(a=a, b=b, role=site.role)
        found = [site.matrix_of(formed(c, site.base)) for c in changes if c is not None]
        merged = _formed(found, scale, count, granularity, renormalize, tolerance)
        return Dense(array=site.role.unmatrix(merged, site.base.shape))

    return merge_leaves(experts, base, rule, select=select, roles=roles)


def _lengths(matrix: jax.Array, granularity: Granularity) -> jax.Array:
    """Lengths of a matrix, with axes of size one where they are shared."""
    axes = {"output": (-2,), "input": (-1,), "matrix": (-2, -1)}[granularity]
    return jnp.sqrt(jnp.sum(matrix * matrix, axis=axes, keepdims=True))


def _lengths_of_product(a: jax.Array, b: jax.Array, granularity: Granularity) -> jax.Array:
    """The same of a product, by triangles of the factors: nothing of its size is formed."""
    if granularity == "input":
        return jnp.swapaxes(_lengths_of_product(jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2), "output"), -1, -2)
    return _lengths(wide_matmul(jnp.linalg.qr(whole_matrices(a), mode="r"), whole_matrices(b)), granularity)


def _directed(lengths: jax.Array, tolerance: float) -> jax.Array:
    """The inverse of lengths; zero where dust has one."""
    real = lengths > jnp.maximum(tolerance * jnp.max(lengths, axis=(-2, -1), keepdims=True), TINY)
    return jnp.where(real, 1.0 / jnp.where(real, lengths, 1.0), 0.0)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _in_factors(
    factors: list[tuple[jax.Array, jax.Array]],
    scale: Any,
    count: int,
    granularity: Granularity,
    renormalize: bool,
    tolerance: float,
) -> tuple[jax.Array, jax.Array]:
    lengths = [_lengths_of_product(a, b, granularity) for a, b in factors]
    inverse = [_directed(m, tolerance) / count for m in lengths]
    on_inputs = granularity == "input"
    lefts = [a * v if on_inputs else a for (a, _), v in zip(factors, inverse, strict=True)]
    rights = [b if on_inputs else b * v for (_, b), v in zip(factors, inverse, strict=True)]
    a, b = jnp.concatenate(lefts, axis=-1), jnp.concatenate(rights, axis=-2)
    size = jnp.asarray(scale, a.dtype) * sum(lengths[1:], lengths[0]) / count
    if renormalize:
        size = size * _directed(_lengths_of_product(a, b, granularity), 0.0)
    return (a * size, b) if on_inputs else (a, b * size)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _formed(
    matrices: list[jax.Array], scale: Any, count: int, granularity: Granularity, renormalize: bool, tolerance: float
) -> jax.Array:
    lengths = [_lengths(m, granularity) for m in matrices]
    directions = [m * _directed(n, tolerance) / count for m, n in zip(matrices, lengths, strict=True)]
    direction = sum(directions[1:], directions[0])
    size = jnp.asarray(scale, direction.dtype) * sum(lengths[1:], lengths[0]) / count
    if renormalize:
        size = size * _directed(_lengths(direction, granularity), 0.0)
    return size * direction
