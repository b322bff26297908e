"""The state before the first step: placed, in the right dtypes, in memory of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_jax as sj
from subspace_jax.core import StructureError
from subspace_jax.training import init_train_state, make_mesh, make_train_step

from .problem import OPTIMIZER, loss, make_adapted, make_batch

SPECS = {"in": P("data", "model"), "out": P("model", "data"), "bias": P("model")}


def test_everything_is_placed():
    mesh = make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1])
    adapted = make_adapted()
    state = init_train_state(adapted, OPTIMIZER, jax.random.key(1), sj.shardings(adapted, SPECS, mesh))
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state))
    assert state.frozen["in"].base.sharding.spec == P("data", "model")
    assert state.trainable["in"].a.sharding.spec == P("data", None)
    assert state.opt_state[1][0].mu["out"].b.sharding.spec == P(None, "data")
    assert state.key.sharding.spec == P()
    with pytest.raises(StructureError, match="placed has 1 shardings and adapted 11 arrays"):
        init_train_state(adapted, OPTIMIZER, jax.random.key(1), {"in": NamedSharding(mesh, P())})


@pytest.mark.parametrize("placed", [False, True])
def test_mixed_precision(placed):
    """Products in bfloat16, what learns in float32; the numbers are those of float32 to bfloat16's rounding."""
    adapted = make_adapted()
    mesh = make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1])
    places = sj.shardings(adapted, SPECS, mesh) if placed else None
    seen = []

    def watched(params, x):
        seen.append((params["in"].dtype, params["bias"].dtype))
        h = jnp.tanh(x.astype(params["in"].dtype) @ params["in"] + params["bias"])
        return h @ params["out"]

    def half_loss(adapted, batch, key):
        outputs = sj.with_adapters(watched)(adapted, batch["x"])
        assert outputs.dtype == jnp.bfloat16
        return jnp.mean((outputs.astype(jnp.float32) - batch["y"]) ** 2)

    state = init_train_state(adapted, OPTIMIZER, jax.random.key(1), places, compute_dtype=jnp.bfloat16)
    exact = init_train_state(adapted, OPTIMIZER, jax.random.key(1))
    step, exact_step = make_train_step(half_loss, OPTIMIZER), make_train_step(loss, OPTIMIZER)
    for number in range(5):
        state, metrics = step(state, make_batch(number))
        exact, exact_metrics = exact_step(exact, make_batch(number))
        np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=2e-2)
    assert set(seen) == {(jnp.dtype(jnp.bfloat16),) * 2}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.trainable)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    assert {state.frozen[name].base.dtype.name for name in ("in", "out")} == {"bfloat16"}
    change = [np.asarray(s.trainable["bias"].value - adapted["bias"].value) for s in (state, exact)]
    np.testing.assert_allclose(change[0], change[1], atol=0.2 * np.abs(change[1]).max())
    merged = sj.merge(sj.combine(state.trainable, state.frozen))
    assert merged["bias"].dtype == merged["in"].dtype == jnp.bfloat16


def test_parts_that_are_not_of_the_weights_shape_stay_as_they_are():
    adapted = make_adapted({"in": sj.osf(4), "out": sj.dora(sj.lora(2))})
    half = init_train_state(adapted, optax.sgd(1.0), jax.random.key(0), compute_dtype=jnp.bfloat16)
    dtypes = {path: leaf.dtype.name for path, leaf in sj.core.leaves_with_paths(half.frozen) if hasattr(leaf, "dtype")}
    assert dtypes["bias"] == "bfloat16"
    assert half.frozen["in"].base.dtype == jnp.bfloat16
    assert half.frozen["in"].high_left.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.trainable)} == {"float32"}
    assert half.trainable["out"].dtype == jnp.bfloat16


def test_the_callers_arrays_survive_a_donated_step():
    adapted = make_adapted()
    before = jax.tree.map(np.asarray, adapted)
    state = init_train_state(adapted, OPTIMIZER, jax.random.key(1))
    start = state
    state, _ = make_train_step(loss, OPTIMIZER)(state, make_batch(0))
    assert jax.tree.all(jax.tree.map(np.array_equal, adapted, before))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((start.trainable, start.opt_state, start.step)))
    assert state.frozen["in"].base is adapted["in"].base
