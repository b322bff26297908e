"""A stream of tiny tasks, and one learner of every kind for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj

TASKS, WIDTH, DIRECTIONS, FEATURES, LABELS, BATCH = 5, 20, 4, 16, 3, 8
HEADS = {"heads": sj.full()}


def model(params, batch):
    """One kernel that learns, one that does not, and a head for every task."""
    hidden = jax.nn.relu(jax.nn.relu(batch["x"] @ params["kernel"]) @ params["features"])
    return hidden @ params["heads"][batch["task"]]


apply = sj.with_adapters(model)


def loss(params, batch):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch), batch["y"]).mean()


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (WIDTH, WIDTH), "features": (WIDTH, FEATURES), "heads": (TASKS, FEATURES, LABELS)}
    drawn = {name: rng.normal(size=s) / np.sqrt(s[-2]) for name, s in shapes.items()}
    drawn["kernel"] += 0.5 * np.eye(WIDTH)  # outputs that resemble inputs, as importance expects
    return {name: jnp.asarray(value, jnp.float32) for name, value in drawn.items()}


def batches(task, count=6, start=0):
    """Batches of a task, whose inputs lie in four directions, one of them the task's before."""
    for number in range(start, count):
        yield dict(_batch(task, number))


@functools.cache
def _batch(task, number):
    basis = np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0]
    own = basis[:, (DIRECTIONS - 1) * task :][:, :DIRECTIONS]
    teacher = np.random.default_rng([6, task]).normal(size=(DIRECTIONS, LABELS))
    latent = np.random.default_rng([7, task, number]).normal(size=(BATCH, DIRECTIONS))
    return {
        "x": jnp.asarray(latent @ own.T, jnp.float32),
        "y": jnp.asarray(np.argmax(latent @ teacher, axis=-1), jnp.int32),
        "task": jnp.asarray(task, jnp.int32),
    }


def inputs(task):
    return np.concatenate([b["x"] for b in batches(task)])


def coso(rate, tasks=TASKS):
    return sj.coso(rate, 4, 4, 2, "in", tasks=tasks)


LEARNERS = {
    "sequential": lambda: sj.continual.sequential_learner(loss, {"kernel": sj.full()} | HEADS, optax.adam(0.02)),
    "sequential lora": lambda: sj.continual.sequential_learner(loss, {"kernel": sj.lora(2)} | HEADS, optax.adam(0.05)),
    "joint": lambda: sj.continual.joint_learner(loss, {"kernel": sj.full()} | HEADS, optax.adam(0.02)),
    "o_lora": lambda: sj.methods.o_lora.learner(loss, "kernel", optax.adam(0.05), tasks=TASKS, rank=2, rules=HEADS),
    "gpm": lambda: sj.methods.gpm.learner(loss, "kernel", optax.adam(0.02), threshold=0.9999, rules=HEADS),
    "osf": lambda: sj.methods.osf.learner(loss, "kernel", optax.adam(0.02), tasks=TASKS, rules=HEADS),
    "osf importance": lambda: sj.methods.osf.learner(
        loss, "kernel", optax.adam(0.02), tasks=TASKS, preserved="importance", target=0.5, rules=HEADS
    ),
    "igsp": lambda: sj.methods.igsp.learner(
        loss, "kernel", optax.adam(0.05), tasks=TASKS, steps=5, size=8, scale=1.0, rules=HEADS
    ),
    "coso": lambda: sj.methods.coso.learner(
        loss, "kernel", coso(0.02), energy_threshold=2.0, rules=HEADS, rules_optimizer=optax.adam(0.02)
    ),
}


def kernel_of(learner, state):
    kernel = learner.params(state)["kernel"]
    if not getattr(kernel, "mergeable", True):  # what it makes of inputs of length one
        return np.asarray(sj.with_adapters(lambda params: jnp.eye(WIDTH) @ params["kernel"])({"kernel": kernel}))
    return np.asarray(sj.merge(learner.params(state))["kernel"])


def heads_of(learner, state):
    return np.asarray(sj.merge({"heads": learner.params(state)["heads"]})["heads"])
