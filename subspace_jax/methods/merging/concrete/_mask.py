"""One soft mask over the parameters of all experts, drawn anew at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, StructureError, check_number, leaves_with_paths, map_with_paths

# Log of the smallest mean that a mask is divided by.
_SMALLEST = 1e-8


def init_logits(vectors: Sequence[Params], value: float = 0.0) -> Params:
    """Returns the logits of a mask: one for every entry that an expert changes, all alike.

    Args:
      vectors: task vectors, None where a leaf was not trained.
      value: of all logits; 0 keeps each entry with a probability of one half.

    Returns:
      A tree like a vector, in float32.

    Raises:
      StructureError: there are no vectors, or they differ in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> init_logits([{"w": jnp.ones(2), "head": None}])["w"].tolist()
      [0.0, 0.0]
    """
    if not vectors:
        raise StructureError("init_logits: expected at least one task vector.")
    shapes = [{path: v.shape for path, v in leaves_with_paths(tree) if v is not None} for tree in vectors]
    for i, found in enumerate(shapes[1:], start=1):
        if found != shapes[0]:
            path = next(p for p in (shapes[0] | found) if shapes[0].get(p) != found.get(p))
            raise StructureError(
                f"{path}: task vector 0 has shape {shapes[0].get(path)}, vector {i} {found.get(path)}; all experts "
                "come of one base."
            )
    return jax.tree.map(lambda v: jnp.full(v.shape, value, jnp.float32), vectors[0])


def sample_mask(
    key: jax.Array, logits: Params, temperature: float | jax.Array = 0.5, *, discrete: bool = False
) -> Params:
    r"""Draws a mask from binary Concrete distributions, and divides that of each leaf by its mean.

    \(m = \sigma((x + \log u - \log(1 - u)) / \tau)\) with uniform \(u\), differentiable in \(x\);
    \(P(m > \frac{1}{2}) = \sigma(x)\); \(\tilde m = m / \bar m\) over the entries of a leaf.

    Args:
      key: consumed; every leaf has a key of its own.
      logits: \(x\), as `init_logits` makes them.
      temperature: \(\tau\).
      discrete: draw zeros and ones of probability \(\sigma(x)\), which have no gradient.

    Returns:
      A tree like `logits`; the mean of each leaf is 1, unless all of it is below 1e-8.

    Raises:
      ValueError: the temperature is not above 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mask = sample_mask(jax.random.key(0), {"w": jnp.zeros(100)})
      >>> round(float(mask["w"].mean()), 4)
      1.0
    """
    check_number("sample_mask: temperature", temperature, above=0.0)
    leaves, treedef = jax.tree.flatten(logits)
    keys = jax.random.split(key, max(len(leaves), 1))

    def one(key: jax.Array, x: jax.Array) -> jax.Array:
        if discrete:
            mask = jax.random.bernoulli(key, jax.nn.sigmoid(x)).astype(x.dtype)
        else:
            mask = concrete_mask(x, jax.random.uniform(key, x.shape, minval=jnp.finfo(x.dtype).tiny), temperature)
        return mask / jnp.maximum(jnp.mean(mask), _SMALLEST)

    return jax.tree.unflatten(treedef, [one(k, x) for k, x in zip(keys, leaves, strict=False)])


def concrete_mask(logits: jax.Array, uniform: jax.Array, temperature: float | jax.Array) -> jax.Array:
    r"""Returns \(\sigma((x + \log u - \log(1 - u)) / \tau)\), of given uniform numbers.

    Args:
      logits: \(x\).
      uniform: \(u\), of the same shape.
      temperature: \(\tau\).

    Example:
      >>> import jax.numpy as jnp
      >>> concrete_mask(jnp.zeros(2), jnp.full(2, 0.5), 0.5).tolist()
      [0.5, 0.5]
    """
    return jax.nn.sigmoid((logits + jnp.log(uniform) - jnp.log1p(-uniform)) / temperature)


def add_masked(base: Params, vectors: Sequence[Params], coefficients: Any, mask: Params | None = None) -> Params:
    r"""Returns \(\theta_0 + \sum_i \lambda_i\,\tilde m\,\tau_i\).

    Args:
      base: \(\theta_0\), plain arrays.
      vectors: \(\tau_i\), None where a leaf was not trained.
      coefficients: a number for all; `[experts]`; or a dict from path to `[experts]`, one for every masked leaf.
      mask: \(\tilde m\), as `sample_mask` draws it; 1 if None.

    Returns:
      A tree like `base`, added in float32 and cast once.

    Raises:
      StructureError: the mask is of another tree than the vectors: it has a leaf that they lack, lacks one that they
        have, or one of another shape; the message has the path.

    Example:
      >>> import jax.numpy as jnp
      >>> vectors = [{"w": jnp.ones(2)}, {"w": -jnp.ones(2)}]
      >>> add_masked({"w": jnp.ones(2)}, vectors, jnp.array([0.5, 0.25]))["w"].tolist()
      [1.25, 1.25]
    """
    by_path = [dict(leaves_with_paths(vector)) for vector in vectors]
    masks = {} if mask is None else dict(leaves_with_paths(mask))
    if mask is not None:
        _check_mask(masks, by_path[0])

    def one(path: str, leaf: Any) -> Any:
        if by_path[0].get(path) is None:
            return leaf
        given = coefficients[path] if isinstance(coefficients, dict) else coefficients
        weights = jnp.broadcast_to(jnp.asarray(given, jnp.float32), (len(vectors),))
        # A vector at a time: stacked ones would be as large as all experts.
        total = weights[0] * by_path[0][path]
        for weight, vector in zip(weights[1:], by_path[1:], strict=True):
            total = total + weight * vector[path]
        change = total * masks[path] if path in masks else total
        return (leaf.astype(change.dtype) + change).astype(leaf.dtype)

    return map_with_paths(one, base)


def _check_mask(masks: Mapping[str, Any], vector: Mapping[str, Any]) -> None:
    shapes = [{path: v.shape for path, v in leaves.items() if v is not None} for leaves in (masks, vector)]
    for path in shapes[0] | shapes[1]:
        came, expected = (found.get(path, "nothing") for found in shapes)
        if came != expected:
            raise StructureError(
                f"{path}: the mask has {came} here, the task vectors have {expected}. Make its logits from these "
                "vectors by init_logits."
            )
