"""Trains sparse vectors of languages and of a task on a small encoder, in programs that serve every support."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj
from experiments.tasks.django_languages import masked_loss, task_logits

sft = sj.methods.composable_sft
MASKABLE = ("encoder/**/{embedding,kernel}", "encoder/encoder/**/{query,key,value,output,fc1,fc2}/bias")
HEADS = {"task": "out/*", "language": "decoder/*"}


@functools.partial(jax.jit, static_argnames=("module", "masked", "steps", "batch", "kind"))
def train(
    adapted: Any,
    data: Any,
    start: Any,
    rate: jax.Array,
    key: jax.Array,
    *,
    module: Any,
    masked: int,
    steps: int,
    batch: int,
    kind: str,
) -> Any:
    """Adam with linear decay and gradients clipped at norm 1, from a new state."""
    tokens, mask, labels = data
    total = sum(v.size for v in jax.tree.leaves(start))

    def objective(tree: Any, key: jax.Array) -> jax.Array:
        first, second = jax.random.split(key)
        rows = jax.random.randint(first, (batch,), 0, len(tokens))
        if kind == "language":
            loss = sj.with_adapters(lambda p: masked_loss(module, p, tokens[rows], mask[rows], masked, second))(tree)
            return loss + 0.1 * sft.distance(tree, total, start)
        logits = sj.with_adapters(lambda p: task_logits(module, p, tokens[rows], mask[rows]))(tree)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]))

    decay = optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), decay, optax.scale(-rate))
    return sj.training.scan_steps(objective, optimizer, adapted, jax.random.split(key, steps)).adapted


_TEMPLATES: dict[str, Any] = {}


def template(params: Any, kind: str) -> Any:
    """Returns a tree with additions to some entries of every maskable array, and a head."""
    if kind not in _TEMPLATES:
        paths = [p for p, _ in sj.core.leaves_with_paths(params) if any(sj.core.matches(one, p) for one in MASKABLE)]
        some = sft.select_changed(params, jax.tree.map(lambda v: v + 1.0, params), len(paths), maskable=MASKABLE)
        rules = {HEADS[kind]: sj.full(), MASKABLE: sft.composable_sft(some)}
        _TEMPLATES[kind] = sj.adapt(params, rules, key=jax.random.key(0))
    return _TEMPLATES[kind]


def with_support(tree: Any, start: Any, chosen: Any, count: int) -> Any:
    """The tree on other arrays and with other entries, in lists of one length, so that one program serves all."""
    arrays = dict(sj.core.leaves_with_paths(start))

    def one(path: str, weight: Any) -> Any:
        if not sj.core.is_weight(weight):
            return arrays[path]
        if not isinstance(weight, sj.weights.SparseDelta):
            return dataclasses.replace(weight, value=arrays[path])
        room = min(count, weight.size)
        at = np.full(room, weight.size, np.int32)
        found = np.flatnonzero(chosen.chosen[path])[:room]
        at[: len(found)] = found
        return dataclasses.replace(
            weight, base=arrays[path], indices=jnp.asarray(at), values=jnp.zeros(room, weight.values.dtype)
        )

    return sj.core.map_with_paths(one, tree)


@functools.partial(jax.jit, static_argnames="module")
def predict(module: Any, params: Any, tokens: Any, mask: Any) -> jax.Array:
    """Logits of the application of each message."""
    return task_logits(module, params, tokens, mask)


def maskable_arrays(params: Any) -> list[Any]:
    """The arrays in which entries may be chosen."""
    return [v for p, v in sj.core.leaves_with_paths(params) if any(sj.core.matches(one, p) for one in MASKABLE)]
