"""Coefficients of Newton-Schulz steps for the size of a matrix: published ones, and how to find others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from subspace_jax.core import check_choice, check_int

Triple = tuple[float, float, float]
Table = Literal["calibrated", "published", "muon"]

MUON: Triple = (3.4445, -4.7750, 2.0315)

# By (shorter, longer) side.
PUBLISHED: dict[tuple[int, int], Triple] = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}

# No singular value of any matrix may end above this.
LARGEST = 1.5
_GRID = np.linspace(0.0, 1.0, 20001)
# Below this the spectrum of a random matrix is not yet that of its limit, and is sampled.
_LIMIT_FROM = 64
_SAMPLES = 32


def newton_schulz_map(values: np.ndarray, triple: Triple, steps: int = 5) -> np.ndarray:
    r"""Returns what Newton-Schulz steps make of singular values: \(p(s) = a s + b s^3 + c s^5\), again and again.

    Args:
      values: singular values of a matrix of Frobenius norm 1.
      triple: \((a, b, c)\).
      steps: how often.

    Example:
      >>> import numpy as np
      >>> newton_schulz_map(np.array([0.5, 1.0]), (1.5, -0.5, 0.0), 10).round(4).tolist()
      [1.0, 1.0]
    """
    a, b, c = triple
    for _ in range(steps):
        squares = values * values
        values = values * (a + squares * (b + c * squares))
    return values


def is_safe(triple: Triple, steps: int = 5) -> bool:
    """Tells whether no singular value ends above 1.5, whatever the matrix.

    Example:
      >>> is_safe(MUON), is_safe(PUBLISHED[2048, 2048])
      (True, False)
    """
    return bool(np.max(newton_schulz_map(_GRID, triple, steps)) <= LARGEST)


def random_spectra(shorter: int, longer: int) -> tuple[np.ndarray, ...]:
    r"""Returns singular values of random matrices of Frobenius norm 1, as those of a Gaussian matrix lie.

    From 64 rows on they follow the Marchenko-Pastur law, \(\sigma = \sqrt{\lambda / m}\) at 512 midpoints of quantiles;
    below, those of 32 matrices are drawn.

    Args:
      shorter: the shorter side \(m\).
      longer: the longer side.
    """
    if shorter < _LIMIT_FROM:
        rng = np.random.default_rng([shorter, longer])
        drawn = np.linalg.svd(rng.standard_normal((_SAMPLES, shorter, longer)), compute_uv=False)
        return tuple(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
    ratio = shorter / longer
    low, high = (1 - np.sqrt(ratio)) ** 2, (1 + np.sqrt(ratio)) ** 2
    # In an angle the density has no singular ends.
    angle = (np.arange(200_000) + 0.5) * np.pi / 200_000
    value = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    share = np.cumsum(np.sin(angle) ** 2 / value)
    quantiles = np.interp((np.arange(512) + 0.5) / 512, share / share[-1], value)
    return (np.sqrt(quantiles / shorter),)


def calibrate(
    shape: tuple[int, int], *, steps: int = 5, real_spectra: Sequence[np.ndarray] = (), minimax: bool = False
) -> Triple:
    r"""Finds Newton-Schulz coefficients that bring the singular values of matrices of a size nearest to 1.

    Minimizes the mean over spectra of \(\frac{1}{m} \sum_i (p^{(5)}(\sigma_i) - 1)^2\), where no value in [0, 1] may
    end above 1.5, by Nelder-Mead from Muon's triple and from that of the nearest published size.

    Args:
      shape: sides of the matrix, in any order.
      steps: of Newton-Schulz.
      real_spectra: singular values of momenta from a run, each of norm 1; they count as one part in four beside random
        ones, as published.
      minimax: minimize the largest deviation above the lowest 1 % instead of the mean square.

    Returns:
      \((a, b, c)\), never worse than Muon's.

    Raises:
      RankError: a side or `steps` is no positive integer.

    Example:
      >>> import numpy as np
      >>> triple = calibrate((64, 256))
      >>> s = random_spectra(64, 256)[0]
      >>> bool(np.mean((newton_schulz_map(s, triple) - 1) ** 2) < np.mean((newton_schulz_map(s, MUON) - 1) ** 2) / 5)
      True
    """
    shorter, longer = sorted(check_int("calibrate: side", side) for side in shape)
    check_int("calibrate: steps", steps)
    # All random spectra in one array: one by one they take ten times as long.
    random = [np.stack(random_spectra(shorter, longer))]
    real = [np.asarray(s, np.float64)[None] for s in real_spectra]

    def deviation(spectra: Sequence[np.ndarray], triple: Triple) -> float:
        if minimax:
            return max(
                float(np.max(np.abs(newton_schulz_map(s[s >= np.quantile(s, 0.01)], triple, steps) - 1)))
                for rows in spectra
                for s in rows
            )
        squares = [np.mean((newton_schulz_map(s, triple, steps) - 1) ** 2, axis=-1) for s in spectra]
        return float(np.mean(np.concatenate(squares)))

    def mixed(triple: Triple) -> float:
        found = deviation(random, triple)
        return 0.75 * found + 0.25 * deviation(real, triple) if real else found

    def loss(values: np.ndarray) -> float:
        triple = (float(values[0]), float(values[1]), float(values[2]))
        with np.errstate(all="ignore"):
            peak = np.max(newton_schulz_map(_GRID[::10], triple, steps))
            if not np.isfinite(peak) or peak > LARGEST - 0.05:  # a finer grid, below, finds a little more
                return 1e3 + (float(peak) if np.isfinite(peak) else 1e6)
            return mixed(triple)

    import scipy.optimize  # here, since it takes a tenth of a second that most users do not need

    near = min(PUBLISHED, key=lambda key: abs(key[1] / key[0] - longer / shorter))
    starts = [MUON, PUBLISHED[near]]
    options = {"maxiter": 600, "xatol": 1e-5, "fatol": 1e-9}
    found = [scipy.optimize.minimize(loss, start, method="Nelder-Mead", options=options).x for start in starts]
    candidates = [MUON, *(tuple(round(float(v), 6) for v in x) for x in found)]
    safe = [triple for triple in candidates if is_safe(triple, steps)]
    return min(safe, key=mixed)


@functools.cache
def coefficients_for(shape: tuple[int, int], table: Table = "calibrated", safe: bool = True) -> Triple:
    """Returns Newton-Schulz coefficients for a matrix's size; found once per size, when a program is traced.

    Args:
      shape: sides of the matrix.
      table: "calibrated" for random matrices of this size, "published" where the size is in the table and Muon's
        elsewhere, or "muon".
      safe: take Muon's in place of a published triple that lets some singular values end above 1.5.

    Raises:
      ValueError: an unknown table.

    Example:
      >>> coefficients_for((8192, 2048), "published")
      (2.9794, -3.6674, 1.6207)
    """
    check_choice("coefficients_for: table", table, ("calibrated", "published", "muon"))
    if table == "calibrated":
        return calibrate(shape)
    triple = PUBLISHED.get((min(shape), max(shape)), MUON) if table == "published" else MUON
    return triple if not safe or is_safe(triple) else MUON
