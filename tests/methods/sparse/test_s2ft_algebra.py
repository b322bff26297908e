"""Fusing, switching and serving adapters made of slices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError
from tests.tolerances import tolerance

PARAMS = {
    "down": jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32),
    "up": jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32),
}


def adapter(rows, columns=(0, 1), seed=0, **options):
    mask = lambda positions: np.isin(np.arange(8), positions)
    rules = {
        "down": sj.s2ft(selected={"down": mask(rows)}, **options),
        "up": sj.s2ft(side="out", selected={"up": mask(columns)}, **options),
    }
    adapted = sj.adapt(PARAMS, rules, key=jax.random.key(0))
    trainable, frozen = sj.partition(adapted)
    rng = np.random.default_rng(seed)
    return sj.combine(jax.tree.map(lambda v: v + rng.normal(size=v.shape).astype(np.float32), trainable), frozen)


def changes(adapted):
    return {name: np.asarray(v) - np.asarray(PARAMS[name]) for name, v in sj.merge(adapted).items()}


@pytest.mark.parametrize("parameterization", ["delta", "in_place"])
def test_disjoint_adapters_keep_their_rows_and_overlapping_ones_add(parameterization):
    one = adapter([0, 3], [1, 2], seed=1, parameterization=parameterization)
    two = adapter([4, 6], [2, 7], seed=2, parameterization=parameterization)
    fused = changes(sj.methods.s2ft.fuse_slices(one, two))
    first, second = changes(one), changes(two)
    np.testing.assert_allclose(fused["down"][[0, 3]], first["down"][[0, 3]], atol=tolerance(size=4))
    np.testing.assert_allclose(fused["down"][[4, 6]], second["down"][[4, 6]], atol=tolerance(size=4))
    assert not fused["down"][[1, 2, 5, 7]].any()
    np.testing.assert_allclose(fused["up"], first["up"] + second["up"], atol=tolerance(size=4))
    x = jnp.ones((3, 8))
    y = sj.with_adapters(lambda p, x: (x @ p["down"]) @ p["up"])(sj.methods.s2ft.fuse_slices(one, two), x)
    merged = sj.merge(sj.methods.s2ft.fuse_slices(one, two))
    np.testing.assert_allclose(y, (x @ merged["down"]) @ merged["up"], rtol=1e-4, atol=1e-4)


def test_fusing_is_commutative_and_associative():
    a, b, c = (adapter(rows, seed=s) for s, rows in enumerate(([0, 1], [1, 5, 6], [2])))
    expected = changes(sj.methods.s2ft.fuse_slices(a, b, c))
    for other in (
        sj.methods.s2ft.fuse_slices(c, b, a),
        sj.methods.s2ft.fuse_slices(sj.methods.s2ft.fuse_slices(a, b), c),
        sj.methods.s2ft.fuse_slices(a, sj.methods.s2ft.fuse_slices(b, c)),
    ):
        for name, value in changes(other).items():
            np.testing.assert_allclose(value, expected[name], atol=tolerance(size=4))


def test_switching_is_subtracting_one_and_adding_the_next():
    old, new = adapter([0, 3], seed=1), adapter([3, 4, 6], [5], seed=2)
    switched = sj.methods.s2ft.switch_slices(sj.merge(old), old, new)
    for name, value in sj.merge(new).items():
        np.testing.assert_allclose(switched[name], value, atol=tolerance(size=4))
    back = sj.methods.s2ft.switch_slices(switched, new, None)
    for name, value in PARAMS.items():
        np.testing.assert_allclose(back[name], value, atol=tolerance(size=4))


def test_every_example_of_a_batch_has_its_own_adapter():
    bank = [adapter([0, 3], [1, 2], seed=1), adapter([4, 6], [0, 7], seed=2), adapter([3, 4], [2, 5], seed=3)]
    tasks = jnp.array([2, 0, 1, 0])
    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3, 8)), jnp.float32)
    model = lambda p, x: jnp.tanh(x @ p["down"]) @ p["up"]
    found = jax.jit(lambda tasks, x: sj.methods.s2ft.serve_slices(model, bank, tasks, x))(tasks, x)
    for i, task in enumerate(tasks):
        np.testing.assert_allclose(found[i], model(sj.merge(bank[int(task)]), x[i]), rtol=1e-4, atol=1e-5)
    # The base meets the whole batch in one product; no example has a base of its own.
    text = jax.jit(lambda tasks, x: sj.methods.s2ft.serve_slices(model, bank, tasks, x)).lower(tasks, x).as_text()
    assert "4x8x5xf32" not in text


def test_what_does_not_fit_is_refused_by_name():
    rows = sj.adapt({"w": jnp.ones((4, 4))}, {"w": sj.s2ft(0.5)}, key=jax.random.key(0))
    columns = sj.adapt({"w": jnp.ones((4, 4))}, {"w": sj.s2ft(0.5, side="out")}, key=jax.random.key(0))
    lora = sj.adapt({"w": jnp.ones((4, 4))}, {"w": sj.lora(1)}, key=jax.random.key(0))
    more = sj.adapt({"w": jnp.ones((4, 4))}, {"w": sj.s2ft(0.75)}, key=jax.random.key(0))
    with pytest.raises(StructureError, match="w: rows learn in one tree and columns in another"):
        sj.methods.s2ft.fuse_slices(rows, columns)
    with pytest.raises(StructureError, match="w: is a LowRank"):
        sj.methods.s2ft.fuse_slices(rows, lora)
    with pytest.raises(StructureError, match="number of slots"):
        sj.methods.s2ft.serve_slices(lambda p, x: x @ p["w"], [rows, more], jnp.array([0]), jnp.ones((1, 4)))
