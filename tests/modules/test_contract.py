"""What every module on activations promises, whatever it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import MaterializeError, NotMergeableError
from tests.tolerances import tolerance

from .contract import MODULES, adapt, make_params, moved, rematerialized, scanned, unrolled

X = jnp.asarray(np.random.default_rng(7).normal(size=(4, 5, 6)), jnp.float32)


@pytest.fixture(params=MODULES, ids=lambda case: case.name, scope="module")
def case(request):
    return request.param


def objective(fn):
    """Value and gradient of everything that learns, and of what is frozen."""
    run = sj.with_adapters(fn)
    weights = jax.random.normal(jax.random.key(3), X.shape)
    return jax.jit(jax.value_and_grad(lambda t, x: jnp.sum(weights * run(t, x)), allow_int=True))


def close(actual, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if a.dtype != jax.dtypes.float0:
            size = np.abs(np.asarray(b, np.float64)).max(initial=0.0)
            np.testing.assert_allclose(
                a, b, atol=500 * tolerance() * max(size, 1.0), err_msg=jax.tree_util.keystr(path)
            )


def test_starts_at_the_model(case):
    adapted, params = adapt(case, make_params()), make_params()
    np.testing.assert_array_equal(jax.jit(sj.with_adapters(scanned))(adapted, X), jax.jit(scanned)(params, X))


def test_layers_in_a_loop_rematerialized_or_one_after_the_other_give_the_same(case):
    adapted = moved(adapt(case, make_params()))
    value, gradients = objective(scanned)(adapted, X)
    assert float(value) != pytest.approx(float(jnp.sum(scanned(make_params(), X))))
    for fn in (rematerialized, unrolled):
        close((value, gradients), objective(fn)(adapted, X))
    learned, frozen = sj.partition(gradients)
    for keys, gradient in jax.tree_util.tree_leaves_with_path(learned):
        assert np.asarray(gradient).any(), f"{jax.tree_util.keystr(keys)} learns nothing"
    for path, weight in sj.core.leaves_with_paths(frozen):
        for gradient in jax.tree.leaves(weight) if sj.core.is_weight(weight) else ():
            held = gradient.dtype == jax.dtypes.float0 or not np.asarray(gradient, np.float32).any()
            assert held, f"{path} is frozen and has a gradient"


def test_vmap_over_adapters_and_bfloat16(case):
    base = adapt(case, make_params())
    trees = [moved(base, seed) for seed in (1, 2)]
    frozen = sj.partition(base)[1]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *(sj.partition(t)[0] for t in trees))
    run = sj.with_adapters(scanned)
    found = jax.jit(jax.vmap(lambda t: run(sj.combine(t, frozen), X)))(stacked)
    for one, tree in zip(found, trees, strict=True):
        close(one, run(tree, X))
    low = moved(adapt(case, make_params(jnp.bfloat16)))
    y = run(low, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = run(moved(adapt(case, jax.tree.map(lambda v: v.astype(jnp.float32), make_params(jnp.bfloat16)))), X)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.1 * float(jnp.abs(exact).max()))


def test_files_shapes_and_refusals(case, tmp_path):
    params = make_params()
    adapted = moved(adapt(case, params))
    abstract = jax.eval_shape(lambda p: adapt(case, p), params)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), abstract) == jax.tree.map(lambda v: (v.shape, v.dtype), adapted)
    sj.save_adapter(tmp_path / "module.safetensors", adapted)
    loaded = sj.load_adapter(tmp_path / "module.safetensors", params)
    np.testing.assert_array_equal(*(sj.with_adapters(scanned)(t, X) for t in (loaded, adapted)))
    with pytest.raises((NotMergeableError, MaterializeError)):
        sj.merge(adapted)
