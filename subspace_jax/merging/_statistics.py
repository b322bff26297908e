"""Mergers that weigh experts by statistics of their own data: Fisher and RegMean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from subspace_jax.core import Params, Role, Statistics, StatisticsError, StructureError, check_number
from subspace_jax.linalg import whole_matrices, wide_dtype, wide_matmul
from subspace_jax.merging._change import Change, Dense, Factored, formed
from subspace_jax.merging._linear import mean
from subspace_jax.merging._site import Site
from subspace_jax.merging._walk import Selector, merge_leaves


def fisher(
    experts: Sequence[Params],
    base: Params,
    statistics: Sequence[Mapping[str, Any]],
    *,
    minimum: float = 1e-6,
    select: Selector | None = None,
) -> Params:
    r"""Averages every entry by how much each expert's likelihood depends on it: \(\sum F_i \theta_i / \sum F_i\).

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      statistics: for every expert, by path, the diagonal Fisher information \(F_i\) of the leaf's shape: mean squared
        gradients of the log-likelihood of single examples. `Statistics` of
        `sj.capture(..., statistics=("squared_gradient",))` over batches of one example serve as well.
      minimum: added to every \(F_i\), so that entries without information are averaged, not set to zero.
      select: which leaves are merged; the others are the base's. Leaves without statistics are averaged.

    Returns:
      A tree of the base's structure, shapes and dtypes.

    Raises:
      StatisticsError: one expert has statistics of a leaf and another has none, or they have another shape, or are
        negative or not finite; the message has the path.
      StructureError: the trees differ, or there are not as many statistics as experts.
      NonFiniteError: an expert holds NaN or infinity; the message has the path.
      PatternError: a glob of `select` matches nothing.
      ValueError: `minimum` is not above 0.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts, base = [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}], {"w": jnp.zeros(2)}
      >>> information = [{"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}]
      >>> sj.merging.fisher(experts, base, information)["w"].round(4).tolist()
      [0.75, 0.5]

    Source:
      Matena, Raffel: Merging Models with Fisher-Weighted Averaging, 2022.
    """
    check_number("fisher: minimum", minimum, above=0.0)
    _check_count(experts, statistics, "fisher")

    def rule(site: Site) -> Change:
        found = _of_leaf(site, statistics, "squared_gradient", tuple(site.base.shape))
        if found is None:
            return mean(site)
        wide = wide_dtype(site.base.dtype)
        total, weight = jnp.zeros(site.base.shape, wide), jnp.zeros(site.base.shape, wide)
        for i, information in enumerate(found):
            total, weight = _weigh(total, weight, formed(site.change(i), site.base), information, minimum)
        return Dense(array=total / weight)

    return merge_leaves(experts, base, rule, select=select)


def regmean(
    experts: Sequence[Params],
    base: Params,
    statistics: Sequence[Mapping[str, Any]],
    *,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
    select: Selector | None = None,
    roles: Mapping[str, Role] | None = None,
) -> Params:
    r"""Merges kernels so that their outputs are nearest those of the experts on the experts' own inputs.

    \(W = (\sum_i G_i + \epsilon I)^{-1} \sum_i (G_i + \frac{\epsilon}{n} I) W_i\) with \(G_i = X_i^T X_i\): the least
    squares solution, and the average where there was no input.

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      statistics: for every expert, by path, \(G_i\) `[*stack, in, in]`, or `Statistics` as `sj.capture` returns them.
      off_diagonal: factor of the entries of \(G_i\) off its diagonal; 1 is plain least squares.
      ridge: \(\epsilon\) as a share of the mean diagonal entry of \(\sum_i G_i\).
      select: which leaves are merged; the others are the base's. Leaves without statistics are averaged.
      roles: how plain arrays of other than two axes are read as matrices.

    Returns:
      A tree of the base's structure, shapes and dtypes. LoRAs give a LoRA of the sum of their ranks.

    Raises:
      StatisticsError: one expert has statistics of a leaf and another has none, or they have another shape, or are
        not finite; the message has the path.
      StructureError: the trees differ, or there are not as many statistics as experts.
      NonFiniteError: an expert holds NaN or infinity; the message has the path.
      PatternError: a glob of `select` or a path of `roles` matches nothing.
      ValueError: `off_diagonal` is not in [0, 1], or `ridge` is not above 0.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts, base = [{"w": jnp.ones((2, 1))}, {"w": jnp.zeros((2, 1))}], {"w": jnp.zeros((2, 1))}
      >>> grams = [{"w": 3 * jnp.eye(2)}, {"w": jnp.eye(2)}]
      >>> sj.merging.regmean(experts, base, grams)["w"].round(4).tolist()
      [[0.75], [0.75]]

    Source:
      Jin et al.: Dataless Knowledge Fusion by Merging Weights of Language Models, 2023.
    """
    check_number("regmean: off_diagonal", off_diagonal, least=0.0, most=1.0)
    check_number("regmean: ridge", ridge, above=0.0)
    _check_count(experts, statistics, "regmean")

    def rule(site: Site) -> Change:
        if site.role is None:
            return mean(site)
        size = site.role.sizes(site.base.shape)[0]
        grams = _of_leaf(site, statistics, "gram", (*site.role.stack_shape(site.base.shape), size, size))
        if grams is None:
            return mean(site)
        grams = [_shrunk(gram, off_diagonal) for gram in grams]
        return _least_squares(site, grams, ridge)

    return merge_leaves(experts, base, rule, select=select, roles=roles)


def _least_squares(site: Site, grams: list[jax.Array], ridge: float) -> Change:
    total = sum(grams[1:], grams[0])
    changes = site.changes()
    role: Any = site.role
    if all(c is None or (isinstance(c, Factored) and c.gain is None) for c in changes) and site.weights():
        # The solution acts on the side of the inputs, so that the factors b stay as they are.
        pairs = [(g, c) for g, c in zip(grams, changes, strict=True) if isinstance(c, Factored)]
        if not pairs:
            return None
        right = jnp.concatenate([_weighted(g, c.a, total, ridge, len(grams)) for g, c in pairs], axis=-1)
        return Factored(a=_solved(total, right, ridge), b=jnp.concatenate([c.b for _, c in pairs], axis=-2), role=role)
    right: Any = 0.0
    for gram, change in zip(grams, changes, strict=True):
        one = _weighted(gram, role.matrix(formed(change, site.base)), total, ridge, len(grams))
        right = right + one
    return Dense(array=role.unmatrix(_solved(total, right, ridge), site.base.shape))


def _epsilon(total: jax.Array, ridge: Any) -> jax.Array:
    scale = jnp.trace(total, axis1=-2, axis2=-1) / total.shape[-1]
    return (ridge * jnp.where(scale > 0, scale, 1.0))[..., None, None]


@jax.jit
def _shrunk(gram: jax.Array, off_diagonal: Any) -> jax.Array:
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return gram * (off_diagonal + (1 - off_diagonal) * eye)


@jax.jit
def _weighted(gram: jax.Array, matrix: jax.Array, total: jax.Array, ridge: Any, count: Any) -> jax.Array:
    return wide_matmul(gram, matrix) + _epsilon(total, ridge) / count * matrix


@jax.jit
def _solved(total: jax.Array, right: jax.Array, ridge: Any) -> jax.Array:
    regular = whole_matrices(total + _epsilon(total, ridge) * jnp.eye(total.shape[-1], dtype=total.dtype))
    return jnp.linalg.solve(regular, whole_matrices(right))


@jax.jit
def _weigh(
    total: jax.Array, weight: jax.Array, change: jax.Array, information: jax.Array, minimum: Any
) -> tuple[jax.Array, jax.Array]:
    information = information.astype(total.dtype) + minimum
    return total + information * change, weight + information


def _check_count(experts: Sequence[Any], statistics: Sequence[Any], what: str) -> None:
    if isinstance(statistics, Mapping) or len(statistics) != len(experts):
        raise StructureError(
            f"{what}: statistics: expected a list of one mapping for each of {len(experts)} experts, came "
            f"{type(statistics).__name__} of {len(statistics)}."
        )


def _of_leaf(
    site: Site, statistics: Sequence[Mapping[str, Any]], field: str, shape: tuple[int, ...]
) -> list[jax.Array] | None:
    """Every expert's statistic of a leaf, or None if no expert has one."""
    given = [one.get(site.path) for one in statistics]
    found = [getattr(one, field) if isinstance(one, Statistics) else one for one in given]
    if all(one is None for one in found):
        return None
    for i, one in enumerate(found):
        if one is None or tuple(one.shape) != shape:
            came = "nothing" if one is None else f"an array of shape {tuple(one.shape)}"
            raise StatisticsError(
                f"{site.path}: expert {i} has {came} as its {field} here, expected shape {shape}. Capture the same "
                "statistics of every expert, on its own data."
            )
        finite, least = jnp.isfinite(one).all(), jnp.min(one, initial=0.0)
        if isinstance(finite, Tracer):  # so is what is made of an array inside a trace
            continue
        if not bool(finite):
            raise StatisticsError(f"{site.path}: the {field} of expert {i} holds NaN or infinity; capture it anew.")
        if field == "squared_gradient" and float(least) < 0:
            raise StatisticsError(
                f"{site.path}: the {field} of expert {i} has negative entries, down to {float(least):.3g}; "
                "expected means of squares. Capture it anew."
            )
    return [jnp.asarray(one) for one in found]
