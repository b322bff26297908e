"""Tokens of equations, and trajectories against exact solutions, invariants and other integrators."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from subspace_jax.methods import lemon

X = lemon.grid(128)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.0314, 9.999, 123456.7, 1e-8, -1e8, 3e-3, 0.5, 999.4, 999.6])
def test_numbers_survive_three_digits(value):
    tokens = lemon.encode_float(value)
    assert set(tokens) <= set(lemon.vocabulary())
    found = lemon.decode_float(tokens)
    assert abs(found - value) <= 0.5e-2 * abs(value)
    assert found * value >= 0


def test_random_numbers_survive_and_carries_move_the_exponent():
    rng = np.random.default_rng(0)
    for value in rng.choice([-1, 1], 500) * 10 ** rng.uniform(-8, 8, 500):
        assert abs(lemon.decode_float(lemon.encode_float(value)) / value - 1) <= 0.5e-2
    assert lemon.encode_float(9.999) == ("+", "N100", "E-1")
    assert lemon.encode_float(0.0) == ("+", "N0", "E0")
    for bad in (np.inf, np.nan, 1e13, 9.9999e12):
        with pytest.raises(ValueError, match="encode_float"):
            lemon.encode_float(bad)
    with pytest.raises(ValueError, match="decode_float"):
        lemon.decode_float(("+", "x0", "E0"))


def test_trees_become_prefixes_and_padding():
    tree = ("add", "ut_0", ("mul", "u_0", "ux_0"), ("neg", ("pow", "u_0", 12)))
    assert lemon.prefix(tree) == ["add", "ut_0", "add", "mul", "u_0", "ux_0", "neg", "pow", "u_0", "+", "1", "2"]
    assert lemon.prefix(-7) == ["-", "7"]
    words = lemon.vocabulary()
    tokens, mask = lemon.encode_equations(["x", tree], 14)
    assert [words[t] for t in tokens[1][mask[1]]] == lemon.prefix(tree)
    assert (tokens[~mask] == 0).all()
    for bad in (("mul", "u_0"), "v_0", ("root", "u_0"), None):
        with pytest.raises(ValueError, match="prefix"):
            lemon.prefix(bad)
    with pytest.raises(ValueError, match="12 tokens"):
        lemon.encode_equations([tree], 5)


def drawn(name, **options):
    return lemon.draw_trajectories(lemon.families()[name], 1, **{"operators": 2, "states": 2, **options})


def test_every_family_has_finite_solutions_and_tokens_with_its_time():
    assert len(lemon.PRETRAINING) == 7
    assert set(lemon.PRETRAINING) | set(lemon.new_families()) == set(lemon.families())
    for name, family in lemon.families().items():
        points = 128 if name == "cahn_hilliard" else 32
        found = drawn(name, points=points, frames=8, states=1)
        assert found.u.shape == (2, 8, points, 1)
        tokens, mask = found.tokens()
        assert (tokens[mask] > 0).all()
        words = [lemon.vocabulary()[t] for t in tokens[0][mask[0]]]
        second = "utt_0" in words
        assert second == (name in ("klein_gordon", "sine_gordon", "wave"))
        factor = (2 / family.t_final) ** (2 if second else 1)
        place = words.index("utt_0" if second else "ut_0")
        if factor == 1:
            assert words[place - 1][0] not in "EN"
        else:
            np.testing.assert_allclose(lemon.decode_float(words[place - 3 : place]), factor, rtol=5e-3)
    with pytest.raises(ValueError, match="linear_family"):
        lemon.linear_family("heat", beta=1.0)


def test_linear_families_are_their_fourier_solutions():
    wavy = lambda rng, n: np.tile(0.5 + 0.5 * np.sin(np.pi * X), (n, 1))
    options = {"operators": 1, "states": 1, "spread": 0.0, "initial": wavy}
    amplitude = lambda u: 2 * np.abs(np.fft.rfft(u[0, :, :, 0]))[:, 1] / 128
    heat = lemon.draw_trajectories(lemon.families()["heat"], 0, **options)
    np.testing.assert_allclose(heat.u[0, :, 0, 0].shape, (64,))
    np.testing.assert_allclose(amplitude(heat.u)[-1] / amplitude(heat.u)[0], 0.943374, atol=1e-5)
    moved = lemon.draw_trajectories(lemon.families()["advection"], 0, **options)
    for j in (1, 20, 63):  # exactly one cell a frame
        np.testing.assert_allclose(moved.u[0, j, :, 0], np.roll(moved.u[0, 0, :, 0], j), atol=1e-5)
    wave = lemon.draw_trajectories(lemon.families()["wave"], 0, **options)
    ratio = (wave.u[0, -1, :, 0] - 0.5) @ (wave.u[0, 0, :, 0] - 0.5) / ((wave.u[0, 0, :, 0] - 0.5) ** 2).sum()
    np.testing.assert_allclose(ratio, 0.0245, atol=1e-4)
    np.testing.assert_allclose(heat.times, np.arange(64) / 32)


@pytest.mark.parametrize(
    "name",
    [n for n in lemon.families() if "flux" in n]
    + ["porous_medium", "fokker_planck", "korteweg_de_vries", "cahn_hilliard"],
)
def test_what_is_conserved_stays(name):
    frames = 16
    u = drawn(name, points=64, frames=frames, states=1).u[..., 0].astype(np.float64)
    np.testing.assert_allclose(u.mean(-1), np.repeat(u[:, :1].mean(-1), frames, 1), atol=1e-5)
    if "flux" in name or name == "porous_medium":
        assert u.max() <= u[:, 0].max() + 1e-6  # no new extrema
        assert u.min() >= u[:, 0].min() - 1e-6


def test_a_smooth_inviscid_flux_follows_its_characteristics():
    smooth = lambda rng, n: 0.5 + 0.2 * np.sin(np.pi * lemon.grid(256))[None]
    options = {"operators": 1, "states": 1, "spread": 0.0, "points": 256, "frames": 16, "initial": smooth}
    found = lemon.draw_trajectories(lemon.families()["inviscid_burgers_flux"], 0, **options)
    x, start = lemon.grid(256), lambda s: 0.5 + 0.2 * np.sin(np.pi * s)
    for j in (4, 8):  # shocks form at 1 / (0.2 pi) = 1.6
        foot = x.copy()
        for _ in range(200):
            foot = x - start(foot) * found.times[j]
        np.testing.assert_allclose(found.u[0, j, :, 0], start(foot), atol=3e-3)


def semi_discrete(name, c, points):
    """The right side of each equation by finite differences or its own formula, written anew."""
    dx = 2 / points
    second = lambda u: (np.roll(u, -1) - 2 * u + np.roll(u, 1)) / dx**2
    k = 2 * np.pi * np.fft.rfftfreq(points, dx)
    derivative = lambda u, n: np.fft.irfft((1j * k) ** n * np.fft.rfft(u), points)
    return {
        "porous_medium": lambda u: second(np.maximum(u, 0) ** c["m"]),
        "korteweg_de_vries": lambda u: -u * derivative(u, 1) - c["delta"] ** 2 * derivative(u, 3),
        "diffusion_reaction_logistic": lambda u: c["nu"] * derivative(u, 2) + c["rho"] * u * (1 - u),
        "diffusion_reaction_bistable": lambda u: c["nu"] * derivative(u, 2) + c["rho"] * u * (1 - u) * (u - c["a"]),
        "diffusion_reaction_square_logistic": lambda u: c["nu"] * derivative(u, 2) + c["rho"] * (u * (1 - u)) ** 2,
        "diffusion_reaction_linear": lambda u: c["nu"] * derivative(u, 2) + c["rho"] * u,
        "sine_gordon": lambda y: np.concatenate([y[points:], derivative(y[:points], 2) - c["c"] * np.sin(y[:points])]),
        "klein_gordon": lambda y: np.concatenate(
            [y[points:], c["c"] ** 2 * derivative(y[:points], 2) - c["m"] ** 2 * c["c"] ** 4 * y[:points]]
        ),
    }[name]


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("porous_medium", 1e-4),
        ("korteweg_de_vries", 2e-3),
        ("sine_gordon", 1e-4),
        ("klein_gordon", 1e-4),
        *((f"diffusion_reaction_{kind}", 1e-4) for kind in ("logistic", "linear", "bistable", "square_logistic")),
    ],
)
def test_solvers_agree_with_another_integrator(name, bound):
    points, family = (64 if name == "korteweg_de_vries" else 32), lemon.families()[name]
    smooth = lambda rng, n: np.tile(0.5 + 0.4 * np.sin(np.pi * lemon.grid(points) + 1), (n, 1))
    found = lemon.draw_trajectories(family, 3, operators=1, states=1, points=points, frames=4, initial=smooth)
    c = {k: v[0] for k, v in found.coefficients.items()}
    start = smooth(None, 1)[0]
    slope = semi_discrete(name, c, points)
    y0 = np.concatenate([start, np.zeros(points)]) if name in ("sine_gordon", "klein_gordon") else start
    times = found.times.astype(np.float64) * family.t_final / 2
    method = "LSODA" if "gordon" not in name else "RK45"
    exact = solve_ivp(lambda t, y: slope(y), (0, times[-1]), y0, method, times, rtol=1e-8, atol=1e-9).y[:points].T
    np.testing.assert_allclose(found.u[0, :, :, 0], exact, atol=bound)


def test_phases_separate_and_energy_falls():
    found = drawn("cahn_hilliard", states=1)
    u, eps = found.u[..., 0].astype(np.float64), found.coefficients["eps"][:, None, None]
    slope = (np.roll(u, -1, -1) - u) * 64
    energy = ((u**2 - 1) ** 2 / 4 + eps**2 / 2 * slope**2).mean(-1)
    assert (np.diff(energy, axis=1) < 1e-6).all()
    assert (energy[:, -1] < 0.7 * energy[:, 0]).all()
    assert np.abs(u).max() < 1.2


def test_a_bead_in_water_has_its_constants():
    found = lemon.draw_trajectories(
        lemon.families()["fokker_planck"], 0, operators=1, states=1, spread=0.0, points=32, frames=2
    )
    c = {k: v[0] for k, v in found.coefficients.items()}
    np.testing.assert_allclose([c["diffusion"], c["drift"], c["drift"] / c["length"]], [2.197, 26.5, 265], rtol=2e-3)


def test_initial_states_lie_between_zero_and_one_and_are_drawn_apart():
    found = drawn("heat", operators=1, states=60)
    start = found.u[:, 0, :, 0]
    np.testing.assert_allclose(start.min(1), 0, atol=1e-6)
    np.testing.assert_allclose(start.max(1), 1, atol=1e-6)
    np.testing.assert_allclose(start[:, 0], start[:, -1], atol=1e-6)  # no slope from end to end
    assert len(np.unique(start.round(6), axis=0)) == 60
    again = drawn("heat", operators=1, states=60)
    np.testing.assert_array_equal(found.u, again.u)
    shocks = drawn("inviscid_burgers_flux", states=2).u[1, 0, :, 0]
    assert len(np.unique(shocks.round(6))) == 2  # every second state is one of Riemann
    assert np.abs(drawn("heat", spread=0.3, operators=50, states=1).coefficients["c"] / 3e-3 - 1).max() > 0.2


def test_noise_has_its_size_in_every_sample():
    u = drawn("heat").u
    noise = lemon.add_noise(u, 0) - u
    sizes = np.linalg.norm(noise.reshape(4, -1), axis=1) / np.linalg.norm(u.reshape(4, -1), axis=1)
    np.testing.assert_allclose(sizes, 0.02, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operators": 0}, "operators=0"),
        ({"spread": 1.0}, "spread=1.0"),
        ({"frames": 0}, "frames=0"),
        ({"points": 4}, "points=4"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        drawn("heat", **options)
