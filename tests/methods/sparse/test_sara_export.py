"""SaRA's export with a strength, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError

sara = sj.methods.sara
KEY = jax.random.key(0)
ROLES = {"layers": sj.Role.dense((1,), (2,), (0,)), "w": sj.Role.dense()}


def params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), dtype)
    return {"layers": draw(3, 6, 5), "w": draw(7, 4), "b": jnp.zeros(4, dtype), "other": draw(3)}


def tuned(base, threshold, seed, rules=("layers", "w", "b")):
    adapted = sj.adapt(base, {name: sara.sara(threshold) for name in rules}, key=KEY, roles=ROLES)
    trainable, frozen = sj.partition(adapted)
    rng = np.random.default_rng(seed)
    return sj.combine(jax.tree.map(lambda v: v + jnp.asarray(rng.normal(size=v.shape), v.dtype), trainable), frozen)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_strength_scales_what_was_learned_and_nothing_else(dtype):
    base = params(dtype)
    tree = tuned(base, 0.5, 1)
    merged = sj.merge(tree)
    for strength, ends in ((1.0, merged), (0.0, base), (0.5, None), (-2.0, None)):
        found, exported = sj.merge(sara.with_strength(tree, strength)), sara.export(tree, strengths=strength)
        for name, array in base.items():
            if ends is not None:
                np.testing.assert_array_equal(found[name], ends[name])
                np.testing.assert_array_equal(exported[name], ends[name])
            start, end = np.asarray(array, np.float64), np.asarray(sj.merge(tree, keep_float32=True)[name], np.float64)
            want = start + strength * (end - start)
            eps = 4 * float(jnp.finfo(dtype).eps) * np.abs(want).max(initial=1.0)
            np.testing.assert_allclose(np.asarray(found[name], np.float64), want, rtol=0, atol=eps)
            np.testing.assert_allclose(np.asarray(exported[name], np.float64), want, rtol=0, atol=eps)
            untouched = np.asarray(np.abs(np.asarray(array, np.float32)) >= np.float32(0.5))
            np.testing.assert_array_equal(np.asarray(found[name])[untouched], np.asarray(array)[untouched])
            assert exported[name].dtype == dtype


def test_several_are_added_in_any_order_and_retired_values_count():
    base = params()
    one, two = tuned(base, 0.5, 1), tuned(base, 1.0, 2, rules=("layers", "b"))
    total = sara.export(one, two, strengths=(0.7, -0.3))
    swapped = sara.export(two, one, strengths=(-0.3, 0.7))
    for name, array in base.items():
        start = np.asarray(array, np.float64)
        changes = [np.asarray(sj.merge(t)[name], np.float64) - start for t in (one, two)]
        np.testing.assert_allclose(total[name], start + 0.7 * changes[0] - 0.3 * changes[1], atol=1e-6)
        np.testing.assert_array_equal(total[name], swapped[name])


def test_a_strength_may_be_traced_and_the_tree_stays_small(tmp_path):
    base = params()
    tree = tuned(base, 0.5, 1)
    step = jax.jit(lambda tree, strength: sj.merge(sara.with_strength(tree, strength)))
    found = [step(tree, jnp.asarray(s)) for s in (0.25, 0.75)]
    assert step._cache_size() == 1
    for strength, one in zip((0.25, 0.75), found, strict=True):
        np.testing.assert_allclose(one["w"], sara.export(tree, strengths=strength)["w"], atol=1e-6)
    half = sara.with_strength(tree, 0.5)
    loaded = sj.load_adapter(sj.save_adapter(tmp_path / "half.safetensors", half, base=base), base)
    np.testing.assert_array_equal(sj.merge(loaded)["layers"], sj.merge(half)["layers"])
    assert loaded["w"].values.shape == tree["w"].values.shape


def test_bad_input_is_refused():
    base = params()
    tree = tuned(base, 0.5, 1)
    with pytest.raises(StructureError, match="no weight of sara"):
        sara.with_strength(base, 1.0)
    with pytest.raises(ValueError, match="strength"):
        sara.with_strength(tree, float("nan"))
    with pytest.raises(ValueError, match="1 strengths for 2 trees"):
        sara.export(tree, tree, strengths=(1.0,))
    with pytest.raises(StructureError, match=r"^layers: export: the trees stand on different arrays"):
        sara.export(tree, tuned(params(seed=5), 0.5, 1))
    with pytest.raises(StructureError, match=r"^other: export: is in one of the trees only"):
        sara.export(tree, {n: v for n, v in tree.items() if n != "other"})
    mixed = sj.adapt(base, {"b": sara.sara(0.5), "w": sj.lora(1)}, key=KEY)
    with pytest.raises(StructureError, match=r"^w: export: is a LowRank of 'lora'.*merge\(\)"):
        sara.export(mixed)
