"""TIES: trim, elect a sign, merge those that agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, check_choice, check_number
from subspace_jax.merging._change import Change, Dense
from subspace_jax.merging._largest import kth_magnitude
from subspace_jax.merging._linear import check_weights
from subspace_jax.merging._site import Site
from subspace_jax.merging._walk import Selector, merge_leaves, sites


def ties(
    experts: Sequence[Params],
    base: Params,
    *,
    density: float = 0.2,
    scale: float | jax.Array = 1.0,
    weights: float | Sequence[float] = 1.0,
    combine: Literal["mean", "sum", "max"] = "mean",
    scope: Literal["tree", "leaf"] = "tree",
    keep: Literal["official", "exact"] = "official",
    elect: Literal["sum", "count"] = "sum",
    zeros: Literal["majority", "positive"] = "majority",
    select: Selector | None = None,
) -> Params:
    r"""Merges task vectors without those entries that are small or of the minority's sign.

    Of every task vector the largest entries are kept. In each place the experts elect a sign, that of the sum of what
    is kept, and the entries of this sign are averaged: \(\theta_0 + \lambda\,\mathrm{mean}\{\tau_i : \mathrm{sign}
    \tau_i = s\}\).

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from.
      density: share of entries kept.
      scale: \(\lambda\); 1 suits "mean", about 0.3 "sum".
      weights: factors of the kept entries, one for all or one each; the election does not see them.
      combine: how entries of the elected sign are combined; "max" takes the largest.
      scope: whether the share is of the whole tree, as published, or of every leaf, as in PEFT and mergekit.
      keep: "official" keeps what is at least the \((d - \lfloor K d \rfloor)\)-th smallest magnitude, mostly one entry
        more than \(\lfloor K d \rfloor\), which "exact" keeps, the first of equal ones.
      elect: whether values or signs are summed.
      zeros: sign of a tie: that of the majority of all places, or positive, as in PEFT.
      select: which leaves are merged, as globs or a predicate; the others are the base's.

    Returns:
      A tree of the base's structure, shapes and dtypes. Where experts have adapters the leaf is `Full`; see
      `to_low_rank`.

    Raises:
      StructureError: the trees differ, or an adapter stands on another base; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      ValueError: an option is none of those above.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.array([2.0, 0.1, 3.0, 0.0])}, {"w": jnp.array([-1.0, 0.2, 1.0, 0.0])}]
      >>> sj.merging.ties(experts, {"w": jnp.zeros(4)}, density=0.5, keep="exact")["w"].tolist()
      [2.0, 0.0, 2.0, 0.0]

    Source:
      Yadav et al.: TIES-Merging: Resolving Interference When Merging Models, 2023.
    """
    check_number("ties: density", density, above=0.0, most=1.0)
    check_number("ties: scale", scale)
    check_choice("ties: combine", combine, ("mean", "sum", "max"))
    check_choice("ties: scope", scope, ("tree", "leaf"))
    check_choice("ties: keep", keep, ("official", "exact"))
    check_choice("ties: elect", elect, ("sum", "count"))
    check_choice("ties: zeros", zeros, ("majority", "positive"))
    factors = jnp.asarray(check_weights("ties: weights", weights, len(experts)))
    found = sites(experts, base, select=select)
    whole = scope == "tree"
    cuts = _cuts(found, density, keep) if whole else None
    majority: Any = 1.0
    if whole and zeros == "majority":
        totals = [_signs(_kept(site, cuts, density, keep), elect)[1] for site in _restarted(cuts, found)]
        majority = jnp.sign(sum(totals[1:], totals[0]))
    if cuts is not None:
        cuts.restart()

    def rule(site: Site) -> Change:
        kept = _kept(site, cuts, density, keep)
        sign, total = _signs(kept, elect)
        tie = 1.0 if zeros == "positive" else majority if whole else jnp.sign(total)
        return Dense(array=_merged(kept, sign, tie, factors, scale, combine))

    return merge_leaves(experts, base, rule, select=select)


class _Cuts:
    """The smallest magnitude kept of every expert, and how many entries of exactly this one are still to keep."""

    def __init__(self, thresholds: list[Any], equal: list[Any] | None) -> None:
        self.thresholds = thresholds
        self._at_start = equal
        self.equal = equal

    def restart(self) -> None:
        self.equal = self._at_start


def _restarted(cuts: _Cuts | None, found: list[Site]) -> list[Site]:
    if cuts is not None:
        cuts.restart()
    return found


def _cuts(found: list[Site], density: float, keep: str) -> _Cuts | None:
    """Finds the thresholds of all experts over the given leaves; None if everything is kept."""
    size = sum(int(_size(site)) for site in found)
    count = int(density * size)
    place = size - count + (1 if keep == "exact" else 0)
    if place < 1 or density == 1.0:
        return None
    thresholds, equal = [], []
    for i in range(len(found[0].leaves)):
        one = [s.only(i) for s in found]
        if place > size:  # nothing is kept
            thresholds.append(jnp.inf)
            equal.append(0)
            continue
        cut = kth_magnitude(lambda one=one: (s.array(0) for s in one), place)
        thresholds.append(cut)
        if keep == "exact":
            larger = [jnp.sum(jnp.abs(s.array(0)) > cut) for s in one]
            equal.append(count - sum(larger[1:], larger[0]))
    return _Cuts(thresholds, equal if keep == "exact" else None)


def _size(site: Site) -> int:
    size = 1
    for n in site.base.shape:
        size *= n
    return size


def _kept(site: Site, cuts: _Cuts | None, density: float, keep: str) -> jax.Array:
    """Returns the trimmed changes `[experts, *shape]`."""
    arrays = site.arrays()
    if cuts is None and density < 1.0:
        cuts = _cuts([Site(site.path, site.base, tuple(Dense(array=v) for v in arrays), site.role)], density, keep)
    if cuts is None:
        return jnp.stack(arrays)
    if cuts.equal is None:
        return jnp.stack([_trim(v, cut) for v, cut in zip(arrays, cuts.thresholds, strict=True)])
    parts = [_trim_exact(*one) for one in zip(arrays, cuts.thresholds, cuts.equal, strict=True)]
    cuts.equal = [left for _, left in parts]
    return jnp.stack([kept for kept, _ in parts])


@jax.jit
def _trim(array: jax.Array, cut: Any) -> jax.Array:
    return jnp.where(jnp.abs(array) >= cut, array, 0.0)


@jax.jit
def _trim_exact(array: jax.Array, cut: Any, equal: Any) -> tuple[jax.Array, jax.Array]:
    flat = array.ravel()
    at_cut = jnp.abs(flat) == cut
    first = at_cut & (jnp.cumsum(at_cut) <= equal)
    kept = jnp.where((jnp.abs(flat) > cut) | first, flat, 0.0)
    return kept.reshape(array.shape), equal - jnp.sum(first)


def _signs(kept: jax.Array, elect: str) -> tuple[jax.Array, jax.Array]:
    """Returns the elected signs, zero for a tie, and their sum."""
    return _elected(kept, elect == "sum")


@jax.jit
def _elected(kept: jax.Array, by_sum: Any) -> tuple[jax.Array, jax.Array]:
    sign = jnp.sign(jnp.sum(jnp.where(by_sum, kept, jnp.sign(kept)), axis=0))
    return sign, jnp.sum(sign)


def _merged(kept: jax.Array, sign: jax.Array, tie: Any, factors: jax.Array, scale: Any, combine: str) -> jax.Array:
    mode = ("mean", "sum", "max").index(combine)
    return _disjoint(kept, sign, tie, factors, scale, mode)


@jax.jit
def _disjoint(kept: jax.Array, sign: jax.Array, tie: Any, factors: jax.Array, scale: Any, mode: Any) -> jax.Array:
    sign = jnp.where(sign == 0, tie, sign)
    agree = kept * sign > 0
    factors = factors.astype(kept.dtype).reshape(-1, *(1,) * (kept.ndim - 1))
    values = jnp.where(agree, kept * factors, 0.0)
    total = jnp.sum(values, axis=0)
    mean = total / jnp.maximum(jnp.sum(agree, axis=0), 1)
    largest = jnp.max(jnp.abs(values), axis=0) * sign
    return jnp.asarray(scale, kept.dtype) * jnp.where(mode == 0, mean, jnp.where(mode == 1, total, largest))
