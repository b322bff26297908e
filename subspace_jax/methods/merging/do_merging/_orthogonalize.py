"""Moves the LoRA factors of several experts a little, until they are nearly orthogonal to each other."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from subspace_jax.core import Params, check_choice, check_int, check_number, is_weight, leaves_with_paths
from subspace_jax.merging import Change, Factored, Selector, Site, low_rank, sites

# Factors whose pair loss is this share of its scale are orthogonal up to rounding, which Adam would blow up.
FLOOR = 1e-10
# Factors more alike than this get equal gradients: they shrink together and do not part.
PARALLEL = 0.99


def orthogonalize(
    experts: Sequence[Params],
    base: Params,
    *,
    steps: int = 300,
    gamma: float = 0.1,
    learning_rate: float = 0.05,
    power: int = 2,
    select: Selector | None = None,
) -> list[Params]:
    r"""Returns LoRA experts whose factors are nearly orthogonal between experts, for any merger.

    Minimizes, leaf by leaf and without data, \(\sum_{i \ne j} \|(A_i + \delta_i)^T (A_j + \delta_j)\|_F^p + \gamma
    \sum_i \|\delta_i\|_F^2\) over the \(\delta_i\) by Adam, and the same of the factors \(B_i\) by their rows. Factors
    are brought to \(\|A_i\|_F = \sqrt r\) for it, so \(\gamma\) depends on neither scale nor rank.

    Args:
      experts: trees with low-rank adapters, two or more. Leaves without any in one of them stay as they are.
      base: the tree that they were trained from.
      steps: of Adam.
      gamma: \(\gamma\); larger keeps factors closer to what they were.
      learning_rate: of Adam, as a share of the root mean square of a factor's entries other than zero.
      power: \(p\), 1 or 2.
      select: which leaves are changed.

    Returns:
      One tree for every expert, of the base's structure, with `LowRank` weights of its ranks.

    Warns:
      UserWarning: two experts are nearly parallel somewhere, so they only shrink.

    Raises:
      StructureError: the trees differ, or an adapter stands on another base; the message has the path.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, subspace_jax as sj
      >>> base, b = {"w": jnp.zeros((8, 6))}, jax.random.normal(jax.random.key(2), (2, 2, 6))
      >>> adapted = [sj.adapt(base, {"w": sj.lora(rank=2)}, key=jax.random.key(i)) for i in range(2)]
      >>> adapted = [{"w": dataclasses.replace(tree["w"], b=one)} for tree, one in zip(adapted, b)]  # as if trained
      >>> first, second = sj.methods.do_merging.orthogonalize(adapted, base, gamma=0.01)
      >>> before, after = adapted[0]["w"].a.T @ adapted[1]["w"].a, first["w"].a.T @ second["w"].a
      >>> bool(jnp.linalg.norm(after) < 0.2 * jnp.linalg.norm(before))
      True
    """
    options = check_options("orthogonalize", steps, gamma, learning_rate, power)
    changed: list[dict[str, object]] = [{} for _ in experts]
    for site in sites(experts, base, select=select):
        changes = site.changes()
        if in_factors(changes):
            for tree, change in zip(changed, orthogonal_factors(site, changes, *options), strict=True):
                if change is not None:
                    tree[site.path] = low_rank(site.base, change)
    treedef = jax.tree.structure(base, is_leaf=is_weight)
    return [
        jax.tree.unflatten(treedef, [new.get(path, leaf) for path, leaf in leaves_with_paths(expert)])
        for new, expert in zip(changed, experts, strict=True)
    ]


def check_options(
    what: str, steps: int, gamma: float, learning_rate: float, power: int
) -> tuple[int, float, float, int]:
    """Returns the options of the descent after checking them.

    Raises:
      RankError: `steps` is no integer of at least 0.
      ValueError: another one is outside its range.
    """
    check_number(f"{what}: gamma", gamma, least=0.0)
    check_number(f"{what}: learning_rate", learning_rate, above=0.0)
    check_choice(f"{what}: power", power, (1, 2))
    return check_int(f"{what}: steps", steps, least=0), gamma, learning_rate, power


def in_factors(changes: Sequence[Change]) -> TypeGuard[Sequence[Factored | None]]:
    """Whether all changes of a leaf are low-rank products, and some is."""
    some = [c for c in changes if c is not None]
    return bool(some) and all(isinstance(c, Factored) and c.gain is None for c in some)


def orthogonal_factors(
    site: Site, changes: Sequence[Factored | None], steps: int, gamma: float, learning_rate: float, power: int
) -> list[Factored | None]:
    """Returns the changes of one leaf with their factors moved; None stays None."""
    present = [c for c in changes if c is not None]
    if steps == 0 or len(present) < 2:
        return list(changes)
    lefts = _pad([c.a for c in present])
    rights = _pad([jnp.swapaxes(c.b, -1, -2) for c in present])
    # An expert that never trained has one factor of zeros; its other one, random, is to push nobody.
    trained = jnp.any(lefts != 0, axis=(-2, -1), keepdims=True) & jnp.any(rights != 0, axis=(-2, -1), keepdims=True)
    _warn_of_copies(site.path, lefts * trained, rights * trained)
    lefts = jnp.where(trained, _descend(lefts * trained, gamma, learning_rate, steps, power), lefts)
    rights = jnp.where(trained, _descend(rights * trained, gamma, learning_rate, steps, power), rights)
    rights = jnp.swapaxes(rights, -1, -2)
    moved = iter(
        Factored(a=left[..., : c.a.shape[-1]], b=right[..., : c.b.shape[-2], :], role=c.role)
        for c, left, right in zip(present, lefts, rights, strict=True)
    )
    return [None if c is None else next(moved) for c in changes]


def _pad(factors: list[jax.Array]) -> jax.Array:
    """Stacks factors `[*stack, d, r_i]` of unequal ranks to `[experts, *stack, d, r]` by columns of zeros."""
    rank = max(f.shape[-1] for f in factors)
    return jnp.stack([jnp.pad(f, [(0, 0)] * (f.ndim - 1) + [(0, rank - f.shape[-1])]) for f in factors])


def _pairs(factors: jax.Array) -> jax.Array:
    """Squared norms of all products of two factors, `[experts, experts, *stack]`."""
    gram = jnp.einsum("i...dr,j...dq->ij...rq", factors, factors, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(gram * gram, axis=(-2, -1))


def pair_loss(factors: jax.Array, power: int = 2) -> jax.Array:
    r"""Returns \(\sum_{i \ne j} \|A_i^T A_j\|_F^p\) of stacked factors, `[*stack]`.

    Args:
      factors: `[experts, *stack, d, r]`.
      power: \(p\), 1 or 2.

    Example:
      >>> import jax.numpy as jnp
      >>> float(pair_loss(jnp.ones((2, 3, 1))))
      18.0
    """
    squares = _pairs(factors)
    apart = ~jnp.eye(len(factors), dtype=bool).reshape(len(factors), len(factors), *(1,) * (squares.ndim - 2))
    # The root has no derivative at zero.
    values = squares if power == 2 else jnp.sqrt(squares + 1e-12)
    return jnp.sum(jnp.where(apart, values, 0.0), axis=(0, 1))


@functools.partial(jax.jit, static_argnames=("steps", "power"))
def _descend(factors: jax.Array, gamma: float, learning_rate: float, steps: int, power: int) -> jax.Array:
    used = jnp.any(factors != 0, axis=-2, keepdims=True)
    rank = jnp.maximum(jnp.sum(used, axis=-1, keepdims=True), 1)
    length = jnp.sqrt(jnp.sum(factors * factors, axis=(-2, -1), keepdims=True) / rank)
    start = factors / jnp.where(length == 0, 1.0, length)
    filled = jnp.maximum(jnp.sum(start != 0, axis=(-2, -1), keepdims=True), 1)
    rate = learning_rate * jnp.sqrt(jnp.sum(start * start, axis=(-2, -1), keepdims=True) / filled)
    norms = jnp.sum(start * start, axis=(-2, -1))
    scale = jnp.sum(norms, axis=0) ** 2 - jnp.sum(norms * norms, axis=0)
    needed = (pair_loss(start) > FLOOR * scale)[None, ..., None, None]
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)

    def loss(delta: jax.Array) -> jax.Array:
        return jnp.sum(pair_loss(start + delta, power)) + gamma * jnp.sum(delta * delta)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        delta, state = carry
        update: Any
        update, state = adam.update(jax.grad(loss)(delta), state)
        return (jnp.where(used & needed, delta - rate * update, 0.0), state), None

    zero = jnp.zeros_like(start)
    (delta, _), _ = jax.lax.scan(step, (zero, adam.init(zero)), None, length=steps)
    return factors + length * delta


def _warn_of_copies(path: str, lefts: jax.Array, rights: jax.Array) -> None:
    alike = _largest_cosine(lefts, rights)
    if not isinstance(alike, Tracer) and float(alike) > PARALLEL:
        warnings.warn(
            f"{path}: two experts have nearly parallel factors (cosine {float(alike):.4f}). Orthogonalizing cannot "
            "tell them apart and shrinks both; leave one out, or set steps=0.",
            stacklevel=4,
        )


@jax.jit
def _largest_cosine(lefts: jax.Array, rights: jax.Array) -> jax.Array:
    """The largest likeness of two experts in both factors: 1 if their Grams are equal up to scale."""
    count = len(lefts)
    cosines = []
    for factors in (lefts, rights):
        norms = jnp.sqrt(_pairs(factors))
        own = jnp.sqrt(jnp.einsum("ii...->i...", norms))
        cosines.append(norms / jnp.maximum(own[:, None] * own[None], jnp.finfo(norms.dtype).tiny))
    both = jnp.minimum(*cosines)
    apart = ~jnp.eye(count, dtype=bool).reshape(count, count, *(1,) * (both.ndim - 2))
    return jnp.max(jnp.where(apart, both, 0.0))
