"""What is learned: the model with its head, the loss of a batch, and what is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from subspace_jax.models import add_classifier, normalize_images

from ._backbone import Backbone

Batch = Mapping[str, Any]


class Judged(NamedTuple):
    """What a model makes of the labels of a batch, each label apart.

    Attributes:
      losses: float32, cross-entropy.
      counts: float32 of the same shape, one at labels and zero elsewhere.
      guesses: int32 of the same shape, the most likely class or token.
      probabilities: float32 of the same shape, of the guess.
    """

    losses: jax.Array
    counts: jax.Array
    guesses: jax.Array
    probabilities: jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and the labels that it learns.

    Attributes:
      params: pretrained parameters, with a fresh head where there is one.
      logits: function of parameters and batch.
      classes: of a classification, in the order of the logits; empty for a language model.
      roles: of the parameters' leaves.
    """

    params: Any
    logits: Callable[[Any, Batch], jax.Array]
    classes: tuple[Any, ...]
    roles: Mapping[str, sj.Role]

    @property
    def classifies(self) -> bool:
        """Whether the labels are classes of whole examples."""
        return bool(self.classes)

    def judge(self, logits: jax.Array, batch: Batch) -> Judged:
        """Returns losses and guesses of every label; a language model's of every token but the first."""
        if self.classifies:
            targets, counts = batch["labels"], batch["counts"]
        else:
            logits, targets, counts = logits[:, :-1], batch["tokens"][:, 1:], batch["labels"][:, 1:]
        logits = logits.astype(jnp.float32)
        guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return Judged(losses, counts.astype(jnp.float32), guesses, jnp.exp(best))

    def mean_loss(self, apply: Callable[[Any, Batch], jax.Array], adapted: Any, batch: Batch) -> jax.Array:
        """Returns the loss of a batch over its labels: their sum by their number."""
        logits = apply(adapted, batch)
        if self.classifies:
            judged = self.judge(logits, batch)
            total, count = jnp.sum(judged.losses * judged.counts), jnp.sum(judged.counts)
        else:
            total, count = sj.training.token_loss(logits, batch["tokens"], batch["labels"])
        return total / jnp.maximum(count, 1.0)

    def count(self, batch: Batch) -> jax.Array:
        """Returns the number of labels, by which micro-batches are weighed."""
        return jnp.sum(batch["counts"] if self.classifies else batch["labels"][:, 1:]).astype(jnp.float32)


def make_problem(backbone: Backbone, classes: tuple[Any, ...], seed: int, sample: Batch) -> Problem:
    """Makes the problem: a classifier with a fresh head where there are classes, the model as it is where not.

    Args:
      backbone: the model.
      classes: of the labels; empty for a language model.
      seed: of the head.
      sample: one batch, for the shapes.
    """
    model = add_classifier(backbone.model, len(classes), jax.random.key(seed)) if classes else backbone.model
    apply: Callable[..., Any] = model.module.apply

    def logits(params: Any, batch: Batch) -> jax.Array:
        if backbone.kind == "image encoder":
            return apply({"params": params}, normalize_images(batch["images"]))
        if classes:
            return apply({"params": params}, batch["tokens"], batch["mask"])
        return apply({"params": params}, batch["tokens"], batch["segments"] > 0, segments=batch["segments"])

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf), model.params)
    shapes = {name: jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype) for name, value in sample.items()}
    return Problem(params, logits, classes, sj.roles(logits, params, shapes))
