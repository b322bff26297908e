"""What task vectors are like: their Gram matrices, their angles, and whether a merged model still answers as each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import Params, Role, StructureError
from subspace_jax.merging import Selector, sites, task_arithmetic
from subspace_jax.methods.regularized.orthoreg._penalty import change_of, gram, kernels, matrix_of


def update_grams(
    params: Params, base: Params, *, select: Selector | None = None, roles: Mapping[str, Role] | None = None
) -> dict[str, jax.Array]:
    r"""Returns the smaller Gram matrix of every update, \(D^T D\) or \(D D^T\): the identity where it is orthonormal.

    Args:
      params: arrays or stand-in weights.
      base: the tree that they were trained from.
      select: which kernels, as in `penalty`.
      roles: likewise.

    Returns:
      `[*stack, m, m]` by path, in at least float32.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> sj.methods.orthoreg.update_grams({"w": jnp.ones((3, 1))}, {"w": jnp.zeros((3, 1))})["w"].tolist()
      [[3.0]]
    """
    return {site.path: gram(matrix_of(site, change_of(site))) for site in kernels(params, base, select, roles)}


def task_cosines(experts: Sequence[Params], base: Params, *, select: Selector | None = None) -> jax.Array:
    r"""Returns the cosines between task vectors \(\tau_i = \theta_i - \theta_0\), each taken as one long vector.

    Args:
      experts: trees of arrays or of stand-in weights, two or more.
      base: \(\theta_0\), the tree that they were trained from.
      select: which leaves count; all that hold floating-point numbers if None.

    Returns:
      `[experts, experts]` in float32; zero where a task vector is zero.

    Raises:
      StructureError: the trees differ.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> experts = [{"w": jnp.array([2.0, 1.0])}, {"w": jnp.array([1.0, 3.0])}]
      >>> sj.methods.orthoreg.task_cosines(experts, {"w": jnp.ones(2)}).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    products = jnp.zeros((len(experts), len(experts)), jnp.float32)
    for site in sites(experts, base, select=select):
        rows = jnp.stack([change.astype(jnp.float32).ravel() for change in site.arrays()])
        products = products + jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sqrt(jnp.diagonal(products))
    both = norms[:, None] * norms
    return products / jnp.where(both > 0, both, 1.0)


def disentanglement_error(
    apply: Callable[[Params, Any, int], jax.Array],
    experts: Sequence[Params],
    base: Params,
    inputs: Sequence[Any],
    *,
    scale: float = 1.0,
    select: Selector | None = None,
) -> jax.Array:
    r"""Returns how often the merged model answers other than the expert of an input's task alone does.

    \(\frac{1}{T} \sum_t \mathrm{mean}_{x \in t}\,[\arg\max f(x; \theta_0 + \alpha \tau_t) \neq
    \arg\max f(x; \theta_0 + \alpha \sum_s \tau_s)]\). Zero if every task vector acts on its own task only.

    Args:
      apply: `apply(params, inputs, task)`, logits of a task; the trees it gets are those of `task_arithmetic`.
      experts: trees, one for every task.
      base: \(\theta_0\).
      inputs: those of every task.
      scale: \(\alpha\).
      select: which leaves are merged; the others are the base's.

    Returns:
      A scalar in [0, 1].

    Raises:
      StructureError: not as many inputs as experts, or the trees differ.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> base = {"w": jnp.zeros((2, 2))}
      >>> experts = [{"w": jnp.eye(2)}, {"w": -2 * jnp.eye(2)}]
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> float(sj.methods.orthoreg.disentanglement_error(lambda p, x, task: x @ p["w"], experts, base, [x, x]))
      0.5
    """
    if len(inputs) != len(experts):
        came = f"{len(inputs)} inputs for {len(experts)} experts"
        raise StructureError(f"disentanglement_error: {came}; expected as many, one for every task.")
    merged = task_arithmetic(experts, base, weights=scale, select=select)
    shares = []
    for task, (expert, x) in enumerate(zip(experts, inputs, strict=True)):
        alone = task_arithmetic([expert], base, weights=scale, select=select)
        own, joint = (jnp.argmax(apply(tree, x, task), -1) for tree in (alone, merged))
        shares.append(jnp.mean(own != joint))
    return jnp.mean(jnp.stack(shares))
