"""An orthogonal dictionary that learns from a stream of samples and keeps none of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.core import StructureError, check_int, check_number
from subspace_jax.linalg import PolarMethod, polar, wide_matmul

# Smallest eigenvalue of the covariance, by the largest, that whitening divides by.
FLOOR = 1e-6


class DictionaryState(NamedTuple):
    """State of the learner: 2 N^2 numbers, whatever the length of the stream.

    Attributes:
      atoms: the dictionary \\(D\\), one atom a column, `[size, size]`; of spectral norm at most 1.
      gradient: the averaged gradient \\(H\\), `[size, size]`.
      count: number of batches so far, int32 scalar.
      covariance: mean of \\(y y^T\\), for whitening; None without.
    """

    atoms: jax.Array
    gradient: jax.Array
    count: jax.Array
    covariance: jax.Array | None = None


def start(size: int, key: jax.Array, *, whiten: bool = False) -> DictionaryState:
    """Returns a random orthogonal dictionary that has seen nothing.

    Args:
      size: dimension of a sample, and number of atoms.
      key: draws the dictionary; consumed.
      whiten: keep the covariance of samples, for dictionaries that are not orthogonal.

    Raises:
      RankError: `size` is no positive integer.

    Example:
      >>> import jax
      >>> start(4, jax.random.key(0)).atoms.shape
      (4, 4)
    """
    size = check_int("start: size", size)
    atoms = polar(jax.random.normal(key, (size, size)))
    zeros = jnp.zeros((size, size))
    return DictionaryState(atoms, zeros, jnp.zeros((), jnp.int32), jnp.copy(zeros) if whiten else None)


def step(
    state: DictionaryState,
    samples: jax.Array,
    *,
    p: float = 3.0,
    averaging: float = 0.5,
    stepping: float = 0.75,
    polar_method: PolarMethod = "svd",
) -> DictionaryState:
    r"""Takes one Frank-Wolfe step toward a dictionary that makes the samples sparse.

    Minimizes \(F(D) = -E\,\|D^T y\|_p^p\) over matrices of spectral norm at most 1, the convex hull of orthogonal ones:
    \(F\) is concave, so a minimum is orthogonal. With \(z = D^T y\),

    \(G = -\frac{p}{b} \sum y\,(|z|^{p-2} z)^T\), \(H \leftarrow (1 - \rho_t) H + \rho_t G\),
    \(S = -\mathrm{polar}(H)\), \(D \leftarrow (1 - \gamma_t) D + \gamma_t S\),

    with \(\rho_t = t^{-1/2}\) and \(\gamma_t = (t + 1)^{-3/4}\), which give the gap its stated rate
    \(O(\ln t / t^{1/4})\). Without the averaging single samples do not converge.

    Args:
      state: consumed.
      samples: `[batch, size]`, one or more.
      p: above 2; 3 bears noise best.
      averaging: exponent of \(\rho_t\); 0 takes each gradient as it is.
      stepping: exponent of \(\gamma_t\); 0 goes all the way.
      polar_method: "svd" or "newton_schulz".

    Returns:
      The new state.

    Raises:
      StructureError: samples of another size, or none.
      ValueError: `p` is not above 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> state = step(start(4, jax.random.key(0)), jnp.eye(4))
      >>> bool(jnp.linalg.norm(state.atoms, 2) <= 1 + 1e-6)
      True
    """
    check_number("step: p", p, above=2.0)
    size = state.atoms.shape[0]
    if samples.ndim != 2 or samples.shape[1] != size or not samples.shape[0]:
        raise StructureError(
            f"step: samples have shape {samples.shape}; expected [batch, {size}] with a batch above 0."
        )
    count = state.count + 1
    time = count.astype(jnp.float32)
    samples, covariance = samples.astype(jnp.float32), state.covariance
    if covariance is not None:
        covariance = covariance + (_transposed(samples) @ samples / len(samples) - covariance) / time
        samples = wide_matmul(samples, inverse_root(covariance))
    gradient = gradient_of(state.atoms, samples, p)
    rho = jnp.minimum(1.0, time**-averaging)
    averaged = (1 - rho) * state.gradient + rho * gradient
    gamma = (time + 1) ** -stepping
    atoms = (1 - gamma) * state.atoms - gamma * polar(averaged, polar_method)
    return DictionaryState(atoms, averaged, count, covariance)


def gradient_of(atoms: jax.Array, samples: jax.Array, p: float = 3.0) -> jax.Array:
    r"""Returns the gradient of \(-\frac{1}{b} \sum \|D^T y\|_p^p\) with respect to \(D\).

    Args:
      atoms: \(D\), `[size, size]`.
      samples: `[batch, size]`.
      p: the exponent.

    Example:
      >>> import jax.numpy as jnp
      >>> gradient_of(jnp.eye(2), jnp.array([[1.0, -2.0]])).tolist()
      [[-3.0, 12.0], [6.0, -24.0]]
    """
    z = wide_matmul(samples, atoms)
    return -p / len(samples) * wide_matmul(_transposed(samples), jnp.abs(z) ** (p - 2) * z)


def finalize(state: DictionaryState) -> jax.Array:
    """Returns the orthogonal dictionary nearest to the state's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> d = finalize(start(3, jax.random.key(0)))
      >>> bool(jnp.allclose(d.T @ d, jnp.eye(3), atol=1e-5))
      True
    """
    return polar(state.atoms)


def gap(atoms: jax.Array, gradient: jax.Array) -> jax.Array:
    r"""Returns the Frank-Wolfe gap \(\langle D, G \rangle + \|G\|_*\): never negative, zero where \(D\) is stationary.

    Args:
      atoms: \(D\).
      gradient: \(G\) there; online the averaged one serves.

    Example:
      >>> import jax.numpy as jnp
      >>> float(gap(jnp.eye(2), -jnp.eye(2)))
      0.0
    """
    return jnp.sum(atoms * gradient) + jnp.sum(jnp.linalg.svd(gradient, compute_uv=False))


def encode(atoms: jax.Array, samples: jax.Array, *, threshold: float = 0.0, keep: int | None = None) -> jax.Array:
    """Returns sparse codes of samples: coefficients shrunk by a threshold, or the largest few of each.

    Args:
      atoms: an orthogonal dictionary, as `finalize` gives it.
      samples: `[batch, size]`.
      threshold: coefficients lose so much of their size.
      keep: keep so many of each sample instead.

    Returns:
      `[batch, size]`; `codes @ atoms.T` are the samples again.

    Example:
      >>> import jax.numpy as jnp
      >>> encode(jnp.eye(3), jnp.array([[3.0, -1.0, 2.0]]), keep=2).tolist()
      [[3.0, 0.0, 2.0]]
    """
    z = wide_matmul(samples, atoms)
    if keep is None:
        return jnp.sign(z) * jnp.maximum(jnp.abs(z) - threshold, 0.0)
    check_int("encode: keep", keep)
    places = jax.lax.top_k(jnp.abs(z), min(keep, z.shape[-1]))[1]
    return jnp.put_along_axis(jnp.zeros_like(z), places, jnp.take_along_axis(z, places, -1), -1, inplace=False)


def decode(atoms: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the samples of codes, `[batch, size]`.

    Example:
      >>> import jax.numpy as jnp
      >>> decode(jnp.eye(2), jnp.ones((1, 2))).tolist()
      [[1.0, 1.0]]
    """
    return wide_matmul(codes, _transposed(atoms))


def dictionary_error(atoms: jax.Array, truth: jax.Array) -> jax.Array:
    r"""Returns \(1 - \|D^T D_*\|_4^4 / N\) of orthogonal dictionaries: 0 up to order and signs of atoms, at most 1.

    Args:
      atoms: orthogonal, as `finalize` gives it.
      truth: orthogonal.

    Example:
      >>> import jax.numpy as jnp
      >>> float(dictionary_error(-jnp.eye(3)[:, ::-1], jnp.eye(3)))
      0.0
    """
    return 1.0 - jnp.sum(wide_matmul(_transposed(atoms), truth) ** 4) / len(truth)


def inverse_root(covariance: jax.Array, theta: Any = 1.0) -> jax.Array:
    r"""Returns \((C / \theta)^{-1/2}\), which makes samples of an invertible dictionary those of an orthogonal one.

    Args:
      covariance: mean of \(y y^T\).
      theta: share of coefficients that are not zero, which only scales.

    Example:
      >>> import jax.numpy as jnp
      >>> inverse_root(jnp.diag(jnp.array([4.0, 1.0]))).round(4).tolist()
      [[0.5, 0.0], [0.0, 1.0]]
    """
    check_number("inverse_root: theta", theta, above=0.0, most=1.0)
    values, vectors = jnp.linalg.eigh(covariance)
    kept = jnp.maximum(values / theta, FLOOR * jnp.maximum(values[-1:], 1e-30))
    return wide_matmul(vectors * kept**-0.5, _transposed(vectors))


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -1, -2)
