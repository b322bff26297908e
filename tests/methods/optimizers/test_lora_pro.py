"""LoRA-Pro against least squares, scipy's Sylvester solver and its own statements."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import subspace_jax as sj
from subspace_jax.core import StructureError
from subspace_jax.methods.optimizers.lora_pro import adjust_pair, equivalent_gradient, plain_pair
from tests.tolerances import assert_rounding, tolerance

SCALE = 2.0


def problem(inputs=7, outputs=5, rank=3, stack=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((*stack, inputs, rank), (*stack, rank, outputs), (*stack, inputs, outputs))
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def gradients(a, b, whole):
    return SCALE * whole @ jnp.swapaxes(b, -1, -2), SCALE * jnp.swapaxes(a, -1, -2) @ whole


def projectors(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a @ np.linalg.pinv(a), np.linalg.pinv(b) @ b


@pytest.mark.parametrize("shape", [(7, 5, 3), (5, 7, 3), (6, 6, 1), (4, 9, 4)])
def test_equivalent_gradient_is_the_least_squares_projection(shape):
    a, b, whole = problem(*shape)
    step = adjust_pair(a, b, *gradients(a, b, whole), SCALE)
    found = equivalent_gradient(a, b, step, SCALE)
    wide = [np.asarray(v, np.float64) for v in (a, b, whole)]
    jacobian = SCALE * np.hstack([np.kron(np.eye(shape[0]), wide[1].T), np.kron(wide[0], np.eye(shape[1]))])
    assert np.linalg.matrix_rank(jacobian) == shape[2] * (shape[0] + shape[1]) - shape[2] ** 2
    solution = np.linalg.lstsq(jacobian, wide[2].ravel(), rcond=None)[0]
    np.testing.assert_allclose(found, (jacobian @ solution).reshape(shape[:2]), rtol=1e-3, atol=1e-4)
    left, right = projectors(a, b)
    outside = (np.eye(shape[0]) - left) @ wide[2] @ (np.eye(shape[1]) - right)
    np.testing.assert_allclose(found, wide[2] - outside, rtol=1e-3, atol=1e-4)


def test_it_is_nearer_the_gradient_than_loras_at_any_length():
    for seed in range(5):
        a, b, whole = problem(seed=seed)
        given = gradients(a, b, whole)
        lora = equivalent_gradient(a, b, type(adjust_pair(a, b, *given, SCALE))(*given), SCALE)
        best = float(jnp.sum(lora * whole) / jnp.sum(lora * lora))
        ours = equivalent_gradient(a, b, adjust_pair(a, b, *given, SCALE), SCALE)
        for length in (1.0, best):
            assert jnp.linalg.norm(ours - whole) <= jnp.linalg.norm(length * lora - whole) + 1e-5


def test_the_choice_among_equal_steps_solves_the_sylvester_equation():
    a, b, whole = problem()
    given = gradients(a, b, whole)
    plain, chosen = plain_pair(a, b, *given, SCALE), adjust_pair(a, b, *given, SCALE)
    wide = [np.asarray(v, np.float64) for v in (a, b, *given)]
    right = -wide[0].T @ wide[2] @ np.linalg.inv(wide[1] @ wide[1].T) / SCALE**2
    x = scipy.linalg.solve_sylvester(wide[0].T @ wide[0], wide[1] @ wide[1].T, right)
    np.testing.assert_allclose(chosen.a, plain.a + wide[0] @ x, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(chosen.b, plain.b - x @ wide[1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        equivalent_gradient(a, b, chosen, SCALE), equivalent_gradient(a, b, plain, SCALE), rtol=1e-3, atol=1e-4
    )

    def distance(shift):
        moved = (chosen.a + wide[0] @ shift, chosen.b - shift @ wide[1])
        return sum(float(np.sum((np.asarray(v) - np.asarray(g)) ** 2)) for v, g in zip(moved, given, strict=True))

    rng = np.random.default_rng(1)
    assert all(distance(0.05 * rng.normal(size=(3, 3))) > distance(np.zeros((3, 3))) for _ in range(10))


def test_descent_is_the_squared_length():
    a, b, whole = problem()
    given = gradients(a, b, whole)
    step = adjust_pair(a, b, *given, SCALE)
    descent = jnp.sum(given[0] * step.a) + jnp.sum(given[1] * step.b)
    np.testing.assert_allclose(descent, jnp.sum(equivalent_gradient(a, b, step, SCALE) ** 2), rtol=1e-3)


def test_another_basis_of_the_rank_changes_nothing():
    a, b, whole = problem()
    mix = np.asarray([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.2, 0.0, 1.0]])
    other = jnp.asarray(a @ mix, jnp.float32), jnp.asarray(np.linalg.inv(mix) @ b, jnp.float32)
    found = [
        equivalent_gradient(*pair, adjust_pair(*pair, *gradients(*pair, whole), SCALE), SCALE)
        for pair in ((a, b), other)
    ]
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-3)


def test_the_first_step():
    a, _, whole = problem()
    b = jnp.zeros((3, 5))
    step = adjust_pair(a, b, *gradients(a, b, whole), SCALE)
    assert not np.asarray(step.a).any()
    left, _ = projectors(a, np.ones((3, 5)))
    np.testing.assert_allclose(SCALE * a @ step.b, left @ whole, rtol=1e-3, atol=1e-4)


def test_full_rank_gives_the_gradient_itself():
    a, b, whole = problem(4, 4, 4)
    step = adjust_pair(a, b, *gradients(a, b, whole), SCALE)
    np.testing.assert_allclose(equivalent_gradient(a, b, step, SCALE), whole, rtol=1e-3, atol=1e-3)


def test_just_after_the_first_step_everything_is_finite():
    a, b, whole = problem()
    for size in (1e-3, 1e-5, 1e-8, 1e-20):
        step = adjust_pair(a, size * b, *gradients(a, size * b, whole), SCALE)
        change = equivalent_gradient(a, size * b, step, SCALE)
        assert np.isfinite(step.a).all()
        assert jnp.linalg.norm(change) <= 1.01 * jnp.linalg.norm(whole)


def test_zero_gradients_and_dependent_columns_give_finite_steps():
    a, b, whole = problem()
    for pair in ((a, b, jnp.zeros_like(whole)), (a.at[:, 1].set(a[:, 0]), b, whole)):
        step = adjust_pair(*pair[:2], *gradients(*pair), SCALE)
        assert all(np.isfinite(v).all() for v in step)


def tree(stack=(), layers=2, **options):
    shape = (*stack, 7, 5)
    params = {
        f"layer_{i}": jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32) for i in range(layers)
    }
    role = sj.Role.dense((len(stack),), (len(stack) + 1,), tuple(range(len(stack))))
    rules = {"layer_*": sj.lora(3, alpha=6.0, **options)}
    adapted = sj.adapt(params, rules, key=jax.random.key(0), roles={"layer_*": role})
    rng = np.random.default_rng(9)
    trainable, frozen = sj.partition(adapted)
    return jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), v.dtype), trainable), frozen


@pytest.mark.parametrize("stack", [(), (4,)])
@pytest.mark.parametrize("make", [sj.methods.lora_pro.scale_by_lora_pro, sj.methods.lora_pro.scale_by_lora_pro_adam])
def test_layers_together_are_layers_alone(stack, make):
    trainable, frozen = tree(stack)
    given = jax.tree.map(lambda v: jnp.cos(v), trainable)
    optimizer = make(adapted=frozen)
    both, _ = jax.jit(optimizer.update)(given, optimizer.init(trainable), trainable)
    for name in trainable:
        for i in np.ndindex(stack):
            one = jax.tree.map(lambda v, i=i: v[i], {name: trainable[name]})
            alone, _ = optimizer.update(jax.tree.map(jnp.cos, one), optimizer.init(one), one)
            for field in ("a", "b"):
                left, right = getattr(both[name], field)[i], getattr(alone[name], field)
                np.testing.assert_allclose(left, right, rtol=2e-3, atol=1e-4)


def test_adam_of_full_rank_follows_adam_on_the_weight():
    rng = np.random.default_rng(0)
    w, target = (jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(2))
    adapted = sj.adapt({"w": w}, {"w": sj.lora(4)}, key=jax.random.key(0))
    learned, frozen = sj.partition(adapted)
    learned["w"] = dataclasses.replace(
        learned["w"], **{n: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for n in ("a", "b")}
    )
    rate = 1e-4
    optimizer = optax.chain(
        sj.methods.lora_pro.scale_by_lora_pro_adam(adapted=adapted), optax.scale_by_learning_rate(rate)
    )
    full, plain = sj.merge(sj.combine(learned, frozen))["w"], optax.adam(rate)
    state, full_state, start = optimizer.init(learned), plain.init(full), full

    def merged(t):
        return sj.combine(t, frozen)["w"].materialize()

    slope = jax.jit(jax.grad(lambda t: jnp.sum((merged(t) - target) ** 2)))
    update, update_full = jax.jit(optimizer.update), jax.jit(plain.update)
    for _ in range(20):
        updates, state = update(slope(learned), state, learned)
        learned = optax.apply_updates(learned, updates)
        updates, full_state = update_full(2 * (full - target), full_state)
        full = optax.apply_updates(full, updates)
    moved = merged(learned) - start
    np.testing.assert_allclose(moved, full - start, atol=0.03 * float(jnp.abs(full - start).max()))


def test_state_is_as_large_as_the_weights():
    trainable, frozen = tree()
    assert not jax.tree.leaves(sj.methods.lora_pro.scale_by_lora_pro(adapted=frozen).init(trainable))
    state = sj.methods.lora_pro.scale_by_lora_pro_adam(adapted=frozen).init(trainable)
    assert sum(v.size for v in (*state.mu, *state.nu)) == 2 * 2 * 7 * 5


def test_other_leaves_pass_and_dora_inside_is_found():
    params = {"w": jnp.ones((7, 5)), "head": jnp.ones((5, 2))}
    rules = {"head": sj.full(), "w": sj.dora(sj.lora(2))}
    trainable, frozen = sj.partition(sj.adapt(params, rules, key=jax.random.key(0)))
    given = jax.tree.map(jnp.ones_like, trainable)
    optimizer = sj.methods.lora_pro.scale_by_lora_pro(adapted=frozen)
    updates, _ = optimizer.update(given, optimizer.init(trainable), trainable)
    np.testing.assert_array_equal(updates["head"].value, given["head"].value)
    np.testing.assert_array_equal(updates["w"].magnitude, given["w"].magnitude)
    assert not np.array_equal(updates["w"].direction.b, given["w"].direction.b)


def test_half_precision_factors_keep_their_dtype():
    trainable, frozen = tree(dtype=jnp.bfloat16)
    given = jax.tree.map(jnp.cos, trainable)
    updates, _ = sj.methods.lora_pro.scale_by_lora_pro(adapted=frozen).update(given, optax.EmptyState(), trainable)
    exact, _ = sj.methods.lora_pro.scale_by_lora_pro(adapted=frozen).update(
        *(
            jax.tree.map(lambda v: v.astype(jnp.float32), t) if t is not None else optax.EmptyState()
            for t in (given, None)
        ),
        jax.tree.map(lambda v: v.astype(jnp.float32), trainable),
    )
    for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(exact), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(np.float32), other, rtol=0.02, atol=0.02)


def test_bad_input_is_refused():
    trainable, _ = tree()
    with pytest.raises(ValueError, match="update\\(gradients, state, params\\)"):
        sj.methods.lora_pro.scale_by_lora_pro().update(trainable, optax.EmptyState())
    with pytest.raises(StructureError, match="no LowRank"):
        sj.methods.lora_pro.scale_by_lora_pro().init({"w": jnp.ones((3, 2))})
    half = {"w": dataclasses.replace(trainable["layer_0"], b=None)}
    with pytest.raises(StructureError, match="both factors together"):
        sj.methods.lora_pro.scale_by_lora_pro().init(half)
    with pytest.raises(StructureError, match=r"layer_0: the scale of this addition is not known.*adapted="):
        sj.methods.lora_pro.scale_by_lora_pro().init(trainable)


def spec_loop(a, b, w, x, y, scale, rate, steps):
    """The specification's SGD in float64, with the damping of 1e-8 that is above float64's rounding."""
    a, b, w, x, y = (np.asarray(v, np.float64) for v in (a, b, w, x, y))
    for _ in range(steps):
        whole = x.T @ (x @ (w + scale * a @ b) - y) / len(x)
        left, right = scale * whole @ b.T, scale * a.T @ whole
        ga, gb = a.T @ a, b @ b.T
        a_inverse, b_inverse = (np.linalg.pinv(g, rcond=1e-12, hermitian=True) for g in (ga, gb))
        if not b.any():
            step_a, step_b = left, a_inverse @ right / scale**2
        else:
            step_a = left @ b_inverse / scale**2
            step_b = a_inverse @ (right - right @ b.T @ b_inverse @ b) / scale**2
            (la, ua), (lb, ub) = np.linalg.eigh(ga), np.linalg.eigh(gb)
            turned = -ua.T @ (a.T @ step_a) @ ub
            solution = ua @ (turned / np.maximum(la[:, None] + lb[None, :], 1e-8)) @ ub.T
            step_a, step_b = step_a + a @ solution, step_b - solution @ b
        a, b = a - rate * step_a, b - rate * step_b
    return 0.5 * np.sum((x @ (w + scale * a @ b) - y) ** 2) / len(x)


@pytest.mark.parametrize("examples", [4, 8])
def test_fewer_examples_than_the_rank_train_as_in_float64(examples):
    """The Gram matrix of B is singular then; its small eigenvalues in float32 are rounding, above any fixed damping."""
    rng = np.random.default_rng(0)
    w, goal = (rng.normal(size=(32, 32)) / np.sqrt(32) for _ in range(2))
    x = rng.normal(size=(examples, 32))
    y = x @ goal
    trainable, frozen = sj.partition(
        sj.adapt({"w": jnp.asarray(w, jnp.float32)}, {"w": sj.lora(16, alpha=32.0)}, key=jax.random.key(0))
    )
    start = trainable["w"]
    optimizer = sj.lora_pro(3e-3, adapted=frozen)

    @jax.jit
    def train(trainable):
        def loss(t):
            merged = sj.combine(t, frozen)["w"].materialize()
            return 0.5 * jnp.sum((jnp.asarray(x, jnp.float32) @ merged - jnp.asarray(y, jnp.float32)) ** 2) / len(x)

        def step(carry, _):
            t, state = carry
            updates, state = optimizer.update(jax.grad(loss)(t), state, t)
            return (optax.apply_updates(t, updates), state), None

        (t, _), _ = jax.lax.scan(step, (trainable, optimizer.init(trainable)), None, length=300)
        return loss(t)

    expected = spec_loop(start.a, start.b, w, x, y, 2.0, 3e-3, 300)
    np.testing.assert_allclose(train(trainable), expected, rtol=1e-2)


def test_two_equal_columns_give_the_projection():
    a, b, whole = problem()
    a = a.at[:, 1].set(a[:, 0])
    found = equivalent_gradient(a, b, adjust_pair(a, b, *gradients(a, b, whole), SCALE), SCALE)
    left, right = projectors(a, b)
    wide = np.asarray(whole, np.float64)
    outside = (np.eye(7) - left) @ wide @ (np.eye(5) - right)
    # Gram matrices square the condition of the factors.
    condition = np.linalg.cond(np.asarray(b, np.float64)) ** 2
    np.testing.assert_allclose(found, wide - outside, rtol=0, atol=tolerance(size=condition, norm=np.abs(wide).max()))


def test_a_pair_without_gradient_rests_and_half_of_one_is_refused():
    trainable, frozen = tree()
    given = jax.tree.map(jnp.cos, trainable)
    optimizer = sj.methods.lora_pro.scale_by_lora_pro_adam(adapted=frozen)
    both, _ = optimizer.update(given, optimizer.init(trainable), trainable)
    one, state = optimizer.update(given | {"layer_1": None}, optimizer.init(trainable), trainable)
    assert one["layer_1"] is None
    assert_rounding(one["layer_0"].a, both["layer_0"].a)
    assert np.asarray(state.mu[0][0]).any()
    assert not np.asarray(state.mu[0][1]).any()
    half = given | {"layer_1": dataclasses.replace(given["layer_1"], a=None)}
    with pytest.raises(StructureError, match="one factor of a pair has no gradient"):
        optimizer.update(half, optimizer.init(trainable), trainable)
