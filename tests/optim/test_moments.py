"""What becomes of moments: which leaves of a state they are, against numpy and fresh optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError
from tests.tolerances import tolerance


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params():
    return {"w": random(6, 4), "v": random(6, 3, seed=1), "bias": random(4, seed=2)}


def gradients(seed):
    return jax.tree.map(lambda p: random(*p.shape, seed=seed), params())


def used(optimizer):
    state = optimizer.init(params())
    for seed in range(5):
        _, state = optimizer.update(gradients(seed), state, params())
    return state


OPTIMIZERS = {
    "adam": (optax.adam(1e-2), lambda s: s[0].mu),
    "momentum": (optax.sgd(1e-2, 0.9), lambda s: s[0].trace),
    "lion": (optax.lion(1e-2), lambda s: s[0].mu),
    "injected": (optax.inject_hyperparams(optax.adam)(1e-2), lambda s: s.inner_state[0].mu),
    "accumulated": (optax.MultiSteps(optax.adam(1e-2), 2), lambda s: s.inner_opt_state[0].mu),
    "guarded": (optax.apply_if_finite(optax.adam(1e-2), 2), lambda s: s.inner_state[0].mu),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_moments_are_projected_and_nothing_else(name):
    optimizer, moment = OPTIMIZERS[name]
    state = used(optimizer)
    u = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 2)))[0]
    found = sj.optim.project_momentum(state, {"w": jnp.asarray(u, jnp.float32)})
    before, after = moment(state), moment(found)
    expected = before["w"] - u @ (u.T @ np.asarray(before["w"], np.float64))
    np.testing.assert_allclose(after["w"], expected, atol=tolerance(size=4))
    np.testing.assert_array_equal(after["v"], before["v"])
    different = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state, found)
    assert sum(jax.tree.leaves(different)) == 1
    assert jax.tree.structure(state) == jax.tree.structure(found)


def test_after_the_basis_changed_momentum_alone_goes_nowhere():
    """The second task's projection in front: without projecting the momentum the first step breaks it."""
    u = jnp.eye(6)[:, :2]
    optimizer = optax.chain(sj.project_orthogonal({"w": jnp.zeros((6, 2))}), optax.sgd(1.0, 0.9))
    state = sj.optim.replace_basis(used(optimizer), {"w": u})
    for old, leaks in ((state, True), (sj.optim.project_momentum(state, {"w": u}), False)):
        updates, _ = optimizer.update(gradients(9), old)
        assert bool(jnp.any(jnp.abs(updates["w"][:2]) > 1e-6)) == leaks


def test_parts_of_a_split_optimizer():
    optimizer = optax.multi_transform({"a": optax.adam(1e-2), "b": optax.sgd(1e-2)}, {"w": "a", "v": "b", "bias": "b"})
    found = sj.optim.project_momentum(used(optimizer), {"w": jnp.eye(6)[:, :2]})
    mu = found.inner_states["a"].inner_state[0].mu["w"]
    assert not mu[:2].any()
    assert mu[2:].all()


def test_reset_adam_goes_on_like_a_fresh_one():
    optimizer = optax.adam(1e-2)
    fresh, _ = optimizer.update(gradients(9), optimizer.init(params()))
    found, _ = optimizer.update(gradients(9), sj.optim.reset_moments(used(optimizer)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance()), found, fresh)
    # With the old count it would take steps of three times their size.
    many = jax.tree.map(lambda p: random(2000, *p.shape), params())
    step = lambda state, gradient: (optimizer.update(gradient, state, params())[1], None)
    kept = jax.jit(lambda state: jax.lax.scan(step, state, many)[0])(optimizer.init(params()))
    assert kept[0].count == 2000
    stale = (sj.optim.reset_moments(kept)[0]._replace(count=kept[0].count), *kept[1:])
    large, _ = optimizer.update(gradients(9), stale)
    ratio = jnp.abs(large["w"] / fresh["w"])
    np.testing.assert_allclose(ratio, 0.1 / np.sqrt(0.001 / (1 - 0.999**2001)), rtol=1e-3)


def test_reset_leaves_schedules_and_bases_alone():
    basis = {"w": jnp.eye(6)[:, :2]}
    optimizer = sj.sandwich(optax.adam(optax.linear_schedule(1.0, 0.0, 10)), basis)
    state = used(optimizer)
    found = sj.optim.reset_moments(state)
    adam, schedule = found.inner
    assert not any(v.any() for v in jax.tree.leaves(adam))
    assert int(schedule.count) == 5
    np.testing.assert_array_equal(found.projection.basis["w"], basis["w"])


def test_moments_in_coordinates_are_refused_by_shape():
    optimizer = sj.optim.in_subspace(optax.scale_by_adam(), rank=2, side="in")
    with pytest.raises(StructureError, match="w: the basis of side 'in'"):
        sj.optim.project_momentum(optimizer.init(params()), {"w": jnp.eye(6)[:, :2]})
