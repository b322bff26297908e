"""Runs the transformations on a mesh of 8 host devices and compares with one device; a program of its own.

Usage: python sharded.py [NAME ...]
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.eight_devices import check_cases
from tests.optim.contract import CASES, make_tree

SPECS = {
    "matrix": P("data", "model"),
    "stacked": P(None, "model", None),
    "conv": P(None, None, None, "model"),
    "bfloat16": P(None, "data", "model"),
    "full": P("model", None),
    "low_rank": {"a": P("data", None), "b": P(None, "model")},
    "twin": {"a": P("data", None), "b": P(None, "model")},
    "vector": P("data"),
}


def place(tree, mesh):
    """Puts every array where its spec says; a dict has those of a stand-in weight's fields."""

    def put(spec, value):
        return jax.device_put(value, NamedSharding(mesh, spec))

    def one(name, leaf):
        spec = SPECS.get(name, P())
        if isinstance(spec, dict):
            return leaf.map_fields(lambda field, value: put(spec[field], value))
        return jax.tree.map(lambda value: put(spec, value), leaf)

    return {name: one(name, leaf) for name, leaf in tree.items()}


def compare(actual, expected, what):
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        tolerance = 2e-2 if a.dtype == jnp.bfloat16 else 2e-4
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        error = np.abs(a - b).max(initial=0.0)
        assert error <= tolerance * max(np.abs(b).max(initial=0.0), 1e-2), f"{what}: {path} differs by {error}"


def make_step(optimizer):
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state, updates

    return step


@functools.cache
def on_one_device(case):
    """The parameters and the last updates of two steps."""
    params, *gradients = (make_tree(seed, case.leaves) for seed in (0, 1, 2))
    optimizer = case.make(0.05)
    step, state = jax.jit(make_step(optimizer)), optimizer.init(params)
    for gradient in gradients:
        params, state, updates = step(params, state, gradient)
    return params, updates


def check(case, mesh, explicit):
    trees = [make_tree(seed, case.leaves) for seed in (0, 1, 2)]
    optimizer, traces = case.make(0.05), []
    expected, expected_updates = on_one_device(case)
    step = make_step(optimizer)

    def counted(*arguments):
        traces.append(None)
        return step(*arguments)

    with jax.set_mesh(mesh):
        params, *gradients = (place(tree, mesh) for tree in trees)
        run = jax.jit(counted, donate_argnums=1)
        state = optimizer.init(params)
        shardings = jax.tree.map(lambda v: v.sharding, params)
        for gradient in gradients:
            new, state, updates = run(params, state, gradient)
            if explicit:
                kept = jax.tree.map(lambda v, s: v.sharding.is_equivalent_to(s, v.ndim), updates, shardings)
                assert all(jax.tree.leaves(kept)), f"updates are not placed as parameters: {kept}"
            else:
                new = jax.tree.map(jax.device_put, new, shardings)
            params = new
        assert len(traces) == 1, f"the second step traced again ({len(traces)} traces)"
    compare(updates, expected_updates, "updates")
    compare(params, expected, "parameters")


if __name__ == "__main__":
    check_cases([case for case in CASES if not case.variant], check)
