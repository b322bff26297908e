"""Projections and coordinates against numpy in float64 and scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg
from subspace_jax.linalg import wide_matmul
from tests.tolerances import tolerance


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def basis(size, rank, seed=1, stack=()):
    return np.linalg.qr(random(*stack, size, rank, seed=seed))[0]


def array(values, dtype=jnp.float32):
    return jnp.asarray(values, dtype)


def transposed(matrix):
    return np.swapaxes(matrix, -1, -2)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
def test_project_is_the_product_with_the_projector(side, stack):
    g, u = random(*stack, 9, 6), basis(9 if side == "in" else 6, 4, stack=stack)
    projector = u @ transposed(u)
    expected = projector @ g if side == "in" else g @ projector
    kept = linalg.project(array(g), array(u), side=side)
    removed = linalg.project(array(g), array(u), side=side, mode="remove")
    np.testing.assert_allclose(kept, expected, atol=tolerance(size=4))
    np.testing.assert_allclose(removed, g - expected, atol=tolerance(size=4))
    np.testing.assert_allclose(kept + removed, g, atol=tolerance(size=4))


def test_the_span_is_that_of_scipy():
    columns = random(9, 3)
    u = linalg.orthonormalize(array(columns))
    kept = linalg.project(array(random(9, 20, seed=3)), u)
    assert np.linalg.matrix_rank(kept, tol=1e-4) == 3
    np.testing.assert_allclose(scipy.linalg.subspace_angles(np.asarray(kept, np.float64), columns), 0, atol=1e-5)
    solved = columns @ np.linalg.lstsq(columns, random(9, 20, seed=3), rcond=None)[0]
    np.testing.assert_allclose(kept, solved, atol=1e-5)


@pytest.mark.parametrize("mode", ["keep", "remove"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_projection_is_idempotent_and_self_adjoint(mode, side):
    u, (g, h) = array(basis(8, 3)), (array(random(8, 8, seed=s)) for s in (2, 3))

    def p(matrix):
        return linalg.project(matrix, u, mode=mode, side=side)

    np.testing.assert_allclose(p(p(g)), p(g), atol=tolerance(size=4))
    np.testing.assert_allclose(jnp.sum(p(g) * h), jnp.sum(g * p(h)), rtol=1e-4)


def test_no_basis_a_whole_basis_and_zero_columns():
    g, u = array(random(6, 5)), basis(6, 2)
    empty, whole = jnp.zeros((6, 4)), array(basis(6, 6))
    np.testing.assert_array_equal(linalg.project(g, empty, mode="remove"), g)
    assert not linalg.project(g, empty).any()
    np.testing.assert_allclose(linalg.project(g, whole), g, atol=tolerance(size=4))
    np.testing.assert_allclose(linalg.project(g, whole, mode="remove"), 0, atol=tolerance(size=4))
    padded = array(np.concatenate([u, np.zeros((6, 3))], -1))
    for mode in ("keep", "remove"):
        one, other = (linalg.project(g, b, mode=mode) for b in (array(u), padded))
        np.testing.assert_allclose(one, other, atol=tolerance(size=4))


def test_sixteen_bit_matrices_are_projected_in_float32():
    g, u = array(random(64, 8), jnp.bfloat16), basis(64, 5)
    kept = linalg.project(g, array(u))
    assert kept.dtype == jnp.float32
    np.testing.assert_allclose(kept, u @ (u.T @ np.asarray(g, np.float64)), atol=1e-5)


@pytest.mark.parametrize("side", ["in", "out"])
def test_coordinates_lead_back_to_what_is_kept(side):
    g, u = random(9, 6), basis(9 if side == "in" else 6, 4)
    found = linalg.to_coordinates(array(g), array(u), side=side)
    np.testing.assert_allclose(found, u.T @ g if side == "in" else g @ u, atol=tolerance(size=4))
    back = linalg.from_coordinates(found, array(u), side=side)
    np.testing.assert_allclose(back, linalg.project(array(g), array(u), side=side), atol=tolerance(size=4))


@pytest.mark.parametrize("stack", [(), (3,)])
def test_transport_goes_through_the_whole_space(stack):
    old, new = (basis(9, 4, seed=s, stack=stack) for s in (1, 2))
    c = random(*stack, 4, 6)
    expected = transposed(new) @ (old @ c)
    np.testing.assert_allclose(linalg.transport(array(c), array(old), array(new)), expected, atol=tolerance(size=4))
    out = linalg.transport(array(transposed(c)), array(old), array(new), side="out")
    np.testing.assert_allclose(out, transposed(expected), atol=tolerance(size=4))


def test_transported_squares_are_those_of_uncorrelated_coordinates():
    """The diagonal of the covariance in the new basis."""
    old, new = basis(9, 9, seed=1), basis(9, 4, seed=2)
    v = np.abs(random(9, 6))
    r = new.T @ old
    expected = np.stack([np.diag(r @ np.diag(column) @ r.T) for column in v.T], -1)
    np.testing.assert_allclose(
        linalg.transport(array(v), array(old), array(new), squares=True), expected, atol=tolerance(size=4)
    )
    out = linalg.transport(array(v.T), array(old), array(new), side="out", squares=True)
    np.testing.assert_allclose(out, expected.T, atol=tolerance(size=4))


def test_complement_is_the_null_space():
    u = basis(9, 4)
    padded = np.concatenate([u, np.zeros((9, 2))], -1)
    found = linalg.complete(array(padded))
    assert found.shape == (9, 5)
    angles = scipy.linalg.subspace_angles(np.asarray(found, np.float64), scipy.linalg.null_space(u.T))
    np.testing.assert_allclose(angles, 0, atol=tolerance(size=4))
    np.testing.assert_allclose(found.T @ found, np.eye(5), atol=tolerance(size=4))
    assert linalg.complete(jnp.eye(3)).shape == (3, 0)
    np.testing.assert_allclose(jnp.abs(linalg.complete(jnp.zeros((3, 1)))).sum(0), 1, atol=tolerance(size=4))


def test_complements_of_a_stack_share_a_shape():
    u = basis(7, 3, stack=(2,))
    u[1, :, 2] = 0.0
    found = np.asarray(linalg.complete(array(u)))
    assert found.shape == (2, 7, 5)
    for one, columns in zip(found, u, strict=True):
        np.testing.assert_allclose(one @ one.T + columns @ columns.T, np.eye(7), atol=tolerance(size=4))


def test_orthonormalize_keeps_directions_from_left_to_right():
    columns = random(8, 5)
    columns[:, 2] = columns[:, 0] - 3 * columns[:, 1]
    columns[:, 3] *= 1e-8
    found = np.asarray(linalg.orthonormalize(array(columns)))
    np.testing.assert_allclose(found.T @ found, np.diag([1.0, 1, 0, 1, 1]), atol=tolerance(size=4))
    for count in (1, 2, 4, 5):
        angles = scipy.linalg.subspace_angles(
            scipy.linalg.orth(found[:, :count].astype(np.float64), rcond=1e-3),
            scipy.linalg.orth(columns[:, :count] / np.linalg.norm(columns[:, :count], axis=0), rcond=1e-9),
        )
        np.testing.assert_allclose(angles, 0, atol=1e-5)


def test_orthonormalize_of_nearly_parallel_columns_is_orthonormal():
    columns = random(50, 1) + 1e-4 * random(50, 12, seed=4)
    found = np.asarray(jax.jit(linalg.orthonormalize)(array(columns)), np.float64)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=1e-5)


def _joins(a, b):
    try:
        return np.broadcast_shapes(a, b) is not None
    except ValueError:
        return False


STACKS = [(), (1,), (3,), (1, 1), (2, 1), (2, 3)]


@pytest.mark.parametrize(("one", "other"), [(a, b) for a in STACKS for b in STACKS if _joins(a, b)])
def test_products_of_stacks_over_explicit_axes(one, other):
    """Types of split arrays are checked on one device too; the result inherits rows and columns."""
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=s).astype(np.float32) for s in ((*one, 4, 3), (*other, 3, 5)))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(v, jax.sharding.NamedSharding(mesh, P(*(None,) * (v.ndim - 2), *spec)))
            for v, spec in ((left, ("a", None)), (right, (None, "b")))
        ]
        found = jax.jit(wide_matmul)(*placed)
        depth = found.ndim - 2
        assert tuple(jax.typeof(found).sharding.spec) == (*(None,) * depth, "a", "b")
    np.testing.assert_allclose(found, left @ right, rtol=0, atol=tolerance(size=3, norm=10.0))
