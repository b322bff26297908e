"""SLERP: goes from one model to another along an arc, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, StructureError, Weight, check_choice, check_number
from subspace_jax.merging._change import Change, Dense, Factored, wide_array
from subspace_jax.merging._linear import concatenated
from subspace_jax.merging._site import Site
from subspace_jax.merging._walk import Selector, merge_leaves

# Cosines beyond this are of nearly parallel tensors, whose arc is a line.
PARALLEL = 0.9995


def slerp(
    experts: Sequence[Params],
    base: Params | None = None,
    *,
    t: float | jax.Array = 0.5,
    of: Literal["weights", "changes"] = "weights",
    select: Selector | None = None,
) -> Params:
    r"""Interpolates two trees spherically: \(\frac{\sin (1 - t)\phi}{\sin\phi} a + \frac{\sin t\phi}{\sin\phi} b\).

    \(\phi\) is the angle between the flattened leaves. Leaves that are nearly parallel or opposite, or nearly zero,
    are interpolated linearly.

    Args:
      experts: two trees of arrays or of stand-in weights.
      base: the tree that they were trained from; needed for adapters, for `of="changes"` and for `select`.
      t: 0 gives the first, 1 the second.
      of: whether the angle is between weights or between what is changed of the base. With "changes" two LoRAs give a
        LoRA without forming anything, with "weights" leaves are formed.
      select: which leaves are merged; the others are the base's.

    Returns:
      A tree of the base's structure, shapes and dtypes.

    Raises:
      StructureError: there are not two trees, they differ, or the base is needed; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      PatternError: a glob of `select` matches nothing.
      ValueError: an option is none of those above.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> found = sj.merging.slerp([{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}], t=0.5)
      >>> [round(v, 4) for v in found["w"].tolist()]
      [0.7071, 0.7071]

    Source:
      Shoemake: Animating rotation with quaternion curves, 1985.
    """
    check_number("slerp: t", t)
    check_choice("slerp: of", of, ("weights", "changes"))
    if len(experts) != 2:
        raise StructureError(f"slerp: {len(experts)} experts given, exactly 2 expected.")
    if base is None:
        if of == "changes" or select is not None:
            raise StructureError("slerp: changes and select= are relative to a base; pass it.")
        base = jax.tree.map(jnp.zeros_like, experts[0])
        if any(isinstance(leaf, Weight) for tree in experts for leaf in _leaves(tree)):
            raise StructureError("slerp: an expert has adapters; pass as base the tree that adapt() was given.")

    def rule(site: Site) -> Change:
        if of == "changes":
            return _of_changes(site, t)
        first, second = site.arrays()
        return Dense(array=_arc(first, second, wide_array(site.base), t))

    return merge_leaves(experts, base, rule, select=select)


def _leaves(tree: Params) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda v: isinstance(v, Weight))


@jax.jit
def _arc(first: jax.Array, second: jax.Array, base: jax.Array, t: Any) -> jax.Array:
    a, b = base + first, base + second
    left, right = shares(jnp.vdot(a, a), jnp.vdot(b, b), jnp.vdot(a, b), t)
    # Written as a change, which is exact where the shares add to one and both ends are near the base.
    return left * first + right * second + (left + right - 1) * base


@jax.jit
def shares(aa: jax.Array, bb: jax.Array, ab: jax.Array, t: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of both tensors, from their squared norms and their inner product."""
    norms = jnp.sqrt(aa) * jnp.sqrt(bb)
    cosine = jnp.clip(ab / jnp.where(norms == 0, 1, norms), -1.0, 1.0)
    straight = (jnp.abs(cosine) > PARALLEL) | (jnp.minimum(aa, bb) < 1e-16)
    angle = jnp.arccos(jnp.where(straight, 0.0, cosine))
    sine = jnp.sin(angle)
    t = jnp.asarray(t, aa.dtype)
    return (
        jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / sine),
        jnp.where(straight, t, jnp.sin(t * angle) / sine),
    )


def _of_changes(site: Site, t: Any) -> Change:
    first, second = site.changes()
    if isinstance(first, Factored) and isinstance(second, Factored) and first.gain is None and second.gain is None:
        products = (_inner(*pair) for pair in ((first, first), (second, second), (first, second)))
        left, right = shares(*products, t)
        return concatenated([(left, first), (right, second)])
    a, b = site.arrays()
    left, right = shares(jnp.vdot(a, a), jnp.vdot(b, b), jnp.vdot(a, b), t)
    return Dense(array=left * a + right * b)


@jax.jit
def _inner(one: Factored, other: Factored) -> jax.Array:
    """The inner product of two changes, from Grams of their factors."""
    precision = jax.lax.Precision.HIGHEST
    left = jnp.einsum("...ir,...iq->...rq", one.a, other.a, precision=precision)
    right = jnp.einsum("...ro,...qo->...rq", one.b, other.b, precision=precision)
    return jnp.sum(left * right)
