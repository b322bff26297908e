"""A small problem that the tests of training share: two layers, one with LoRA, one bias that learns whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_jax as sj

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
RULES = {"in": sj.lora(2), "out": sj.pissa(2), "bias": sj.full()}


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"in": (16, 32), "bias": (32,), "out": (32, 8)}
    return {name: jnp.asarray(rng.normal(size=shape) / 4, jnp.float32) for name, shape in shapes.items()}


def make_adapted(rules=RULES):
    return sj.adapt(make_params(), rules, key=jax.random.key(0))


def model(params, x):
    return jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"]


def loss(adapted, batch, key):
    del key
    error = sj.with_adapters(model)(adapted, batch["x"]) - batch["y"]
    return jnp.mean(error**2)


def make_batch(number, rows=16):
    x, y = np.random.default_rng([1, number]).normal(size=(2, rows, 16)).astype(np.float32)
    return {"x": x, "y": y[:, :8]}


def batches(start):
    """As many as anyone takes, each a function of its number."""
    while True:
        yield make_batch(start)
        start += 1


def content(state):
    """All bytes of a state."""
    key = jax.random.key_data(state.key)
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state._replace(key=key)))
