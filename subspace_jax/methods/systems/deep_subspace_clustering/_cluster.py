"""All stages in a row: from samples and the number of clusters to labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import check_int

from ._expression import normalize_rows
from ._networks import Network, expressed_layers
from ._spectral import affinity, spectral_clusters
from ._stages import EXPRESSION, PRETRAINING, TUNING, Pretraining, Start, Tuning, pretrain, self_express, tune
from ._stopping import Minimized, StoppingRule


class Clustering(NamedTuple):
    """Labels of the clusters, the graph they come from, and how the training went.

    Attributes:
      labels: int32 `[samples]`, from 0 to clusters - 1.
      affinity: the graph that was clustered, `[samples, samples]`.
      coefficients: the matrix that expresses all layers, `[samples, samples]`, diagonal zero.
      encoder: parameters of the trained encoder.
      features: of the last layer, rows of unit norm, `[samples, features]`.
      stages: by name, the losses of each iteration.
      rounds: pseudo-labels after self-expression and after each round of tuning.
    """

    labels: np.ndarray
    affinity: np.ndarray
    coefficients: np.ndarray
    encoder: Any
    features: np.ndarray
    stages: dict[str, np.ndarray]
    rounds: list[np.ndarray]


def cluster(
    x: Any,
    clusters: int,
    network: Network,
    *,
    d_sub: int,
    key: jax.Array,
    rho: float = 1.0,
    rounds: int = 6,
    pretraining: Pretraining = "reconstruction",
    start: Start = "closed_form",
    mode: Tuning = "sum",
    rules: tuple[StoppingRule, StoppingRule, StoppingRule] = (PRETRAINING, EXPRESSION, TUNING),
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_stage: Callable[[str, np.ndarray], None] | None = None,
) -> Clustering:
    """Clusters samples that lie near a union of subspaces, curved ones as well; no label is read or needed.

    Memory is a few matrices of samples by samples: up to a few thousand samples.

    Args:
      x: `[samples, ...]`, real; images with channels last for a convolutional network.
      clusters: how many there are.
      network: of `dense_network`, `conv_network`, or your own.
      d_sub: coefficients kept per sample; one more than the dimension that the subspaces are thought to have.
      key: of the network's start.
      rho: of the ridge; one value for all data.
      rounds: of tuning, at most; they end when clusters stay as they are. 0 for none.
      pretraining: as of `pretrain`.
      start: as of `self_express`.
      mode: as of `tune`.
      rules: when each stage stops.
      learning_rate: of Adam in all stages.
      seed: of k-means.
      on_stage: called after each stage with its name and its losses.

    Returns:
      Labels, the graph, coefficients and the trained encoder.

    Raises:
      ValueError: samples that are not finite real numbers, or fewer than two.
      RankError: a count is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from subspace_jax.methods import deep_subspace_clustering as dsc
      >>> a, b = jax.random.normal(jax.random.key(0), (2, 10, 1)), jnp.eye(6)[:2]
      >>> x = jnp.concatenate([a[0] * b[0], a[1] * b[1]])  # two lines
      >>> short = (dsc.StoppingRule(most=20),) * 3
      >>> found = dsc.cluster(x, 2, dsc.dense_network((4,)), d_sub=9, key=jax.random.key(1), rules=short)
      >>> bool((found.labels[:10] == found.labels[0]).all() and (found.labels[10:] != found.labels[0]).all())
      True
    """
    x = _checked(x)
    clusters = check_int("cluster: clusters", clusters, 1, len(x))
    check_int("cluster: d_sub", d_sub)
    check_int("cluster: rounds", rounds, 0)
    stages: dict[str, np.ndarray] = {}

    def tell(name: str, end: Minimized) -> None:
        stages[name] = np.asarray(end.losses)[: int(end.iterations)]
        if on_stage is not None:
            on_stage(name, stages[name])

    first = pretrain(network, network.init(key, x), x, kind=pretraining, rule=rules[0], learning_rate=learning_rate)
    tell("pretraining", first)
    end = self_express(
        network, first.variables["encoder"], x, rho=rho, start=start, rule=rules[1], learning_rate=learning_rate
    )
    tell("self-expression", end)
    graph, labels = _read_out(end, clusters, d_sub, seed)
    found = [labels]
    for i in range(rounds):
        end = tune(
            network,
            end.variables,
            x,
            jnp.asarray(labels),
            rho=rho,
            mode=mode,
            rule=rules[2],
            learning_rate=learning_rate,
        )
        tell(f"tuning {i + 1}", end)
        graph, labels = _read_out(end, clusters, d_sub, seed)
        found.append(labels)
        if same_partition(labels, found[-2]):
            break
    encoder = end.variables["encoder"]
    features = normalize_rows(expressed_layers(network, encoder, x)[-1])
    coefficients = np.asarray(end.variables["coefficients"])
    return Clustering(labels, np.asarray(graph), coefficients, encoder, np.asarray(features), stages, found)


def _checked(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim < 2 or len(x) < 2 or not jnp.issubdtype(x.dtype, jnp.floating) or not bool(jnp.isfinite(x).all()):
        raise ValueError(f"cluster: x is {x.dtype}{x.shape}; expected two or more samples of finite real numbers.")
    return x.astype(jnp.float32)


def _read_out(end: Minimized, clusters: int, d_sub: int, seed: int) -> tuple[jax.Array, np.ndarray]:
    graph = affinity(end.variables["coefficients"], d_sub)
    return graph, spectral_clusters(graph, clusters, seed=seed)


def same_partition(one: Any, other: Any) -> bool:
    """Tells whether two labelings are the same but for the names of the clusters.

    Args:
      one: `[samples]` integers.
      other: as many.

    Example:
      >>> same_partition([0, 0, 1], [5, 5, 2]), same_partition([0, 0, 1], [0, 1, 1])
      (True, False)
    """
    pairs = set(zip(np.asarray(one).tolist(), np.asarray(other).tolist(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
