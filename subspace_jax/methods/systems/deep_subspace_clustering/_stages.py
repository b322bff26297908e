"""The three stages, each with one loss: an autoencoder, self-expression of all its layers, and cleaner clusters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.core import check_choice, check_number

from ._expression import closed_form, expression_loss, structured_norm, without_diagonal
from ._networks import Network, expressed_layers
from ._stopping import Minimized, StoppingRule, minimize

Pretraining = Literal["reconstruction", "distance"]
Start = Literal["closed_form", "zeros"]
Tuning = Literal["sum", "pure"]

PRETRAINING = StoppingRule(least=50, most=3000)
EXPRESSION = StoppingRule(most=1000)
TUNING = StoppingRule(most=300)


@dataclasses.dataclass(frozen=True)
class _Rebuilt:
    """Stage 1: how far the decoder's output is from the input, or the distances of the last layer from its own."""

    network: Network
    kind: str

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        layers = self.network.encode(params["encoder"], x)
        last = layers[-1] if layers else x
        if self.kind == "reconstruction":
            return jnp.mean(jnp.square(x - self.network.decode(params["decoder"], last, x)))
        return jnp.mean(jnp.square(_relative_distances(x) - _relative_distances(last)))


def _relative_distances(x: jax.Array) -> jax.Array:
    rows = x.reshape(x.shape[0], -1)
    squares = jnp.sum(jnp.square(rows[:, None] - rows[None]), -1)
    # Equal samples, each with itself at least: the root has no gradient at zero.
    distances = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return distances / jnp.maximum(jnp.mean(distances), 1e-12)


@dataclasses.dataclass(frozen=True)
class _Expressed:
    """Stages 2 and 3: self-expression of all layers, the structured norm, or both."""

    network: Network
    terms: tuple[str, ...]
    layers: tuple[int, ...] | None

    def __call__(self, variables: Any, data: Any) -> jax.Array:
        c, total = without_diagonal(variables["coefficients"]), jnp.zeros(())
        if "expression" in self.terms:
            found = expressed_layers(self.network, variables["encoder"], data["x"])
            chosen = found if self.layers is None else [found[i] for i in self.layers]
            total = total + expression_loss(c, chosen, data["rho"])
        if "structure" in self.terms:
            total = total + structured_norm(c, data["labels"]) / c.shape[0]
        return total


def pretrain(
    network: Network,
    params: Any,
    x: jax.Array,
    *,
    kind: Pretraining = "reconstruction",
    rule: StoppingRule = PRETRAINING,
    learning_rate: float = 1e-3,
) -> Minimized:
    r"""Trains the autoencoder alone: \(\frac{1}{nd} \|X - \mathrm{dec}(\mathrm{enc}(X))\|^2\).

    Args:
      network: an autoencoder.
      params: its parameters.
      x: `[samples, ...]`.
      kind: "reconstruction", or "distance": distances of the last layer's features, relative to their mean, come near
        those of the input; the decoder is not used then.
      rule: when to stop.
      learning_rate: of Adam.

    Returns:
      Parameters and losses.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from subspace_jax.methods import deep_subspace_clustering as dsc
      >>> net, x = dsc.dense_network((4,)), jax.random.normal(jax.random.key(0), (6, 5))
      >>> end = pretrain(net, net.init(jax.random.key(1), x), x, rule=dsc.StoppingRule(most=20))
      >>> bool(end.losses[19] < end.losses[0])
      True
    """
    check_choice("pretrain: kind", kind, ("reconstruction", "distance"))
    return minimize(_Rebuilt(network, kind), params, x, rule, learning_rate)


def self_express(
    network: Network,
    encoder: Any,
    x: jax.Array,
    *,
    rho: float = 1.0,
    start: Start = "closed_form",
    layers: Sequence[int] | None = None,
    rule: StoppingRule = EXPRESSION,
    learning_rate: float = 1e-3,
) -> Minimized:
    """Trains one coefficient matrix and the encoder on self-expression of the input and of all layers.

    Args:
      network: an autoencoder.
      encoder: parameters of its encoder.
      x: `[samples, ...]`.
      rho: of the ridge; at 0 stopping is all that regularizes, and the start must be "zeros".
      start: "closed_form", the exact minimizer for the encoder as it is, or "zeros" (1e-4).
      layers: which are expressed, 0 for the input; all if None.
      rule: when to stop.
      learning_rate: of Adam.

    Returns:
      Variables `{"coefficients", "encoder"}` and losses; the diagonal of the coefficients is zero.

    Raises:
      ValueError: an unknown start, a negative rho, a closed form without a ridge, or a layer that is not there.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from subspace_jax.methods import deep_subspace_clustering as dsc
      >>> net, x = dsc.dense_network((4,)), jax.random.normal(jax.random.key(0), (6, 5))
      >>> end = self_express(net, net.init(jax.random.key(1), x)["encoder"], x, rule=dsc.StoppingRule(most=20))
      >>> end.variables["coefficients"].shape
      (6, 6)
    """
    check_choice("self_express: start", start, ("closed_form", "zeros"))
    check_number("self_express: rho", rho, least=0.0)
    found = expressed_layers(network, encoder, x)
    chosen = tuple(range(len(found))) if layers is None else tuple(layers)
    if not chosen or not all(0 <= i < len(found) for i in chosen):
        raise ValueError(f"self_express: layers={layers!r}; expected some of 0 (the input) to {len(found) - 1}.")
    if start == "closed_form":
        first = closed_form([found[i] for i in chosen], rho)
    else:
        first = without_diagonal(jnp.full((x.shape[0],) * 2, 1e-4))
    objective = _Expressed(network, ("expression",), None if layers is None else chosen)
    variables = {"coefficients": first, "encoder": encoder}
    end = minimize(objective, variables, {"x": x, "rho": jnp.asarray(rho)}, rule, learning_rate)
    return _clean(end)


def tune(
    network: Network,
    variables: Any,
    x: jax.Array,
    labels: jax.Array,
    *,
    rho: float = 1.0,
    mode: Tuning = "sum",
    rule: StoppingRule = TUNING,
    learning_rate: float = 1e-3,
) -> Minimized:
    r"""Trains both on clusters that are given: \(J_2 + \frac1n \|C\|_Q\), or the structured norm alone.

    Args:
      network: an autoencoder.
      variables: of the stage before.
      x: `[samples, ...]`.
      labels: `[samples]` integers, pseudo-labels of the stage before.
      rho: of the ridge.
      mode: "sum", or "pure": only the structured norm, which drives coefficients between clusters to zero.
      rule: when to stop.
      learning_rate: of Adam.

    Returns:
      Variables and losses.

    Raises:
      ValueError: an unknown mode.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from subspace_jax.methods import deep_subspace_clustering as dsc
      >>> net, x = dsc.dense_network((4,)), jax.random.normal(jax.random.key(0), (6, 5))
      >>> rule = dsc.StoppingRule(most=20)
      >>> end = dsc.self_express(net, net.init(jax.random.key(1), x)["encoder"], x, rule=rule)
      >>> labels = jnp.array([0, 0, 0, 1, 1, 1])
      >>> tuned = tune(net, end.variables, x, labels, rule=rule).variables["coefficients"]
      >>> bool(dsc.structured_norm(tuned, labels) < dsc.structured_norm(end.variables["coefficients"], labels))
      True
    """
    check_choice("tune: mode", mode, ("sum", "pure"))
    terms = ("expression", "structure") if mode == "sum" else ("structure",)
    data = {"x": x, "rho": jnp.asarray(rho), "labels": jnp.asarray(labels)}
    return _clean(minimize(_Expressed(network, terms, None), variables, data, rule, learning_rate))


def _clean(end: Minimized) -> Minimized:
    coefficients = without_diagonal(end.variables["coefficients"])
    return end._replace(variables={**end.variables, "coefficients": coefficients})
