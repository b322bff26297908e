"""ROOT against NumPy's loop of its steps, scalar polynomials, optax's Muon, and published coefficients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import subspace_jax as sj
from subspace_jax.core import RankError
from subspace_jax.linalg import newton_schulz
from subspace_jax.methods.optimizers.root import (
    MUON,
    PUBLISHED,
    calibrate,
    clip_by_quantile,
    clip_entries,
    coefficients_for,
    is_safe,
    newton_schulz_map,
    orthogonalize,
    random_spectra,
    root,
    scale_by_root,
)
from tests.tolerances import assert_rounding


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def steps_of(x, triple, steps=5):
    """Newton-Schulz in float64, written out."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / (np.linalg.norm(x) + 1e-7)
    a, b, c = triple
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (6, 6)])
def test_three_steps_are_those_of_the_equations(nesterov, shape):
    optimizer = root(0.1, nesterov=nesterov, table="published", weight_decay=0.3)
    w = normal(*shape, seed=9)
    params, moved = {"w": jnp.asarray(w, jnp.float32)}, np.zeros(shape)
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for seed in range(3):
        g = normal(*shape, seed=seed)
        updates, state = step({"w": jnp.asarray(g, jnp.float32)}, state, params)
        moved = 0.95 * moved + g
        n = g + 0.95 * moved if nesterov else moved
        bound = np.quantile(np.abs(n), 0.9) + 1e-9
        kept = n - np.sign(n) * np.maximum(np.abs(n) - bound, 0)
        expected = -0.1 * (0.2 * np.sqrt(max(shape)) * steps_of(kept, MUON) + 0.3 * np.asarray(params["w"], np.float64))
        assert_rounding(updates["w"], expected, size=512)
        assert_rounding(state[0].matrices["momentum"]["w"], moved, size=16)  # the momentum itself is not clipped
        params = optax.apply_updates(params, updates)
    assert step._cache_size() == 1


def test_without_clipping_it_is_muon():
    g = {"w": jnp.asarray(normal(10, 6), jnp.float32)}
    ours = scale_by_root(quantile=1.0, table="muon", momentum=0.0, nesterov=False, rms=1.0)
    axes = {"w": optax.contrib.MuonDimensionNumbers((0,), (1,))}
    options = {"ns_coeffs": MUON, "beta": 0.0, "nesterov": False, "weight_dimension_numbers": axes}
    theirs = optax.contrib.scale_by_muon(**options)
    found = ours.update(g, ours.init(g))[0]["w"] / np.sqrt(10)
    assert_rounding(found, theirs.update(g, theirs.init(g), g)[0]["w"], size=512)
    chained = optax.chain(optax.trace(0.95, nesterov=True), clip_by_quantile(0.9), orthogonalize(table="muon"))
    whole = scale_by_root(table="muon", rms=1.0)
    state, other = chained.init(g), whole.init(g)
    for _ in range(2):
        one, state = chained.update(g, state)
        two, other = whole.update(g, other)
        assert_rounding(one["w"] * np.sqrt(10), two["w"], size=64)


def test_clipping_keeps_its_share_and_every_matrix_of_a_stack_has_its_own_bound():
    n = jnp.asarray(normal(3, 20, 30) * np.array([1.0, 100.0, 1e-3])[:, None, None], jnp.float32)
    kept = clip_entries(n, 0.9)
    for one, clipped in zip(np.asarray(n), np.asarray(kept), strict=True):
        bound = np.quantile(np.abs(one), 0.9) + 1e-9
        np.testing.assert_allclose(clipped, np.clip(one, -bound, bound), rtol=1e-5, atol=1e-6 * bound)
        assert np.abs(clipped).max() <= bound * (1 + 1e-6)
        assert abs((np.abs(one) > bound).mean() - 0.1) <= 1 / one.size
    np.testing.assert_array_equal(clip_entries(n, 1.0), n)


def test_a_matrix_of_mostly_zeros_loses_its_entries_as_in_the_published_form():
    n = jnp.zeros((10, 10)).at[2, 3].set(0.695)
    np.testing.assert_array_equal(clip_entries(n, 0.9), jnp.zeros((10, 10)))


def test_the_approximate_quantile_is_near_the_exact_one():
    n = jnp.asarray(normal(600, 500), jnp.float32)
    exact, near = (float(jnp.abs(clip_entries(n, 0.9, m)).max()) for m in ("exact", "approximate"))
    assert abs(near / exact - 1) < 0.02
    small = n[:20, :20]
    np.testing.assert_array_equal(clip_entries(small, 0.9, "approximate"), clip_entries(small, 0.9))


def test_singular_values_follow_the_polynomial_and_vectors_stay():
    n = normal(7, 11)
    u, s, vt = np.linalg.svd(n, full_matrices=False)
    for triple in (MUON, PUBLISHED[2048, 8192]):
        x = np.asarray(newton_schulz(jnp.asarray(n, jnp.float32), (triple,) * 5), np.float64)
        expected = np.diag(newton_schulz_map(s / np.linalg.norm(n), triple))
        np.testing.assert_allclose(u.T @ x @ vt.T, expected, atol=1e-5)


def test_published_coefficients_beat_muons_and_calibrated_ones_both():
    """Mean squares on random matrices, as the specification of the method has them from its own computation."""
    expected = {
        (2048, 2048): (0.0499, 0.0394, 0.0351),
        (2048, 3072): (None, None, 0.00240),
        (2048, 8192): (None, None, 1.8e-4),
        (2048, 16384): (0.0425, 0.0040, 7.1e-5),
    }

    def deviation(shape, triple):
        return np.mean([np.mean((newton_schulz_map(s, triple) - 1) ** 2) for s in random_spectra(*shape)])

    for shape, (muon, published, calibrated) in expected.items():
        if muon is not None:
            np.testing.assert_allclose(deviation(shape, MUON), muon, atol=2e-4)
            np.testing.assert_allclose(deviation(shape, PUBLISHED[shape]), published, atol=2e-4)
        found = calibrate(shape)
        assert deviation(shape, found) <= calibrated * 1.02
        assert deviation(shape, found) < deviation(shape, PUBLISHED[shape]) < deviation(shape, MUON)
        assert is_safe(found)
    assert deviation((64, 64), calibrate((64, 64))) < 0.0080
    assert calibrate((3, 40), steps=5) == calibrate((40, 3), steps=5)


def test_spectra_are_those_of_random_matrices():
    drawn = np.linalg.svd(normal(128, 256), compute_uv=False)
    drawn = np.sort(drawn / np.linalg.norm(drawn))
    (found,) = random_spectra(128, 256)
    quantiles = np.quantile(found, (np.arange(128) + 0.5) / 128)
    assert np.abs(quantiles / drawn - 1).max() < 0.06
    np.testing.assert_allclose(np.sum(found**2) / 512 * 128, 1.0, rtol=2e-3)
    assert len(random_spectra(8, 16)) == 32


def test_real_spectra_count_one_part_in_four_and_the_largest_deviation_can_count():
    real = [np.geomspace(1.0, 1e-3, 64) / np.linalg.norm(np.geomspace(1.0, 1e-3, 64))]
    mixed, plain, worst = (
        calibrate((64, 128), real_spectra=real),
        calibrate((64, 128)),
        calibrate((64, 128), minimax=True),
    )
    on = lambda s, t: np.mean((newton_schulz_map(s, t) - 1) ** 2)
    assert on(real[0], mixed) < on(real[0], plain)
    spectrum = random_spectra(64, 128)[0]
    high = spectrum[spectrum >= np.quantile(spectrum, 0.01)]
    peak = lambda t: np.abs(newton_schulz_map(high, t) - 1).max()
    assert peak(worst) <= peak(plain)
    assert is_safe(mixed) and is_safe(worst)  # noqa: PT018


def test_an_unsafe_triple_is_replaced_unless_it_is_wanted():
    assert not is_safe(PUBLISHED[2048, 2048])
    peak = newton_schulz_map(np.linspace(0.544, 0.574, 2001), PUBLISHED[2048, 2048]).max()
    np.testing.assert_allclose(peak, 3.31, atol=0.01)
    assert all(is_safe(t) for k, t in PUBLISHED.items() if k != (2048, 2048))
    assert coefficients_for((2048, 2048), "published") == MUON
    assert coefficients_for((2048, 2048), "published", safe=False) == PUBLISHED[2048, 2048]
    assert coefficients_for((7, 5), "published") == MUON


def test_zero_gradients_and_low_precision():
    params = {"w": jnp.ones((6, 4), jnp.bfloat16), "v": jnp.zeros(3)}
    optimizer = root(0.1, weight_decay=0.0)
    updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert all((v == 0).all() for v in jax.tree.leaves(updates))
    assert updates["w"].dtype == jnp.bfloat16
    assert state[0].matrices["momentum"]["w"].dtype == jnp.float32


def test_outliers_turn_its_direction_less_than_muons():
    """A signal of rank 16 in noise, one entry in a hundred spoiled: the cosine with the direction of the clean one."""
    cosines = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        clean = rng.normal(size=(128, 16)) @ rng.normal(size=(16, 256)) / 4 + 0.3 * rng.normal(size=(128, 256))
        spoiled = clean + 30 * rng.normal(size=clean.shape) * (rng.random(clean.shape) < 0.01)
        direction = lambda n, q: newton_schulz(clip_entries(jnp.asarray(n, jnp.float32), q), (MUON,) * 5)
        cosine = lambda a, b: float(jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))
        truth = direction(clean, 1.0)
        cosines.append(
            [cosine(direction(spoiled, q), truth) for q in (1.0, 0.9)] + [cosine(direction(clean, 0.9), truth)]
        )
    muon, ours, cost = np.mean(cosines, axis=0)
    assert ours > muon + 0.3
    assert 0.8 < cost < 0.95  # without outliers clipping costs


def test_refusals():
    for make in (
        lambda: scale_by_root(table="other"),
        lambda: orthogonalize(table="other"),
        lambda: clip_by_quantile(method="x"),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
    with pytest.raises(RankError, match="calibrate: side"):
        calibrate((0, 3))
    assert sj.methods.root.root is root
