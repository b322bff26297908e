"""Backward and forward maps against SciPy, and NNX against Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.linalg import expm

from subspace_jax import metrics
from subspace_jax.methods.regularized.lambda_orthogonality import (
    BackwardMap,
    ForwardMap,
    NNXBackwardMap,
    NNXForwardMap,
    orthogonal_kernel,
)
from tests.tolerances import tolerance


def triangle(entries, size):
    upper = np.zeros((size, size))
    upper[np.triu_indices(size, 1)] = entries
    return upper - upper.T


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_strict_kernels_are_exponentials_and_cayley_transforms(scale):
    entries = scale * np.random.default_rng(0).normal(size=28)
    generator = triangle(entries, 8)
    eye = np.eye(8)
    expected = {"orthogonal": expm(generator), "cayley": (eye + generator) @ np.linalg.inv(eye - generator)}
    for kind, kernel in expected.items():
        found = orthogonal_kernel(jnp.asarray(entries, jnp.float32), 8, kind)
        np.testing.assert_allclose(found, kernel, atol=1e-5)
        np.testing.assert_allclose(found.T @ found, eye, atol=1e-5)
        np.testing.assert_allclose(np.linalg.det(found), 1.0, atol=1e-5)


def test_a_strict_map_keeps_distances_and_retrieval():
    adapter = BackwardMap("orthogonal")
    rng = np.random.default_rng(0)
    new, labels = rng.normal(size=(40, 12)).astype(np.float32), rng.integers(0, 5, 40)
    params = {"entries": jnp.asarray(rng.normal(size=66), jnp.float32)}
    mapped = np.asarray(adapter.apply({"params": params}, new))
    assert np.abs(mapped - new).max() > 0.5
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), np.linalg.norm(new, axis=1), rtol=1e-5)
    between = [np.linalg.norm(v[:, None] - v[None], axis=-1) for v in (mapped, new)]
    np.testing.assert_allclose(*between, atol=1e-4)
    scores = [metrics.retrieval_scores(v, labels, v, labels, same_set=True) for v in (mapped, new)]
    np.testing.assert_allclose(scores[0].cmc, scores[1].cmc)
    np.testing.assert_allclose(scores[0].mean_average_precision, scores[1].mean_average_precision, rtol=1e-5)


def test_all_but_the_affine_map_begin_at_the_identity():
    new = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    sizes = {"lambda": 6 * 6 + 6, "affine": 6 * 6 + 6, "orthogonal": 15, "cayley": 15}
    for kind, size in sizes.items():
        variables = BackwardMap(kind).init(jax.random.key(0), new)
        assert sum(v.size for v in jax.tree.leaves(variables)) == size
        moved = np.abs(BackwardMap(kind).apply(variables, new) - new).max()
        assert (moved > 0.1) == (kind == "affine")


def test_maps_are_affine_in_row_vectors():
    rng = np.random.default_rng(0)
    new, old, kernel, bias = rng.normal(size=(4, 3)), rng.normal(size=(4, 2)), rng.normal(size=(3, 3)), np.arange(3.0)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    np.testing.assert_allclose(BackwardMap().apply({"params": params}, new), new @ kernel + bias, rtol=1e-5)
    params = {"out": {"kernel": jnp.asarray(kernel[:2]), "bias": jnp.asarray(bias)}}
    np.testing.assert_allclose(ForwardMap(3).apply({"params": params}, old), old @ kernel[:2] + bias, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lambda", "affine", "orthogonal", "cayley"])
def test_nnx_backward_maps_are_linen_ones(kind):
    new = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    other = NNXBackwardMap(6, kind, rngs=nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    drawn = jax.tree.map(lambda v: v + 0.1 * jnp.arange(v.size).reshape(v.shape) / v.size, state)
    nnx.update(other, drawn)
    np.testing.assert_allclose(other(new), BackwardMap(kind).apply({"params": drawn}, new), atol=tolerance(size=4))


@pytest.mark.parametrize("hidden", [(), (8, 7)])
def test_nnx_forward_maps_are_linen_ones(hidden):
    old = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    other = NNXForwardMap(3, 6, hidden, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    found = ForwardMap(6, hidden).apply({"params": params}, old)
    np.testing.assert_allclose(other(old), found, atol=tolerance(size=4))
    assert found.shape == (4, 6)
    reached = old
    for name in [f"hidden_{i}" for i in range(len(hidden))] + ["out"]:
        reached = reached @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
        reached = reached if name == "out" else np.maximum(reached, 0)
    np.testing.assert_allclose(found, reached, atol=1e-5)


def test_narrow_features_are_mapped_in_float32():
    new = jnp.ones((2, 4), jnp.bfloat16)
    for kind in ("lambda", "orthogonal"):
        assert BackwardMap(kind).init_with_output(jax.random.key(0), new)[0].dtype == jnp.float32


def test_compiles_once_and_strict_gradients_are_finite_at_the_start():
    traces, new = [], jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)

    @jax.jit
    def gradient(params):
        traces.append(None)
        loss = lambda p: jnp.sum(BackwardMap("orthogonal").apply({"params": p}, new)[:, 0])
        return jax.grad(loss)(params)

    params = BackwardMap("orthogonal").init(jax.random.key(0), new)["params"]
    for _ in range(2):
        found = gradient(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, found)
    assert np.isfinite(found["entries"]).all()
    assert np.abs(found["entries"]).max() > 0
    assert len(traces) == 1


def test_unknown_kinds_and_sizes_are_refused():
    with pytest.raises(ValueError, match="'lambda', 'affine', 'orthogonal', 'cayley'"):
        BackwardMap("strict").init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="'lambda', 'affine', 'orthogonal', 'cayley'"):
        NNXBackwardMap(3, "strict", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected \(3,\) for size=3"):
        orthogonal_kernel(jnp.ones(4), 3)
    with pytest.raises(ValueError, match="features=0"):
        ForwardMap(0).init(jax.random.key(0), jnp.ones((2, 3)))
