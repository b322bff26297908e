"""What is learned: the model with its head, the loss of a batch, and what is right."""

from __future__ import annotations

import dataclasses
import functools
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
CHUNK = 1024  # places whose logits are in memory at a time


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
      sums: function of parameters and batch: the summed loss over the labels, and their number.
      classes: of a classification, in the order of the logits; empty for a language model.
      roles: of the parameters' leaves.
    """

    params: Any
    logits: Callable[[Any, Batch], jax.Array]
    sums: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    classes: tuple[Any, ...]
    roles: Mapping[str, sj.Role]

    @property
    def classifies(self) -> bool:
        """Whether the labels are classes of whole examples."""
        return bool(self.classes)

    @functools.cached_property
    def judge(self) -> Callable[[Any, Batch], Judged]:
        """Compiled function of parameters, with their stand-ins, and a batch: what they make of every label."""
        apply = sj.with_adapters(self.logits)

        def judge(adapted: Any, batch: Batch) -> Judged:
            logits = apply(adapted, batch)
            if self.classifies:
                return judge_labels(logits, batch["labels"], batch["counts"])
            return judge_labels(logits[:, :-1], batch["tokens"][:, 1:], batch["labels"][:, 1:])

        return jax.jit(judge)

    def count(self, batch: Batch) -> jax.Array:
        """Returns the number of labels, by which micro-batches are weighed."""
        return jnp.sum(batch["counts"] if self.classifies else batch["labels"][:, 1:]).astype(jnp.float32)


def judge_labels(logits: jax.Array, targets: jax.Array, counts: jax.Array) -> Judged:
    """Returns losses and guesses of labels, each apart."""
    logits = logits.astype(jnp.float32)
    best = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    guesses = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return Judged(losses, counts.astype(jnp.float32), guesses, jnp.exp(best))


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

    def sums(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        if classes:
            judged = judge_labels(logits(params, batch), batch["labels"], batch["counts"])
            # where, not a product: rows of padding may give anything.
            return jnp.sum(jnp.where(judged.counts > 0, judged.losses, 0.0)), jnp.sum(judged.counts)
        tokens, segments = batch["tokens"], batch["segments"]
        if tokens.size <= CHUNK:
            return sj.training.token_loss(logits(params, batch), tokens, batch["labels"])
        hidden = apply({"params": params}, tokens, segments > 0, segments=segments, return_hidden=True)

        def logits_of(states: jax.Array) -> jax.Array:
            if model.config.tie_embeddings:
                return states @ params["embedding"]["embedding"].astype(states.dtype).T
            return states @ params["head"]["kernel"].astype(states.dtype)

        return sj.training.chunked_token_loss(logits_of, hidden, tokens, batch["labels"], chunk=CHUNK)

    shapes = {name: jax.ShapeDtypeStruct(np.shape(value), np.asarray(value).dtype) for name, value in sample.items()}
    return Problem(model.params, logits, sums, classes, sj.roles(logits, model.params, shapes))
