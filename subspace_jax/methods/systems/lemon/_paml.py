"""Meta-learning whose tasks are families of equations: a start from which a few steps lead far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import check_int, check_number

Loss = Callable[[Any, Any], jax.Array]
Rate = Any
"""A number, a tree like the parameters (one rate each), or `rate(params, support)`."""


def adapt_to(
    loss: Loss,
    params: Any,
    support: Any,
    rate: Rate,
    *,
    steps: int = 5,
    first_order: bool = True,
    clamp: float | None = None,
    adapted: Callable[[str], bool] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Any:
    r"""Takes a few steps of plain gradient descent: \(\phi_{k+1} = \phi_k - \alpha \nabla L_S(\phi_k)\).

    To first order the gradients inside count as constants; the rate does not, so that one that is learned or predicted
    has a gradient of its own either way.

    Args:
      loss: `loss(params, batch)`, a scalar.
      params: \(\phi_0\).
      support: what is learned from.
      rate: \(\alpha\).
      steps: how many.
      first_order: whether the outer gradient ignores the curvature of the inner loss.
      clamp: limit of each entry of the inner gradients; 1 in the second version of the publication, none in the first.
      adapted: tells by a leaf's path ("a/b/kernel") whether it takes part; all do by default.
      optimizer: in place of plain descent, such as `optax.adamw(1e-3)`; its updates are multiplied by the rate.
      temperature: \(\eta\) of Langevin noise \(\sqrt{2 \alpha \eta} z\), zero for none.
      key: of the noise.

    Returns:
      \(\phi_K\), a tree like `params`.

    Raises:
      RankError: `steps` is negative.
      ValueError: a clamp that is not positive, noise without a key, or rates that fit no parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> square = lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2)
      >>> adapt_to(square, jnp.array([1.0]), jnp.array([0.0]), 0.5, steps=2)
      Array([0.25], dtype=float32)
    """
    steps = check_int("adapt_to: steps", steps, 0)
    check_number("adapt_to: temperature", temperature, least=0.0)
    if clamp is not None:
        check_number("adapt_to: clamp", clamp, above=0.0)
    if temperature and key is None:
        raise ValueError("adapt_to: noise of a temperature needs a key.")
    leaves, structure = jax.tree.flatten(params)
    rates = _rates(rate(params, support) if callable(rate) else rate, structure)
    found = jax.tree_util.tree_leaves_with_path(params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    which = [adapted is None or bool(adapted(path)) for path in paths]
    inner = optax.sgd(1.0) if optimizer is None else optimizer
    keys = jax.random.split(jax.random.key(0) if key is None else key, max(steps, 1))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        phi, state = carry
        gradient = jax.tree.leaves(jax.grad(loss)(jax.tree.unflatten(structure, phi), support))
        if first_order:
            gradient = jax.lax.stop_gradient(gradient)
        if clamp is not None:
            gradient = [jnp.clip(g, -clamp, clamp) for g in gradient]
        updates, state = inner.update(gradient, state, phi)
        moves: Any = updates
        noise = jax.random.split(key, len(phi))
        found = []
        for value, move, alpha, moved, own in zip(phi, moves, rates, which, noise, strict=True):
            new = value + (alpha * move).astype(value.dtype) if moved else value
            if temperature and moved:
                new = new + jnp.sqrt(2 * temperature * alpha) * jax.random.normal(own, value.shape, value.dtype)
            found.append(new)
        return (found, state), None

    phi = jax.lax.scan(step, (leaves, inner.init(leaves)), keys[:steps])[0][0] if steps else leaves
    return jax.tree.unflatten(structure, phi)


def _rates(chosen: Any, structure: Any) -> list[Any]:
    """One rate for each leaf: the same for all, or those of a tree."""
    if jax.tree.structure(chosen) == structure:
        return jax.tree.leaves(chosen)
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(chosen)) or jnp.ndim(chosen) != 0:
        raise ValueError("adapt_to: rate is neither a number nor a tree like the parameters.")
    return [chosen] * structure.num_leaves


def paml_loss(
    loss: Loss, params: Any, support: Any, query: Any, rate: Rate, *, key: jax.Array | None = None, **options: Any
) -> jax.Array:
    r"""Returns \(\frac1B \sum_b L_{Q_b}(\phi_K(\theta, S_b))\): the loss of a start, after a few steps on each task.

    Differentiate it in `params`, and in whatever the rate is made of. Tasks are gone through one after the other, so
    that memory holds one adapted copy to first order, and the steps of one task to second.

    Args:
      loss: `loss(params, batch)`.
      params: \(\theta\).
      support: a tree with a leading axis of tasks.
      query: another, of operators and initial states that the support has not.
      rate: as of `adapt_to`.
      key: of Langevin noise.
      **options: of `adapt_to`.

    Returns:
      A scalar. With `steps=0` it is the joint loss on all queries.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> square = lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2)
      >>> s, q = jnp.array([[0.0], [0.0]]), jnp.array([[1.0], [3.0]])
      >>> jax.grad(lambda t: paml_loss(square, t, s, q, 0.5, steps=1))(jnp.array([2.0]))  # 1 - 2
      Array([-1.], dtype=float32)
    """
    count = jax.tree.leaves(support)[0].shape[0]
    keys = jax.random.split(jax.random.key(0) if key is None else key, count)

    def one(total: jax.Array, task: Any) -> tuple[jax.Array, None]:
        mine, asked, own = task
        phi = adapt_to(loss, params, mine, rate, key=own, **options)
        return total + loss(phi, asked), None

    return jax.lax.scan(one, jnp.zeros(()), (support, query, keys))[0] / count


class RateNetwork(nn.Module):
    r"""Predicts the inner rate from the encoding of an equation: \(c\,\sigma(m)\), m the mean of an MLP over tokens.

    The publication leaves the symbol encoder out of the inner loop when it is used.

    Attributes:
      largest: \(c\).
      hidden: width of the two hidden layers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net, tokens = RateNetwork(), jnp.ones((5, 16))
      >>> params = net.init(jax.random.key(0), tokens)["params"]
      >>> 0 < float(net.apply({"params": params}, tokens)) < 1
      True
    """

    largest: float = 1.0
    hidden: int = 128

    @nn.compact
    def __call__(self, encoding: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Returns a scalar rate.

        Args:
          encoding: of one equation, `[length, width]`.
          mask: `[length]`, true where tokens are valid.
        """
        x = encoding
        for _ in range(2):
            x = nn.relu(nn.Dense(self.hidden)(x))
        values = nn.Dense(1)(x)[..., 0].astype(jnp.float32)
        weights = jnp.ones_like(values) if mask is None else mask.astype(jnp.float32)
        return self.largest * jax.nn.sigmoid(jnp.sum(weights * values) / jnp.maximum(jnp.sum(weights), 1))
