"""Riemannian optimization: the published step in numpy, what it promises, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RankError, StructureError
from tests.tolerances import tolerance

SPACES = (sj.manifolds.Grassmann(), sj.manifolds.Stiefel(), sj.manifolds.SpecialOrthogonal())
by_name = pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)


def point(space=SPACES[0], shape=(4, 6, 2), seed=0):
    shape = (*shape[:-2], shape[-2], shape[-2]) if isinstance(space, sj.manifolds.SpecialOrthogonal) else shape
    return space.random_point(jax.random.key(seed), shape)


def gradients(like, count, seed=1):
    return [np.random.default_rng(seed + i).normal(size=like.shape).astype(np.float32) for i in range(count)]


def numpy_sgd(s, found, rate, momentum, every, transport):
    """The published update with an SVD, in float64."""
    s, buffer = np.asarray(s, np.float64), np.zeros(s.shape)
    t = lambda v: np.swapaxes(v, -1, -2)
    tangent = lambda a: a - s @ (t(s) @ a)
    for i, g in enumerate(found):
        if transport == "project":
            buffer = velocity = momentum * tangent(buffer) + tangent(g)
        else:
            buffer = momentum * buffer + g
            velocity = tangent(buffer)
        u, sizes, wt = np.linalg.svd(velocity, full_matrices=False)
        s = (s @ t(wt) * np.cos(rate * sizes)[..., None, :] - u * np.sin(rate * sizes)[..., None, :]) @ wt
        if (i + 1) % every == 0:
            q, r = np.linalg.qr(s)
            s = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return s


def train(optimizer, params, found):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for g in found:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("transport", ["project", "none"])
def test_sgd_is_the_published_one(transport):
    start = point()
    found = gradients(start, 12)
    optimizer = sj.methods.gcr.grassmann_sgd(0.05, 0.9, transport=transport, renormalize_every=5)
    end, _ = train(optimizer, start, found)
    np.testing.assert_allclose(end, numpy_sgd(start, found, 0.05, 0.9, 5, transport), atol=2e-5)
    other = {"project": "none", "none": "project"}[transport]
    assert np.abs(end - numpy_sgd(start, found, 0.05, 0.9, 5, other)).max() > 1e-3


def test_the_forms_of_momentum_differ_at_second_order():
    start = point()
    found = gradients(start, 3)
    sizes = []
    for rate in (1e-1, 5e-2):
        ends = [numpy_sgd(start, found, rate, 0.9, 5, transport) for transport in ("project", "none")]
        ours = [train(sj.methods.gcr.grassmann_sgd(rate, transport=t), start, found)[0] for t in ("project", "none")]
        np.testing.assert_allclose(ours[0] - ours[1], ends[0] - ends[1], atol=1e-5)
        sizes.append(np.abs(ours[0] - ours[1]).max())
    assert 0.15 < sizes[1] / sizes[0] < 0.4


@by_name
@pytest.mark.parametrize("retraction", ["exponential", "qr", "polar"])
def test_a_step_descends_by_the_squared_gradient(space, retraction):
    start = point(space).astype(jnp.float32)
    target = jnp.asarray(gradients(start, 1, 9)[0])
    loss = lambda p: (
        0.5 * jnp.sum(jnp.square(p - target))
        if not isinstance(space, sj.manifolds.Grassmann)
        else -jnp.sum(jnp.square(jnp.swapaxes(p, -1, -2) @ target))
    )
    gradient = jax.grad(loss)(start)
    square = float(jnp.sum(space.inner(start, *(space.to_tangent(start, gradient),) * 2)))
    faults = []
    for rate in (4e-3, 2e-3):
        optimizer = sj.riemannian(space, optax.sgd(rate), retraction=retraction)
        updates, _ = optimizer.update(gradient, optimizer.init(start), start)
        faults.append(float(loss(start + updates) - loss(start)) + rate * square)
    assert abs(faults[0]) < 0.2 * 4e-3 * square
    assert abs(faults[1]) < 0.35 * abs(faults[0]) + 3e-5


@by_name
@pytest.mark.parametrize("transport", ["project", "isometric", "none"])
@pytest.mark.parametrize("inner", [lambda: optax.sgd(0.02, 0.9), lambda: optax.adamw(0.02)], ids=["sgd", "adamw"])
def test_a_thousand_steps_stay_on_the_manifold(space, transport, inner):
    start = {"x": point(space), "other": jnp.zeros(3)}
    found = jnp.asarray(gradients(start["x"], 1)[0])
    optimizer = sj.riemannian({"x": space}, inner(), transport=transport)

    @jax.jit
    def run(params):
        def step(carry, i):
            params, state = carry
            gradient = {"x": found * jnp.sin(i + jnp.arange(found.size).reshape(found.shape)), "other": jnp.ones(3)}
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, jax.tree.map(lambda u: u, updates)), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1000.0))[0]

    end, state = run(start)
    assert space.check_point(end["x"], tolerance=1e-5)
    np.testing.assert_array_equal(end["other"], 1000.0)  # passed as it came
    if transport != "none":
        moments = next(v for v in jax.tree.leaves(state.inner) if v.shape == found.shape)
        np.testing.assert_allclose(space.to_tangent(end["x"], moments), moments, atol=1e-4)


@by_name
def test_finds_the_best_point(space):
    """Eigenvectors for subspaces, Procrustes for the others."""
    start = point(space, (6, 2))
    if isinstance(space, sj.manifolds.Grassmann):
        a = gradients(jnp.zeros((6, 6)), 1)[0]
        a = a @ a.T + 2 * np.diag(np.arange(6.0))
        gradient = lambda p: -a @ p
        vectors = np.linalg.eigh(a)[1][:, -2:]
        distance = lambda p: space.distance(p, jnp.asarray(vectors))
    else:
        a = np.asarray(point(space, (6, 2), 5)) + 0.1 * gradients(start, 1)[0]
        gradient = lambda p: p - a
        distance = lambda p: jnp.linalg.norm(p - space.project(jnp.asarray(a)))
    optimizer = sj.riemannian(space, optax.sgd(0.02, 0.9))

    @jax.jit
    def run(p):
        def step(carry, _):
            updates, state = optimizer.update(gradient(carry[0]), carry[1], carry[0])
            return (carry[0] + updates, state), None

        return jax.lax.scan(step, (p, optimizer.init(p)), None, length=600)[0][0]

    assert distance(run(start)) < 1e-3 < distance(start)


def test_zero_gradients_leave_every_point_as_it_is():
    start = point()
    for retraction in ("exponential", "qr"):
        optimizer = sj.methods.gcr.grassmann_sgd(0.1, retraction=retraction, renormalize_every=5)
        updates, _ = optimizer.update(jnp.zeros_like(start), optimizer.init(start), start)
        np.testing.assert_allclose(updates, 0, atol=0 if retraction == "exponential" else 1e-6)


def test_whole_space_does_not_move_and_lines_do():
    whole, line = point(shape=(3, 3)), point(shape=(5, 1))
    optimizer = sj.methods.gcr.grassmann_sgd(0.1)
    for start, moves in ((whole, False), (line, True)):
        updates, _ = optimizer.update(gradients(start, 1)[0], optimizer.init(start), start)
        assert (np.abs(updates).max() > 1e-3) == moves


def test_renormalizing_does_not_turn_columns_against_the_momentum():
    start = point()
    found = gradients(start, 1) * 7
    often, never = (train(sj.methods.gcr.grassmann_sgd(0.01, renormalize_every=n), start, found)[0] for n in (1, 1000))
    np.testing.assert_allclose(often, never, atol=1e-5)


def test_weight_decay_does_not_reach_subspaces():
    start, found = point(), gradients(point(), 5)
    plain, _ = train(sj.riemannian(sj.manifolds.Grassmann(), optax.sgd(0.05)), start, found)
    decay = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.05))
    decayed, _ = train(sj.riemannian(sj.manifolds.Grassmann(), decay), start, found)
    np.testing.assert_allclose(plain, decayed, atol=tolerance(size=4))


def test_fields_of_stand_in_weights_can_be_points():
    params = {"w": jnp.asarray(gradients(jnp.zeros((8, 5)), 1)[0])}
    trainable, _ = sj.partition(sj.adapt(params, {"w": sj.pissa(2)}, key=jax.random.key(0)))
    factor = sj.manifolds.Stiefel().project(trainable["w"].a)
    trainable["w"] = trainable["w"].map_fields(lambda name, value: factor if name == "a" else value)
    optimizer = sj.riemannian({"w/a": sj.manifolds.Stiefel()}, optax.sgd(0.1))
    found = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = optimizer.update(found, optimizer.init(trainable), trainable)
    assert sj.manifolds.Stiefel().check_point(optax.apply_updates(trainable, updates)["w"].a)
    np.testing.assert_array_equal(updates["w"].b, found["w"].b)


def test_paths_choose_subspaces():
    params = {"head": {"subspaces": point()}, "w": jnp.ones(2)}
    optimizer = sj.methods.gcr.grassmann_sgd(0.1, paths="**/subspaces")
    found = jax.tree.map(jnp.ones_like, params)
    updates, state = optimizer.update(found, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], 1.0)
    assert sj.manifolds.Grassmann().check_point(params["head"]["subspaces"] + updates["head"]["subspaces"])
    assert sum(v.size for v in jax.tree.leaves(state.inner)) == params["head"]["subspaces"].size  # the state: c d k


def test_bad_input_is_refused():
    good = point()
    optimizer = sj.methods.gcr.grassmann_sgd(0.1)
    with pytest.raises(ValueError, match="needs params"):
        optimizer.update(good, optimizer.init(good))
    with pytest.raises(StructureError, match="head: columns are not orthonormal"):
        optimizer.init({"head": 1.1 * good})
    with pytest.raises(StructureError, match="head: dtype bfloat16"):
        optimizer.init({"head": good.astype(jnp.bfloat16)})
    with pytest.raises(StructureError, match=r"head: Grassmann: shape \(6,\)"):
        optimizer.init({"head": good[0, :, 0]})
    with pytest.raises(PatternError, match="nearest"):
        sj.riemannian({"haed": sj.manifolds.Grassmann()}, optax.sgd(1.0)).init({"head": good})
    with pytest.raises(ValueError, match="cayley"):
        sj.riemannian(sj.manifolds.Stiefel(), optax.sgd(1.0), retraction="cayley")
    with pytest.raises(ValueError, match="isometric"):
        sj.methods.gcr.grassmann_sgd(0.1, transport="isometric")
    with pytest.raises(RankError, match="renormalize_every=0"):
        sj.methods.gcr.grassmann_sgd(0.1, renormalize_every=0)


@pytest.mark.parametrize("space", [sj.manifolds.Grassmann(), sj.manifolds.Stiefel()])
@pytest.mark.parametrize("transport", ["project", "none"])
def test_gradients_in_bfloat16_stay_on_the_manifold(space, transport):
    """Without momentum nothing else would widen the update."""
    point = space.random_point(jax.random.key(0), (10, 3))
    gradient = jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)), jnp.bfloat16)
    optimizer = sj.riemannian(space, optax.sgd(0.1), transport=transport)
    state = optimizer.init(point)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state, point)
        assert updates.dtype == jnp.float32
        point = optax.apply_updates(point, updates)
    assert jnp.abs(point.T @ point - jnp.eye(3)).max() <= tolerance(size=10)


@pytest.mark.parametrize("seed", range(4))
def test_adam_does_not_take_rounding_for_a_tangent(seed):
    """A gradient in the span of a subspace has no tangent part; Adam gives rounding steps of full length."""
    space = sj.manifolds.Grassmann()
    point = space.random_point(jax.random.key(seed), (10, 3))
    gradient = 100.0 * point @ jnp.asarray(np.random.default_rng(seed).normal(size=(3, 3)), jnp.float32)
    optimizer = sj.riemannian(space, optax.adam(0.1))
    updates, state = optimizer.update(gradient, optimizer.init(point), point)
    assert jnp.abs(updates).max() <= tolerance()
    assert not any(np.asarray(v).any() for v in jax.tree.leaves(state.inner.inner_state[0].mu))
