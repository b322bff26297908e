"""Averages and task arithmetic: linear in the experts, so adapters stay adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from subspace_jax.core import Params, StructureError, check_number, is_weight, leaves_with_paths
from subspace_jax.merging._change import Change, Dense, Factored, formed
from subspace_jax.merging._site import Site
from subspace_jax.merging._walk import Selector, merge_leaves


def task_arithmetic(
    experts: Sequence[Params],
    base: Params,
    *,
    weights: float | Sequence[float] | jax.Array = 0.3,
    select: Selector | None = None,
) -> Params:
    r"""Adds weighted task vectors to the base: \(\theta_0 + \sum_i \lambda_i (\theta_i - \theta_0)\).

    LoRAs of any ranks and scales become one LoRA of the sum of their ranks, DoRAs one DoRA, both exactly; nothing of
    the weight's size is formed. Other adapters, and mixtures with full weights, are formed one leaf at a time.

    Args:
      experts: trees of arrays or of stand-in weights; one is enough.
      base: the tree that they were trained from.
      weights: \(\lambda_i\), one for all or one each; negative ones forget a task.
      select: which leaves are merged, as globs or a predicate; the others are the base's.

    Returns:
      A tree of the base's structure, shapes and dtypes; see `merge_leaves`.

    Raises:
      StructureError: the trees differ, or an adapter stands on another base; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      ValueError: a weight is not a finite number, or there are not as many as experts.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}]
      >>> sj.merging.task_arithmetic(experts, {"w": jnp.zeros(2)}, weights=0.5)["w"].tolist()
      [2.0, 1.0]

    Source:
      Ilharco et al.: Editing Models with Task Arithmetic, 2023.
    """
    coefficients = check_weights("task_arithmetic: weights", weights, len(experts))
    return merge_leaves(experts, base, lambda site: linear(site, coefficients), select=select, least=1)


def average(
    experts: Sequence[Params],
    base: Params | None = None,
    *,
    weights: Sequence[float] | None = None,
    select: Selector | None = None,
) -> Params:
    r"""Returns the weighted average of several trees: \(\sum_i w_i \theta_i\) with \(\sum_i w_i = 1\).

    Adapters stay adapters, as in `task_arithmetic`.

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: the tree that they were trained from; needed for adapters and for `select`.
      weights: divided by their sum; equal ones if None.
      select: which leaves are averaged; the others are the base's.

    Returns:
      A tree of the experts' structure, shapes and dtypes.

    Raises:
      StructureError: the trees differ, or there are adapters and no base; the message has the path.
      NonFiniteError: an expert holds NaN or infinity; likewise.
      ValueError: a weight is negative or no number, or all are zero.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> sj.merging.average([{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}], weights=[3, 1])["w"].tolist()
      [0.75, 0.75]

    Source:
      Wortsman et al.: Model soups: averaging weights of multiple fine-tuned models, 2022.
    """
    given = [1.0] * len(experts) if weights is None else weights
    coefficients = check_weights("average: weights", given, len(experts), least=0.0)
    total = sum(coefficients)
    if experts and not isinstance(total, Tracer) and not float(total) > 0:
        raise ValueError(f"average: weights={weights!r}: their sum is zero; expected a positive one.")
    return merge_leaves(
        experts,
        _first(experts, select) if base is None else base,
        lambda site: linear(site, [c / total for c in coefficients]),
        select=select,
    )


def _first(experts: Sequence[Params], select: Selector | None) -> Params:
    """The first expert in the base's place, which an average of arrays does not need."""
    adapted = [path for tree in experts for path, leaf in leaves_with_paths(tree) if is_weight(leaf)]
    if adapted or select is not None:
        why = f"{adapted[0]}: an expert has an adapter here" if adapted else "select: leaves not chosen are the base's"
        raise StructureError(f"{why}, and base is None. Pass as base the tree that the experts were trained from.")
    if not experts:
        raise StructureError("experts: none given, at least 2 expected.")
    return experts[0]


def linear(site: Site, coefficients: Sequence[Any]) -> Change:
    r"""Returns the weighted sum \(\sum_i c_i D_i\) of the experts' changes of a leaf, in factors where all are.

    Args:
      site: the leaf.
      coefficients: one for every expert.
    """
    found: list[tuple[Any, Factored]] = []
    total: jax.Array | None = None
    for i, coefficient in enumerate(coefficients):  # one expert's array beside the sum, not all of them
        change = site.change(i)
        if isinstance(change, Factored):
            found.append((coefficient, change))
        elif isinstance(change, Dense):
            total = _add(jnp.zeros_like(change.array) if total is None else total, change.array, coefficient)
    joined = concatenated(found)
    if total is None or joined is None:
        return joined if total is None else Dense(array=total)
    return Dense(array=_add(total, formed(joined, site.base), 1.0))


def concatenated(terms: Sequence[tuple[Any, Factored]]) -> Factored | None:
    """Returns the weighted sum of changes in factors: the factors side by side, exactly; None for no change.

    Args:
      terms: pairs of a weight and a change.
    """
    if not terms:
        return None
    gains: list[Any] = [c * change.gain for c, change in terms if change.gain is not None]
    gain: Any = sum(gains[1:], gains[0]) if gains else None
    return Factored(
        a=jnp.concatenate([change.a for _, change in terms], axis=-1),
        b=jnp.concatenate([change.b * c for c, change in terms], axis=-2),
        gain=gain,
        role=terms[0][1].role,
    )


def mean(site: Site) -> Change:
    """Returns the mean of the experts' changes of a leaf, as mergers of matrices do with leaves that are none.

    Args:
      site: the leaf.
    """
    count = len(site.leaves)
    return linear(site, [1.0 / count] * count)


@jax.jit
def _add(total: jax.Array, change: jax.Array, coefficient: Any) -> jax.Array:
    return total + jnp.asarray(coefficient, total.dtype) * change


def check_weights(what: str, weights: Any, count: int, *, least: float | None = None) -> list[Any]:
    """Returns one coefficient for every expert.

    Args:
      what: owner and name of the option.
      weights: one number for all experts, or one each; traced values pass.
      count: number of experts.
      least: smallest value allowed.

    Raises:
      ValueError: they are not finite numbers, too small, or not as many as experts.
    """
    single = isinstance(weights, (int, float)) or getattr(weights, "ndim", 1) == 0
    given: Any = weights
    values: list[Any] = [given] * count if single else list(given)
    if len(values) != count:
        raise ValueError(f"{what}: {len(values)} given for {count} experts; give one for all, or one each.")
    for value in values:
        check_number(what, value, least=least)
    traced = any(isinstance(v, (Tracer, jax.Array)) for v in values)
    return values if traced else [float(np.float64(v)) for v in values]
