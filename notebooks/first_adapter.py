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
# # First adapter
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/subspace_jax/blob/main/notebooks/first_adapter.ipynb)
#
# A network has learned to read digits. Now they come turned by 90 degrees, and there are 150 of them. How many of its
# weights have to learn for it to read these too?

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

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import subspace_jax as sj

QUICK = bool(os.environ.get("NOTEBOOK_QUICK"))  # set where this is only checked to run
STEPS, SEEDS = (40, 1) if QUICK else (300, 3)

# %% [markdown]
# ## The data, and a network that reads upright digits
#
# The 8 x 8 digits come with scikit-learn. We train a small network on the upright ones, which stands for a pretrained
# model.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = (images / 16).reshape(-1, 8, 8).astype(np.float32), jnp.asarray(labels)
turned = np.rot90(images, axes=(1, 2))
order = np.random.default_rng(0).permutation(len(images))
few, test = order[:150], order[1000:]

figure, axes = plt.subplots(2, 8, figsize=(8, 2.2))
for column, number in enumerate(order[:8]):
    axes[0, column].imshow(images[number], cmap="gray_r")
    axes[1, column].imshow(turned[number], cmap="gray_r")
for axis in axes.flat:
    axis.set_axis_off()

# %%
model = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])
flat = lambda pictures: jnp.asarray(pictures).reshape(len(pictures), 64)


def train(fn, trainable, frozen, x, y, rate, steps=STEPS):
    """Trains what learns; returns the whole tree."""
    optimizer = optax.adam(rate)

    @jax.jit
    def run(trainable, frozen):
        def step(carry, key):
            trainable, state = carry
            rows = jax.random.randint(key, (64,), 0, len(x))

            def loss(trainable):
                logits = fn(sj.combine(trainable, frozen), x[rows])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

            grads = jax.grad(loss)(trainable)
            updates, state = optimizer.update(grads, state, trainable)
            return (optax.apply_updates(trainable, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (trainable, optimizer.init(trainable)), keys)[0][0]

    return sj.combine(run(trainable, frozen), frozen)


fn = lambda params, x: model.apply({"params": params}, x)
start = model.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
nothing = jax.tree.map(lambda _: None, start)
pretrained = train(fn, start, nothing, flat(images[order[150:1000]]), labels[order[150:1000]], 3e-3)


def accuracy(params, pictures):
    logits = sj.with_adapters(fn)(params, flat(pictures[test]))
    return 100 * float((logits.argmax(axis=-1) == labels[test]).mean())


print(f"upright digits: {accuracy(pretrained, images):.1f} %, turned ones: {accuracy(pretrained, turned):.1f} %")

# %% [markdown]
# ## Adapters
#
# A rule says which weights get which method. `sj.adapt` puts stand-in weights into the tree; the model's code stays as it
# is.

# %%
head = {"layers_4/*": sj.full()}  # the last layer learns as it is; the first rule that matches counts
rotated = {"{layers_0,layers_2}/kernel": sj.oft(block_size=32)}
arms = {  # rules, and the best of a few learning rates
    "last layer": (head, 3e-2),
    "LoRA, rank 2": ({**head, "**/kernel": sj.lora(rank=2)}, 5e-3),
    "LoRA, rank 8": ({**head, "**/kernel": sj.lora(rank=8)}, 5e-3),
    "OFT, blocks of 32": ({**head, **rotated}, 5e-3),
    "everything": ({"**": sj.full()}, 3e-3),
}
if QUICK:
    arms = {name: arms[name] for name in ("LoRA, rank 8", "OFT, blocks of 32")}
adapted = sj.adapt(pretrained, arms["LoRA, rank 8"][0], key=jax.random.key(2))
print(sj.summary(adapted))

# %% [markdown]
# `sj.partition` splits it into what learns and what does not; only the first part is differentiated.

# %%
found = {}
for name, (rules, rate) in arms.items():
    scores = []
    for seed in range(SEEDS):
        adapted = sj.adapt(pretrained, rules, key=jax.random.key(seed))
        trainable, frozen = sj.partition(adapted)
        rows = np.random.default_rng(seed).permutation(order[:1000])[:150]
        tuned = train(sj.with_adapters(fn), trainable, frozen, flat(turned[rows]), labels[rows], rate)
        scores.append(accuracy(tuned, turned))
    values = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    found[name] = values, np.mean(scores), np.std(scores)
    print(f"{name:18} {values:7,} values  {np.mean(scores):5.1f} ± {np.std(scores):.1f} %")

# %%
figure, axis = plt.subplots(figsize=(7, 4))
for name, (values, mean, spread) in found.items():
    axis.errorbar(values, mean, yerr=spread, marker="o", capsize=3)
    axis.annotate(name, (values, mean), xytext=(6, -12), textcoords="offset points")
axis.set(xscale="log", xlabel="values that learn", ylabel="turned digits read, %", xlim=(1e3, 1e5))
axis.grid(alpha=0.3)

# %% [markdown]
# ## Out again
#
# `sj.merge` makes ordinary arrays of it, which cost nothing extra; `sj.save_adapter` keeps what was learned as a small
# file.

# %%
plain = sj.merge(tuned)
difference = jnp.abs(fn(plain, flat(turned[test])) - sj.with_adapters(fn)(tuned, flat(turned[test]))).max()
print(f"merged: {type(plain['layers_0']['kernel']).__name__}, logits differ by {difference:.1e}")

# %% [markdown]
# ## The answer
#
# A tenth of the values and the last layer read the turned digits nearly as well as training everything; the last layer
# alone falls behind, since what it sees was made for upright digits. And what the change *is* matters: a turned picture has
# the same pixels in other places, which is a rotation of the inputs, and OFT, which learns rotations, is as good as
# everything. The figures are those of one small task:
# [Which method?](https://github.com/OWNER/subspace_jax/blob/main/docs/which-method.md) has more of them.
