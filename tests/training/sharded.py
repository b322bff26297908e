"""Trains on a mesh of 8 host devices and compares with one device; a program of its own.

Usage: python sharded.py [LAYOUT ...]
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[2]))

import subspace_jax as sj
from subspace_jax.training import fit, init_train_state, make_mesh, make_train_step, shard_batch
from tests.eight_devices import check_cases
from tests.training.problem import OPTIMIZER, loss, make_adapted, make_batch

# Sums over devices are added in another order: relative to the largest entry of an array, after three steps of Adam.
TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh and specs; the batch is split over `rows`, and the hidden axis of activations over `hidden`."""

    name: str
    axes: dict
    specs: dict
    rows: tuple = ("data",)
    hidden: str | None = "model"


LAYOUTS = [
    Layout("data", {"data": -1}, {"in": P(), "out": P(), "bias": P()}, hidden=None),
    Layout("fsdp", {"data": 8}, {"in": P("data", None), "out": P(None, "data"), "bias": P()}, hidden=None),
    Layout(
        "fsdp x tensor",
        {"data": 4, "model": -1},
        {"in": P("data", "model"), "out": P("model", "data"), "bias": P("model")},
    ),
    Layout(
        "data x fsdp x tensor",
        {"copies": 2, "data": 2, "model": 2},
        {"in": P("data", "model"), "out": P("model", "data"), "bias": P("model")},
        rows=("copies", "data"),
    ),
]


def make_loss(layout, explicit):
    """The loss of `problem` as a model for explicit axes is written: it gathers what fsdp has split, and names layouts.

    With automatic axes the compiler finds out by itself.
    """

    def product(x, w, out_axis):
        if not explicit:
            return x @ w
        kept = ("model", None) if out_axis is None else (None, "model")
        kept = kept if "model" in layout.axes else (None, None)
        w = jax.sharding.reshard(w, P(*kept))
        return jnp.einsum("bi,io->bo", x, w, out_sharding=P(layout.rows, out_axis))

    def model(params, x):
        hidden = jnp.tanh(product(x, params["in"], layout.hidden) + params["bias"])
        return product(hidden, params["out"], None)

    def laid_out(adapted, batch, key):
        del key
        error = sj.with_adapters(model)(adapted, batch["x"]) - batch["y"]
        return jnp.mean(error**2)

    return laid_out


@functools.cache
def one_device(accumulate):
    """What every layout is compared with."""
    step = make_train_step(loss, OPTIMIZER, accumulate=accumulate)
    state, found = init_train_state(make_adapted(), OPTIMIZER, jax.random.key(1)), []
    for number in range(3):
        state, metrics = step(state, make_batch(number, rows=32))
        found.append(metrics)
    return state, found


def compare(actual, expected, what):
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.abs(a - b).max(initial=0.0)
        assert error <= TOLERANCE * max(np.abs(b).max(initial=0.0), 1e-2), f"{what}: {path} differs by {error}"


def check(layout, mesh, explicit):
    del mesh
    mesh = make_mesh(layout.axes, explicit=explicit)
    assert mesh.size == 8
    for accumulate in (1, 2):
        expected, expected_metrics = one_device(accumulate)
        traces = []

        def counted(*arguments, traces=traces):
            traces.append(None)
            return make_loss(layout, explicit)(*arguments)

        with jax.set_mesh(mesh):
            adapted = make_adapted()
            placed = sj.shardings(adapted, layout.specs, mesh)
            state = init_train_state(adapted, OPTIMIZER, jax.random.key(1), placed)
            places = jax.tree.map(lambda v: v.sharding, state)
            assert state.frozen["in"].base.sharding.is_equivalent_to(NamedSharding(mesh, layout.specs["in"]), 2)
            step, seen = make_train_step(counted, OPTIMIZER, accumulate=accumulate), []

            def spread(number, mesh=mesh):
                source = (make_batch(n, rows=32) for n in range(number, 99))
                return (shard_batch(batch, mesh, layout.rows) for batch in source)

            state = fit(state, step, spread, steps=3, on_metrics=lambda n, m, seen=seen: seen.append(m))
        assert jax.tree.map(lambda v: v.sharding, state) == places
        assert len(traces) == 1, f"traced {len(traces)} times"
        compare(state.trainable, expected.trainable, "trainable")
        compare(state.opt_state, expected.opt_state, "state")
        compare(seen, expected_metrics, "metrics")


if __name__ == "__main__":
    check_cases(LAYOUTS, check)
