"""Solvers on a periodic grid, all samples at once, in float64: what the families of equations are made with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = Callable[[np.ndarray], np.ndarray]


def wave_numbers(points: int, length: float) -> np.ndarray:
    """Returns the angular wave numbers of a real transform, `[points // 2 + 1]`."""
    return 2 * np.pi * np.fft.rfftfreq(points, length / points)


def by_modes(u0: np.ndarray, times: np.ndarray, length: float, factor: Callable[[np.ndarray, float], np.ndarray]):
    r"""Solves a linear equation exactly: every Fourier mode is multiplied by its own factor of time.

    Args:
      u0: `[n, points]`.
      times: `[frames]`.
      length: of the domain.
      factor: `factor(k, t)`, complex, broadcast to `[n, modes]`.

    Returns:
      `[n, frames, points]`.
    """
    points = u0.shape[-1]
    modes, k = np.fft.rfft(u0), wave_numbers(points, length)
    return np.stack([np.fft.irfft(modes * factor(k, t), points) for t in times], axis=1)


def exponential_runge_kutta(
    u0: np.ndarray, times: np.ndarray, length: float, linear: np.ndarray, nonlinear: Field, step: float
) -> np.ndarray:
    r"""Solves \(\hat u_t = L \hat u + \widehat{N(u)}\) by the fourth-order exponential scheme ETDRK4.

    Its coefficients are means over a circle in the complex plane, which is exact where a division would cancel.

    Args:
      u0: `[n, points]`.
      times: `[frames]`, from 0.
      length: of the domain.
      linear: \(L\), `[n or 1, modes]`.
      nonlinear: \(N\) of values `[n, points]`; modes above two thirds are dropped.
      step: largest time step.

    Returns:
      `[n, frames, points]`.
    """
    points = u0.shape[-1]
    keep = np.arange(points // 2 + 1) <= points // 3
    spacing = np.diff(times)
    substeps = max(1, int(np.ceil(spacing.max() / step))) if len(spacing) else 1
    h = (spacing.max() if len(spacing) else step) / substeps
    full, half = np.exp(h * linear), np.exp(h * linear / 2)
    ring = np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)
    z = h * linear[..., None] + ring
    q = h * ((np.exp(z / 2) - 1) / z).mean(-1)
    f1 = h * ((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3).mean(-1)
    f2 = h * ((2 + z + np.exp(z) * (z - 2)) / z**3).mean(-1)
    f3 = h * ((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3).mean(-1)

    def slope(modes: np.ndarray) -> np.ndarray:
        return np.fft.rfft(nonlinear(np.fft.irfft(modes, points))) * keep

    v, found = np.fft.rfft(u0), [u0]
    for _ in spacing:
        for _ in range(substeps):
            n0 = slope(v)
            a = half * v + q * n0
            na = slope(a)
            b = half * v + q * na
            nb = slope(b)
            c = half * a + q * (2 * nb - n0)
            v = full * v + f1 * n0 + 2 * f2 * (na + nb) + f3 * slope(c)
        found.append(np.fft.irfft(v, points))
    return np.stack(found, axis=1)


def runge_kutta(y0: np.ndarray, times: np.ndarray, slope: Field, step: float) -> np.ndarray:
    """Solves an ordinary system by the classical fourth-order scheme.

    Args:
      y0: `[..., points]`, any leading axes.
      times: `[frames]`, equally spaced from 0.
      slope: time derivative of such an array.
      step: largest time step.

    Returns:
      `[frames, ..., points]`.
    """
    spacing = np.diff(times)
    found, y = [y0], y0
    for gap in spacing:
        count = max(1, int(np.ceil(gap / step)))
        h = gap / count
        for _ in range(count):
            k1 = slope(y)
            k2 = slope(y + h / 2 * k1)
            k3 = slope(y + h / 2 * k2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3))
        found.append(y)
    return np.stack(found)


def conservation_law(
    u0: np.ndarray, times: np.ndarray, length: float, flux: Field, speed: Field, viscosity: np.ndarray
) -> np.ndarray:
    r"""Solves \(u_t + f(u)_x = \nu u_{xx}\) by finite volumes: limited slopes, local Lax-Friedrichs, two stages.

    Shocks are sharp over a few cells, and the mean of \(u\) is kept to rounding.

    Args:
      u0: cell means, `[n, cells]`.
      times: `[frames]`, from 0.
      length: of the domain.
      flux: \(f\).
      speed: \(|f'|\), or a bound of it.
      viscosity: \(\nu\), `[n, 1]`, zero or more.

    Returns:
      `[n, frames, cells]`.
    """
    dx = length / u0.shape[-1]

    def slope(u: np.ndarray) -> np.ndarray:
        ahead, behind = np.roll(u, -1, -1) - u, u - np.roll(u, 1, -1)
        limited = np.where(ahead * behind > 0, np.sign(ahead) * np.minimum(abs(ahead), abs(behind)), 0)
        left, right = u + limited / 2, np.roll(u - limited / 2, -1, -1)  # both sides of the face to the right
        fastest = np.maximum(speed(left), speed(right))
        faces = (flux(left) + flux(right) - fastest * (right - left)) / 2 - viscosity * ahead / dx
        return -(faces - np.roll(faces, 1, -1)) / dx

    # No new extrema arise, so that the largest speed is one of the start's.
    span = np.linspace(u0.min(), u0.max(), 256)
    limit = 0.4 / (max(speed(span).max(), 1e-9) / dx + 2 * np.max(viscosity) / dx**2)
    u, found = u0, [u0]
    for gap in np.diff(times):
        count = max(1, int(np.ceil(gap / limit)))
        h = gap / count
        for _ in range(count):
            once = u + h * slope(u)
            u = (u + once + h * slope(once)) / 2
        found.append(u)
    return np.stack(found, axis=1)


def by_matrix(u0: np.ndarray, times: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    r"""Solves \(u_t = A u\) by the exponential of the matrix of each sample; times are equally spaced from 0.

    Args:
      u0: `[n, points]`.
      times: `[frames]`.
      matrices: `[n, points, points]`.

    Returns:
      `[n, frames, points]`.
    """
    from scipy.linalg import expm

    gap = times[1] - times[0] if len(times) > 1 else 0.0
    step, found = expm(gap * matrices), [u0]
    for _ in times[1:]:
        found.append(np.einsum("nij,nj->ni", step, found[-1]))
    return np.stack(found, axis=1)


def stabilized_implicit(u0: np.ndarray, times: np.ndarray, length: float, width: np.ndarray, step: float) -> np.ndarray:
    r"""Solves \(u_t = (u^3 - u)_{xx} - \epsilon^2 u_{xxxx}\) with its stiff parts implicit, stable at any step.

    First order in time: phases separate within a frame and their pattern hangs on rounding, so that only statistics of
    solutions can be compared.

    Args:
      u0: `[n, points]`.
      times: `[frames]`, from 0.
      length: of the domain.
      width: \(\epsilon\), `[n, 1]`.
      step: largest time step.

    Returns:
      `[n, frames, points]`.
    """
    points, stabilizer = u0.shape[-1], 2.0
    k2 = wave_numbers(points, length) ** 2
    v, found = np.fft.rfft(u0), [u0]
    for gap in np.diff(times):
        count = max(1, int(np.ceil(gap / step)))
        h = gap / count
        below = 1 + h * (stabilizer * k2 + width**2 * k2**2)
        for _ in range(count):
            u = np.fft.irfft(v, points)
            v = (v - h * k2 * (np.fft.rfft(u**3 - u) - stabilizer * v)) / below
        found.append(np.fft.irfft(v, points))
    return np.stack(found, axis=1)
