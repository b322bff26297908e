import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.merging import slerp

from ..tolerances import assert_rounding
from . import trees


def reference(a, b, t):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    na, nb = np.linalg.norm(a), np.linalg.norm(b)
    if min(na, nb) < 1e-8 or abs((a * b).sum() / na / nb) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos((a * b).sum() / na / nb)
    return np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [0.001, 0.5, 3.0])
def test_equals_the_formula_leaf_by_leaf(t, size):
    base = trees.base_tree()
    a, b = trees.full_experts(base, 2, size=size)
    for merged in (slerp([a, b], t=t), slerp([a, b], base, t=t), slerp([b, a], base, t=1 - t)):
        for path in trees.SHAPES:
            assert_rounding(np.asarray(merged[path]), reference(a[path], b[path], t), size=4)


def test_points_of_the_unit_sphere():
    spatial = pytest.importorskip("scipy.spatial")
    generator = np.random.default_rng(0)
    a, b = (v / np.linalg.norm(v) for v in generator.normal(size=(2, 5)))
    found = slerp([{"w": jnp.asarray(a, jnp.float32)}, {"w": jnp.asarray(b, jnp.float32)}], t=0.35)["w"]
    assert_rounding(np.asarray(found), spatial.geometric_slerp(a, b, 0.35), size=4)
    assert float(jnp.linalg.norm(found)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_parallel_opposite_and_zero_tensors_are_interpolated_linearly(sign):
    a = jnp.array([1.0, 2.0, 3.0])
    found = slerp([{"w": a, "z": jnp.zeros(2)}, {"w": sign * 2 * a, "z": jnp.ones(2)}], t=0.25)
    assert_rounding(np.asarray(found["w"]), np.asarray(a) * (0.75 + 0.5 * sign))
    assert_rounding(np.asarray(found["z"]), np.full(2, 0.25))


def test_changes_of_two_loras_give_a_lora():
    base = trees.base_tree()
    a, b = trees.adapted_experts(base, [sj.lora(rank=2), sj.lora(rank=4, alpha=3.0)])
    merged = slerp([a, b], base, t=0.3, of="changes")
    start, one, other = (trees.arrays(v) for v in (base, a, b))
    for path in ("dense", "wide", "stack"):
        assert merged[path].rank == 6
        expected = start[path] + reference(one[path] - start[path], other[path] - start[path], 0.3)
        assert_rounding(np.asarray(merged[path].materialize()), expected, size=8)
    mixed = slerp([a, trees.plain(b)], base, t=0.3, of="changes")
    assert_rounding(np.asarray(mixed["dense"].value), np.asarray(merged["dense"].materialize()), size=8)


def test_weights_of_adapters():
    base = trees.base_tree()
    a, b = trees.adapted_experts(base, [sj.lora(rank=2), sj.oft(block_size=2)])
    merged = slerp([a, b], base, t=0.4)
    one, other = trees.arrays(trees.plain(a)), trees.arrays(trees.plain(b))
    for path in ("dense", "wide", "stack"):
        assert_rounding(np.asarray(merged[path].value), reference(one[path], other[path], 0.4), size=8)
    jax.block_until_ready(jax.jit(lambda t: slerp([a, b], base, t=t)["dense"].value)(0.4))


def test_refuses_other_than_two():
    base = trees.base_tree()
    with pytest.raises(sj.errors.StructureError, match="3 experts given, exactly 2"):
        slerp(trees.full_experts(base), base)
    with pytest.raises(sj.errors.StructureError, match="pass as base"):
        slerp(trees.adapted_experts(base, [sj.lora(rank=2)] * 2))
