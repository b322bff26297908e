"""Runs the methods on a mesh of 8 host devices and compares with one device; a program of its own.

Usage: python sharded.py [METHOD ...]
"""

import functools
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))

import subspace_jax as sj
from tests.contract.kernels import loss, make_inputs, model
from tests.contract.methods import SHARDED, adapt, move, supported
from tests.eight_devices import check_cases

# How a model's layers are usually split; the batch goes over "data". What is not listed differs from something listed
# only on one device.
SPECS = {
    "wide": P("model", None),
    "square": P("data", "model"),
    "heads_in": P("model", None, None),
    "conv_strided": P(None, None, None, "model"),
    "tied": P(None, "model"),
    "stacked": P(None, None, "model"),
}
# Of these JAX itself refuses a split where axes are explicit, with plain arrays too: one stands for them there, whole.
WHOLE_IF_EXPLICIT = "stacked"
NOT_IF_EXPLICIT = ("conv_strided", "tied")
# A split input axis of the kernel meets a split axis of the operand.
INPUT_SPECS = {"wide": P("data", "model"), "heads_in": P("data", None, "model", None)}
# One program for all kernels; leaf by leaf on a mesh: tests/core/sharded_program.py.
merge = jax.jit(sj.merge)


def place(tree, mesh, specs):
    """Puts every array where its spec says."""

    def put(spec, value):
        return jax.device_put(value, NamedSharding(mesh, spec))

    return jax.tree.map(put, specs, tree, is_leaf=lambda s: isinstance(s, P))


def step(trainable, frozen, inputs):
    """One step of gradient descent."""

    def value(trainable):
        outputs = sj.with_adapters(model)(sj.combine(trainable, frozen), inputs)
        return loss(outputs), outputs

    (_, outputs), gradients = jax.value_and_grad(value, has_aux=True)(trainable)
    return jax.tree.map(lambda v, g: v - 0.01 * g, trainable, gradients), outputs


def compare(actual, expected, what):
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        error = np.abs(a - b).max(initial=0.0)
        assert error <= 1e-4 * max(np.abs(b).max(initial=0.0), 1e-2), f"{what}: {path} differs by {error}"


@functools.cache
def on_one_device(case):
    """The merged kernels at the start, the adapted ones after a change, and what a step makes of these and returns."""
    names = [name for name in SPECS if name in case.kernels]
    start = adapt(case, {name: w for name, w in supported(case).items() if name in names})
    moved = move(start)
    inputs = {name: make_inputs()[name] for name in names}
    return merge(start), moved, jax.jit(step)(*sj.partition(moved), inputs) if case.whole else None


def check(case, mesh, explicit):
    names = [n for n in SPECS if n in case.kernels and not (explicit and n in NOT_IF_EXPLICIT)]
    whole = (WHOLE_IF_EXPLICIT,) if explicit else ()
    specs = {name: P() if name in whole else SPECS[name] for name in names}
    if explicit:  # the batch has the axis "data" to itself
        specs = {name: P(*(None if n == "data" else n for n in spec)) for name, spec in specs.items()}
    input_specs = {name: P() if name in whole else INPUT_SPECS.get(name, P("data")) for name in names}
    params = {name: w for name, w in supported(case).items() if name in names}
    inputs = {name: make_inputs()[name] for name in names}
    merged, moved, expected = on_one_device(case)
    with jax.set_mesh(mesh):
        # The start from sharded arrays: the same adapter as on one device.
        begun = adapt(case, place(params, mesh, specs))
        compare(merge(begun), of(names, merged), "merge at the start")
    if case.whole:
        # Kernels do not meet in the loss, so some of them learn what they learn among all.
        check_step(of(names, moved), tuple(of(names, tree) for tree in expected), inputs, mesh, specs, input_specs)


def of(names, tree):
    """The part of a tree that belongs to these kernels."""
    return {name: tree[name] for name in names}


def check_step(adapted, expected, inputs, mesh, specs, input_specs):
    traces = []

    def counted(*args):
        traces.append(None)
        return step(*args)

    with jax.set_mesh(mesh):
        placed = place(adapted, mesh, {name: w.partition_specs(specs[name]) for name, w in adapted.items()})
        trainable, frozen = sj.partition(placed)
        spread = place(inputs, mesh, input_specs)
        run = jax.jit(counted, out_shardings=(jax.tree.map(lambda v: v.sharding, trainable), None))
        new, outputs = run(trainable, frozen, spread)
        compare(new, expected[0], "step")
        compare(outputs, expected[1], "outputs")
        run(new, frozen, spread)
        assert len(traces) == 1, f"the second step traced again ({len(traces)} traces)"


if __name__ == "__main__":
    check_cases(SHARDED, check)
