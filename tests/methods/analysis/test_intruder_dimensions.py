"""Intruder dimensions against NumPy's decomposition, planted ones, and what scaling one may change."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import Role, StructureError
from subspace_jax.methods.analysis.intruder_dimensions import (
    count_intruders,
    effective_rank,
    intruder_dimensions,
    scale_intruders,
)

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(n, seed=0):
    return np.linalg.qr(normal(n, n, seed=seed))[0]


def spread(m, n, seed=0):
    """A matrix with singular values from 2 to 1."""
    p = min(m, n)
    return orthogonal(m, seed)[:, :p] @ np.diag(np.linspace(2.0, 1.0, p)) @ orthogonal(n, seed + 1)[:p]


def single(x):
    return jnp.asarray(x, jnp.float32)


def planted(m=8, n=12, size=10.0):
    """An intruder on the output side, beside the last input direction so that no other vector moves."""
    w0 = spread(m, n)
    u0, s0, vt0 = np.linalg.svd(w0)
    return w0, w0 + size * np.outer(u0[:, m - 1], vt0[m]), s0[-1]


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (9, 9)])
def test_similarities_are_numpys(side, shape):
    w0, w = spread(*shape), spread(*shape) + 0.5 * normal(*shape, seed=7)
    found = intruder_dimensions({"w": single(w0)}, {"w": single(w)}, k=5, side=side, threshold=0.7)["w"]
    pairs = [np.linalg.svd(v, full_matrices=False) for v in (w0, w)]
    lead = [p[2] if side == "out" else p[0].T for p in pairs]
    cosines = np.abs(lead[1][:5] @ lead[0].T)
    np.testing.assert_allclose(found.cosines, cosines, atol=2e-5)
    np.testing.assert_allclose(found.similarity, cosines.max(1), atol=2e-5)
    np.testing.assert_array_equal(found.is_intruder, cosines.max(1) < 0.7)
    np.testing.assert_allclose(found.values, pairs[1][1][:5], rtol=1e-5)
    assert (np.sum(np.asarray(found.cosines) ** 2, axis=1) <= 1 + 1e-5).all()


def test_an_unchanged_scaled_or_negated_kernel_has_none():
    w0 = spread(8, 12)
    for w in (w0, 3.0 * w0, -w0):
        for side in ("in", "out"):
            assert (
                count_intruders(intruder_dimensions({"w": single(w0)}, {"w": single(w)}, threshold=0.999, side=side))
                == 0
            )
    low = single(np.outer(normal(8), normal(12)))  # vectors of no size are not counted
    assert count_intruders(intruder_dimensions({"w": low}, {"w": low}, threshold=0.999)) == 0


def test_the_planted_one_is_found_and_no_other():
    w0, w, least = planted()
    found = intruder_dimensions({"w": single(w0)}, {"w": single(w)}, threshold=0.9, k=10)["w"]
    assert found.is_intruder.tolist() == [True] + [False] * 7
    np.testing.assert_allclose(found.similarity[0], least / np.sqrt(100 + least**2), rtol=1e-4)
    counts = [
        count_intruders(intruder_dimensions({"w": single(w0)}, {"w": single(w)}, threshold=t, k=k))
        for t, k in ((0.0, 10), (0.3, 10), (0.999, 1), (0.999, 10))
    ]
    assert counts == sorted(counts)
    assert counts[0] == 0
    turn, other = orthogonal(8, 5), orthogonal(12, 6)
    turned = intruder_dimensions({"w": single(turn @ w0 @ other)}, {"w": single(turn @ w @ other)}, threshold=0.9)["w"]
    np.testing.assert_allclose(turned.similarity, found.similarity, atol=2e-4)


def test_a_full_basis_bounds_similarities_from_below():
    w0, w = spread(9, 6), 100 * normal(9, 6, seed=3)
    found = intruder_dimensions({"w": single(w0)}, {"w": single(w)}, k=6, threshold=1 / np.sqrt(6) - 1e-4)["w"]
    assert (found.similarity >= 1 / np.sqrt(6) - 1e-5).all()
    assert int(found.count) == 0


def test_scaling_changes_one_singular_value_and_nothing_else():
    w0, w, _ = planted()
    before, after = {"w": single(w0), "b": jnp.ones(3)}, {"w": single(w), "b": jnp.zeros(3)}
    values = np.linalg.svd(w, compute_uv=False)
    for factor in (0.0, 0.5, 2.0):
        scaled = scale_intruders(before, after, factor, threshold=0.9)
        np.testing.assert_array_equal(scaled["b"], after["b"])
        expected = np.sort([factor * values[0], *values[1:]])[::-1]
        np.testing.assert_allclose(np.linalg.svd(scaled["w"], compute_uv=False), expected, atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(scaled["w"] - w), abs(1 - factor) * values[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(scale_intruders(before, after, 1.0, threshold=0.9)["w"], after["w"])
    same = scale_intruders(before, before, 0.3)
    np.testing.assert_array_equal(same["w"], before["w"])
    control = scale_intruders(before, after, 0.0, threshold=0.9, control=True)
    np.testing.assert_allclose(
        np.linalg.svd(control["w"], compute_uv=False), np.sort([values[0], 0.0, *values[2:]])[::-1], atol=2e-5
    )


def test_all_of_them_and_stacks_and_adapters():
    pairs = [planted()[:2], (spread(8, 12, seed=4), spread(8, 12, seed=4))]
    w0, w = (single(np.stack([p[i] for p in pairs])) for i in (0, 1))
    roles = {"w": Role.dense((1,), (2,), (0,))}
    found = intruder_dimensions({"w": w0}, {"w": w}, threshold=0.9, roles=roles)["w"]
    assert found.count.tolist() == [1, 0]
    scaled = scale_intruders({"w": w0}, {"w": w}, 0.0, threshold=0.9, which="all", roles=roles)["w"]
    np.testing.assert_array_equal(scaled[1], w[1])
    assert np.abs(scaled[0] - w[0]).max() > 0.5
    params = {"w": single(spread(8, 12)), "v": jnp.ones(4)}
    adapted = sj.adapt(params, {"w": sj.lora(2)}, key=KEY)
    trained = sj.combine(jax.tree.map(lambda v: v + 0.5, sj.partition(adapted)[0]), sj.partition(adapted)[1])
    one = intruder_dimensions(params, trained)["w"]
    other = intruder_dimensions(params, sj.merge(trained))["w"]
    np.testing.assert_allclose(one.similarity, other.similarity, atol=1e-5)
    assert list(intruder_dimensions(params, trained)) == ["w"]
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    assert intruder_dimensions(half, half)["w"].similarity.dtype == jnp.float32


def test_vectors_that_are_not_defined_are_told():
    w0 = single(orthogonal(6))
    with pytest.warns(UserWarning, match=r"first 10 differ by less than 0.0001 .* in w; such"):
        found = intruder_dimensions({"w": w0}, {"w": w0})["w"]
    assert bool(found.is_clustered.all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        intruder_dimensions({"w": single(spread(6, 6))}, {"w": single(spread(6, 6))})


def test_the_effective_rank_has_its_closed_forms():
    for r in (1, 3, 6):
        np.testing.assert_allclose(effective_rank(single(spread(8, 12)[:, :r] * 0 + np.eye(8, r))), r, rtol=1e-5)
    values = np.array([4.0, 2.0, 1.0])
    share = values / values.sum()
    matrix = orthogonal(5)[:, :3] @ np.diag(values) @ orthogonal(4, 2)[:3]
    np.testing.assert_allclose(effective_rank(single(matrix)), np.exp(-np.sum(share * np.log(share))), rtol=1e-5)
    assert float(effective_rank(jnp.zeros((3, 3)))) == 1.0


def test_refusals():
    before = {"w": jnp.ones((3, 4))}
    with pytest.raises(StructureError, match=r"^w: expert 0 has shape \(3, 5\)"):
        intruder_dimensions(before, {"w": jnp.ones((3, 5))})
    with pytest.raises(ValueError, match="side"):
        intruder_dimensions(before, before, side="output")
    with pytest.raises(ValueError, match="control=True is of one vector"):
        scale_intruders(before, before, 0.5, which="all", control=True)
