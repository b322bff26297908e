"""OSF's projections: what they keep, and what leaks without them."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, StructureError
from subspace_jax.methods.continual.osf import _frozen
from tests.tolerances import tolerance

ADAM = optax.adam(1e-2)
STACK = {"w": sj.Role.dense((1,), (2,), (0,))}


def matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(w, k, **options):
    roles = STACK if np.ndim(w) == 3 else None
    return sj.adapt({"w": jnp.asarray(w)}, {"w": sj.osf(k, **options)}, key=jax.random.key(0), roles=roles)


@functools.partial(jax.jit, static_argnames=("make", "inner", "options", "steps", "large"))
def run(trainable, frozen, target, make, inner, options, steps, large):
    """Trains; `large`, from which on stacks are projected in a loop, is read while this is traced."""
    assert large == _frozen.LARGE
    optimizer = make(inner, frozen, **dict(options))

    def step(_, carry):
        loss = lambda t: jnp.sum((sj.combine(t, frozen)["w"].materialize() - target) ** 2)
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, steps, step, (trainable, optimizer.init(trainable)))[0]


def train(w, k, make=sj.methods.osf.projection, inner=ADAM, *, steps=100, width="exact", **options):
    """The weights before and after, and the trained stand-in, on a regression that pulls everywhere."""
    trainable, frozen = sj.partition(adapt(w, k, width=width))
    options = tuple(options.items())
    new = run(trainable, frozen, matrix(np.shape(w), 9), make, inner, options, steps, _frozen.LARGE)
    trained = sj.combine(new, frozen)
    return np.asarray(w, np.float64), np.asarray(sj.merge(trained)["w"], np.float64), trained["w"]


def leaks(before, after, k):
    """How far the change of a weight reaches into the frozen columns and rows, by numpy's decomposition."""
    u, _, vt = np.linalg.svd(before, full_matrices=False)
    change = after - before
    size = np.abs(change).max()
    left = np.abs(np.swapaxes(u, -1, -2) @ change)[..., :k, :].max() / size
    right = np.abs(change @ np.swapaxes(vt, -1, -2))[..., :, :k].max() / size
    return left, right


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (2, 8, 8)])
@pytest.mark.parametrize("inner", [optax.adam(1e-2), optax.adamw(1e-2, weight_decay=0.01), optax.sgd(1e-2, 0.9)])
@pytest.mark.parametrize("width", ["exact", "bucketed", "common"])
def test_the_change_is_orthogonal_to_what_is_frozen_on_both_sides(shape, inner, width):
    before, after, _ = train(matrix(shape), 4, inner=inner, width=width)
    assert max(leaks(before, after, 4)) < 1e-5
    u, s, vt = np.linalg.svd(before, full_matrices=False)
    left, right = np.swapaxes(u, -1, -2)[..., :4, :], np.swapaxes(vt, -1, -2)[..., :4]
    np.testing.assert_allclose(left @ after, s[..., :4, None] * vt[..., :4, :], atol=2e-5 * s.max())
    np.testing.assert_allclose(after @ right, u[..., :4] * s[..., None, :4], atol=2e-5 * s.max())
    assert np.abs(after - before).max() > 0.1


def with_removers(inner, frozen, **options):
    return sj.methods.osf.projection(inner, sj.methods.osf.removers(frozen), **options)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (2, 8, 8)])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("project_gradients", [True, False])
def test_every_width_and_form_trains_the_same_weight(shape, k, project_gradients):
    ways = (("exact", sj.methods.osf.projection), *((w, with_removers) for w in ("exact", "bucketed", "common")))
    found = []
    for width, make in ways:
        before, after, _ = train(matrix(shape), k, make, width=width, project_gradients=project_gradients)
        assert max(leaks(before, after, k)) < 1e-5
        found.append(after)
    for after in found[1:]:
        np.testing.assert_allclose(after, found[0], atol=2e-4)
    assert np.abs(found[0] - before).max() > 0.1


@pytest.mark.parametrize("shape", [(3, 12, 8), (2, 8, 8)])
@pytest.mark.parametrize("make", [sj.methods.osf.projection, with_removers])
@pytest.mark.parametrize("width", ["exact", "common"])
def test_large_stacks_are_projected_in_a_loop_with_the_same_result(shape, make, width, monkeypatch):
    _, together, _ = train(matrix(shape), 3, make, steps=10, width=width)
    calls, real = [], jax.lax.map
    monkeypatch.setattr(_frozen, "LARGE", 0)
    monkeypatch.setattr(jax.lax, "map", lambda *args: calls.append(None) or real(*args))
    before, after, _ = train(matrix(shape), 3, make, steps=10, width=width)
    assert len(calls) == 4  # both factors, before and after the optimizer
    np.testing.assert_allclose(after, together, atol=1e-6)
    assert max(leaks(before, after, 3)) < 1e-5


def test_the_dense_form_loops_as_well(monkeypatch):
    w = jnp.asarray(matrix((3, 12, 8)))
    dense = sj.methods.osf.projection(optax.sgd(1.0), adapt(w, 3), mode="dense", roles=STACK)
    project = lambda: jax.jit(lambda tree: dense.update(tree, dense.init(tree), tree)[0])({"w": w})["w"]
    together = project()
    monkeypatch.setattr(_frozen, "LARGE", 0)
    np.testing.assert_allclose(project(), together, atol=1e-5)
    assert leaks(np.zeros_like(w) + w, w + project(), 3)[0] < 1e-5


def test_removers_are_those_of_numpy_in_the_cheaper_form():
    w = matrix((12, 8))
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    rows, columns = matrix((12, 3), 1), matrix((3, 8), 2)
    for k, forms in ((0, (None, None)), (3, ("basis", "basis")), (5, ("basis", "projector")), (8, ("projector",) * 2)):
        found = sj.methods.osf.removers(adapt(w, k))["w"]
        for one, form in zip((found.left, found.right), forms, strict=True):
            assert one.is_empty if form is None else getattr(one, form) is not None
        np.testing.assert_allclose(found.remove(rows, "in"), rows - u[:, :k] @ (u[:, :k].T @ rows), atol=1e-5)
        np.testing.assert_allclose(found.remove(columns, "out"), columns - columns @ vt[:k].T @ vt[:k], atol=1e-5)


def test_tasks_of_one_bucket_are_one_program():
    traces, w = [], matrix((40, 32))

    @jax.jit
    def step(trainable, frozen, state):
        traces.append(None)
        updates, state = with_removers(optax.adam(1e-2), frozen).update(trainable, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for bucket in ((5, 6, 7), (29, 30, 31)):
        state = None
        for k in bucket:
            trainable, frozen = sj.partition(adapt(w, k, width="bucketed"))
            if state is None:
                state = with_removers(optax.adam(1e-2), frozen).init(trainable)
            state = sj.methods.osf.next_task(state, sj.methods.osf.removers(frozen))
            for _ in range(2):
                trainable, state = step(trainable, frozen, state)
    assert len(traces) == 2
    other = sj.methods.osf.removers(adapt(w, 9, width="bucketed"))
    with pytest.raises(StructureError, match="w: the new weight has"):
        sj.methods.osf.next_task(state, other)


def test_outputs_for_inputs_in_the_frozen_span_do_not_change():
    before, after, weight = train(matrix((12, 8)), 4)
    x = matrix((5, 4), 3) @ np.asarray(weight.high_left).T
    np.testing.assert_allclose(x @ after, x @ before, atol=1e-4)


def overlap(weight):
    left = np.abs(np.asarray(weight.high_left).T @ np.asarray(weight.left)).max()
    return max(left, np.abs(np.asarray(weight.right) @ np.asarray(weight.high_right).T).max())


def test_adam_leaks_without_the_parameter_projection_and_not_with_it():
    w = matrix((12, 8))
    only_before = train(w, 4, project_params=False)
    both = train(w, 4)
    only_after = train(w, 4, project_gradients=False)
    assert 0.1 < overlap(only_before[2]) < 1.5
    assert overlap(both[2]) < tolerance(size=4)
    assert overlap(only_after[2]) < tolerance(size=4)
    assert max(leaks(*only_before[:2], 4)) > 0.05


def without_projection(inner, frozen):
    return inner


@pytest.mark.parametrize("inner", [optax.sgd(1e-2), optax.chain(optax.add_decayed_weights(0.01), optax.sgd(1e-2))])
def test_plain_sgd_needs_no_parameter_projection(inner):
    weight = train(matrix((12, 8)), 4, inner=inner, project_params=False)[2]
    assert overlap(weight) < 1e-5
    assert overlap(train(matrix((12, 8)), 4, without_projection, inner)[2]) > 0.05


def test_projected_gradients_are_those_of_numpy_and_projecting_again_changes_nothing():
    adapted = adapt(matrix((12, 8)), 3)
    trainable, frozen = sj.partition(adapted)
    optimizer = sj.methods.osf.projection(optax.identity(), frozen, project_params=False)
    noise = jax.tree.map(lambda v: jnp.asarray(matrix(v.shape, 5)), trainable)
    once = optimizer.update(noise, optimizer.init(trainable))[0]["w"]
    u, _, vt = np.linalg.svd(matrix((12, 8)), full_matrices=False)
    p, r = u[:, :3] @ u[:, :3].T, vt[:3].T @ vt[:3]
    np.testing.assert_allclose(once.left, noise["w"].left - p @ noise["w"].left, atol=1e-5)
    np.testing.assert_allclose(once.right, noise["w"].right - noise["w"].right @ r, atol=1e-5)
    np.testing.assert_array_equal(once.core, noise["w"].core)
    twice = optimizer.update({"w": once}, optimizer.init(trainable))[0]["w"]
    chex.assert_trees_all_close(twice, once, atol=tolerance(size=4))


@pytest.mark.parametrize("shape", [(12, 8), (2, 8, 8)])
def test_dense_mode_keeps_the_same_constraint(shape):
    w = matrix(shape)
    roles = STACK if len(shape) == 3 else None
    optimizer = sj.methods.osf.projection(optax.adam(1e-2), adapt(w, 4), mode="dense", roles=roles)
    params, state = {"w": jnp.asarray(w)}, None
    state = optimizer.init(params)
    step = jax.jit(lambda p, s: optimizer.update(jax.tree.map(lambda v: v - matrix(shape, 9), p), s, p))
    for _ in range(20):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert max(leaks(w, np.asarray(params["w"]), 4)) < 1e-4
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    free = [np.eye(v.shape[-1]) - v for v in (u[..., :4] @ np.swapaxes(u, -1, -2)[..., :4, :],)]
    bare = sj.methods.osf.projection(optax.identity(), adapt(w, 4), mode="dense", roles=roles, project_params=False)
    found = bare.update(params, bare.init(params))[0]["w"]
    right = np.eye(shape[-1]) - np.swapaxes(vt, -1, -2)[..., :4] @ vt[..., :4, :]
    np.testing.assert_allclose(found, free[0] @ np.asarray(params["w"]) @ right, atol=1e-5)


def test_a_stream_of_tasks_keeps_one_program_and_every_tasks_span():
    """Merge, split anew with a larger rank, replace the frozen part: nothing compiles again."""
    traces, w = [], matrix((12, 8))
    optimizer = sj.methods.osf.projection(optax.adam(1e-2), adapt(w, 0, width="common"))
    state = optimizer.init(sj.partition(adapt(w, 0, width="common"))[0])

    @jax.jit
    def step(trainable, frozen, state, target):
        traces.append(None)
        gradient = jax.grad(lambda t: jnp.sum((sj.combine(t, frozen)["w"].materialize() - target) ** 2))(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state

    for task, k in enumerate((0, 2, 5, 8)):
        adapted = adapt(w, k, width="common")
        trainable, frozen = sj.partition(adapted)
        state = sj.methods.osf.next_task(state, frozen)
        assert int(state.inner[0].count) == 0
        assert not np.asarray(state.inner[0].mu["w"].left).any()
        for _ in range(5):
            trainable, state = step(trainable, frozen, state, jnp.asarray(matrix((12, 8), 20 + task)))
        after = np.asarray(sj.merge(sj.combine(trainable, frozen))["w"])
        if k == 8:
            np.testing.assert_array_equal(np.abs(after - w) < 1e-5, True)
        elif k:
            assert max(leaks(w, after, k)) < 1e-4
        w = after
    assert len(traces) == 1


def test_frozen_factors_can_come_with_the_update():
    w = matrix((12, 8))
    trainable, frozen = sj.partition(adapt(w, 3, width="common"))
    other = sj.partition(adapt(w, 6, width="common"))[1]
    optimizer = sj.methods.osf.projection(optax.sgd(1.0), frozen)
    noise = jax.tree.map(lambda v: jnp.asarray(matrix(v.shape, 5)), trainable)
    found = optimizer.update(noise, optimizer.init(trainable), trainable, frozen=other)[0]["w"]
    np.testing.assert_allclose(np.asarray(other["w"].high_left).T @ (found.left + trainable["w"].left), 0, atol=1e-5)


def test_masked_triples_stay_zero_under_an_optimizer_that_moves_everything():
    trainable, frozen = sj.partition(adapt(matrix((12, 8)), 5, width="common"))
    ones = optax.stateless(lambda updates, params: jax.tree.map(jnp.ones_like, updates))
    optimizer = sj.methods.osf.projection(ones, frozen)
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
    found = optax.apply_updates(trainable, updates)["w"]
    for part in (found.left[:, :5], found.core[:5], found.right[:5]):
        np.testing.assert_array_equal(part, 0)


def test_works_beside_others():
    """Other leaves, a chain, labels, accumulation, NaN steps and abstract initialization."""
    adapted = sj.adapt(
        {"w": jnp.asarray(matrix((12, 8))), "head": jnp.ones((8, 3))},
        {"w": sj.osf(3), "head": sj.full()},
        key=jax.random.key(0),
    )
    trainable, frozen = sj.partition(adapted)
    core = sj.methods.osf.projection(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), frozen)
    split = optax.multi_transform(
        {"a": sj.methods.osf.projection(optax.adam(1e-2), frozen), "b": optax.sgd(0.1)}, {"w": "a", "head": "b"}
    )
    for optimizer in (core, split, optax.MultiSteps(core, 1), optax.apply_if_finite(core, 3)):
        state = optimizer.init(trainable)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.init, trainable), state)
        updates, after = jax.jit(optimizer.update)(trainable, state, trainable)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, trainable)
        moved = optax.apply_updates(trainable, updates)["w"]
        np.testing.assert_allclose(np.asarray(frozen["w"].high_left).T @ moved.left, 0, atol=1e-5)
        assert np.abs(np.asarray(updates["head"].value)).max() > 0


@pytest.mark.parametrize("spec", [("a", "b"), (None, "b"), ("a",)])
def test_works_where_mesh_axes_are_explicit(spec):
    """The types of split arrays are checked as a program is traced, on one device too."""
    mesh, w = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2), matrix((12, 8))
    with jax.set_mesh(mesh):
        placed = jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        adapted = jax.jit(lambda v: adapt(v, 4))(placed)
        trainable, frozen = sj.partition(adapted)
        removers = jax.jit(sj.methods.osf.removers)(frozen)
        for params, mode, held in (
            (trainable, "factored", frozen),
            (trainable, "factored", removers),
            ({"w": placed}, "dense", removers),
            ({"w": placed}, "dense", frozen),
        ):
            optimizer = sj.methods.osf.projection(optax.adam(1e-2), held, mode=mode)
            updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
            same = jax.tree.map(lambda u, p: u.sharding.is_equivalent_to(p.sharding, u.ndim), updates, params)
            assert all(jax.tree.leaves(same))
    expected = sj.methods.osf.projection(optax.adam(1e-2), adapt(w, 4), mode="dense")
    params = {"w": jnp.asarray(w)}
    np.testing.assert_allclose(updates["w"], expected.update(params, expected.init(params))[0]["w"], atol=1e-5)


def test_bad_trees_are_refused_by_name():
    w = matrix((12, 8))
    trainable, frozen = sj.partition(adapt(w, 3))
    with pytest.raises(StructureError, match="no SplitSVD"):
        sj.methods.osf.projection(optax.sgd(1.0), trainable)
    with pytest.raises(StructureError, match='w: is a SplitSVD, but mode="dense"'):
        sj.methods.osf.projection(optax.sgd(1.0), frozen, mode="dense").init(trainable)
    with pytest.raises(StructureError, match="w: is a "):
        sj.methods.osf.projection(optax.sgd(1.0), frozen).init({"w": jnp.asarray(w)})
    with pytest.raises(PatternError, match="w: there is a SplitSVD for it"):
        sj.methods.osf.projection(optax.sgd(1.0), frozen).init({"v": jnp.asarray(w)})
    with pytest.raises(StructureError, match="w: factors of sizes"):
        sj.methods.osf.projection(optax.sgd(1.0), adapt(matrix((9, 8)), 3)).init(trainable)
    optimizer = sj.methods.osf.projection(optax.sgd(1.0), frozen)
    with pytest.raises(StructureError, match=r'w: the new weight has .*width="common"'):
        sj.methods.osf.next_task(optimizer.init(trainable), adapt(w, 5))
    with pytest.raises(StructureError, match=r"holds no osf\.projection"):
        sj.methods.osf.next_task(optax.sgd(1.0).init(trainable), frozen)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(trainable, optimizer.init(trainable))


@pytest.mark.optimized
def test_cost_of_a_step_at_width_512():
    """Operations of forming, projecting and Adam beside those of a plain step, of the compiled programs."""
    x = jax.ShapeDtypeStruct((4096, 512), jnp.float32)
    params = {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    loss = lambda p, x: jnp.sum((jnp.tanh(x) @ p["w"]) ** 2)

    def cost(adapted, optimizer_of):
        trainable, frozen = sj.partition(adapted)

        def step(trainable, frozen, x):
            run = lambda t, x: sj.with_adapters(loss)(sj.combine(t, frozen), x)
            gradient, back = jax.grad(run, (0, 1))(trainable, x)
            optimizer = optimizer_of(frozen)
            updates, state = optimizer.update(gradient, optimizer.init(trainable), trainable)
            return optax.apply_updates(trainable, updates), state.inner if hasattr(state, "inner") else state, back

        return jax.jit(step).lower(trainable, frozen, x).compile().cost_analysis()["flops"]

    make = lambda method: jax.eval_shape(lambda p: sj.adapt(p, {"w": method}, key=jax.random.key(0)), params)
    plain = cost(make(sj.full()), lambda frozen: optax.adam(1e-3))
    for method, least, most in (
        (sj.osf(256), 1.1, 1.2),
        (sj.osf(448), 0.9, 1.0),
        (sj.osf(257), 1.1, 1.2),
        (sj.osf(257, width="bucketed"), 1.15, 1.25),
        (sj.osf(256, width="common"), 1.4, 1.5),
    ):
        ratio = cost(make(method), lambda frozen: sj.methods.osf.projection(optax.adam(1e-3), frozen)) / plain
        assert least <= ratio <= most, ratio


def test_narrow_gradients_end_at_projected_factors():
    """The step is in the factors' dtype: rounded to bfloat16 it would leave the allowed space by a thousandth."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    trainable, frozen = sj.partition(sj.adapt({"w": w}, {"w": sj.osf(3)}, key=jax.random.key(0)))
    optimizer = sj.methods.osf.projection(optax.sgd(0.1), frozen)
    sines = lambda v: np.sin(1 + np.arange(v.size)).reshape(v.shape)
    gradient = jax.tree.map(lambda v: jnp.asarray(sines(v), jnp.bfloat16), trainable)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(trainable), trainable)
    new = optax.apply_updates(trainable, updates)["w"]
    assert np.abs(np.asarray(frozen["w"].high_left).T @ new.left).max() <= tolerance(size=8)


def test_a_gradient_of_frozen_directions_moves_nothing_under_adam():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    trainable, frozen = sj.partition(sj.adapt({"w": w}, {"w": sj.osf(3)}, key=jax.random.key(0)))
    optimizer = sj.methods.osf.projection(optax.adam(0.1), frozen)
    zero = jax.tree.map(np.zeros_like, trainable)["w"]
    high = np.asarray(frozen["w"].high_left)
    inside = 100.0 * high @ np.ones((high.shape[-1], zero.left.shape[-1]), np.float32)
    gradient = {"w": dataclasses.replace(zero, left=inside)}
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(trainable), trainable)
    assert np.abs(updates["w"].left).max() <= tolerance(size=8)
