"""What a task of the league is: a pretrained model, data to learn from, and something that it knew before."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj

Batch = Mapping[str, Any]

# Examples that are judged at once; sizes of held-out splits are multiples of it.
JUDGED = 32


class Job(abc.ABC):
    """One task with its model: everything that runs of different methods and seeds share.

    Attributes:
      name: of the task.
      known: what the pretrained model knew, in words.
      kernels: pattern of the kernels that methods adapt.
      outputs: pattern of the kernels that leave attention.
      downs: pattern of the kernels that leave feed-forward blocks.
      scope: pattern of all that a method of scales and shifts may adapt; empty where nothing can be shifted.
      heads: attention heads of a block.
      head: rules of what every method trains as a whole.
      data: arrays by split, `train`, `validation`, `test` and `known`.
      steps: optimizer steps of a run.
      batch_size: examples of a step.
    """

    name: str
    known: str
    kernels: str
    outputs: str
    downs: str
    scope: str
    heads: int
    head: Mapping[str, Any]
    data: Mapping[str, Batch]
    steps: int
    batch_size: int

    @abc.abstractmethod
    def start(self, seed: int) -> Any:
        """Returns the pretrained parameters, with a fresh head where there is one."""

    @abc.abstractmethod
    def model(self, params: Any, batch: Batch) -> jax.Array:
        """Returns the logits of ordinary parameters."""

    @abc.abstractmethod
    def targets(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns logits, integer targets and weights, of what is predicted."""

    @abc.abstractmethod
    def known_hits(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns how many of the `known` examples ordinary parameters get right, and out of how many."""

    def loss(self, adapted: Any, batch: Batch) -> jax.Array:
        """Returns the mean cross-entropy of a tree with stand-in weights."""
        logits, targets, weights = self.targets(sj.with_adapters(self.model)(adapted, batch), batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return (losses * weights).sum() / jnp.maximum(weights.sum(), 1)

    def hits(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns how many predictions are right, and out of how many."""
        logits, targets, weights = self.targets(self.model(params, batch), batch)
        return ((logits.argmax(-1) == targets) * weights).sum(), weights.sum()

    def batches(self, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields the training batches of a run: epochs of the seed's order, until the steps are done."""
        train, rng = self.data["train"], np.random.default_rng(seed)
        count, order = len(next(iter(train.values()))), np.empty(0, int)
        for _ in range(self.steps):
            if len(order) < self.batch_size:
                order = np.concatenate([order, rng.permutation(count)])
            picked, order = order[: self.batch_size], order[self.batch_size :]
            yield {name: array[picked] for name, array in train.items()}

    def accuracy(self, params: Any, split: str) -> float:
        """Returns the share of right predictions of ordinary parameters on a split."""
        return self._share("hits", params, split)

    def retained(self, params: Any) -> float:
        """Returns the share of right predictions on what the pretrained model knew."""
        return self._share("known_hits", params, "known")

    def _share(self, function: str, params: Any, split: str) -> float:
        compiled = self._compiled.setdefault(function, jax.jit(getattr(self, function)))
        right = total = 0.0
        arrays = self.data[split]
        for start in range(0, len(next(iter(arrays.values()))), JUDGED):
            found = compiled(params, {k: v[start : start + JUDGED] for k, v in arrays.items()})
            right, total = right + float(found[0]), total + float(found[1])
        return right / total

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        """What has been compiled, by the name of the method."""
        return {}


def whole(size: int) -> int:
    """Returns a number of examples rounded down to what is judged at once, at least one such batch."""
    return max(JUDGED, size // JUDGED * JUDGED)


def linear_probe(features: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Returns the head of a ridge regression on one-hot labels, on standardized features."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    ridge = RidgeClassifier(alpha=10.0).fit(scaler.transform(features), labels)
    if len(ridge.classes_) != classes:
        raise ValueError(
            f"{len(ridge.classes_)} of {classes} classes among the probe's examples: expected all of them."
        )
    kernel = ridge.coef_.T / np.asarray(scaler.scale_)[:, None]
    bias = ridge.intercept_ - np.asarray(scaler.mean_) @ kernel
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
