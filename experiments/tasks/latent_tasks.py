"""A stream of small tasks whose inputs lie in a few directions, some of them shared by all tasks.

Task t's inputs in R^64 are combinations of 4 directions that all tasks share and 8 of its own, all orthonormal, with
a little noise; its 4 labels are those of a random tanh teacher of these 12 coordinates. The model is
x -> kernel (64, 64) -> relu -> fixed random (64, 128) -> relu -> a linear head for each task. Only the kernel and the
head of the current task learn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from experiments.runner import with_spread

WIDTH, FEATURES, LABELS, SHARED, PRIVATE = 64, 128, 4, 4, 8


@dataclasses.dataclass(frozen=True)
class Stream:
    """Tasks of several seeds; every array begins with `[seeds, tasks]`.

    Attributes:
      x: inputs for training, `[seeds, tasks, examples, 64]`.
      y: labels for training.
      x_test: inputs for testing.
      y_test: labels for testing.
      features: the fixed random kernel, `[seeds, 64, 128]`.
    """

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array
    features: jax.Array

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return self.x.shape[1]


def make_stream(seeds: Sequence[int], tasks: int, shared_std: float, examples: int = 600) -> Stream:
    """Returns the tasks of every seed.

    Args:
      seeds: one stream for each.
      tasks: number of tasks.
      shared_std: standard deviation of the shared coordinates; that of the others is 1.
      examples: for training, and as many for testing.
    """
    xs, ys, features = [], [], []
    for seed in seeds:
        rng = np.random.default_rng(1000 + seed)
        directions = np.linalg.qr(rng.normal(size=(WIDTH, SHARED + tasks * PRIVATE)))[0]
        x, y = [], []
        for task in range(tasks):
            own = np.arange(SHARED + task * PRIVATE, SHARED + (task + 1) * PRIVATE)
            basis = directions[:, np.concatenate([np.arange(SHARED), own])]
            latent = rng.normal(size=(2 * examples, SHARED + PRIVATE))
            latent[:, :SHARED] *= shared_std
            teacher = rng.normal(size=(SHARED + PRIVATE, 32)) / np.sqrt(SHARED + PRIVATE), rng.normal(size=(32, LABELS))
            y.append(np.argmax(np.tanh(latent @ teacher[0]) @ teacher[1], axis=-1))
            x.append(latent @ basis.T + 0.05 * rng.normal(size=(2 * examples, WIDTH)))
        xs.append(x)
        ys.append(y)
        features.append(rng.normal(size=(WIDTH, FEATURES)) * np.sqrt(2 / WIDTH))
    x, y = jnp.asarray(np.array(xs), jnp.float32), jnp.asarray(np.array(ys), jnp.int32)
    return Stream(
        x[:, :, :examples],
        y[:, :, :examples],
        x[:, :, examples:],
        y[:, :, examples:],
        jnp.asarray(np.array(features), jnp.float32),
    )


def network(params: Any, features: jax.Array, x: jax.Array) -> jax.Array:
    """Returns logits `[batch, 4]` of one task."""
    hidden = jax.nn.relu(jax.nn.relu(x @ params["kernel"]) @ features)
    return hidden @ params["head"]


apply = sj.with_adapters(network)


def accuracies(kernel: jax.Array, heads: Sequence[jax.Array], stream: Stream) -> np.ndarray:
    """Returns test accuracies `[seeds, tasks]` with the heads that there are; NaN for tasks to come."""

    @jax.vmap
    def one(kernel: jax.Array, head: jax.Array, features: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = network({"kernel": kernel, "head": head}, features, x)
        return jnp.mean(jnp.argmax(logits, axis=-1) == y)

    found = np.full(stream.y.shape[:2], np.nan)
    for task, head in enumerate(heads):
        found[:, task] = one(kernel, head, stream.features, stream.x_test[:, task], stream.y_test[:, task])
    return found


def records(method: str, rate: float, seeds: Sequence[int], matrices: np.ndarray) -> list[dict[str, Any]]:
    """Returns one JSON-able record for each seed, of accuracy matrices `[tasks, seeds, tasks]`."""
    found = []
    for i, seed in enumerate(seeds):
        matrix = matrices[:, i]
        last, own = matrix[-1], np.diagonal(matrix)
        found.append(
            {
                **{"method": method, "learning_rate": rate, "seed": seed, "accuracy": float(last.mean())},
                **{"backward_transfer": float((last - own)[:-1].mean()), "learning_accuracy": float(own.mean())},
            }
        )
    return found


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns final accuracy and backward transfer of every method at its rate of best accuracy."""
    rows = [["method", "learning rate", "final accuracy %", "backward transfer %", "accuracy when learned %"]]
    runs = results["runs"]
    for method in dict.fromkeys(r["method"] for r in runs):
        rates: dict[float, list[Any]] = {}
        for r in runs:
            if r["method"] == method:
                rates.setdefault(r["learning_rate"], []).append(r)
        rate, best = max(rates.items(), key=lambda item: np.mean([r["accuracy"] for r in item[1]]))
        names = ("accuracy", "backward_transfer", "learning_accuracy")
        rows.append([method, f"{rate:g}", *(with_spread([r[name] for r in best]) for name in names)])
    return rows
