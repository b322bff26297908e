"""Exports the mean routing as LoRA, and the term that balances the atoms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import Batch, Params, StructureError, leaves_with_paths, map_with_paths, resolve_links
from subspace_jax.core import with_adapters as accept
from subspace_jax.methods.low_rank.queryable_lora._weight import QueryableLowRank
from subspace_jax.weights import LowRank


class FrozenRouting(NamedTuple):
    """Result of `freeze_routing`: LoRAs with fixed weights of the atoms.

    Attributes:
      adapted: the tree with `LowRank` weights, which merge.
      weights: mean weights of the atoms in every block, `[blocks, atoms]`.
      gap: root of the summed squared difference of both models' outputs over the batches, divided by that of the
        queryable model's change from the base.
    """

    adapted: Params
    weights: jax.Array
    gap: float


def freeze_routing(fn: Callable[..., jax.Array], adapted: Params, batches: Iterable[Batch]) -> FrozenRouting:
    r"""Exports the LoRA of the mean routing.

    Its factors are \(A\) and \(\bar R_b B\), with \(\bar R_b = \sum_i \bar\alpha_i M_i\) of the block.
    It is the model itself where the routing does not matter: one atom, or atoms that are all alike. Else it is another
    model, and `gap` tells how far away.

    Args:
      fn: `fn(params, batch)`, the model's output; plain, not from `with_adapters`.
      adapted: a tree from `queryable_lora`.
      batches: over whose rows the mean is taken, and the gap.

    Returns:
      The tree with `LowRank` weights, the mean weights of the atoms, and how far both models are apart.

    Raises:
      StructureError: there is no such weight, there are no batches, or a kernel is used in several places.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> method = sj.methods.queryable_lora.queryable_lora(3, blocks=("w",), head="w", atoms=1, kept=1)
      >>> adapted = sj.adapt({"w": jnp.eye(6)}, {"w": method}, key=jax.random.key(0))
      >>> found = freeze_routing(lambda p, x: x @ p["w"], adapted, [jnp.ones((2, 6))])
      >>> type(found.adapted["w"]).__name__, found.weights.tolist()
      ('LowRank', [[1.0]])
    """
    filled = {p: w for p, w in leaves_with_paths(resolve_links(adapted)) if isinstance(w, QueryableLowRank)}
    if not filled:
        raise StructureError("freeze_routing: no weight of queryable_lora in the tree.")
    batches = list(batches)
    if not batches:
        raise StructureError("freeze_routing: no batches; the mean routing is one over data.")
    run = jax.jit(accept(fn, collect=True))
    sizes, sums, outputs = [], [], []
    for batch in batches:
        output, reports = run(adapted, batch)
        outputs.append(output)
        total, rows = _totals(filled, reports)
        sums.append(total)
        sizes.append(rows)
    means = sum(sums[1:], sums[0]) / sum(sizes)
    frozen = map_with_paths(lambda path, w: _low_rank(filled[path], means) if path in filled else w, adapted)
    base = map_with_paths(lambda path, w: w.base if path in filled else w, adapted)
    apart = moved = 0.0
    for batch, output in zip(batches, outputs, strict=True):
        apart += float(jnp.sum((accept(fn)(frozen, batch) - output) ** 2))
        moved += float(jnp.sum((accept(fn)(base, batch) - output) ** 2))
    return FrozenRouting(frozen, means, (apart / moved) ** 0.5 if moved else 0.0)


def balance(reports: Mapping[str, Any]) -> jax.Array:
    r"""Returns how uneven the atoms are used, \(\sum_b KL(\bar\alpha_b \| \mathrm{uniform})\), to be added to a loss.

    Args:
      reports: what `with_adapters(fn, collect=True)` returns beside the result.

    Example:
      >>> import jax.numpy as jnp
      >>> one = {"weights": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "block": jnp.array(0), "first": jnp.array(True)}
      >>> float(balance({"w": one}))
      0.0
    """
    total = jnp.zeros(())
    for one in reports.values():
        for part in one if isinstance(one, list) else [one]:
            mean = _rows_mean(part)
            uneven = jnp.sum(
                jnp.where(mean > 0, mean * jnp.log(jnp.where(mean > 0, mean, 1.0) * mean.shape[-1]), 0.0), -1
            )
            total = total + jnp.sum(jnp.where(part["first"], uneven, 0.0))
    return total


def _rows_mean(part: Mapping[str, jax.Array]) -> jax.Array:
    """Mean weights over rows, `[*stack, atoms]`."""
    weights, stack = part["weights"], part["first"].shape
    return jnp.mean(weights.reshape(*stack, -1, weights.shape[-1]), axis=-2)


def _totals(filled: Mapping[str, QueryableLowRank], reports: Mapping[str, Any]) -> tuple[jax.Array, int]:
    """Weights summed over rows by block, and the number of rows."""
    blocks, atoms = (next(iter(filled.values())).blocks, next(iter(filled.values())).atoms)
    total, rows = jnp.zeros((0 if blocks is None else len(blocks), 0 if atoms is None else len(atoms))), 0
    for one in reports.values():
        if isinstance(one, list):
            raise StructureError("freeze_routing: a kernel is used in several places, so it has several routings.")
        stack = one["first"].shape
        weights = one["weights"].reshape(*stack, -1, one["weights"].shape[-1])
        rows = weights.shape[-2]
        sums = jnp.where(one["first"][..., None], jnp.sum(weights, axis=-2), 0.0)
        total = total.at[one["block"]].add(sums)
    return total, rows


def _low_rank(weight: QueryableLowRank, means: jax.Array) -> LowRank:
    operator = jnp.einsum("...m,mrq->...rq", means[weight.block], jnp.asarray(weight.atoms))
    names = ("base", "a", "scale", "dropout", "role", "dtype", "method")
    fields: dict[str, Any] = {name: getattr(weight, name) for name in names}
    b = jnp.matmul(operator, weight.b, precision=jax.lax.Precision.HIGHEST)
    return LowRank(b=b, trainable=("a", "b"), **fields)
