"""LoCA against scipy's transforms and a brute-force central difference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

import subspace_jax as sj
from subspace_jax.core import RankError
from tests.tolerances import tolerance

EVALUATIONS = ["default", "sparse", "fast", "factored"]
STACK = {"w": sj.Role.dense((1,), (2,), (0,))}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def adapt(w, method, roles=None):
    return sj.adapt({"w": jnp.asarray(w)}, {"w": method}, key=jax.random.key(0), roles=roles)


def trained(w, method, roles=None, seed=1, scale=1.0):
    """A tree with coefficients, and with locations beyond both borders and in one cell among them."""
    weight = adapt(w, method, roles)["w"]
    locations = np.array(weight.locations)
    locations[..., :, 0] = locations[..., :, 1]
    locations[..., 0, 2], locations[..., 1, 3] = -0.1, 1.1
    locations[..., 0, 4], locations[..., 1, 4] = 0.0, 0.999
    coefficients = scale * normal(*weight.coefficients.shape, seed=seed)
    return {"w": dataclasses.replace(weight, coefficients=jnp.asarray(coefficients), locations=jnp.asarray(locations))}


def cells(weight, shape, highest=0.999):
    sizes = np.array(shape)[:, None] - 1
    return np.round(np.clip(np.asarray(weight.locations), 0, np.float32(highest)) * sizes).astype(int)


def spectrum(weight, shape):
    found = np.zeros(shape, np.float32)
    np.add.at(found, tuple(cells(weight, shape)), np.asarray(weight.coefficients))
    return found


def gradients(adapted, x, target):
    """Gradients of half the squared distance of the layer's outputs to a target."""
    trainable, frozen = sj.partition(adapted)
    apply = sj.with_adapters(lambda p, x: x @ p["w"])
    loss = lambda t: 0.5 * jnp.sum((apply(sj.combine(t, frozen), x) - target) ** 2)
    return jax.jit(jax.grad(loss))(trainable)["w"]


def by_hand(weight, shape, alpha, gradient):
    """The published backward rule in numpy, from dL/dDelta."""
    z = scipy.fft.dctn(alpha * gradient, norm="ortho")
    (rows, columns), a = cells(weight, shape), np.asarray(weight.coefficients)
    moved = []
    for axis, size in enumerate(shape):
        slopes = []
        for j in range(len(a)):
            up, down = [rows[j], columns[j]], [rows[j], columns[j]]
            up[axis], down[axis] = min(up[axis] + 1, size - 1), max(down[axis] - 1, 0)
            slopes.append(np.clip(0.5 * a[j] * (z[tuple(up)] - z[tuple(down)]), -1, 1) * (size - 1))
        u = np.asarray(weight.locations)[axis]
        moved.append(np.where((u < 0) | (u > np.float32(0.999)), 0, slopes))
    return z[rows, columns], np.stack(moved)


@pytest.mark.parametrize("evaluation", [*EVALUATIONS, "auto"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_change_is_the_inverse_transform_of_the_added_up_spectrum(shape, evaluation):
    w, x = normal(*shape), normal(5, shape[0], seed=2)
    adapted = trained(w, sj.loca(9, alpha=0.7, evaluation=evaluation))
    expected = w + 0.7 * scipy.fft.idctn(spectrum(adapted["w"], shape), norm="ortho")
    np.testing.assert_allclose(sj.merge(adapted)["w"], expected, atol=1e-5)
    np.testing.assert_allclose(sj.with_adapters(lambda p, x: x @ p["w"])(adapted, x), x @ expected, atol=2e-5)
    energy = 0.7 * np.linalg.norm(spectrum(adapted["w"], shape))
    np.testing.assert_allclose(np.linalg.norm(adapted["w"].change()), energy, rtol=1e-5)


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize(("alpha", "size"), [(0.7, 0.05), (3.0, 1.0)])
def test_gradients_are_the_published_rule(evaluation, alpha, size):
    shape = (12, 7)
    w, x = normal(*shape), normal(5, 12, seed=2)
    adapted = trained(w, sj.loca(9, alpha=alpha, evaluation=evaluation), scale=size)
    target = normal(5, 7, seed=3)
    effective = w + alpha * scipy.fft.idctn(spectrum(adapted["w"], shape), norm="ortho")
    coefficients, locations = by_hand(adapted["w"], shape, alpha, x.T @ (x @ effective - target))
    found = gradients(adapted, x, target)
    np.testing.assert_allclose(found.coefficients, coefficients, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.locations, locations, rtol=1e-3, atol=1e-3)
    clipped = np.abs(locations) == np.array(shape)[:, None] - 1
    assert clipped.any() == (size == 1.0)
    assert not clipped.all()


def test_gradient_of_coefficients_is_the_finite_difference():
    adapted = trained(normal(12, 7), sj.loca(9))
    x, target = normal(5, 12, seed=2), normal(5, 7, seed=3)
    found = np.asarray(gradients(adapted, x, target).coefficients)

    def loss(coefficients):
        weight = dataclasses.replace(adapted["w"], coefficients=jnp.asarray(coefficients, jnp.float32))
        delta = scipy.fft.idctn(spectrum(weight, (12, 7)).astype(float), norm="ortho")
        return 0.5 * np.sum((x @ (np.asarray(weight.base, float) + delta) - target) ** 2)

    start = np.asarray(adapted["w"].coefficients)
    for j in range(9):
        step = np.eye(9)[j] * 1e-2
        np.testing.assert_allclose(found[j], (loss(start + step) - loss(start - step)) / 2e-2, rtol=1e-2, atol=2e-2)


def test_location_gradient_of_a_quadratic_loss_is_the_smoothed_change_by_a_cell():
    """Z = S - DCT(T), and the first-order change of moving a coefficient by one cell has the estimator's sign."""
    shape, target = (12, 12), np.asarray(scipy.fft.idctn(np.exp(-np.add.outer(np.arange(12), np.arange(12)) / 4)))
    weight = adapt(np.zeros(shape), sj.loca(6))["w"]
    weight = dataclasses.replace(weight, coefficients=jnp.full(6, 1e-3))
    trainable, frozen = sj.partition({"w": weight})
    distance = lambda t: 0.5 * jnp.sum((sj.combine(t, frozen)["w"].materialize() - target) ** 2)
    found = np.asarray(jax.jit(jax.grad(distance))(trainable)["w"].locations)

    def loss(places):
        s = np.zeros(shape)
        np.add.at(s, tuple(places), 1e-3)
        return 0.5 * np.sum((scipy.fft.idctn(s, norm="ortho") - target) ** 2)

    at = cells(weight, shape)
    for axis in range(2):
        for j in range(6):
            if 0 < at[axis, j] < 11:
                ahead, behind = at.copy(), at.copy()
                ahead[axis, j] += 1
                behind[axis, j] -= 1
                change = (loss(ahead) - loss(behind)) / 2
                np.testing.assert_allclose(
                    found[axis, j], 11 * np.clip(change, -1, 1), rtol=2e-2, atol=tolerance(size=4)
                )


def test_start_is_the_weight_and_only_coefficients_have_a_gradient():
    w = normal(12, 7)
    adapted = adapt(w, sj.loca(9))
    np.testing.assert_array_equal(sj.merge(adapted)["w"], w)
    found = gradients(adapted, normal(5, 12, seed=2), normal(5, 7, seed=3))
    assert (np.asarray(found.coefficients) != 0).all()
    np.testing.assert_array_equal(found.locations, 0)
    assert 0 <= float(adapted["w"].locations.min()) < float(adapted["w"].locations.max()) < 1


def test_one_coefficient_at_the_origin_is_a_constant():
    weight = dataclasses.replace(
        adapt(np.zeros((6, 8)), sj.loca(1))["w"], coefficients=jnp.array([3.0]), locations=jnp.zeros((2, 1))
    )
    np.testing.assert_allclose(weight.materialize(), np.full((6, 8), 3.0 / np.sqrt(48)), rtol=tolerance())


def test_swapped_locations_transpose_the_change():
    weight = trained(np.zeros((6, 9)), sj.loca(7))["w"]
    turned = dataclasses.replace(weight, base=weight.base.T, locations=weight.locations[::-1])
    np.testing.assert_allclose(turned.materialize(), weight.materialize().T, atol=tolerance(size=4))


def test_layers_of_a_stack_have_locations_of_their_own():
    adapted = trained(normal(3, 8, 6), sj.loca(7, evaluation="fast"), STACK)
    merged = sj.merge(adapted)["w"]
    for layer in range(3):
        one = jax.tree.map(lambda v, i=layer: v[i] if v.ndim else v, adapted["w"])
        expected = np.asarray(one.base) + scipy.fft.idctn(spectrum(one, (8, 6)), norm="ortho")
        np.testing.assert_allclose(merged[layer], expected, atol=1e-5)
    start = adapt(normal(3, 8, 6), sj.loca(7), STACK)["w"].locations
    assert len(np.unique(start)) == start.size


def test_highest_frequency_is_out_of_reach_as_published_and_in_reach_by_option():
    weight = adapt(np.zeros((768, 4)), sj.loca(2))["w"]
    weight = dataclasses.replace(weight, locations=jnp.ones((2, 2)))
    assert int(weight.cells()[0].max()) == 766
    assert int(dataclasses.replace(weight, highest=1.0).cells()[0].max()) == 767
    # Halves go to the even neighbor.
    halves = dataclasses.replace(weight, locations=jnp.stack([jnp.zeros(2), jnp.array([0.5, 0.5])]))
    assert halves.cells()[1].tolist() == [2, 2]


def test_bfloat16_forms_the_change_in_float32():
    w = normal(64, 64).astype(jnp.bfloat16)
    adapted = trained(w, sj.loca(40))
    assert adapted["w"].change().dtype == jnp.float32
    expected = scipy.fft.idctn(spectrum(adapted["w"], (64, 64)), norm="ortho")
    np.testing.assert_allclose(adapted["w"].change(), expected, atol=1e-5)
    text = str(jax.make_jaxpr(sj.with_adapters(lambda p, x: x @ p["w"]))(adapted, jnp.ones((2, 64), jnp.bfloat16)))
    assert "bf16[64,40]" not in text


def test_automatic_evaluation_takes_the_cheapest():
    few = adapt(np.zeros((256, 256)), sj.loca(4))
    many = adapt(np.zeros((256, 256)), sj.loca(4000))
    apply = sj.with_adapters(lambda p, x: x @ p["w"])
    forms = lambda adapted, rows: "f32[256,256] = add" in str(jax.make_jaxpr(apply)(adapted, jnp.ones((rows, 256))))
    assert not forms(few, 8)
    assert forms(many, 4096)
    transform = str(jax.make_jaxpr(many["w"].change)())
    assert "scatter-add" in transform
    assert "scatter-add" not in str(jax.make_jaxpr(few["w"].change)())


def test_no_cosine_basis_is_stored():
    adapted = adapt(np.zeros((64, 48)), sj.loca(5, evaluation="default"))
    assert sum(v.size for v in jax.tree.leaves(adapted)) == 64 * 48 + 15 + 1  # the scale


def test_fixed_locations_stand_for_the_same_and_are_integers():
    adapted = trained(normal(12, 7), sj.loca(9))
    fixed = sj.methods.loca.fix_locations(adapted)
    np.testing.assert_array_equal(fixed["w"].positions, cells(adapted["w"], (12, 7)))
    assert fixed["w"].positions.dtype == jnp.int32
    x, target = normal(5, 12, seed=2), normal(5, 7, seed=3)
    for evaluation in EVALUATIONS:
        one = {"w": dataclasses.replace(fixed["w"], evaluation=evaluation)}
        np.testing.assert_allclose(sj.merge(one)["w"], sj.merge(adapted)["w"], atol=1e-5)
        expected = gradients(adapted, x, target).coefficients
        np.testing.assert_allclose(gradients(one, x, target).coefficients, expected, rtol=1e-4, atol=1e-4)
    assert sj.summary(fixed).trainable == 9


def test_fixed_locations_survive_a_file(tmp_path):
    params = {"w": jnp.asarray(normal(12, 7))}
    fixed = sj.methods.loca.fix_locations(trained(params["w"], sj.loca(9)))
    path = sj.save_adapter(tmp_path / "adapter.safetensors", fixed, base=params)
    again = sj.load_adapter(path, params)
    np.testing.assert_array_equal(sj.merge(again)["w"], sj.merge(fixed)["w"])


def test_counts_are_of_coefficients_and_of_everything_that_learns():
    params = {f"{i}/{n}": jnp.zeros((2, 2)) for i in range(12) for n in "qv"}
    adapted = sj.adapt(params, {"**": sj.loca(1000)}, key=jax.random.key(0))
    assert sj.methods.loca.cosine_values(adapted) == (24_000, 72_000)
    assert sj.summary(adapted).trainable == 72_000


@pytest.mark.parametrize("evaluation", ["sparse", "factored"])
def test_dropout_reaches_the_cosine_terms_only(evaluation):
    adapted = trained(normal(64, 32), sj.loca(20, dropout=0.5, evaluation=evaluation))
    apply = jax.jit(sj.with_adapters(lambda p, x: x @ p["w"]))
    x = np.ones((400, 64), np.float32)
    runs = [apply(sj.with_dropout(adapted, jax.random.key(s)), x) for s in (1, 2)]
    assert not np.allclose(*runs)
    np.testing.assert_allclose(np.mean(runs[0], axis=0), apply(adapted, x)[0], atol=0.6)
    without = {"w": dataclasses.replace(adapted["w"], coefficients=jnp.zeros(20))}
    np.testing.assert_array_equal(apply(sj.with_dropout(without, jax.random.key(1)), x), apply(without, x))


def test_bad_options_are_refused_by_name():
    with pytest.raises(RankError, match="loca: count=0"):
        sj.loca(0)
    with pytest.raises(ValueError, match="evaluation='quick'"):
        sj.loca(3, evaluation="quick")
    with pytest.raises(ValueError, match=r"highest=1\.5"):
        sj.loca(3, highest=1.5)
