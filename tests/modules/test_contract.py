"""What every module on activations promises, whatever it computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import MaterializeError, NotMergeableError
from tests.tolerances import tolerance

from .contract import MODULES, adapt, make_params, moved, rematerialized, scanned, unrolled

X, WEIGHTS = jnp.asarray(np.random.default_rng(7).normal(size=(2, 4, 5, 6)), jnp.float32)
forward = jax.jit(sj.with_adapters(scanned))
model = jax.jit(scanned)


@pytest.fixture(params=MODULES, ids=lambda case: case.name, scope="module")
def case(request):
    return request.param


@functools.cache
def objective(fn):
    """Value, outputs and the gradient of everything that learns, of what is frozen, and of the inputs."""

    def loss(tree, x, weights):
        y = sj.with_adapters(fn)(tree, x)
        return jnp.sum(weights * y), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), allow_int=True, has_aux=True))


def close(actual, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        if a.dtype != jax.dtypes.float0:
            size = np.abs(np.asarray(b, np.float64)).max(initial=0.0)
            np.testing.assert_allclose(
                a, b, atol=500 * tolerance() * max(size, 1.0), err_msg=jax.tree_util.keystr(path)
            )


def test_starts_at_the_model(case):
    adapted, params = adapt(case, make_params()), make_params()
    np.testing.assert_array_equal(forward(adapted, X), model(params, X))


def test_layers_in_a_loop_rematerialized_or_one_after_the_other_give_the_same(case):
    adapted = moved(adapt(case, make_params()))
    found = objective(scanned)(adapted, X, WEIGHTS)
    plain = np.asarray(model(make_params(), X))
    assert float(found[0][0]) != pytest.approx(float(np.sum(WEIGHTS * plain)))
    for fn in (rematerialized, unrolled):
        close(found, objective(fn)(adapted, X, WEIGHTS))
    learned, frozen = sj.partition(found[1][0])
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
        close(one, forward(tree, X))
    low = moved(adapt(case, make_params(jnp.bfloat16)))
    y = run(low, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v, np.float32)), make_params(jnp.bfloat16))
    exact = np.asarray(forward(moved(adapt(case, wide)), X))
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=0.1 * np.abs(exact).max())


def test_a_bank_serves_each_row_with_its_own_and_learns_each_alone(case, tmp_path):
    """Values and gradients of every row are those of its adapter alone; slot 0 is the model; contents are arguments."""
    params = make_params()
    base = adapt(case, params)
    made = [moved(base, seed) for seed in (1, 2, 3)]
    bank, rows = sj.bank(params, made[:2], slots=4, trainable=True), jnp.array([2, 0, 1, 2])

    @jax.jit
    def run(bank, rows, x):
        trainable, fixed = sj.partition(bank)

        def loss(t, x):
            y = sj.per_row(scanned)(sj.combine(t, fixed), rows, x)
            return jnp.sum(WEIGHTS * y), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(trainable, x)
        return y, gradients

    y, (learned, inputs) = run(bank, rows, X)
    empty, _ = run(sj.banks.remove(sj.banks.remove(bank, 1), 2), rows, X)
    np.testing.assert_array_equal(y[1], empty[1])
    (_, plain), (_, into) = objective(scanned)(params, X, WEIGHTS)
    close(empty, plain)
    close(inputs[1], into[1])
    for slot in (1, 2):
        mine = np.asarray(rows) == slot
        (_, alone), (want, into) = objective(scanned)(made[slot - 1], X, WEIGHTS * mine[:, None, None])
        close(sj.partition(sj.banks.take(sj.combine(learned, sj.partition(bank)[1]), slot))[0], sj.partition(want)[0])
        close(inputs[mine], into[mine])
        close(y[mine], alone[mine])
    for slot in (0, 3):  # the plain model, and a slot of no row and no adapter
        assert not any(np.asarray(v).any() for v in jax.tree.leaves(_slot(learned, slot)))

    changed = sj.banks.put(sj.banks.remove(bank, 1), 3, made[2])
    y, _ = run(changed, jnp.array([3, 1, 0, 2]), X)
    assert run._cache_size() == 1
    np.testing.assert_array_equal(y[1:3], empty[1:3])
    close(y[0], forward(made[2], X)[0])
    close(y[3], forward(made[1], X)[3])
    path = sj.save_adapter(tmp_path / "bank.safetensors", changed, base=params)
    np.testing.assert_array_equal(run(sj.load_adapter(path, params), jnp.array([3, 1, 0, 2]), X)[0], y)


def _slot(bank, slot):
    """One slot of everything that learns in a bank of modules."""

    def one(leaf):
        if not isinstance(leaf, sj.modules.ModuleBank):
            return leaf
        learned = {n: v for n, v in leaf.module.data_items() if n in leaf.module.trainable}
        depth = len(leaf.role.stack_axes)
        axes = {n: 0 if n in sj.modules.alone(leaf.module) else depth for n in learned}
        return {n: np.take(np.asarray(v), slot, axis=axes[n]) for n, v in learned.items()}

    return jax.tree.map(one, bank, is_leaf=sj.core.is_weight)


def test_files_shapes_and_refusals(case, tmp_path):
    params = make_params()
    adapted = moved(adapt(case, params))
    abstract = jax.eval_shape(lambda p: adapt(case, p), params)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), abstract) == jax.tree.map(lambda v: (v.shape, v.dtype), adapted)
    sj.save_adapter(tmp_path / "module.safetensors", adapted)
    loaded = sj.load_adapter(tmp_path / "module.safetensors", params)
    np.testing.assert_array_equal(*(forward(t, X) for t in (loaded, adapted)))
    with pytest.raises((NotMergeableError, MaterializeError)):
        sj.merge(adapted)
