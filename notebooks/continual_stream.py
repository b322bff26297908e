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
# # A stream of tasks
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/subspace_jax/blob/main/notebooks/continual_stream.ipynb)
#
# A network learns five tasks, one after the other, and may keep no old data. Each time it forgets what it could. Can a line
# in the optimizer prevent that?

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
STEPS, TASKS = (30, 2) if QUICK else (300, 5)

# %% [markdown]
# ## Five tasks
#
# In each task the pixels of the digits are shuffled in another way, so that nothing learned about one picture helps with the
# next. Each task has a read-out of its own; the two layers below are shared, and that is where forgetting happens.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
rng = np.random.default_rng(0)
train_rows, test_rows = np.split(rng.permutation(len(images)), [1200])
shuffles = [rng.permutation(64) for _ in range(TASKS)]
sizes = (64, 100, 100)


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "layer_0": jax.random.normal(keys[0], (64, 100)) / 8,
        "layer_1": jax.random.normal(keys[1], (100, 100)) / 10,
        "heads": jnp.zeros((TASKS, 100, 10)),
    }


def fn(params, x, task):
    hidden = jax.nn.relu(jax.nn.relu(x @ params["layer_0"]) @ params["layer_1"])
    return hidden @ params["heads"][task]


def accuracy(params, task):
    logits = fn(params, images[test_rows][:, shuffles[task]], task)
    return 100 * float((logits.argmax(axis=-1) == labels[test_rows]).mean())


# %% [markdown]
# ## Training one task
#
# The optimizer is given the memory: for every shared kernel an orthonormal basis of the inputs that earlier tasks used.
# After a task `sj.methods.gpm.next_task` adds the directions of its own inputs. All shapes stay as they are, so the program
# is compiled once for all tasks.


# %%
def remember(memories, params, x):
    """Adds the directions of a task's inputs to every shared kernel: those that hold 97 % of their energy."""
    inputs = {"layer_0": x, "layer_1": jax.nn.relu(x @ params["layer_0"])}
    return {name: sj.methods.gpm.next_task(memories[name], inputs[name], 0.97) for name in memories}


def stream(make_optimizer):
    """The accuracies of every task after every task."""

    @jax.jit
    def train(params, basis, task, x, y):
        optimizer = make_optimizer(basis)

        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (64,), 0, len(x))

            def loss(params):
                logits = fn(params, x[rows], task)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(task), STEPS)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    params = init(jax.random.key(0))
    memories = {name: sj.methods.gpm.init_memory(size) for name, size in [("layer_0", 64), ("layer_1", 100)]}
    matrix, kept = np.full((TASKS, TASKS), np.nan), []
    for task in range(TASKS):
        x = images[train_rows][:, shuffles[task]]
        basis = {name: memory.basis for name, memory in memories.items()}
        params = train(params, basis, task, x, labels[train_rows])
        memories = remember(memories, params, x[:300])
        matrix[task, : task + 1] = [accuracy(params, old) for old in range(task + 1)]
        kept.append(int(memories["layer_0"].rank))
    return matrix, kept


# %% [markdown]
# ## Four optimizers
#
# A projection is an ordinary optax transformation. Before Adam is what one writes first: the gradients are clean, but
# Adam divides every entry by its own size, which turns the update back into the directions that were to stay. The same
# line after Adam, or around it, holds for the update itself.

# %%
arms = {
    "Adam": lambda basis: optax.adam(1e-3),
    "projection, then Adam": lambda basis: optax.chain(sj.project_orthogonal(basis), optax.adam(1e-3)),
    "Adam, then projection": lambda basis: optax.chain(optax.adam(1e-3), sj.project_orthogonal(basis)),
    "around Adam": lambda basis: sj.sandwich(optax.adam(1e-3), basis),
}
found = {}
for name, make in arms.items():
    found[name], kept = stream(make)
for name, matrix in found.items():
    last, learned = matrix[-1], np.diag(matrix)
    print(
        f"{name:22} at the end {last.mean():5.1f} %  when learned {learned.mean():5.1f} %  forgotten {(learned - last)[:-1].mean():4.1f}"
    )

# %%
figure, axes = plt.subplots(1, len(found), figsize=(12, 3.2), sharey=True)
for axis, (name, matrix) in zip(axes, found.items(), strict=True):
    picture = axis.imshow(matrix, vmin=20, vmax=100, cmap="viridis")
    axis.set_title(name, fontsize=10)
    axis.set(xlabel="test of task", xticks=range(TASKS), yticks=range(TASKS))
    for row, column in np.argwhere(~np.isnan(matrix)):
        color = "black" if matrix[row, column] > 70 else "white"
        axis.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color=color, fontsize=9)
axes[0].set_ylabel("after task")
figure.colorbar(picture, ax=axes, label="accuracy, %", shrink=0.8)
# %% [markdown]
# ## What it costs
#
# The memory grows, and what it holds is closed to later tasks: of the first layer's 64 inputs so many directions are kept
# after each task.

# %%
print(kept)

# %% [markdown]
# ## The answer
#
# Yes, if the line stands in the right place. Projected gradients alone leave a third of Adam's forgetting; projected updates
# leave a twentieth to a ninth, and what is learned is learned as well. `sj.methods.gpm.learner` has all of this in one
# object for any model, captures the inputs by itself and resumes; CoSO, OSF, O-LoRA and iGSP are others of its kind
# ([learning task after task](https://github.com/OWNER/subspace_jax/blob/main/docs/continual-learning.md)).
