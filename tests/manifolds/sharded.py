"""Runs every manifold on a mesh of 8 host devices and compares with one device; a program of its own.

Usage: python sharded.py auto|explicit
"""

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
from tests.eight_devices import make_mesh


def everything(space, x, y, v):
    t = space.to_tangent(x, v)
    ends = [space.retract(x, t, method) for method in ("exponential", "qr", "polar")]
    return [t, *ends, space.project(x + v), space.transport(x, t, y), space.inner(x, t, t), space.distance(x, y)]


def steps(space, x, v):
    """A point after three steps, one of them with a renormalization, and the momentum."""
    optimizer = sj.riemannian(space, optax.sgd(0.1, 0.9), transport="isometric", renormalize_every=2)
    state = optimizer.init(x)
    for _ in range(3):
        updates, state = optimizer.update(v, state, x)
        x = x + updates
    return [x, *jax.tree.leaves(state.inner)]


def main():
    kind = sys.argv[1]
    mesh = make_mesh(kind)
    for space in (sj.manifolds.Stiefel(), sj.manifolds.Grassmann(), sj.manifolds.SpecialOrthogonal()):
        shape = (4, 4, 4) if isinstance(space, sj.manifolds.SpecialOrthogonal) else (4, 6, 2)
        points = [space.random_point(jax.random.key(seed), shape) for seed in (0, 1)]
        vector = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        expected = jax.jit(everything, static_argnums=0)(space, *points, vector)
        expected += jax.jit(steps, static_argnums=0)(space, points[0], vector)
        for spec in (P("data", "model", None), P(None, "data" if shape[1] == 4 else "model", None)):
            with jax.set_mesh(mesh):
                placed = [jax.device_put(v, NamedSharding(mesh, spec)) for v in (*points, vector)]
                found = jax.jit(everything, static_argnums=0)(space, *placed)
                moved = jax.jit(steps, static_argnums=0)(space, placed[0], placed[2])
            if kind == "explicit":
                assert moved[0].sharding.is_equivalent_to(placed[0].sharding, 3), f"{space.name} {spec}"
            for a, b in zip(found + moved, expected, strict=True):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4, err_msg=f"{space.name} {spec}")
        print(f"{space.name}: ok")


if __name__ == "__main__":
    main()
