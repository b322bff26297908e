# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A pod in one page
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/subspace_jax/blob/main/notebooks/a_pod_in_one_page.ipynb)
#
# A model too large for one chip lies in pieces on eight. Where do its adapter and the optimizer's state go, and does a step
# have to bring the pieces together?
#
# There are eight devices here as well: XLA makes them of one CPU, and the program is the one for a pod.

# %%
# In Colab: install the library. Elsewhere it is there already.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("subspace_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "subspace-jax", "matplotlib"], check=True)
os.environ["JAX_PLATFORMS"] = "cpu"  # leave these two lines out on a real pod
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

# %%
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from subspace_jax.training import init_train_state, make_mesh, make_train_step, shard_batch

QUICK = bool(os.environ.get("NOTEBOOK_QUICK"))  # set where this is only checked to run
LAYERS, WIDTH = (2, 32) if QUICK else (8, 128)

# %% [markdown]
# ## A mesh and a model on it
#
# Four devices along "data", which have other rows of the batch; two along "model", which have other columns of the weights.
# Layers are stacked, as under `nn.scan`.

# %%
mesh = make_mesh({"data": 4, "model": 2})
specs = {"up": P(None, None, "model"), "down": P(None, "model", None), "head": P(None, "model")}
shapes = {"up": (LAYERS, WIDTH, 4 * WIDTH), "down": (LAYERS, 4 * WIDTH, WIDTH), "head": (WIDTH, 16)}
placed = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def init(key):
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {name: jax.random.normal(keys[name], shape) / np.sqrt(shape[-2]) for name, shape in shapes.items()}


params = jax.jit(init, out_shardings=placed)(jax.random.key(0))  # never whole on one device


def fn(params, x):
    def layer(x, kernels):
        up, down = kernels
        return x + jax.nn.gelu(x @ up) @ down / 4, None

    x, _ = jax.lax.scan(layer, x, (params["up"], params["down"]))
    return x @ params["head"]


# %% [markdown]
# ## The adapter goes where its weight is
#
# `sj.shardings` reads it off: `a` is split as the weight's inputs, `b` as its outputs, the rank is whole everywhere. Under
# `jit` the start is computed where it will lie; that goes for methods that decompose the weight, too.

# %%
rules = {"{up,down}": sj.lora(rank=8), "head": sj.full()}
roles = sj.roles(fn, params, jax.ShapeDtypeStruct((8, WIDTH), jnp.float32))
make = lambda params: sj.adapt(params, rules, key=jax.random.key(1), roles=roles)
adapted = jax.jit(make, out_shardings=sj.shardings(jax.eval_shape(make, params), params))(params)

for name in ("up", "down"):
    for field in ("base", "a", "b"):
        array = getattr(adapted[name], field)
        print(f"{name:5} {field:5} {array.shape!s:16} {array.sharding.spec}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.4), width_ratios=[4, 1, 4])
colors = plt.get_cmap("tab10")
for axis, field in zip(axes, ("base", "a", "b"), strict=True):
    array = getattr(adapted["up"], field)
    for shard in array.addressable_shards:
        rows, columns = (
            range(*index.indices(size)) for index, size in zip(shard.index[1:], array.shape[1:], strict=True)
        )
        position = np.argwhere(mesh.devices == shard.device)[0]
        corner, size = (columns.start, rows.start), (len(columns), len(rows))
        axis.add_patch(plt.Rectangle(corner, *size, facecolor=colors(position[1]), alpha=0.15, edgecolor="black"))
    axis.set(xlim=(0, array.shape[2]), ylim=(array.shape[1], 0), title=f"up: {field}", xticks=[], yticks=[])
    for half in range(2):
        if array.sharding.spec[-1] == "model":
            axis.text(array.shape[2] * (half + 0.5) / 2, array.shape[1] / 2, f"model {half}", ha="center", va="center")
axes[1].text(4, WIDTH / 2, "whole", ha="center", va="center", rotation=90)
# %% [markdown]
# ## A step
#
# `make_train_step` compiles one step of gradients, accumulation and optimizer; moments lie where what they belong to lies.

# %%
optimizer, apply = optax.adamw(3e-3), sj.with_adapters(fn)
state = init_train_state(adapted, optimizer, jax.random.key(2))


def loss(adapted, batch, key):
    logits = apply(adapted, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


step = make_train_step(loss, optimizer, accumulate=2)
rng = np.random.default_rng(0)
x = rng.normal(size=(256, WIDTH)).astype(np.float32)
batch = shard_batch({"x": x, "y": (x[:, :16].argmax(axis=1)).astype(np.int32)}, mesh)
for number in range(5 if QUICK else 40):
    state, metrics = step(state, batch)
    if number % 10 == 0:
        print(f"step {number:2}: loss {metrics['loss']:.3f}")
print("first moment of b:", state.opt_state[0].mu["up"].b.sharding.spec)

# %% [markdown]
# ## What travels
#
# The compiled program says what devices send each other. A frozen weight is never among it: what moves are activations of
# the rows and gradients of the factors.


# %%
def traffic(params):
    """The arrays that devices exchange in one gradient, largest first."""
    trainable, frozen = sj.partition(params)
    gradient = jax.jit(jax.grad(lambda t, f, batch: loss(sj.combine(t, f), batch, None)))
    program = gradient.lower(trainable, frozen, batch).compile().as_text()
    found = re.findall(r"= (?:\()?(\w+)\[([\d,]*)\].*? (all-reduce|all-gather|all-to-all|reduce-scatter)", program)
    sizes = [(int(np.prod([int(n) for n in dims.split(",") if n])) * 4, kind, dims) for _, dims, kind in found]
    return sorted(sizes, reverse=True)


one_weight = 4 * WIDTH * 4 * WIDTH // 2
sent = traffic(adapted)
print(f"a device's part of one layer's frozen weight: {one_weight:,} bytes")
print(f"largest array sent: {sent[0][0]:,} bytes ({sent[0][1]} of [{sent[0][2]}])")
assert all("all-gather" not in kind for _, kind, _ in sent)


def held(tree):
    """Bytes that the first device holds."""
    first = mesh.devices.flat[0]
    shards = [s.data.nbytes for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards if s.device == first]
    return sum(shards)


print(f"held by a device: {held(params):,} bytes of the model, {held(state.trainable):,} of what learns,")
print(f"{held(state.opt_state):,} of the optimizer's state; whole model: {sum(v.nbytes for v in params.values()):,}")

# %% [markdown]
# ## The answer
#
# The adapter lies beside the pieces of its weight, the optimizer's state beside the adapter, and a step sends activations
# and small gradients only. On a real pod the same lines run in every process after `sj.training.initialize_distributed`;
# `sj.training.fit` saves, stops at SIGTERM and resumes to the same bits
# ([sharding](https://github.com/OWNER/subspace_jax/blob/main/docs/sharding.md)).
