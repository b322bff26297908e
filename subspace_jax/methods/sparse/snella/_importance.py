"""Smoothed importance of the factors, and the budget that layers get by it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax.core import (
    OptState,
    Params,
    StructureError,
    Updates,
    check_choice,
    check_number,
    leaves_with_paths,
    map_with_paths,
)
from subspace_jax.methods.sparse.snella._budget import budget as budget_of
from subspace_jax.methods.sparse.snella._budget import order_of, share_out
from subspace_jax.methods.sparse.snella._method import MixedKernelSparse

FACTORS = ("a", "b")
Metric = Literal["sensitivity", "magnitude"]


class WithImportanceState(NamedTuple):
    """State of `with_importance`.

    Attributes:
      inner: that of the optimizer.
      importance: \\(I\\), by path and factor, as the factor.
      uncertainty: \\(U\\), likewise.
    """

    inner: Any
    importance: dict[str, jax.Array]
    uncertainty: dict[str, jax.Array]


def with_importance(
    inner: optax.GradientTransformation,
    b1: float = 0.85,
    b2: float = 0.85,
    *,
    order: Literal["post", "pre"] = "post",
    metric: Metric = "sensitivity",
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optimizer, and beside it smooths the importance of every entry of SNELLA's factors.

    \(i = |\theta\,g|\), \(I \leftarrow \beta_1 I + (1 - \beta_1)\,i\) and, with the new \(I\),
    \(U \leftarrow \beta_2 U + (1 - \beta_2)\,|i - I|\); both begin at zero. Updates are those of the optimizer. What is
    not a number counts as zero.

    Args:
      inner: any optimizer; give it the gradient that came from the loss.
      b1: \(\beta_1\).
      b2: \(\beta_2\).
      order: "post", as released: the parameters just updated with the gradient that updated them; "pre": those before.
      metric: "sensitivity"; or "magnitude", \(i = |\theta|\). A third one of the release, the size of surviving
        entries, is left out.

    Returns:
      An optax transformation with the state `WithImportanceState`; `update` needs the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.zeros((4, 3))}, {"w": sj.methods.snella.snella(2)}, key=jax.random.key(0))
      >>> state = with_importance(optax.adam(1e-3)).init(sj.partition(adapted)[0])
      >>> sorted(state.importance), state.importance["w.a"].shape
      (['w.a', 'w.b'], (2, 4, 1))
    """
    for name, value in (("b1", b1), ("b2", b2)):
        check_number(f"with_importance: {name}", value, least=0.0, below=1.0)
    check_choice("with_importance: order", order, ("post", "pre"))
    check_choice("with_importance: metric", metric, ("sensitivity", "magnitude"))
    extended = optax.with_extra_args_support(inner)

    def init(params: Params) -> WithImportanceState:
        def zeros() -> dict[str, jax.Array]:
            return {name: jnp.zeros(v.shape, jnp.float32) for name, v in _factors(params).items()}

        return WithImportanceState(extended.init(params), zeros(), zeros())

    def update(updates: Updates, state: OptState, params: Params = None, **extra: Any) -> tuple[Updates, OptState]:
        new, held = extended.update(updates, state.inner, params, **extra)
        gradients, values, moves = (_factors(tree) for tree in (updates, params, new))
        importance, uncertainty = dict(state.importance), dict(state.uncertainty)
        for name in importance.keys() & gradients.keys():
            value = values[name] + moves[name] if order == "post" else values[name]
            value = value.astype(jnp.float32)
            seen = jnp.abs(value * gradients[name].astype(jnp.float32) if metric == "sensitivity" else value)
            seen = jnp.where(jnp.isnan(seen), 0.0, seen)
            importance[name] = b1 * importance[name] + (1 - b1) * seen
            uncertainty[name] = b2 * uncertainty[name] + (1 - b2) * jnp.abs(seen - importance[name])
        return new, WithImportanceState(held, importance, uncertainty)

    return optax.GradientTransformationExtraArgs(init, update)


def reallocate(
    adapted: Params,
    state: OptState,
    epoch: int,
    *,
    start: float,
    target: float,
    epochs: int = 100,
    warmup: int = 0,
    final: int = 0,
    interval: int = 1,
    least: int = 0,
) -> Params:
    r"""Gives the budget of an epoch to the layers by the importance of their factors.

    \(R_l = \overline{I_A U_A} + \overline{I_B U_B}\). It is the product of two quantities that both grow with
    \(|\theta g|\): budgets collapse onto few layers, as in the released program, and a layer without entries has no
    gradient and seldom returns; `least` prevents that. Call it at the start of every epoch; it does nothing up to
    epoch \(t_i\), off the interval (but in the final phase), and after \(E\). Layers of a stack are layers.

    Args:
      adapted: the whole tree, concrete.
      state: the optimizer's, with one `with_importance` in it.
      epoch: \(\tau\), from 0.
      start: \(s\) of `snella`.
      target: \(s\) at the end.
      epochs: \(E\); see `budget`.
      warmup: \(t_i\).
      final: \(t_f\).
      interval: epochs between allocations.
      least: entries that every layer keeps; of this library, 0 as published.

    Returns:
      The tree with other thresholds; shapes stay, and nothing compiles again.

    Raises:
      StructureError: there is no weight of SNELLA, or no importance in the state.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.zeros((4, 5))}, {"w": sj.methods.snella.snella(2)}, key=jax.random.key(0))
      >>> state = with_importance(optax.adam(1e-3)).init(sj.partition(adapted)[0])
      >>> int(reallocate(adapted, state, 100, start=0.0, target=0.8)["w"].order)
      16
    """
    weights = {path: w for path, w in leaves_with_paths(adapted) if isinstance(w, MixedKernelSparse)}
    found = [s for s in _states(state) if isinstance(s, WithImportanceState)]
    if not weights or len(found) != 1:
        what = "no weight of snella" if not weights else f"{len(found)} states of with_importance in the optimizer's"
        raise StructureError(f"reallocate: {what}; expected a tree from sj.adapt and the state of its optimizer.")
    due = epoch % interval == 0 or epoch > epochs - final
    if epoch <= warmup or epoch > epochs or not due:
        return adapted
    scores = {path: _scores(path, weight, found[0]) for path, weight in weights.items()}
    sizes = {path: int(np.prod(weight.role.sizes(weight.shape))) for path, weight in weights.items()}
    layers = [sizes[path] for path, score in scores.items() for _ in score.ravel()]
    total = budget_of(epoch, layers, start=start, target=target, epochs=epochs, warmup=warmup, final=final)
    everything = [float(v) for score in scores.values() for v in score.ravel()]
    kept = iter(share_out(everything, layers, total, least=least))
    orders = {}
    for path, weight in weights.items():
        values = [order_of(next(kept), sizes[path], weight.rule) for _ in scores[path].ravel()]
        orders[path] = jnp.asarray(np.reshape(values, weight.order.shape), jnp.int32)

    def one(path: str, leaf: Any) -> Any:
        return dataclasses.replace(leaf, order=orders[path]) if path in orders else leaf

    return map_with_paths(one, adapted)


def _factors(tree: Any) -> dict[str, jax.Array]:
    """The factors of every weight of SNELLA, by path and name."""
    weights = [(path, w) for path, w in leaves_with_paths(tree) if isinstance(w, MixedKernelSparse)]
    return {f"{path}.{n}": v for path, w in weights for n in FACTORS if (v := getattr(w, n)) is not None}


def _scores(path: str, weight: MixedKernelSparse, state: WithImportanceState) -> np.ndarray:
    """The score of every layer of one weight, in its stack's shape."""
    total = np.zeros(weight.order.shape)
    for name in (f"{path}.{n}" for n in FACTORS):
        if name not in state.importance:
            raise StructureError(f"{path}: reallocate: the optimizer's state has no importance of it; was it trained?")
        product = np.asarray(state.importance[name], np.float64) * np.asarray(state.uncertainty[name], np.float64)
        total += product.mean(axis=(-3, -2, -1))
    return total


def _states(state: Any) -> list[Any]:
    """Every state of importance inside an optimizer's state."""
    return [s for s in jax.tree.leaves(state, is_leaf=_is_importance) if _is_importance(s)]


def _is_importance(value: Any) -> bool:
    return isinstance(value, WithImportanceState)
