import functools

import jax
import jax.numpy as jnp
import numpy as np

import subspace_jax as sj
from subspace_jax.merging import dare, task_arithmetic, ties

from ..tolerances import assert_rounding
from . import trees


def test_mean_and_variance_are_those_of_the_draw():
    size, value, drop = 200_000, 2.0, 0.9
    base = {"w": jnp.zeros(size)}
    experts = [{"w": jnp.full(size, value)}, base]
    one = functools.partial(task_arithmetic, weights=[1.0, 0.0])
    found = np.asarray(dare(experts, base, key=jax.random.key(0), drop=drop, merger=one)["w"], np.float64)
    variance = value**2 * drop / (1 - drop)
    assert abs(found.mean() - value) < 5 * np.sqrt(variance / size)
    assert abs(found.var() / variance - 1) < 0.03
    raw = dare(experts, base, key=jax.random.key(0), drop=drop, rescale=False, merger=one)["w"]
    assert set(np.unique(raw)) == {0.0, value}


def test_nothing_dropped_is_the_merger_alone():
    base = trees.base_tree()
    experts = trees.adapted_experts(base, [sj.lora(rank=2), sj.lora(rank=3)])
    for merger in (task_arithmetic, functools.partial(ties, density=0.3)):
        found = dare(experts, base, key=jax.random.key(0), drop=0.0, merger=merger)
        expected = trees.plain(merger(experts, base))
        assert type(found["dense"]).__name__ == "Full"  # it can be saved with the adapters' tree
        for path in ("dense", "wide", "stack"):
            assert_rounding(np.asarray(found[path].value), np.asarray(expected[path]), size=4)


def test_experts_draw_apart_and_a_leaf_draws_the_same_in_any_tree():
    base = {"w": jnp.zeros(1000), "v": jnp.zeros(1000)}
    ones = jax.tree.map(jnp.ones_like, base)
    first = functools.partial(task_arithmetic, weights=[1.0, 0.0])
    second = functools.partial(task_arithmetic, weights=[0.0, 1.0])
    key = jax.random.key(3)
    a, b = (dare([ones, ones], base, key=key, merger=m) for m in (first, second))
    small = dare([{"w": ones["w"]}] * 2, {"w": base["w"]}, key=key, merger=first)
    assert np.array_equal(a["w"], small["w"])
    kept = [np.asarray(v) > 0 for v in (a["w"], a["v"], b["w"])]
    for i in range(3):
        for j in range(i):
            assert abs(np.mean(kept[i] == kept[j]) - 0.5) < 0.1


def test_under_jit_with_the_key_traced():
    base = trees.base_tree()
    experts = trees.full_experts(base)
    found = jax.jit(lambda k: dare(experts, base, key=k))(jax.random.key(1))
    expected = dare(experts, base, key=jax.random.key(1))
    for path in trees.SHAPES:
        assert_rounding(np.asarray(found[path]), np.asarray(expected[path]))
