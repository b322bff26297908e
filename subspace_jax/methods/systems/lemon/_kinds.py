"""Solvers and trees of the families, put together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np

from . import _solvers as solvers
from . import _trees as trees
from ._families import LENGTH, Coefficients, Family


def modes(factor: Callable) -> Callable:
    """Returns the solver of a linear equation, from the factor of each mode: `factor(coefficients, k, t)`."""
    return lambda c, u0, times: solvers.by_modes(u0, times, LENGTH, lambda k, t: factor(c, k, t))


def porous_medium(c: Coefficients, u0: np.ndarray, times: np.ndarray) -> np.ndarray:
    """u_t = (u^m)_xx, in fluxes, so that mass is kept."""
    dx = LENGTH / u0.shape[-1]

    def slope(u: np.ndarray) -> np.ndarray:
        p = np.maximum(u, 0) ** c["m"]
        return (np.roll(p, -1, -1) - 2 * p + np.roll(p, 1, -1)) / dx**2

    step = 0.5 * dx**2 / c["m"].max() / max(u0.max(), 1.0) ** (c["m"].max() - 1)
    return solvers.runge_kutta(u0, times, slope, step).swapaxes(0, 1)


def sine_gordon(c: Coefficients, u0: np.ndarray, times: np.ndarray) -> np.ndarray:
    """u_tt = u_xx - c sin u from rest."""
    k2 = solvers.wave_numbers(u0.shape[-1], LENGTH) ** 2

    def slope(y: np.ndarray) -> np.ndarray:
        curved = np.fft.irfft(-k2 * np.fft.rfft(y[0]), u0.shape[-1])
        return np.stack([y[1], curved - c["c"] * np.sin(y[0])])

    found = solvers.runge_kutta(np.stack([u0, np.zeros_like(u0)]), times, slope, 0.5 / np.sqrt(k2.max()))
    return found[:, 0].swapaxes(0, 1)


def korteweg_de_vries(c: Coefficients, u0: np.ndarray, times: np.ndarray) -> np.ndarray:
    """u_t = -u u_x - delta^2 u_xxx."""
    points, k = u0.shape[-1], solvers.wave_numbers(u0.shape[-1], LENGTH)
    nonlinear = lambda u: -np.fft.irfft(1j * k * np.fft.rfft(u * u / 2), points)  # noqa: E731
    return solvers.exponential_runge_kutta(u0, times, LENGTH, 1j * c["delta"] ** 2 * k**3, nonlinear, 2e-3)


_REACTIONS: Mapping[str, Callable[[np.ndarray, Coefficients], np.ndarray]] = {
    "logistic": lambda u, c: u * (1 - u),
    "linear": lambda u, c: u,
    "bistable": lambda u, c: u * (1 - u) * (u - c["a"]),
    "square_logistic": lambda u, c: (u * (1 - u)) ** 2,
}


def _grow(kind: str, c: Coefficients, u0: np.ndarray, times: np.ndarray) -> np.ndarray:
    linear = -c["nu"] * solvers.wave_numbers(u0.shape[-1], LENGTH) ** 2
    nonlinear = lambda u: c["rho"] * _REACTIONS[kind](u, c)  # noqa: E731
    return solvers.exponential_runge_kutta(u0, times, LENGTH, linear, nonlinear, 0.02)


_FLUXES: Mapping[str, tuple[solvers.Field, solvers.Field]] = {
    "burgers": (lambda u: u * u / 2, np.abs),
    "cubic": (lambda u: u**3 / 3, np.square),
    "sine": (np.sin, lambda u: np.abs(np.cos(u))),
    "cosine": (np.cos, lambda u: np.abs(np.sin(u))),
}


def _conserve(kind: str, c: Coefficients, u0: np.ndarray, times: np.ndarray) -> np.ndarray:
    flux, speed = _FLUXES[kind]
    k = c["k"]
    viscosity = c.get("viscosity", np.zeros((1, 1)))
    return solvers.conservation_law(
        u0, times, LENGTH, lambda u: k * flux(u), lambda u: k.max() * speed(u), np.asarray(viscosity)
    )


def fokker_planck(c: Coefficients, u0: np.ndarray, times: np.ndarray) -> np.ndarray:
    """u_t = D u_xx - (s sin(x / L) u)_x, in fluxes."""
    points = u0.shape[-1]
    dx, eye = LENGTH / points, np.eye(points)
    ahead = np.roll(eye, 1, 1)  # row i picks the cell to the right
    # The force at right faces; it jumps at the end of the line, which is no whole number of periods.
    force = c["drift"] * np.sin((np.arange(points) + 1) * dx / c["length"])
    faces = -c["diffusion"][..., None] * (ahead - eye) / dx + force[..., None] * (ahead + eye) / 2
    return solvers.by_matrix(u0, times, -(faces - np.roll(faces, 1, axis=-2)) / dx)


def brownian(c: Coefficients) -> Coefficients:
    """Returns diffusion and drift of a bead in water, in micrometers and seconds, from the viscosity of the water."""
    radius, temperature, depth = 1e-7, 300.0, 5e-21
    drag = 6 * np.pi * c["eta"] * radius
    return {
        "diffusion": 1.380649e-23 * temperature / drag * 1e12,
        "drift": depth / (radius * drag) * 1e6,
        "length": np.full_like(c["eta"], radius * 1e6),
    }


def law(kind: str, viscous: bool) -> Family:
    """Returns the family of a conservation law, with viscosity eps / pi or without."""
    centers = {"k": 1.0, **({"viscosity": 0.01 / np.pi} if viscous else {})}
    return Family(
        f"{'viscous' if viscous else 'inviscid'}_{kind}_flux",
        centers,
        functools.partial(trees.conservation, kind),
        functools.partial(_conserve, kind),
        initial=("sines", "riemann"),
    )


def growth(kind: str) -> Family:
    """Returns the family of a diffusion-reaction equation."""
    return Family(
        f"diffusion_reaction_{kind}",
        {"nu": 3e-3, "rho": 1.0},
        functools.partial(trees.diffusion_reaction, kind),
        functools.partial(_grow, kind),
        ranges={"a": (0.0, 1.0)} if kind == "bistable" else {},
    )


def linear_family(name: str, **centers: float) -> Family:
    """Returns a linear family with your own coefficients, solved exactly.

    Args:
      name: "heat" (c), "advection" (beta), "advection_diffusion" (beta, c), "dispersion" (a) or "wave" (c).
      **centers: its coefficients.

    Raises:
      ValueError: an unknown name or coefficient.

    Example:
      >>> linear_family("advection_diffusion", beta=0.5, c=0.02).centers
      {'beta': 0.5, 'c': 0.02}
    """
    known: Mapping[str, tuple[tuple[str, ...], Callable, Callable]] = {
        "heat": (("c",), trees.heat, lambda c, k, t: np.exp(-c["c"] * k**2 * t)),
        "advection": (("beta",), trees.advection, lambda c, k, t: np.exp(-1j * c["beta"] * k * t)),
        "advection_diffusion": (
            ("beta", "c"),
            trees.advection_diffusion,
            lambda c, k, t: np.exp(-(1j * c["beta"] * k + c["c"] * k**2) * t),
        ),
        "dispersion": (("a",), trees.dispersion, lambda c, k, t: np.exp(1j * c["a"] * k**3 * t)),
        "wave": (("c",), trees.wave, lambda c, k, t: np.cos(c["c"] * k * t)),
    }
    if name not in known or set(centers) != set(known[name][0]):
        forms = "; ".join(f"{n}({', '.join(v[0])})" for n, v in known.items())
        raise ValueError(f"linear_family: {name!r} with {sorted(centers)}; expected one of {forms}.")
    return Family(name, dict(centers), known[name][1], modes(known[name][2]))
