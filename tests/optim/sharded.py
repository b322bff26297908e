"""Runs the transformations on a mesh of 8 host devices and compares with one device; a program of its own.

Usage: python sharded.py auto|explicit NAME...
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))

import subspace_jax as sj
from tests.optim.contract import CASES, make_tree

SPECS = {
    "matrix": P("data", "model"),
    "stacked": P(None, "model", None),
    "conv": P(None, None, None, "model"),
    "heads": P("data", "model", None),
    "full": P("model", None),
    "low_rank": P("data", "model"),
    "vector": P("data"),
}
# Of these JAX itself refuses to join axes of which one is split.
WHOLE_IF_EXPLICIT = ("heads",)


def place(tree, mesh, explicit):
    """Puts every array where the spec of the model's array says."""

    def one(name, leaf):
        spec = P() if explicit and name in WHOLE_IF_EXPLICIT else SPECS.get(name, P())
        specs = leaf.partition_specs(spec) if sj.is_weight(leaf) else jax.tree.map(lambda _: spec, leaf)
        put = lambda s, v: jax.device_put(v, NamedSharding(mesh, s))
        return jax.tree.map(put, specs, leaf, is_leaf=lambda s: isinstance(s, P))

    return {name: one(name, leaf) for name, leaf in tree.items()}


def compare(actual, expected, what):
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        error = np.abs(a - b).max(initial=0.0)
        assert error <= 2e-4 * max(np.abs(b).max(initial=0.0), 1e-2), f"{what}: {path} differs by {error}"


def check(case, mesh, explicit):
    trees = [{k: v for k, v in make_tree(seed).items() if k != "bfloat16" or seed >= 0} for seed in (0, 1, 2)]
    optimizer, traces = case.make(0.05), []

    def step(params, state, gradient):
        traces.append(None)
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state, updates

    expected, state = trees[0], optimizer.init(trees[0])
    one_device = jax.jit(step)
    for gradient in trees[1:]:
        expected, state, expected_updates = one_device(expected, state, gradient)
    traces.clear()

    with jax.set_mesh(mesh):
        params, *gradients = (place(tree, mesh, explicit) for tree in trees)
        run = jax.jit(step, donate_argnums=1)
        state = optimizer.init(params)
        shardings = jax.tree.map(lambda v: v.sharding, params)
        for gradient in gradients:
            new, state, updates = run(params, state, gradient)
            if explicit:
                kept = jax.tree.map(lambda v, s: v.sharding == s, updates, shardings)
                assert all(jax.tree.leaves(kept)), f"updates are not placed as parameters: {kept}"
            else:
                new = jax.tree.map(jax.device_put, new, shardings)
            params = new
        assert len(traces) == 1 or not explicit, f"the second step traced again ({len(traces)} traces)"
    compare(updates, expected_updates, "updates")
    compare(params, expected, "parameters")


def main():
    kind, *wanted = sys.argv[1:]
    jax.config.update("jax_disable_most_optimizations", True)
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis, axis))
    failed = False
    for case in CASES:
        if wanted and case.name not in wanted:
            continue
        try:
            check(case, mesh, kind == "explicit")
        except Exception as error:
            failed = True
            if len(wanted) == 1:
                raise
            print(f"{case.name}: {type(error).__name__}: {error}"[:800])
        else:
            print(f"{case.name}: ok")
    sys.exit(failed)


if __name__ == "__main__":
    main()
