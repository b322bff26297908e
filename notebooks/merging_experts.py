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
# # Merging eight experts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/subspace_jax/blob/main/notebooks/merging_experts.ipynb)
#
# One network reads the pictures of eight cameras. All of them have been knocked: each camera's pictures are now shifted in a
# direction of its own. At every camera somebody has trained an adapter, on the pictures of that camera alone. Is there one
# network that reads all eight, without training anew?

# %%
# In Colab: install the library. Elsewhere it is there already.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("subspace_jax") is None:
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "subspace-jax", "scikit-learn", "matplotlib"], check=True
    )

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import subspace_jax as sj

QUICK = bool(os.environ.get("NOTEBOOK_QUICK"))  # set where this is only checked to run
STEPS, EXPERTS = (40, 3) if QUICK else (400, 8)

# %%
images, labels = load_digits(return_X_y=True)
images, labels = (images / 16).reshape(-1, 8, 8).astype(np.float32), jnp.asarray(labels)
train_rows, validation, test = np.split(np.random.default_rng(0).permutation(len(images)), [1100, 1300])
SHIFTS = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)][:EXPERTS]


def seen_by(camera, shift):
    """Rows of 8 x 100 inputs, zero but for those of one camera, whose pictures are shifted."""
    moved = np.roll(np.pad(images, ((0, 0), (1, 1), (1, 1))), shift, axis=(1, 2)).reshape(-1, 100)
    rows = np.zeros((len(images), 8, 100), np.float32)
    rows[:, camera] = moved
    return jnp.asarray(rows.reshape(-1, 800))


before = jnp.stack([seen_by(camera, (0, 0)) for camera in range(EXPERTS)])
pictures = jnp.stack([seen_by(camera, shift) for camera, shift in enumerate(SHIFTS)])
figure, axes = plt.subplots(2, EXPERTS, figsize=(9, 2.6))
for camera in range(EXPERTS):
    for axis, shown in zip(axes[:, camera], (before, pictures), strict=True):
        axis.imshow(shown[camera, 0].reshape(8, 10, 10)[camera], cmap="gray_r")
        axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("before")
axes[1, 0].set_ylabel("knocked")

# %% [markdown]
# ## A base and eight adapters
#
# `jax.vmap` trains all experts at once: adapters of one shape are one program.


# %%
def fn(params, x):
    hidden = jax.nn.relu(x @ params["layer_0"] + params["bias_0"])
    hidden = jax.nn.relu(hidden @ params["layer_1"] + params["bias_1"])
    return hidden @ params["head"]


def train(trainable, frozen, cameras, steps=STEPS, rate=3e-3):
    """Trains on the pictures of some cameras, `[cameras, pictures, inputs]`."""
    optimizer, apply = optax.adam(rate), sj.with_adapters(fn)
    cameras, y = cameras[:, train_rows], labels[train_rows]

    def step(carry, key):
        trainable, state = carry
        which, rows = (
            jax.random.randint(k, (64,), 0, n) for k, n in zip(jax.random.split(key), cameras.shape, strict=False)
        )

        def loss(trainable):
            logits = apply(sj.combine(trainable, frozen), cameras[which, rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(trainable), state)
        return (optax.apply_updates(trainable, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(step, (trainable, optimizer.init(trainable)), keys)[0][0]


keys = jax.random.split(jax.random.key(0), 3)
start = {
    "layer_0": jax.random.normal(keys[0], (800, 96)) / 10,
    "bias_0": jnp.zeros(96),
    "layer_1": jax.random.normal(keys[1], (96, 96)) / 10,
    "bias_1": jnp.zeros(96),
    "head": jnp.zeros((96, 10)),
}
base = jax.jit(train)(start, jax.tree.map(lambda _: None, start), before)

adapted = sj.adapt(base, {"layer_*": sj.lora(rank=8)}, key=jax.random.key(2))
trainable, frozen = sj.partition(adapted)
trained = jax.jit(jax.vmap(lambda x: train(trainable, frozen, x[None])))(pictures)
experts = [sj.combine(jax.tree.map(lambda v, i=i: v[i], trained), frozen) for i in range(EXPERTS)]


@jax.jit
def scores(params, rows):
    """The share of digits that are read rightly, for each camera."""
    right = jax.vmap(lambda x: (fn(params, x[rows]).argmax(axis=-1) == labels[rows]).mean())
    return 100 * right(pictures)


alone = np.array([scores(sj.merge(expert), test) for expert in experts])
others = alone[~np.eye(EXPERTS, dtype=bool)]
print(f"base: {scores(base, test).mean():.1f} %")
print(f"experts: {np.diag(alone).mean():.1f} % at their own camera, {others.mean():.1f} % at the others")

# %% [markdown]
# ## Merge
#
# A merger is a pure function of the experts and the base. Each has one strength, which we choose on validation digits.
# RegMean also asks what inputs each expert's layers have seen: the Gram matrices of 200 pictures without labels, which
# `sj.capture` gathers.

# %%
merged_experts = [sj.merge(expert) for expert in experts]
grams = [
    sj.capture(fn, expert, [pictures[camera, train_rows[:200]]], statistics="gram", select="layer_*")
    for camera, expert in enumerate(merged_experts)
]
mergers = {
    "mean": (sj.merging.average, [None]),
    "task arithmetic": (lambda e, b, s: sj.merging.task_arithmetic(e, b, weights=s), [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]),
    "TIES": (lambda e, b, s: sj.merging.ties(e, b, density=0.3, scale=s), [0.5, 1.0, 1.5, 2.0, 3.0]),
    "TSV-M": (lambda e, b, s: sj.merging.tsv_m(e, b, scale=s), [0.3, 0.5, 0.7, 1.0, 1.4]),
    "DO-Merging": (lambda e, b, s: sj.methods.do_merging.do_merging(e, b, scale=s), [1.0, 1.4, 2.0, 2.8, 4.0]),
    "RegMean": (lambda e, b, s: sj.merging.regmean(e, b, grams, off_diagonal=s), [0.5, 0.9, 0.98]),
}
found = {}
for name, (merger, strengths) in mergers.items():
    tried = {}
    for strength in strengths[1:3] if QUICK else strengths:
        merged = merger(experts, base) if strength is None else merger(experts, base, strength)
        tried[strength] = sj.merge(merged)
    if not tried:
        tried = {None: sj.merge(merger(experts, base))}
    best = max(tried, key=lambda s: float(scores(tried[s], validation).mean()))
    found[name] = np.asarray(scores(tried[best], test))
    print(f"{name:16} strength {best}: {found[name].mean():.1f} %, worst camera {found[name].min():.1f} %")

joint = jax.jit(lambda x: train(trainable, frozen, x, steps=2 * STEPS))(pictures)
together = np.asarray(scores(sj.merge(sj.combine(joint, frozen)), test))
print(f"trained on all eight together: {together.mean():.1f} %")

# %%
rows = {"base": np.asarray(scores(base, test)), "one expert": alone[0], **found, "trained together": together}
figure, axis = plt.subplots(figsize=(8, 3.6))
picture = axis.imshow(np.stack(list(rows.values())), vmin=30, vmax=100, cmap="viridis", aspect="auto")
axis.set_yticks(range(len(rows)), list(rows))
axis.set_xticks(range(EXPERTS), [str(s) for s in SHIFTS])
for row, values in enumerate(rows.values()):
    for column, value in enumerate(values):
        color = "black" if value > 75 else "white"
        axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
axis.set_xlabel("camera, by its shift")
figure.colorbar(picture, label="read rightly, %")
# %% [markdown]
# ## What comes back is an adapter
#
# Linear mergers of eight LoRAs of rank 8 give one LoRA of rank 64; `sj.merging.to_low_rank` makes it small again.

# %%
merged = sj.merging.regmean(experts, base, grams)
print(type(merged["layer_0"]).__name__, "of rank", merged["layer_0"].rank)
for rank in (32, 16, 8, 4):
    small = sj.merging.to_low_rank(merged, base, rank=rank)
    print(f"rank {rank:2}: {scores(sj.merge(small), test).mean():.1f} %")

# %% [markdown]
# ## The answer
#
# Nearly. What a merger is not told it has to guess: without data the best of these, TIES, reads two thirds. RegMean knows which
# inputs each expert's layers have seen, from 200 pictures without labels and no training at all, and comes within two points
# of a network that was trained on all cameras together; half of its rank is enough for that. Other mergers, and what stays an
# adapter in each: [merging](https://github.com/OWNER/subspace_jax/blob/main/docs/merging.md).
