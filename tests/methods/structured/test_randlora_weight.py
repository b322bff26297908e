"""Scaled random bases against loops in numpy, and the bases themselves."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import subspace_jax as sj
from subspace_jax.core import StructureError
from subspace_jax.methods.structured.randlora import RandomBases
from subspace_jax.weights import draw_basis
from tests.tolerances import tolerance

FLOAT32 = np.dtype("float32")
# Input smaller, larger, equal; the rank divides the smaller side or does not.
SHAPES = [((6, 10), 2), ((10, 6), 3), ((8, 8), 4), ((7, 12), 3), ((12, 7), 2), ((9, 9), 4), ((4, 6), 5)]


def normal(shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def weight_of(shape, rank, role=None, **options):
    """A weight in the middle of training, with bases larger than it needs."""
    roles = {"w": role} if role else None
    size = max(12, *shape)  # shared by most shapes, so that their bases are one program for each rank
    method, larger = sj.randlora(rank, **options), jnp.zeros((size + 3, size + 2))
    tree = sj.adapt({"large": larger, "w": normal(shape)}, {"*": method}, key=jax.random.key(0), roles=roles)
    weight = sj.core.resolve_links(tree)["w"]
    scales = [normal(v.shape, i) for i, v in enumerate((weight.rank_scales, weight.feature_scales))]
    return dataclasses.replace(weight, rank_scales=scales[0], feature_scales=scales[1], links=())


def brute_force(weight, rank_scales=None, feature_scales=None):
    """The sum over bases of explicit products with diagonal matrices, in float64; one layer."""
    lam = np.asarray(weight.rank_scales if rank_scales is None else rank_scales, np.float64)
    gam = np.asarray(weight.feature_scales if feature_scales is None else feature_scales, np.float64)
    inputs, outputs = weight.role.sizes(weight.shape)
    smaller, larger = sorted((inputs, outputs))
    bases, rank = lam.shape
    a = np.asarray(weight.basis_a, np.float64)[:, :smaller]
    b = [np.asarray(weight.basis_b[n], np.float64).T[:larger] for n in range(bases)]
    total = np.zeros((inputs, outputs))
    for n in range(bases):
        for k in range(rank):
            if weight.pairing == "paper":
                column = b[n][:, k]
            else:  # row (k, n), counted by k first, meets the column of this place counted by n first
                place = k * bases + n
                column = b[place // rank][:, place % rank]
            row = lam[n, k] * a[k] * gam[n]
            total += np.outer(row, column) if inputs <= outputs else np.outer(column, row)
    return weight.scale * total


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
@pytest.mark.parametrize("pairing", ["paper", "peft"])
def test_update_is_the_sum_of_explicit_diagonal_products(shape, rank, pairing):
    weight = weight_of(shape, rank, pairing=pairing)
    expected = brute_force(weight)
    np.testing.assert_allclose(weight.update(jnp.float32), expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(weight.materialize(), normal(shape) + expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("route", ["factored", "materialized", "auto"])
@pytest.mark.parametrize(("shape", "rank"), SHAPES[:4])
def test_every_route_gives_the_product(shape, rank, route):
    weight, x = weight_of(shape, rank, route=route), normal((5, shape[0]), 9)
    expected = x @ (np.asarray(normal(shape)) + brute_force(weight))
    y = jax.jit(sj.with_adapters(lambda w, x: x @ w))(weight, x)
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_update_has_full_rank_and_few_bases_have_theirs(shape, rank):
    weight = weight_of(shape, rank)
    update = np.asarray(weight.update(jnp.float32), np.float64)
    assert np.linalg.matrix_rank(update, tol=1e-4 * np.linalg.norm(update, 2)) == min(shape) == weight.rank
    for count in range(1, weight.rank_scales.shape[0]):
        few = dataclasses.replace(weight, rank_scales=weight.rank_scales.at[count:].set(0.0))
        update = np.asarray(few.update(jnp.float32), np.float64)
        assert np.linalg.matrix_rank(update, tol=1e-4 * np.linalg.norm(update, 2)) <= count * rank


def test_update_is_bilinear():
    weight = weight_of((7, 12), 3)
    for factor in (4.0, -1.0):
        other = dataclasses.replace(
            weight, rank_scales=weight.rank_scales * factor, feature_scales=weight.feature_scales / factor
        )
        np.testing.assert_array_equal(other.update(jnp.float32), weight.update(jnp.float32))
    twice = dataclasses.replace(weight, rank_scales=2 * weight.rank_scales)
    np.testing.assert_allclose(twice.update(jnp.float32), 2 * weight.update(jnp.float32), rtol=tolerance())


def test_gradient_descent_on_rank_scales_finds_the_least_squares():
    weight, target = weight_of((6, 10), 3), normal((6, 10), 5)
    count = weight.rank_scales.size

    def residual(flat):
        scales = flat.reshape(weight.rank_scales.shape)
        return (dataclasses.replace(weight, rank_scales=scales).update(jnp.float32) - target).ravel()

    columns = [brute_force(weight, np.eye(count)[i].reshape(-1, 3)).ravel() for i in range(count)]
    expected = np.linalg.lstsq(np.stack(columns, 1), np.asarray(target, np.float64).ravel(), rcond=None)[0]
    # Newton's method ends in one step where the map is linear.
    loss = lambda flat: 0.5 * jnp.sum(residual(flat) ** 2)
    start = weight.rank_scales.ravel()
    hessian, gradient = jax.jit(lambda flat: (jax.hessian(loss)(flat), jax.grad(loss)(flat)))(start)
    found = start - np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@functools.cache
def naive_gradients(shape, rank):
    weight, x = weight_of(shape, rank), normal((5, shape[0]), 9)
    smaller, larger = sorted(shape)
    bases = weight.rank_scales.shape[0]
    a, b = weight.basis_a[:, :smaller], weight.basis_b[:bases, :, :larger]

    def loss(lam, gam, x):
        delta = weight.scale * jnp.einsum("nk,kj,nj,nko->jo", lam, a, gam, b)
        return jnp.sin(x @ (weight.base + (delta if shape[0] <= shape[1] else delta.T))).sum()

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(loss, (0, 1, 2)))(weight.rank_scales, weight.feature_scales, x)


@pytest.mark.parametrize("route", ["factored", "materialized"])
@pytest.mark.parametrize(("shape", "rank"), SHAPES[:5])
def test_gradients_are_those_of_the_naive_einsum(shape, rank, route):
    weight, x = weight_of(shape, rank, route=route), normal((5, shape[0]), 9)

    def loss(lam, gam, x):
        moved = dataclasses.replace(weight, rank_scales=lam, feature_scales=gam)
        return jnp.sin(sj.with_adapters(lambda w, x: x @ w)(moved, x)).sum()

    with jax.default_matmul_precision("highest"):
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(weight.rank_scales, weight.feature_scales, x)
    for one, other in zip(found, naive_gradients(shape, rank), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_backward_pass_keeps_no_scaled_copy(shape):
    weight, rows = weight_of(shape, 8, route="factored"), 4
    apply = sj.with_adapters(lambda w, x: x @ w)

    def forward(lam, gam, x):
        return apply(dataclasses.replace(weight, rank_scales=lam, feature_scales=gam), x)

    arguments = weight.rank_scales, weight.feature_scales, normal((rows, shape[0]))
    _, backward = jax.vjp(forward, *arguments)
    kept = {v.shape for v in jax.tree.leaves(backward) if v.size > rows * max(shape)}
    stored = {weight.basis_a.shape, weight.basis_b.shape, weight.base.shape, weight.feature_scales.shape}
    assert kept <= stored, kept - stored
    _, backward = jax.vjp(lambda lam, gam: forward(lam, gam, arguments[2]), *arguments[:2])
    assert not any(v.size == 64 * 64 for v in jax.tree.leaves(backward))
    formed = dataclasses.replace(weight, base=jnp.zeros(shape))
    _, backward = jax.vjp(
        lambda lam, gam: dataclasses.replace(formed, rank_scales=lam, feature_scales=gam).materialize(),
        *arguments[:2],
    )
    assert not any(v.shape == (8, 8, 64) for v in jax.tree.leaves(backward))


def test_stacked_layers_read_one_basis_each_in_its_own_way():
    role = sj.Role.dense((1,), (2,), (0,))
    for shape in ((3, 6, 8), (3, 8, 6)):
        weight, x = weight_of(shape, 2, role=role), normal((3, 5, shape[1]), 4)
        assert (weight.basis_a.ndim, weight.basis_b.ndim) == (2, 3)
        layers = [
            dataclasses.replace(
                weight,
                base=weight.base[i],
                rank_scales=weight.rank_scales[i],
                feature_scales=weight.feature_scales[i],
                role=sj.Role.dense(),
            )
            for i in range(3)
        ]
        expected = np.stack([np.asarray(v.base) + brute_force(v) for v in layers])
        np.testing.assert_allclose(weight.materialize(), expected, atol=1e-5 * np.abs(expected).max())
        for route in ("factored", "materialized"):
            one = dataclasses.replace(weight, route=route)
            experts = sj.with_adapters(lambda w, x: jnp.einsum("ebi,eio->ebo", x, w))(one, x)
            np.testing.assert_allclose(experts, np.asarray(x) @ expected, atol=1e-4)
            tied = sj.with_adapters(lambda w, y: jnp.einsum("ebo,eio->ebi", y, w))(one, jnp.asarray(experts))
            np.testing.assert_allclose(tied, np.asarray(experts) @ expected.swapaxes(1, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("shape", "rows", "formed"), [((64, 64), 16, False), ((64, 64), 64, True), ((64, 64), 4096, True)]
)
def test_auto_takes_the_route_of_fewer_operations(shape, rows, formed):
    def step(route):
        weight = dataclasses.replace(weight_of(shape, 8), route=route)

        def loss(lam, gam, x):
            moved = dataclasses.replace(weight, rank_scales=lam, feature_scales=gam)
            return jnp.sin(sj.with_adapters(lambda w, x: x @ w)(moved, x)).sum()

        arguments = weight.rank_scales, weight.feature_scales, jax.ShapeDtypeStruct((rows, shape[0]), jnp.float32)
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()
        return compiled.cost_analysis()["flops"]

    flops = {route: step(route) for route in ("factored", "materialized", "auto")}
    assert flops["auto"] == min(flops.values())
    assert (flops["materialized"] < flops["factored"]) == formed


def test_wide_bases_in_bfloat16_are_added_in_float32():
    weight = weight_of((6, 10), 2, basis_dtype=jnp.bfloat16)
    assert weight.basis_a.dtype == weight.basis_b.dtype == jnp.bfloat16
    expected = brute_force(weight)
    np.testing.assert_allclose(weight.update(jnp.float32), expected, atol=tolerance(size=4) * np.abs(expected).max())


def test_no_gradient_reaches_bases_or_base():
    weight = weight_of((6, 10), 2)
    gradient = jax.jit(jax.grad(lambda w: jnp.sin(sj.with_adapters(lambda w, x: x @ w)(w, normal((4, 6)))).sum()))(
        weight
    )
    for name in ("base", "basis_a", "basis_b"):
        assert not np.asarray(getattr(gradient, name)).any()
    assert np.abs(gradient.rank_scales).min() > 0


@pytest.mark.parametrize("route", ["factored", "materialized"])
def test_dropout_is_on_the_input_of_the_bases_alone(route):
    weight, x = weight_of((64, 64), 8, dropout=0.25, route=route), jnp.ones((200, 64))
    apply = sj.with_adapters(lambda w, x: x @ w)
    np.testing.assert_array_equal(apply(weight, x), apply(dataclasses.replace(weight, dropout=0.0), x))
    active = sj.with_dropout({"w": weight}, jax.random.key(3))["w"]
    change = np.asarray(apply(active, x) - x @ weight.base, np.float64)
    masked = np.linalg.lstsq(brute_force(weight).T, change.T, rcond=None)[0]
    assert np.minimum(np.abs(masked), np.abs(masked - 4 / 3)).max() < 1e-2
    assert abs((masked > 0.5).mean() - 0.75) < 0.02
    np.testing.assert_allclose(active.materialize(), weight.materialize())


def test_a_weight_apart_from_its_bases_says_where_they_are():
    params = {"a": normal((4, 5)), "b": normal((5, 4))}
    tree = sj.adapt(params, {"*": sj.randlora(2)}, key=jax.random.key(0))
    with pytest.raises(StructureError, match=r"stored at a\. Use merge\(\) or with_adapters\(\)"):
        tree["b"].materialize()


@pytest.mark.parametrize("sparsity", [None, 3.0, 8.0])
@pytest.mark.parametrize("shape", [(8, 500), (20, 16, 300)])
def test_bases_have_unit_deviation_over_all_entries(sparsity, shape):
    basis = np.asarray(draw_basis(3, 1, shape, sparsity, FLOAT32), np.float64)
    assert basis.std() == pytest.approx(1.0, abs=5e-4)
    assert abs(basis.mean()) < 4 / np.sqrt(basis.size)


def test_dense_entries_are_uniform_in_a_symmetric_interval():
    basis = np.asarray(draw_basis(0, 0, (300, 300), None, FLOAT32))
    assert np.abs(basis).max() == pytest.approx(np.sqrt(3.0), rel=5e-3)
    counts, _ = np.histogram(basis, bins=10, range=(-np.sqrt(3.0), np.sqrt(3.0)))
    assert np.abs(counts / basis.size - 0.1).max() < 5e-3


@pytest.mark.parametrize("sparsity", [3.0, 8.0])
def test_sparse_entries_take_three_values(sparsity):
    basis = np.asarray(draw_basis(0, 0, (300, 300), sparsity, FLOAT32))
    low, zero, high = np.unique(basis)
    assert (low, zero) == (-high, 0.0)
    for value in (low, high):
        assert (basis == value).mean() == pytest.approx(1 / (2 * sparsity), abs=4e-3)
    assert high == pytest.approx(np.sqrt(sparsity), rel=2e-2)


def test_bits_of_a_seed_are_the_same_in_every_version_and_setting():
    def sha(**options):
        drawn = {"seed": 0, "stream": 0, "shape": (64, 300), "sparsity": None, "dtype": FLOAT32} | options
        return hashlib.sha256(np.asarray(draw_basis(**drawn)).tobytes()).hexdigest()[:12]

    assert sha() == "867cc0d39b5b"
    assert sha(sparsity=3.0) == "0079138d8e9a"
    assert sha(sparsity=8.0) == "7f581836b44a"
    assert len({sha(), sha(seed=1), sha(stream=1)}) == 3
    for setting, value in (("jax_default_prng_impl", "rbg"), ("jax_enable_x64", True)):
        before = getattr(jax.config, setting)
        draw_basis.clear_cache()
        jax.config.update(setting, value)
        try:
            assert sha() == "867cc0d39b5b"
        finally:
            jax.config.update(setting, before)


def test_a_large_array_has_the_deviation_that_64_bits_compute():
    # The sum of squares of 4 million entries is above 32 bits.
    basis = np.asarray(draw_basis(1, 0, (2, 500, 4000), None, FLOAT32), np.float64)
    assert basis.std() == pytest.approx(1.0, abs=3e-4)


def test_entries_without_any_deviation_stay_finite():
    basis = draw_basis(0, 0, (1, 1), 100.0, FLOAT32)
    assert np.isfinite(basis).all()


def test_regenerate_needs_static_fields_only():
    weight = weight_of((6, 10), 3, seed=5)
    bare = dataclasses.replace(weight, basis_a=None, basis_b=None, rank_scales=None, feature_scales=None)
    for name, value in bare.regenerate().items():
        np.testing.assert_array_equal(value, getattr(weight, name))
    assert tuple(bare.regenerate()) == RandomBases.regenerated
