"""Small trees of experts, full and adapted, and what they are in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj

SHAPES = {"dense": (12, 10), "wide": (6, 14), "bias": (10,), "stack": (3, 8, 6)}
ROLES = {"stack": sj.Role.dense(in_axes=(1,), out_axes=(2,), stack_axes=(0,))}


def base_tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    tree = {n: jax.device_put(rng.normal(size=s).astype(dtype)) for n, s in SHAPES.items()}
    return tree | {"steps": jnp.arange(3)}


def full_experts(base, count=3, size=0.1, seed=1):
    """Trees that differ from the base everywhere by about `size`."""
    rng = np.random.default_rng(seed)
    return [jax.tree.map(lambda v: _noisy(v, rng, size), base) for _ in range(count)]


def adapted_experts(base, methods, seed=2):
    """Trees with an adapter of one method each on all matrices, moved away from its start."""
    roles = {p: r for p, r in ROLES.items() if p in base}
    return [
        moved(sj.adapt(base, {"{dense,wide,stack}": m}, key=jax.random.key(seed + i), roles=roles), seed + i)
        for i, m in enumerate(methods)
    ]


def moved(adapted, seed, size=0.3):
    """Adds noise to everything that learns."""
    rng = np.random.default_rng(seed)
    trainable, frozen = sj.partition(adapted)
    return sj.combine(jax.tree.map(lambda v: _noisy(v, rng, size), trainable), frozen)


def _noisy(array, rng, size):
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jax.device_put((np.asarray(array, np.float32) + size * rng.normal(size=array.shape)).astype(array.dtype))


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
