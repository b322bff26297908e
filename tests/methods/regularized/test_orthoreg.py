"""OrthoReg against singular values in NumPy, difference quotients, and task arithmetic by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import PatternError, RoleError, StructureError
from subspace_jax.methods.regularized.orthoreg import (
    disentanglement_error,
    linearized,
    low_rank_penalty,
    penalty,
    task_cosines,
    update_grams,
)
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)
of_arrays = jax.jit(lambda p, b, squared=False: penalty(p, b, squared=squared), static_argnames="squared")
gradient = jax.jit(jax.grad(lambda p, b, squared: penalty(p, b, squared=squared)), static_argnames="squared")


def normal(*shape, seed=0, scale=0.4):
    return jnp.asarray(scale * np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def squares(d):
    """Of the singular values of the smaller side; those beyond the rank are zero."""
    return np.sum((np.linalg.svd(np.asarray(d, np.float64), compute_uv=False) ** 2 - 1) ** 2)


SHAPES = [(6, 2), (2, 6), (5, 5), (1, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_that_of_the_singular_values(shape):
    base, d = {"w": normal(*shape)}, np.asarray(normal(*shape, seed=1), np.float64)
    moved = {"w": base["w"] + d.astype(np.float32)}
    d = np.asarray(moved["w"], np.float64) - np.asarray(base["w"], np.float64)
    assert_rounding(of_arrays(moved, base, squared=True), squares(d), size=16)
    assert_rounding(of_arrays(moved, base), np.sqrt(squares(d)), size=16)
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(shape[0],) * 2))[0]
    turned = {"w": base["w"] + jnp.asarray(turn @ d, jnp.float32)}
    assert_rounding(of_arrays(turned, base), np.sqrt(squares(d)), size=64)
    flipped = of_arrays({"w": moved["w"].T}, {"w": base["w"].T})
    assert_rounding(flipped, of_arrays(moved, base), size=16)
    # The other Gram matrix differs by a constant, so that the squared form has one gradient.
    both = [np.sum((g - np.eye(len(g))) ** 2) for g in (d.T @ d, d @ d.T)]
    assert both[0] - both[1] == pytest.approx(shape[1] - shape[0])


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_its_gradient_is_the_closed_form_and_a_difference_quotient(shape, squared):
    base, moved = {"w": jnp.zeros(shape)}, {"w": normal(*shape, seed=1)}
    d = np.asarray(moved["w"], np.float64)
    found = gradient(moved, base, squared)["w"]
    expected = 4 * d @ (d.T @ d - np.eye(shape[1]))
    if shape[0] < shape[1]:
        expected = 4 * (d @ d.T - np.eye(shape[0])) @ d
    if not squared:
        expected = expected / (2 * np.sqrt(squares(d)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    direction = np.random.default_rng(4).normal(size=shape)
    ends = [squares(d + h * direction) ** (1 if squared else 0.5) for h in (1e-5, -1e-5)]
    assert np.sum(expected * direction) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_where_it_is_zero_and_where_nothing_has_moved():
    """No update: a stationary point. Orthonormal columns: zero, and a finite gradient in the form with the kink."""
    base = {"w": jnp.zeros((6, 2))}
    assert float(of_arrays(base, base, squared=True)) == 2
    assert float(of_arrays(base, base)) == pytest.approx(np.sqrt(2))
    for squared in (True, False):
        assert not np.any(gradient(base, base, squared)["w"])
    exact = {"w": jnp.eye(6)[:, 1:3]}
    assert float(of_arrays(exact, base, squared=True)) == 0
    assert not np.any(gradient(exact, base, False)["w"])
    rounded = {"w": jnp.linalg.qr(normal(6, 2))[0]}
    assert float(jnp.linalg.norm(gradient(rounded, base, False)["w"])) < 2.1
    # Small updates are amplified: the gradient near zero is -4 D.
    small = {"w": 1e-3 * normal(6, 2)}
    np.testing.assert_allclose(gradient(small, base, True)["w"], -4 * small["w"], rtol=1e-4)
    assert float(jnp.sum(jnp.square(rounded["w"]))) == pytest.approx(2, rel=1e-5)


def test_stacks_are_summed_and_kernels_of_more_axes_are_matrices():
    base = {"layers": jnp.zeros((3, 4, 2)), "heads": jnp.zeros((4, 2, 3)), "conv": jnp.zeros((2, 2, 3, 5))}
    moved = {name: normal(*v.shape, seed=2) for name, v in base.items()}
    roles = {
        "layers": sj.Role.dense((1,), (2,), (0,)),
        "heads": sj.Role.dense((0,), (1, 2)),
        "conv": sj.Role.conv(4),
    }
    parts = {
        "layers": sum(np.sqrt(squares(v)) for v in moved["layers"]),
        "heads": np.sqrt(squares(moved["heads"].reshape(4, 6))),
        "conv": np.sqrt(squares(moved["conv"].reshape(12, 5))),
    }
    assert_rounding(penalty(moved, base, roles=roles), parts["layers"] + parts["heads"], size=32)
    assert_rounding(penalty(moved, base, roles=roles, select="conv"), parts["conv"], size=32)
    grams = update_grams(moved, base, roles=roles)
    assert {name: g.shape for name, g in grams.items()} == {"layers": (3, 2, 2), "heads": (4, 4)}
    np.testing.assert_allclose(grams["layers"][1], moved["layers"][1].T @ moved["layers"][1], atol=1e-5)


def test_biases_norms_and_frozen_weights_do_not_count():
    base = {"w": normal(4, 3), "v": normal(4, 3, seed=5), "bias": jnp.zeros(3), "scale": jnp.ones(3)}
    moved = jax.tree.map(lambda v: v + 0.3, base)
    both = penalty(moved, base)
    assert_rounding(both, penalty(moved, base, select="w") + penalty(moved, base, select="v"), size=16)
    adapted = sj.adapt(moved, {"w": sj.full(), "bias": sj.full()}, key=KEY)
    assert_rounding(penalty(adapted, base), penalty(moved, base, select="w"), size=16)
    trainable, frozen = sj.partition(adapted)
    grads = jax.jit(jax.grad(lambda t: penalty(sj.combine(t, frozen), base)))(trainable)
    assert not np.any(grads["bias"].value)
    assert np.any(grads["w"].value)
    of_base = jax.jit(jax.grad(lambda b: penalty(moved, b)))(base)
    assert not any(np.any(g) for g in jax.tree.leaves(of_base))
    nothing = jax.jit(jax.grad(lambda t: 0.0 * penalty(sj.combine(t, frozen), base) + jnp.sum(t["bias"].value)))(
        trainable
    )
    assert not np.any(nothing["w"].value)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 7, 5)])
def test_low_rank_updates_by_their_factors(shape):
    *stack, inputs, outputs = shape
    a, b = normal(*stack, inputs, 3), normal(*stack, 3, outputs, seed=1)
    dense = 0.5 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    each = [squares(d) for d in dense.reshape(-1, inputs, outputs)]
    assert_rounding(low_rank_penalty(a, b, 0.5, squared=True), sum(each), size=64)
    assert_rounding(low_rank_penalty(a, b, 0.5), np.sqrt(each).sum(), size=64)
    assert min(each) >= min(inputs, outputs) - 3
    # Of a LoRA the products have the rank's size: no update is formed.
    params = {"w": normal(*shape, seed=3)}
    role = {"w": sj.Role.dense((1,), (2,), (0,))} if stack else None
    tree = sj.adapt(params, {"w": sj.lora(3, alpha=1.5)}, key=KEY, roles=role)
    at_start = jax.jit(jax.grad(lambda t: penalty(sj.combine(t, sj.partition(tree)[1]), params)))(sj.partition(tree)[0])
    assert not np.any(at_start["w"].a)
    assert not np.any(at_start["w"].b)
    moved = {"w": dataclasses.replace(tree["w"], a=a, b=b)}
    assert_rounding(penalty(moved, params, squared=True), sum(each), size=64)
    formed = f"f32[{','.join(map(str, shape))}] = dot_general"
    assert formed not in str(jax.make_jaxpr(lambda t: penalty(t, params))(moved))
    assert formed in str(jax.make_jaxpr(lambda t: penalty(sj.merge(t), params, roles=role))(moved))
    frozen = {"w": dataclasses.replace(moved["w"], trainable=("b",))}
    slope = jax.jit(jax.grad(lambda t: penalty(t, params)))(frozen)["w"]
    assert not np.any(slope.a)
    assert np.any(slope.b)
    orthonormal = low_rank_penalty(jnp.eye(6)[:, :3], jnp.eye(9)[:3], squared=True)
    assert float(orthonormal) == 3  # m - r, which no update of this rank goes below


def test_other_stand_ins_and_bfloat16_are_compared_in_float32():
    params = {"w": normal(8, 6).astype(jnp.bfloat16)}
    tree = sj.adapt(params, {"w": sj.dora(sj.lora(2))}, key=KEY)
    tree = {"w": jax.tree.map(lambda v: v * 1.5 if v.dtype == jnp.float32 else v, tree["w"])}
    dense = np.asarray(tree["w"].materialize(jnp.float32), np.float64) - np.asarray(params["w"], np.float64)
    found = penalty(tree, params)
    assert found.dtype == jnp.float32
    assert float(found) == pytest.approx(np.sqrt(squares(dense)), rel=1e-3)
    moved = {"w": (params["w"] + 1.0).astype(jnp.bfloat16)}
    exact = np.asarray(moved["w"], np.float64) - np.asarray(params["w"], np.float64)
    assert float(penalty(moved, params)) == pytest.approx(np.sqrt(squares(exact)), rel=1e-5)


def test_descent_ends_with_unit_singular_values():
    base, params = {"w": jnp.zeros((6, 3))}, {"w": 0.1 * normal(6, 3)}
    slope = jax.grad(lambda p: penalty(p, base, squared=True))

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, slope(params)), None

    params = jax.lax.scan(step, params, None, 200)[0]
    np.testing.assert_allclose(np.linalg.svd(params["w"], compute_uv=False), 1, atol=1e-4)


def test_angles_of_task_vectors():
    base = {"w": normal(4, 3), "b": normal(3)}
    experts = [jax.tree.map(lambda v, s=s: v + normal(*v.shape, seed=s), base) for s in (1, 2, 3)]
    experts[2] = base
    vectors = [np.concatenate([np.ravel(e[n] - base[n]) for n in ("b", "w")]) for e in experts]
    expected = [[u @ v / (np.linalg.norm(u) * np.linalg.norm(v) + 1e-30) for v in vectors] for u in vectors]
    np.testing.assert_allclose(task_cosines(experts, base), expected, atol=1e-6)
    only = [[u[:3] @ v[:3] / (np.linalg.norm(u[:3]) * np.linalg.norm(v[:3]) + 1e-30) for v in vectors] for u in vectors]
    np.testing.assert_allclose(task_cosines(experts, base, select="b"), only, atol=1e-6)


def test_disentanglement_counts_answers_that_merging_changes():
    base = {"w": normal(2, 3, seed=9)}
    x = [normal(50, 2, seed=1, scale=1.0), normal(50, 2, seed=2, scale=1.0)]
    apply = lambda params, x, task: (x @ params["w"]) * (1 - 2 * task)
    changes = [normal(2, 3, seed=s) for s in (3, 4)]
    experts = [{"w": base["w"] + d} for d in changes]
    found = disentanglement_error(apply, experts, base, x, scale=0.5)
    at = lambda t, d: np.argmax(x[t] @ (base["w"] + 0.5 * d) * (1 - 2 * t), -1)
    shares = [np.mean(at(t, d) != at(t, sum(changes))) for t, d in enumerate(changes)]
    assert float(found) == pytest.approx(np.mean(shares))
    assert 0 < float(found) < 1
    # Task vectors on inputs of their own: each input sees one of them alone.
    apart = [{"w": base["w"].at[t].add(d[t])} for t, d in enumerate(changes)]
    own = [jnp.stack([x[0][:, 0], jnp.zeros(50)], 1), jnp.stack([jnp.zeros(50), x[1][:, 1]], 1)]
    assert float(disentanglement_error(apply, apart, base, own)) == 0
    with pytest.raises(StructureError, match="1 inputs for 2 experts"):
        disentanglement_error(apply, experts, base, x[:1])


def test_the_tangent_model_is_linear_in_its_parameters():
    base = {"w": normal(4, 3, scale=1.0)}
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    tangent, x = linearized(fn, base), normal(5, 4, seed=1)
    assert_rounding(tangent(base, x), fn(base, x), size=4)
    step = {"w": normal(4, 3, seed=2)}
    slope = (1 - np.tanh(x @ base["w"]) ** 2) * (x @ step["w"])
    for s in (1.0, -3.0):
        moved = {"w": base["w"] + s * step["w"]}
        assert_rounding(tangent(moved, x), fn(base, x) + s * slope, size=64)


def test_bad_input_is_refused():
    base = {"w": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    with pytest.raises(RoleError, match=r"bias: shape \(2,\) is not known to be a matrix"):
        penalty(base, base, select="bias")
    with pytest.raises(RoleError, match="no dense kernel"):
        penalty({"bias": base["bias"]}, {"bias": base["bias"]})
    with pytest.raises(PatternError, match="nothing"):
        penalty(base, base, select="nothing")
    with pytest.raises(StructureError, match=r"w: expert 0 has shape \(2, 3\)"):
        penalty({**base, "w": jnp.zeros((2, 3))}, base)
    other = sj.adapt({**base, "w": jnp.ones((3, 2))}, {"w": sj.lora(1)}, key=KEY)
    with pytest.raises(StructureError, match="w: the expert's adapter stands on other values"):
        penalty(other, base)
