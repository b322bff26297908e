"""Small trees of experts, full and adapted, and what they are in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj

SHAPES = {"dense": (12, 10), "wide": (6, 14), "bias": (10,), "stack": (3, 8, 6)}
ROLES = {"stack": sj.Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,))}


def base_tree(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    tree = {
        n: jax.random.normal(k, s, jnp.float32).astype(dtype) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)
    }
    return tree | {"steps": jnp.arange(3)}


def full_experts(base, count=3, size=0.1, seed=1):
    """Trees that differ from the base everywhere by about `size`."""

    def one(key):
        leaves, treedef = jax.tree.flatten(base)
        keys = jax.random.split(key, len(leaves))
        moved = [
            (v.astype(jnp.float32) + size * jax.random.normal(k, v.shape)).astype(v.dtype)
            if jnp.issubdtype(v.dtype, jnp.floating)
            else v
            for k, v in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, moved)

    return [one(k) for k in jax.random.split(jax.random.key(seed), count)]


def adapted_experts(base, methods, seed=2):
    """Trees with an adapter of one method each on all matrices, moved away from its start."""
    keys = jax.random.split(jax.random.key(seed), len(methods))
    roles = {p: r for p, r in ROLES.items() if p in base}
    return [
        moved(sj.adapt(base, {"{dense,wide,stack}": m}, key=k, roles=roles), k)
        for m, k in zip(methods, keys, strict=True)
    ]


def moved(adapted, key, size=0.3):
    """Adds noise to everything that learns."""
    trainable, frozen = sj.partition(adapted)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(key, len(leaves))
    moved = [v + size * jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves, strict=True)]
    return sj.combine(jax.tree.unflatten(treedef, moved), frozen)


def arrays(tree):
    """The tree's arrays in float64, by path; LoRAs are formed in float64 from their parts."""
    found = {}
    for path, leaf in sj.core.leaves_with_paths(tree):
        if isinstance(leaf, sj.weights.LowRank):
            a, b = np.asarray(leaf.a, np.float64), np.asarray(leaf.b, np.float64)
            delta = leaf.role.unmatrix(leaf.scale * (a @ b), leaf.shape)  # pyright: ignore[reportArgumentType]
            found[path] = np.asarray(leaf.base, np.float64) + np.asarray(delta, np.float64)
        elif sj.core.is_weight(leaf):
            found[path] = np.asarray(leaf.materialize(jnp.float32), np.float64)
        else:
            found[path] = np.asarray(leaf, np.float64)
    return found


def plain(tree):
    """The tree with all stand-in weights formed in float32."""
    return sj.merge(tree, keep_float32=True)


def with_leaf(tree, name, **fields):
    return tree | {name: dataclasses.replace(tree[name], **fields)}
