"""Manifolds against scipy, geoopt, pymanopt and their own laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import subspace_jax as sj
from subspace_jax.core import StructureError
from tests.tolerances import tolerance

STIEFEL, GRASSMANN, ROTATIONS = sj.manifolds.Stiefel(), sj.manifolds.Grassmann(), sj.manifolds.SpecialOrthogonal()
# With rank 1, full rank, a stack.
PLACES = [
    *((space, shape) for space in (STIEFEL, GRASSMANN) for shape in ((6, 3), (5, 1), (4, 4), (2, 3, 7, 2))),
    *((ROTATIONS, shape) for shape in ((3, 3), (4, 4), (2, 5, 5), (1, 1))),
]
IDS = [f"{space.name}-{'x'.join(map(str, shape))}" for space, shape in PLACES]
each = pytest.mark.parametrize(("space", "shape"), PLACES, ids=IDS)


@pytest.fixture(autouse=True, scope="module")
def _doubles():
    """Laws are checked in float64, where a mistake is no rounding; float32 has tests of its own."""
    doubles = jax.config.jax_enable_x64
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_enable_x64", doubles)  # pymanopt sets it for the whole process as it is imported


def gaussian(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@functools.partial(jax.jit, static_argnames=("space", "shape"))
def point_of(space, shape, seed=0):
    return space.random_point(jax.random.key(seed), shape, jnp.float64)


def tangent_of(space, point, seed=1, size=0.7):
    return _scaled_tangent(space, point, gaussian(point.shape, seed), size)


@functools.partial(jax.jit, static_argnames="space")
def _scaled_tangent(space, point, vector, size):
    vector = space.to_tangent(point, vector)
    length = jnp.linalg.norm(vector, axis=(-2, -1), keepdims=True)
    # Where the manifold is a single point, what is left of the vector is rounding.
    return jnp.where(length < 1e-9, 0.0, size * vector / length)


def gram_error(x):
    x = np.asarray(x, np.float64)
    return np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1])).max()


def is_tangent(space, point, vector, tolerance):
    gram = np.swapaxes(np.asarray(point), -1, -2) @ np.asarray(vector)
    fault = gram if space is GRASSMANN else gram + np.swapaxes(gram, -1, -2)
    return np.abs(fault).max() < tolerance


@each
def test_tangent_projection(space, shape):
    point, vector = point_of(space, shape), gaussian(shape, 3)
    tangent = space.to_tangent(point, vector)
    assert is_tangent(space, point, tangent, 1e-12)
    np.testing.assert_allclose(space.to_tangent(point, tangent), tangent, atol=1e-12)
    # Orthogonal: what is taken away is orthogonal to every tangent vector.
    other = tangent_of(space, point, 4)
    np.testing.assert_allclose(space.inner(point, vector - tangent, other), 0, atol=1e-12)
    np.testing.assert_allclose(space.inner(point, other, other), np.sum(np.square(other), (-2, -1)), atol=1e-12)


@functools.partial(jax.jit, static_argnames=("space", "method"))
def moved(space, point, tangent, t, method):
    return space.retract(point, t * tangent, method)


@each
@pytest.mark.parametrize("method", ["exponential", "qr", "polar"])
def test_retractions_stay_on_the_manifold_and_are_first_order(space, shape, method):
    point = point_of(space, shape)
    tangent = tangent_of(space, point)
    go = lambda t: moved(space, point, tangent, t, method)
    for size in (0.0, 1e-3, 1.0, 4.0):
        assert space.check_point(go(size), tolerance=1e-11)
    np.testing.assert_array_equal(space.retract(point, 0 * tangent), point) if space is GRASSMANN else None
    np.testing.assert_allclose(go(0.0), point, atol=1e-12)
    slopes = jax.jvp(go, (0.0,), (1.0,))[1] if method == "exponential" and space is not GRASSMANN else None
    slopes = (np.asarray(go(1e-5)) - go(-1e-5)) / 2e-5 if slopes is None else slopes
    np.testing.assert_allclose(slopes, tangent, atol=1e-8)
    errors = [np.linalg.norm(np.asarray(go(t)) - point - t * np.asarray(tangent)) for t in (2e-3, 1e-3)]
    assert errors[1] < 0.3 * errors[0] + 1e-12


@each
def test_distance_is_a_metric(space, shape):
    a, b, c = (point_of(space, shape, seed) for seed in (1, 2, 3))
    ab, ba, bc, ac, aa = (space.distance(*pair) for pair in ((a, b), (b, a), (b, c), (a, c), (a, a)))
    np.testing.assert_allclose(ab, ba, atol=1e-10)
    assert ab.shape == shape[:-2]
    assert np.all(ac <= ab + bc + 1e-10)
    np.testing.assert_allclose(aa, 0, atol=1e-7)
    if shape[-1] < shape[-2] or (space is not GRASSMANN and shape[-1] > 1):
        assert np.all(ab > 1e-3)


@pytest.mark.parametrize("shape", [(6, 3), (5, 1), (2, 3, 7, 2)])
def test_grassmann_geodesic_distance_log_and_angles(shape):
    point = point_of(GRASSMANN, shape)
    tangent = tangent_of(GRASSMANN, point)
    end = GRASSMANN.retract(point, tangent)
    np.testing.assert_allclose(GRASSMANN.distance(point, end), 0.7, atol=1e-10)
    sizes = np.linalg.svd(np.asarray(tangent), compute_uv=False)[..., ::-1]
    np.testing.assert_allclose(GRASSMANN.angles(point, end), sizes, atol=1e-7)
    np.testing.assert_allclose(GRASSMANN.log(point, end), tangent, atol=1e-7)
    back = GRASSMANN.retract(end, GRASSMANN.transport(point, -tangent, end))
    np.testing.assert_allclose(back, point, atol=1e-7)
    flat = (v.reshape(-1, *shape[-2:]) for v in (np.asarray(point), np.asarray(end)))
    expected = [scipy.linalg.subspace_angles(a, b)[::-1] for a, b in zip(*flat, strict=True)]
    np.testing.assert_allclose(GRASSMANN.angles(point, end).reshape(-1, shape[-1]), expected, atol=1e-7)


def test_grassmann_geodesic_equals_the_form_with_an_svd():
    point = point_of(GRASSMANN, (9, 4))
    tangent = tangent_of(GRASSMANN, point, size=3.0)
    u, s, wt = np.linalg.svd(np.asarray(tangent), full_matrices=False)
    for eta in (-0.7, 1e-9, 0.3, 2.0):
        expected = (np.asarray(point) @ wt.T * np.cos(eta * s) + u * np.sin(eta * s)) @ wt
        np.testing.assert_allclose(GRASSMANN.retract(point, eta * tangent), expected, atol=1e-10)
    there = GRASSMANN.retract(point, tangent)
    onward = (np.asarray(point) @ wt.T * -np.sin(s) + u * np.cos(s)) * s @ wt  # the velocity at the end
    np.testing.assert_allclose(GRASSMANN.retract(there, -jnp.asarray(onward)), point, atol=1e-7)


def test_grassmann_knows_nothing_of_the_basis():
    point, other = point_of(GRASSMANN, (7, 3)), point_of(GRASSMANN, (7, 3), 5)
    tangent = tangent_of(GRASSMANN, point)
    turn, turn2 = (point_of(STIEFEL, (3, 3), seed) for seed in (8, 9))
    for method in ("exponential", "polar"):
        expected = GRASSMANN.retract(point, tangent, method) @ turn
        np.testing.assert_allclose(GRASSMANN.retract(point @ turn, tangent @ turn, method), expected, atol=1e-10)
    moved = GRASSMANN.retract(point @ turn, tangent @ turn, "qr")
    np.testing.assert_allclose(GRASSMANN.distance(moved, GRASSMANN.retract(point, tangent, "qr")), 0, atol=1e-7)
    found = GRASSMANN.distance(point @ turn, other @ turn2)
    np.testing.assert_allclose(found, GRASSMANN.distance(point, other), atol=1e-10)
    np.testing.assert_allclose(
        GRASSMANN.log(point @ turn, other @ turn2), GRASSMANN.log(point, other) @ turn, atol=1e-9
    )
    expected = GRASSMANN.transport(point, tangent, other) @ turn2
    np.testing.assert_allclose(GRASSMANN.transport(point @ turn, tangent @ turn, other @ turn2), expected, atol=1e-9)


@each
def test_transport_gives_tangent_vectors_and_keeps_inner_products_where_it_should(space, shape):
    point, new = point_of(space, shape), point_of(space, shape, 7)
    a, b = tangent_of(space, point, 1), tangent_of(space, point, 2)
    moved_a, moved_b = (space.transport(point, v, new) for v in (a, b))
    assert is_tangent(space, new, moved_a, 1e-10)
    np.testing.assert_allclose(space.transport(point, a, point), a, atol=1e-7)
    if space is not STIEFEL:
        np.testing.assert_allclose(space.inner(new, moved_a, moved_b), space.inner(point, a, b), atol=1e-10)


def test_rotations_against_matrix_functions():
    point, other = point_of(ROTATIONS, (5, 5)), point_of(ROTATIONS, (5, 5), 3)
    tangent = tangent_of(ROTATIONS, point)
    expected = np.asarray(point) @ scipy.linalg.expm(np.asarray(point.T @ tangent))
    np.testing.assert_allclose(ROTATIONS.retract(point, tangent), expected, atol=1e-12)
    np.testing.assert_allclose(ROTATIONS.distance(point, ROTATIONS.retract(point, tangent)), 0.7, atol=1e-10)
    log = scipy.linalg.logm(np.asarray(point.T @ other))
    np.testing.assert_allclose(ROTATIONS.distance(point, other), np.linalg.norm(log), atol=1e-8)
    half_turn = jnp.diag(jnp.array([-1.0, -1.0, 1.0]))
    np.testing.assert_allclose(ROTATIONS.distance(jnp.eye(3), half_turn), np.sqrt(2) * np.pi, atol=1e-10)
    assert jnp.linalg.det(ROTATIONS.project(jnp.diag(jnp.array([1.0, 2.0, -0.1])))) > 0
    many = ROTATIONS.random_point(jax.random.key(0), (50, 3, 3))
    np.testing.assert_allclose(np.linalg.det(many), 1, atol=1e-5)
    assert abs(float(many.mean())) < 0.1


def test_stiefel_geodesic_solves_its_equation():
    r"""\(\ddot X + X \dot X^T \dot X = 0\), by finite differences; the speed is constant."""
    point = point_of(STIEFEL, (6, 3))
    tangent = tangent_of(STIEFEL, point)
    go = lambda t: STIEFEL.retract(point, t * tangent)
    h = 1e-4
    for t in (0.0, 0.8):
        speed, bend = (go(t + h) - go(t - h)) / (2 * h), (go(t + h) - 2 * go(t) + go(t - h)) / h**2
        np.testing.assert_allclose(bend, -go(t) @ (speed.T @ speed), atol=1e-6)
        np.testing.assert_allclose(jnp.linalg.norm(speed), 0.7, atol=1e-7)


@each
def test_projection_is_the_nearest_point(space, shape):
    matrix = point_of(space, shape) + 0.1 * gaussian(shape, 4)
    near = space.project(matrix)
    assert space.check_point(near, tolerance=1e-11)
    best = jnp.linalg.norm(matrix - near, axis=(-2, -1))
    for seed in range(5):
        other = space.retract(near, 0.05 * tangent_of(space, near, seed))
        other = other if space is not GRASSMANN else other @ point_of(ROTATIONS, (shape[-1],) * 2, seed)
        assert np.all(jnp.linalg.norm(matrix - other, axis=(-2, -1)) >= best - 1e-12)


@pytest.mark.parametrize("space", [STIEFEL, GRASSMANN], ids=lambda s: s.name)
def test_against_pymanopt(space):
    manifolds = pytest.importorskip("pymanopt.manifolds")
    theirs = (manifolds.Stiefel if space is STIEFEL else manifolds.Grassmann)(7, 3)
    if space is STIEFEL:
        theirs = manifolds.Stiefel(7, 3, retraction="polar")
    point, other = (np.asarray(point_of(space, (7, 3), seed)) for seed in (0, 1))
    tangent, vector = np.asarray(tangent_of(space, point)), np.asarray(gaussian((7, 3), 5))
    np.testing.assert_allclose(space.to_tangent(point, vector), theirs.projection(point, vector), atol=1e-12)
    np.testing.assert_allclose(space.retract(point, tangent, "polar"), theirs.retraction(point, tangent), atol=1e-10)
    found, expected = np.asarray(space.retract(point, tangent)), theirs.exp(point, tangent)
    if space is GRASSMANN:
        found, expected = found @ found.T, expected @ expected.T
        np.testing.assert_allclose(space.distance(point, other), theirs.dist(point, other), atol=1e-10)
        np.testing.assert_allclose(space.log(point, other), theirs.log(point, other), atol=1e-8)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    np.testing.assert_allclose(space.inner(point, tangent, tangent), theirs.norm(point, tangent) ** 2, atol=1e-12)


def test_against_geoopt():
    geoopt, torch = pytest.importorskip("geoopt"), pytest.importorskip("torch")
    theirs = geoopt.EuclideanStiefel()
    point = np.asarray(point_of(STIEFEL, (7, 3)))
    tangent, vector = np.asarray(tangent_of(STIEFEL, point)), np.asarray(gaussian((7, 3), 5))
    there = lambda *arrays: [torch.tensor(v) for v in arrays]
    np.testing.assert_allclose(STIEFEL.to_tangent(point, vector), theirs.proju(*there(point, vector)), atol=1e-12)
    np.testing.assert_allclose(STIEFEL.retract(point, tangent, "qr"), theirs.retr(*there(point, tangent)), atol=1e-10)
    np.testing.assert_allclose(STIEFEL.retract(point, tangent), theirs.expmap(*there(point, tangent)), atol=1e-9)
    np.testing.assert_allclose(STIEFEL.project(vector), theirs.projx(*there(vector)), atol=1e-10)


@pytest.mark.parametrize(("space", "shape"), [PLACES[0], PLACES[3], PLACES[4], PLACES[5], PLACES[8]])
@pytest.mark.parametrize("method", ["exponential", "qr"])
def test_a_thousand_float32_steps_with_qr_every_fifth(space, shape, method):
    point = space.random_point(jax.random.key(0), shape)
    vectors = jnp.asarray(gaussian((16, *shape), 2), jnp.float32)

    @jax.jit
    def run(point):
        def step(i, x):
            x = space.retract(x, 0.05 * space.to_tangent(x, vectors[i % 16]), method)
            return jax.lax.cond(i % 5 == 4, lambda: space.retract(x, 0 * x, "qr"), lambda: x)

        return jax.lax.fori_loop(0, 1000, step, point)

    end = run(point)
    assert end.dtype == jnp.float32
    assert gram_error(end) < 1e-5
    assert space.check_point(end, tolerance=1e-5)


def test_float32_small_angles_and_zero_vectors():
    point = GRASSMANN.random_point(jax.random.key(0), (20, 3))
    tangent = jnp.asarray(tangent_of(GRASSMANN, point, size=1e-4), jnp.float32)
    end = GRASSMANN.retract(point, tangent)
    np.testing.assert_allclose(GRASSMANN.distance(point, end), 1e-4, rtol=1e-2)  # the arc cosine would give 0 or 3e-4
    np.testing.assert_array_equal(GRASSMANN.retract(point, jnp.zeros_like(point)), point)
    for eta in (0.1, 1.0, 5.0):
        assert gram_error(GRASSMANN.retract(point, eta * 1e4 * tangent)) < tolerance(size=len(point))
    some = jnp.zeros((2, 20, 3), jnp.float32).at[0].set(tangent)
    assert np.isfinite(GRASSMANN.retract(jnp.stack([point, point]), some)).all()
    gradient = jax.jit(jax.grad(lambda v: GRASSMANN.retract(point, v, "qr").sum()))(jnp.zeros_like(point))
    assert np.isfinite(gradient).all()


def test_qr_keeps_signs():
    """LAPACK's own Q flips columns of a matrix that is orthonormal already."""
    for space in (STIEFEL, GRASSMANN, ROTATIONS):
        point = point_of(space, (4, 4))
        np.testing.assert_allclose(space.retract(point, jnp.zeros_like(point), "qr"), point, atol=1e-12)
    assert (np.diag(np.linalg.qr(np.asarray(point))[1]) < 0).any()


@pytest.mark.parametrize(("space", "shape"), [PLACES[0], PLACES[4], PLACES[8]])
def test_stack_is_one_matrix_after_the_other_and_compiles_once(space, shape):
    points, others = (point_of(space, (3, *shape[-2:]), seed) for seed in (1, 2))
    vectors = gaussian(points.shape, 3)
    traces = []

    @jax.jit
    def everything(x, y, v):
        traces.append(None)
        t = space.to_tangent(x, v)
        ends = tuple(space.retract(x, t, method) for method in ("exponential", "qr", "polar"))
        return *ends, space.transport(x, t, y), space.inner(x, t, t), space.distance(x, y)

    stacked = everything(points, others, vectors)
    everything(others, points, vectors)
    assert len(traces) == 1
    for found in (
        jax.vmap(everything)(points, others, vectors),
        [jnp.stack(v) for v in zip(*map(everything, points, others, vectors), strict=True)],
    ):
        for a, b in zip(stacked, found, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("space", [STIEFEL, GRASSMANN, ROTATIONS], ids=lambda s: s.name)
def test_bad_points_are_explained(space):
    assert space.check_point(jnp.eye(3), explain=True) == (True, "")
    reason = lambda matrix: space.check_point(matrix, explain=True)[1]
    assert "differs from I by 3" in reason(2 * jnp.eye(3))
    assert "bfloat16" in reason(jnp.eye(3, dtype=jnp.bfloat16))
    assert "not finite" in reason(jnp.full((3, 3), jnp.nan))
    assert "shape" in reason(jnp.ones((2, 3)))
    assert "shape" in reason(jnp.ones(3))
    if space is ROTATIONS:
        assert "determinant" in reason(jnp.diag(jnp.array([1.0, 1.0, -1.0])))
    for bad in (
        lambda: space.random_point(jax.random.key(0), (2, 3)),
        lambda: space.to_tangent(jnp.eye(3), jnp.eye(2)),
    ):
        with pytest.raises(StructureError, match=space.name):
            bad()
    with pytest.raises(StructureError, match="bfloat16"):
        space.random_point(jax.random.key(0), (3, 3), jnp.bfloat16)
    with pytest.raises(ValueError, match="caley"):
        space.retract(jnp.eye(3), jnp.zeros((3, 3)), "caley")


def test_bfloat16_is_widened():
    point = GRASSMANN.random_point(jax.random.key(0), (6, 2)).astype(jnp.bfloat16)
    end = GRASSMANN.retract(point, jnp.zeros_like(point), "qr")
    assert end.dtype == jnp.float32
    assert GRASSMANN.check_point(end, tolerance=1e-5)
