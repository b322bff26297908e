"""The transformation against the gradient of the term in a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RoleError, leaves_with_paths
from subspace_jax.methods.regularized.lambda_orthogonality import lambda_orthogonality
from tests.optim.contract import ROLES, make_tree


def added(tree, **options):
    """What the transformation adds to a gradient of zero."""
    optimizer = sj.methods.lambda_orthogonality.add_lambda_orthogonality(**options)
    return jax.jit(lambda p: optimizer.update(optax.tree.zeros_like(p), optimizer.init(p), p)[0])(tree)


def test_adds_the_gradient_of_the_term_in_the_loss():
    params = make_tree(1)  # those of the start are orthogonal, where the direction of the pull is rounding
    found = dict(leaves_with_paths(added(params, weight=0.5, lam=1.0, alpha=2.0, roles=ROLES)))
    for path in ("matrix", "stacked", "conv", "bfloat16"):
        term = lambda w, path=path: 0.5 * lambda_orthogonality(w, 1.0, 2.0, role=ROLES.get(path))
        expected = jax.jit(jax.grad(term))(params[path].astype(jnp.float32))
        tolerance = 1e-2 if path == "bfloat16" else 1e-5
        assert found[path].dtype == params[path].dtype
        np.testing.assert_allclose(found[path].astype(jnp.float32), expected, atol=tolerance * np.abs(expected).max())
    assert not np.asarray(found["vector"]).any()
    slope = jax.jit(jax.grad(lambda w: 0.5 * lambda_orthogonality(w, 1.0, 2.0)))
    for field in ("a", "b"):
        factor = getattr(params["low_rank"], field)
        expected = slope(factor)
        np.testing.assert_allclose(getattr(found["low_rank"], field), expected, atol=1e-5)
    full = slope(params["full"].value)
    np.testing.assert_allclose(found["full"].value, full, atol=1e-5 * np.abs(full).max())


def test_magnitudes_of_dora_pass():
    adapted = sj.adapt({"w": jnp.ones((6, 4))}, {"w": sj.dora(sj.pissa(2))}, key=jax.random.key(0))
    trainable = sj.partition(adapted)[0]
    changed = [jax.tree_util.keystr(p) for p, v in jax.tree.leaves_with_path(added(trainable, lam=0.0)) if v.any()]
    assert changed
    assert not any("magnitude" in name for name in changed)


def test_chooses_by_glob_and_predicate():
    params = {"a": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((3, 3))}}
    for select in ("a/kernel", ["a/kernel"], lambda path, leaf: path == "a/kernel"):
        found = added(params, lam=0.0, select=select)
        assert np.asarray(found["a"]["kernel"]).any()
        assert not np.asarray(found["b"]["kernel"]).any()
        assert not np.asarray(found["a"]["bias"]).any()


def test_holes_and_masked_leaves_stay():
    params = {"w": 2 * jnp.eye(3), "frozen": 2 * jnp.eye(3), "other": 2 * jnp.eye(3)}
    optimizer = sj.methods.lambda_orthogonality.add_lambda_orthogonality(lam=0.0)
    gradient = {"w": jnp.zeros((3, 3)), "frozen": None, "other": optax.MaskedNode()}
    seen = params | {"other": optax.MaskedNode()}
    updates, _ = optimizer.update(gradient, optimizer.init(seen), seen)
    assert updates["frozen"] is None
    assert updates["other"] == optax.MaskedNode()
    assert np.asarray(updates["w"]).any()
    split = optax.chain(
        optax.masked(
            sj.methods.lambda_orthogonality.add_lambda_orthogonality(lam=0.0),
            {"w": True, "frozen": False, "other": False},
        )
    )
    updates, _ = split.update(optax.tree.zeros_like(params), split.init(params), params)
    assert [name for name, u in updates.items() if u.any()] == ["w"]


def test_follows_schedules_and_injected_numbers():
    params = {"w": 2 * jnp.eye(3)}
    zeros = optax.tree.zeros_like(params)
    x = 3 * np.sqrt(3.0)
    schedules = sj.methods.lambda_orthogonality.add_lambda_orthogonality(
        optax.linear_schedule(0.0, 1.0, 2), lambda count: x * (count > 1)
    )
    injected = optax.inject_hyperparams(sj.methods.lambda_orthogonality.add_lambda_orthogonality)(
        weight=optax.linear_schedule(0.0, 1.0, 2), lam=x
    )
    slope = jax.jit(jax.grad(lambda_orthogonality))
    for optimizer, lams in ((schedules, (0.0, 0.0, x)), (injected, (x, x, x))):
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for weight, lam in zip((0.0, 0.5, 1.0), lams, strict=True):
            updates, state = update(zeros, state, params)
            expected = weight * slope(params["w"], lam)
            np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


def test_alone_it_brings_a_kernel_to_its_lambda():
    """The pull fades where the gate closes: from far outside the kernel comes in and stays near lambda."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)}
    optimizer = optax.chain(sj.methods.lambda_orthogonality.add_lambda_orthogonality(1.0, 4.0, 3.0), optax.sgd(0.01))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    end = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=300)[0][0]["w"])(params)
    far, near = (np.linalg.norm(np.asarray(w).T @ np.asarray(w) - np.eye(16)) for w in (params["w"], end))
    assert far > 40
    assert 1.0 < near < 4.5


def test_bad_input_is_refused():
    params = {"w": jnp.ones((2, 2)), "stack": jnp.ones((2, 2, 2))}
    optimizer = sj.methods.lambda_orthogonality.add_lambda_orthogonality()
    with pytest.raises(ValueError, match="needs params"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(PatternError, match="kernel"):
        sj.methods.lambda_orthogonality.add_lambda_orthogonality(select="kernel").init(params)
    with pytest.raises(RoleError, match="stack"):
        sj.methods.lambda_orthogonality.add_lambda_orthogonality(select="stack").init(params)
    with pytest.raises(ValueError, match="alpha=0"):
        added(params, alpha=0.0)
