"""Runs every manifold on a mesh of 8 host devices and compares with one device; a program of its own.

Usage: python sharded.py [MANIFOLD ...]
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))

import subspace_jax as sj
from tests.eight_devices import check_cases

SPACES = [sj.manifolds.Stiefel(), sj.manifolds.Grassmann(), sj.manifolds.SpecialOrthogonal()]


@functools.partial(jax.jit, static_argnums=0)
def everything(space, x, y, v):
    t = space.to_tangent(x, v)
    ends = [space.retract(x, t, method) for method in ("exponential", "qr", "polar")]
    others = [space.project(x + v), space.transport(x, t, y), space.inner(x, t, t), space.distance(x, y)]
    return {"each": [t, *ends, *others], "steps": steps(space, x, v)}


def steps(space, x, v):
    """A point after three steps, one of them with a renormalization, and the momentum."""
    optimizer = sj.riemannian(space, optax.sgd(0.1, 0.9), transport="isometric", renormalize_every=2)
    state = optimizer.init(x)
    for _ in range(3):
        updates, state = optimizer.update(v, state, x)
        x = x + updates
    return [x, *jax.tree.leaves(state.inner)]


@functools.cache
def on_one_device(space):
    """Two points and a vector, and what comes of them."""
    shape = (4, 4, 4) if isinstance(space, sj.manifolds.SpecialOrthogonal) else (4, 6, 2)
    points = [space.random_point(jax.random.key(seed), shape) for seed in (0, 1)]
    arrays = [*points, jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)]
    return arrays, everything(space, *arrays)


def check(space, mesh, explicit):
    arrays, expected = on_one_device(space)
    for spec in (P("data", "model", None), P(None, "data" if arrays[0].shape[1] == 4 else "model", None)):
        with jax.set_mesh(mesh):
            placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v in arrays]
            found = everything(space, *placed)
        if explicit:
            assert found["steps"][0].sharding.is_equivalent_to(placed[0].sharding, 3), spec
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4, err_msg=str(spec))


if __name__ == "__main__":
    check_cases(SPACES, check)
