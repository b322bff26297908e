"""Removers against projectors of numpy in float64, in every form and on both sides."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.linalg import Remover, bucketed, make_remover
from tests.tolerances import tolerance


def columns(size, rank, stack=(), seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(*stack, size, size)))[0][..., :rank]


def removed(matrix, basis, side):
    """By the projector, in float64."""
    basis, matrix = np.asarray(basis, np.float64), np.asarray(matrix, np.float64)
    away = np.eye(basis.shape[-2]) - basis @ np.swapaxes(basis, -1, -2)
    return away @ matrix if side == "in" else matrix @ away


def matrix_of(size, side, stack=(), other=5):
    shape = (size, other) if side == "in" else (other, size)
    return np.random.default_rng(1).normal(size=(*stack, *shape))


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize("rank", [0, 1, 5, 6, 7, 12])
def test_removes_the_span(rank, stack, side):
    basis, matrix = columns(12, rank, stack), matrix_of(12, side, stack)
    remover = make_remover(jnp.asarray(basis, jnp.float32))
    found = jax.jit(lambda r, m: r(m, side))(remover, jnp.asarray(matrix, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, removed(matrix, basis, side), atol=tolerance(size=12, norm=4))
    inside = np.swapaxes(basis, -1, -2) @ found if side == "in" else found @ basis
    np.testing.assert_allclose(inside, 0, atol=tolerance(size=12, norm=4))


@pytest.mark.parametrize(("rank", "form"), [(0, None), (1, "basis"), (5, "basis"), (6, "projector"), (12, "projector")])
def test_the_form_is_the_one_that_multiplies_least(rank, form):
    """Operations of the compiled program."""
    remover = make_remover(jnp.asarray(columns(12, rank), jnp.float32))
    assert [n for n in ("basis", "projector") if getattr(remover, n) is not None] == ([form] if form else [])
    assert remover.size == 12
    matrix = jnp.ones((12, 40))
    compiled = jax.jit(lambda r, m: r(m)).lower(remover, matrix).compile()
    found = (compiled.cost_analysis() or {}).get("flops", 0.0)
    least = min(4 * 12 * rank * 40, 2 * 12 * 12 * 40)
    assert found <= 1.05 * least + 2 * matrix.size


def test_nothing_is_removed_bit_for_bit_where_there_is_nothing():
    matrix = jnp.asarray(matrix_of(12, "in"), jnp.float32)
    np.testing.assert_array_equal(make_remover(jnp.zeros((12, 4)), 0)(matrix), matrix)


def test_zero_columns_may_be_left_out_and_others_may_not():
    basis = np.zeros((12, 8), np.float32)
    basis[:, :3] = columns(12, 3)
    matrix = matrix_of(12, "in")
    for kept, form in ((3, "basis"), (4, "basis"), (8, "projector")):
        remover = make_remover(jnp.asarray(basis), kept)
        assert getattr(remover, form) is not None
        np.testing.assert_allclose(remover(jnp.asarray(matrix)), removed(matrix, basis, "in"), atol=1e-5)
    with pytest.raises(ValueError, match="columns=2, but a column beyond them is not zero"):
        make_remover(jnp.asarray(basis), 2)


@pytest.mark.parametrize("rank", [2, 9])
def test_narrow_matrices_and_bases_are_multiplied_in_float32(rank):
    basis = columns(12, rank)
    matrix = jnp.asarray(matrix_of(12, "in"), jnp.bfloat16)
    found = make_remover(jnp.asarray(basis, jnp.float32))(matrix)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, removed(matrix.astype(jnp.float32), basis, "in"), atol=1e-5)
    assert make_remover(jnp.asarray(basis, jnp.bfloat16))(matrix).dtype == jnp.float32


def test_a_projector_mends_a_basis_that_is_nearly_orthonormal():
    """It leaves the square of what a projection that is not repeated leaves."""
    basis = columns(12, 8) + 1e-3 * np.random.default_rng(3).normal(size=(12, 8))
    remover = make_remover(jnp.asarray(basis, jnp.float32))
    left = np.linalg.qr(basis)[0].T @ np.asarray(remover(jnp.asarray(matrix_of(12, "in"), jnp.float32)))
    once = np.linalg.qr(basis)[0].T @ removed(matrix_of(12, "in"), basis, "in")
    assert np.abs(left).max() < 2e-4 < 5e-3 < np.abs(once).max()


def test_removers_of_one_form_are_one_program():
    traces = []

    @jax.jit
    def run(remover, matrix):
        traces.append(None)
        return remover(matrix)

    for seed in (0, 1):
        for rank in (2, 9):
            run(make_remover(jnp.asarray(columns(12, rank, seed=seed), jnp.float32)), jnp.ones((12, 3)))
    assert len(traces) == 2


@pytest.mark.parametrize("rank", [2, 9])
@pytest.mark.parametrize("spec", [("a", "b"), (None, "b"), ("a", None)])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_explicit_mesh_axes(rank, spec, stack):
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec = (*(None,) * len(stack), *spec)
    with jax.set_mesh(mesh):
        place = lambda v: jax.device_put(
            jnp.asarray(v, jnp.float32), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        )
        for side in ("in", "out"):
            basis, matrix = columns(12, rank, stack), matrix_of(12, side, stack)
            remover = jax.jit(make_remover)(place(basis))
            found = jax.jit(lambda r, m, side=side: r(m, side))(remover, place(matrix))
            np.testing.assert_allclose(found, removed(matrix, basis, side), atol=1e-5)


def test_buckets_are_eighths():
    for size in (1, 7, 8, 20, 384):
        found = [bucketed(count, size) for count in range(size + 1)]
        assert found[0] == 0
        assert all(least <= width <= size for least, width in enumerate(found))
        assert len(set(found) - {0}) <= 8
        assert found == sorted(found)
        assert all(width - least < -(-size // 8) for least, width in enumerate(found))


def test_bad_bases_are_refused():
    for shape in ((12,), (3, 4)):
        with pytest.raises(ValueError, match=r"expected \[\*stack, d, k\]"):
            make_remover(jnp.ones(shape))
    for count in (-1, 5):
        with pytest.raises(ValueError, match="expected 0 to 4"):
            make_remover(jnp.zeros((12, 4)), count)
    assert Remover(size=3)(jnp.ones((3, 1))).tolist() == [[1.0]] * 3
