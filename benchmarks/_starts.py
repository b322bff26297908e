"""Matrices to start adapters from, the starts as compiled programs, and how good their low-rank parts are."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.sparse.linalg

import subspace_jax as sj
from benchmarks._collectives import product_flops

ROLE = sj.Role.dense(stack_axes=(0,), in_axes=(1,), out_axes=(2,))
LEARNING_RATE = 1e-3


class Factors(NamedTuple):
    """The low-rank part that a start found, `left @ right`, largest term first.

    Attributes:
      left: `[depth, in, rank]`.
      right: `[depth, rank, out]`.
    """

    left: jax.Array
    right: jax.Array


def times(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the matrix product in full precision."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def power_law(rng: np.random.Generator, shape: Sequence[int], decay: float) -> np.ndarray:
    r"""Returns a matrix with singular values \(i^{-decay}\) and mixed-up vectors, `[m, n]` in float32.

    The vectors are cosines, whose signs are drawn, transformed again: fast transforms in place of two QR
    factorizations of the matrix's own size. Once would leave the matrix too regular.
    """
    values = np.arange(1, min(shape) + 1, dtype=np.float32) ** -np.float32(decay)
    made = np.zeros(shape, np.float32)
    np.fill_diagonal(made, values)
    for axis in (0, 1, 0, 1):
        made = np.asarray(scipy.fft.dct(made, axis=axis, norm="ortho"))
        made *= np.expand_dims(_signs(rng, shape[axis]), 1 - axis)
    return made


def covariance(rng: np.random.Generator, size: int) -> np.ndarray:
    """Returns a covariance whose eigenvalues fall as 1, 1/2, 1/3 and so on, `[size, size]` in float32."""
    values = np.arange(1, size + 1, dtype=np.float32) ** -1.0
    vectors = np.asarray(scipy.fft.dct(np.eye(size, dtype=np.float32), axis=0, norm="ortho"))
    vectors *= _signs(rng, size)[:, None]
    return (vectors * values) @ vectors.T


def _signs(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.where(rng.random(size) < 0.5, -1, 1).astype(np.float32)


def stack(spectrum: str, shape: Sequence[int], depth: int, decay: float) -> np.ndarray:
    """Returns matrices to adapt, `[depth, m, n]` in float32.

    Args:
      spectrum: "power", as that of pretrained weights roughly is, or "gaussian", the flat one, which is the hardest.
      shape: of one matrix.
      depth: number of them.
      decay: exponent of the power law.

    Raises:
      SystemExit: there is no such spectrum.
    """
    rng = np.random.default_rng(0)
    if spectrum not in ("power", "gaussian"):
        raise SystemExit(f'startup: spectra={spectrum}; choose from "power" and "gaussian".')
    if spectrum == "gaussian":
        return rng.standard_normal((depth, *shape), np.float32)
    return np.stack([power_law(rng, shape, decay) for _ in range(depth)])


def start(method: sj.Method) -> Callable[..., Any]:
    """Returns `start(key, matrices, statistics)`, which gives the weight that a method makes of a stack."""

    def program(key: jax.Array, matrices: jax.Array, statistics: Any) -> Any:
        found = None if statistics is None else {"kernel": statistics}
        adapted = sj.adapt({"kernel": matrices}, {"kernel": method}, key=key, roles={"kernel": ROLE}, stats=found)
        return adapted["kernel"]

    return program


def gram_start(rank: int) -> Callable[..., Factors]:
    """Returns a start by the eigenvectors of the smaller Gram matrix, which the library does not use."""

    def program(key: jax.Array, matrices: jax.Array, statistics: Any) -> Factors:
        del key, statistics
        wide = matrices.shape[-2] > matrices.shape[-1]
        matrices = jnp.swapaxes(matrices, -1, -2) if wide else matrices
        _, vectors = jnp.linalg.eigh(times(matrices, jnp.swapaxes(matrices, -1, -2)))
        left = vectors[..., ::-1][..., :rank]
        right = times(jnp.swapaxes(left, -1, -2), matrices)
        if wide:
            left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
        return Factors(left, right)

    return program


def factors(weight: Any) -> Factors:
    """Returns the low-rank part of what a start made."""
    if isinstance(weight, Factors):
        return weight
    if hasattr(weight, "a"):
        return Factors(weight.a * weight.scale, weight.b)
    if weight.method == "lora_xs":  # the core starts at nearly zero; the factors are the approximation
        return Factors(weight.left, weight.right)
    core = weight.core if weight.core.ndim == 2 else jnp.diagonal(weight.core, axis1=-2, axis2=-1) * weight.scale
    return Factors(weight.left * core[:, None, :], weight.right)


def values(found: Factors, covariance: Any = None) -> np.ndarray:
    """Returns the size of each term, `[depth, rank]` in float64: the singular values, if the terms are orthogonal."""
    left = found.left if covariance is None else covariance @ found.left
    return np.linalg.norm(np.asarray(left, np.float64), axis=-2) * np.linalg.norm(
        np.asarray(found.right, np.float64), axis=-1
    )


def excess(target: np.ndarray, found: Factors, best: np.ndarray) -> dict[str, float]:
    """Returns by how much the remainder of a low-rank part is larger than that of the best one, relative to it.

    Args:
      target: what the part approximates, `[depth, m, n]`.
      found: the part.
      best: the largest singular values of the target, `[depth, more than rank]`.

    Returns:
      The worst of the stack in Frobenius and spectral norm.
    """
    rank = found.right.shape[-2]
    worst = {"frobenius": -np.inf, "spectral": -np.inf}
    for one, left, right, sizes in zip(target, found.left, found.right, best, strict=True):
        remainder = one - np.asarray(left) @ np.asarray(right)
        energy = np.sum(one.astype(np.float64) ** 2) - np.sum(sizes[:rank] ** 2)
        largest = _spectral_norm(remainder)
        here = {"frobenius": np.linalg.norm(remainder) / np.sqrt(energy) - 1, "spectral": largest / sizes[rank] - 1}
        worst = {name: max(worst[name], float(value)) for name, value in here.items()}
    return worst


def _spectral_norm(matrix: np.ndarray) -> float:
    first = np.ones(min(matrix.shape), matrix.dtype)
    options: dict[str, Any] = {"k": 1, "tol": 1e-3, "return_singular_vectors": False, "v0": first}
    found: Any = scipy.sparse.linalg.svds(matrix, **options)
    return float(found[0])


def counted_products(text: str) -> int:
    """Returns the operations of the matrix products of a program.

    A loop whose length depends on values, as CorDA's damping, which doubles nothing here, is left out.
    """
    lines = [
        line + ', backend_config={"known_trip_count":{"n":"0"}}'
        if re.search(r" while\(", line) and "known_trip_count" not in line
        else line
        for line in text.splitlines()
    ]
    return product_flops("\n".join(lines))
