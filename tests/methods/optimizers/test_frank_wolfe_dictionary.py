"""The online dictionary against NumPy's loop, its invariants, and a dictionary that is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax.core import RankError, StructureError
from subspace_jax.linalg import polar
from subspace_jax.methods.optimizers.frank_wolfe_dictionary import (
    DictionaryState,
    decode,
    dictionary_error,
    encode,
    finalize,
    gap,
    gradient_of,
    inverse_root,
    spectral_frank_wolfe,
    start,
    step,
)
from tests.tolerances import assert_rounding

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def single(x):
    return jnp.asarray(x, jnp.float32)


def orthogonal(n, seed=0):
    return np.linalg.qr(normal(n, n, seed=seed))[0]


def sparse(n, batch, theta=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, n)) * (rng.random((batch, n)) < theta)


def numpy_step(d, h, t, y, p=3.0):
    z = y @ d
    g = -p / len(y) * y.T @ (np.abs(z) ** (p - 2) * z)
    rho, gamma = min(1.0, t**-0.5), (t + 1) ** -0.75
    h = (1 - rho) * h + rho * g
    u, _, vt = np.linalg.svd(h)
    return (1 - gamma) * d - gamma * u @ vt, h


@pytest.mark.parametrize("p", [3.0, 4.0])
def test_steps_are_those_of_the_equations(p):
    state = start(6, KEY)
    d, h = np.asarray(state.atoms, np.float64), np.zeros((6, 6))
    run = jax.jit(functools.partial(step, p=p))
    for t in range(1, 5):
        y = normal(20, 6, seed=t)
        state = run(state, single(y))
        d, h = numpy_step(d, h, t, y, p)
        assert_rounding(state.atoms, d, size=1024)
        assert_rounding(state.gradient, h, size=1024)
        assert np.linalg.norm(state.atoms, 2) <= 1 + 1e-6
    assert run._cache_size() == 1


@pytest.mark.parametrize("p", [3.0, 4.0])
def test_the_gradient_is_that_of_the_objective(p):
    d, y = single(normal(5, 5)), single(normal(7, 5, seed=1))
    objective = lambda d: -jnp.mean(jnp.sum(jnp.abs(y @ d) ** p, axis=1))
    assert_rounding(gradient_of(d, y, p), jax.jit(jax.grad(objective))(d), size=256)


@pytest.mark.parametrize("method", ["svd", "newton_schulz"])
def test_the_oracle_is_the_polar_factor_and_nothing_goes_further(method):
    h = normal(6, 6)
    s = -np.asarray(polar(single(h), method), np.float64)
    u, values, vt = np.linalg.svd(h)
    np.testing.assert_allclose(s, -u @ vt, atol=1e-4)
    np.testing.assert_allclose(np.sum(s * h), -values.sum(), rtol=1e-5)
    assert all(np.sum(orthogonal(6, seed) * h) > np.sum(s * h) for seed in range(200))
    np.testing.assert_allclose(polar(single(3 * h), method), -s, atol=1e-5)
    np.testing.assert_allclose(
        polar(single(normal(2, 4, 7)), method)[1], np.asarray(polar(single(normal(2, 4, 7)[1]))), atol=1e-4
    )


def test_the_gap_is_zero_at_the_truth_and_never_negative():
    truth = orthogonal(6)
    y = np.eye(6) @ truth.T  # one atom each
    assert abs(float(gap(single(truth), gradient_of(single(truth), single(y))))) < 1e-5
    for seed in range(5):
        d = single(polar(single(normal(6, 6, seed=seed))))
        assert float(gap(d, gradient_of(d, single(sparse(6, 40) @ truth.T)))) > 0


def test_without_averaging_and_all_the_way_it_is_the_power_method():
    y = single(sparse(8, 400) @ orthogonal(8).T)
    state, values = start(8, KEY), []
    for _ in range(6):
        z = y @ state.atoms
        expected = polar(y.T @ (jnp.abs(z) * z))
        state = step(state, y, averaging=0.0, stepping=0.0)
        np.testing.assert_allclose(state.atoms, expected, atol=1e-4)
        values.append(float(jnp.sum(jnp.abs(y @ state.atoms) ** 3)))
    assert (np.diff(values) >= -1e-3).all()


def test_it_turns_with_its_samples_and_permutes_with_its_atoms():
    turn, state = orthogonal(5, 3), start(5, KEY)
    order, flips = np.array([2, 0, 4, 1, 3]), np.array([1.0, -1.0, 1.0, 1.0, -1.0])
    plain, turned = state, state._replace(atoms=single(turn) @ state.atoms)
    permuted = state._replace(atoms=state.atoms[:, order] * single(flips))
    for t in range(3):
        y = normal(40, 5, seed=t)
        plain, turned = step(plain, single(y)), step(turned, single(y @ turn.T))
        permuted = step(permuted, single(y))
        np.testing.assert_allclose(turned.atoms, turn @ np.asarray(plain.atoms), atol=2e-4)
        np.testing.assert_allclose(permuted.atoms, np.asarray(plain.atoms)[:, order] * flips, atol=2e-4)


def stream(truth, batch, steps, seed=0, mix=None, **options):
    """The state after a stream of sparse samples, drawn inside one compiled loop."""
    n = len(truth)

    @jax.jit
    def run(state, key):
        def one(state, key):
            amplitudes, mask = (jax.random.fold_in(key, i) for i in (0, 1))
            x = jax.random.normal(amplitudes, (batch, n)) * jax.random.bernoulli(mask, 0.3, (batch, n))
            y = x @ single(truth).T
            return step(state, y if mix is None else y @ single(mix).T, **options), None

        return jax.lax.scan(one, state, jax.random.split(key, steps))[0]

    return run(start(n, jax.random.key(seed), whiten=mix is not None), jax.random.key(100 + seed))


def test_it_finds_the_dictionary_of_a_stream():
    truth = orthogonal(10)
    state = stream(truth, 16, 1500)
    assert float(dictionary_error(finalize(state), single(truth))) < 4e-3
    assert np.linalg.norm(state.atoms, 2) <= 1 + 1e-6
    alone = stream(truth, 1, 1500, averaging=0.0)
    averaged = stream(truth, 1, 1500)
    errors = [float(dictionary_error(finalize(s), single(truth))) for s in (alone, averaged)]
    assert errors[0] > 10 * errors[1]  # averaging is what makes single samples converge


def test_whitening_serves_a_dictionary_that_is_not_orthogonal():
    mix = orthogonal(8, 1) @ np.diag(np.linspace(0.5, 2.0, 8)) @ orthogonal(8, 2)
    state = stream(np.eye(8), 32, 1000, mix=mix)
    assert isinstance(state, DictionaryState)
    assert state.covariance is not None
    root = inverse_root(state.covariance)
    whitened = root @ single(mix)
    assert float(dictionary_error(finalize(state), polar(whitened))) < 0.02
    c = normal(6, 6)
    c = c @ c.T
    np.testing.assert_allclose(inverse_root(single(c)) @ single(c) @ inverse_root(single(c)), np.eye(6), atol=2e-3)


def test_codes_and_samples():
    d, y = single(orthogonal(6)), single(normal(4, 6))
    np.testing.assert_allclose(decode(d, encode(d, y)), y, atol=1e-5)
    z = np.asarray(y) @ np.asarray(d)
    np.testing.assert_allclose(encode(d, y, threshold=0.5), np.sign(z) * np.maximum(np.abs(z) - 0.5, 0), atol=1e-5)
    kept = np.asarray(encode(d, y, keep=2))
    assert (np.count_nonzero(kept, axis=1) == 2).all()
    np.testing.assert_allclose(np.abs(kept).max(1), np.abs(z).max(1), rtol=1e-5)
    assert float(dictionary_error(d[:, ::-1] * -1.0, d)) < 1e-5
    assert float(dictionary_error(single(orthogonal(6, 9)), d)) > 0.5


def test_as_an_optimizer_it_stays_in_its_ball_and_is_muon_with_decay():
    w, g = {"w": jnp.zeros((4, 6)), "v": jnp.ones(3)}, {"w": single(normal(4, 6)), "v": jnp.ones(3)}
    optimizer = spectral_frank_wolfe(radius=3.0)
    state, params = optimizer.init(w), w
    for seed in range(4):
        g = {"w": single(normal(4, 6, seed=seed)), "v": jnp.ones(3)}
        updates, state = jax.jit(optimizer.update)(g, state, params)
        params = optax.apply_updates(params, updates)
        assert np.linalg.norm(params["w"], 2) <= 3.0 + 1e-5
    rate, decay, start_at = 0.1, 0.5, {"w": single(normal(4, 6, seed=9))}
    ours = spectral_frank_wolfe(rate * decay, 1 / decay, averaging=0.0)
    found, _ = ours.update({"w": g["w"]}, ours.init(start_at), start_at)
    u, _, vt = np.linalg.svd(np.asarray(g["w"]), full_matrices=False)
    np.testing.assert_allclose(found["w"], -rate * (decay * np.asarray(start_at["w"]) + u @ vt), atol=1e-5)
    with pytest.raises(ValueError, match="needs the parameters"):
        ours.update({"w": g["w"]}, ours.init(start_at))


def test_refusals():
    state = start(4, KEY)
    for shape in ((3, 5), (0, 4), (4,)):
        with pytest.raises(StructureError, match=r"step: samples have shape .*expected \[batch, 4\]"):
            step(state, jnp.zeros(shape))
    with pytest.raises(ValueError, match="step: p"):
        step(state, jnp.zeros((1, 4)), p=2.0)
    with pytest.raises(RankError, match="start: size"):
        start(0, KEY)
    with pytest.raises(ValueError, match="polar_method"):
        spectral_frank_wolfe(polar_method="qr")
