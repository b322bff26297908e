"""Orthonormal bases that follow from a seed, and which of their columns a concept gets."""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import numpy as np

from subspace_jax.core import RankError, check_int, check_rank

Mode = Literal["slot", "random", "gaussian", "shared"]
Basis = Literal["auto", "qr", "cosine"]

# Up to this many inputs a random basis is made by a QR factorization, in seconds.
QR_UP_TO = 2048

# What the random numbers of one seed are for.
_BASIS, _ORDER, _CONCEPT, _GAUSSIAN = range(4)


class Overlap(NamedTuple):
    """How much two concepts share whose columns are drawn at random.

    Attributes:
      expected: expected number of common columns.
      disjoint: probability of none.
    """

    expected: float
    disjoint: float


def overlap(rank: int, inputs: int) -> Overlap:
    r"""Returns how much two concepts share whose columns are drawn at random, of mode "random".

    The number of common columns is hypergeometric: \(r^2 / n\) are expected, and none are with probability
    \(\binom{n - r}{r} / \binom{n}{r}\).

    Args:
      rank: \(r\), columns of a concept.
      inputs: \(n\), columns of the basis.

    Raises:
      RankError: `rank` is not an integer from 1 to `inputs`.

    Example:
      >>> [round(v, 4) for v in overlap(8, 64)]
      [1.0, 0.3209]
    """
    inputs = check_int("overlap: inputs", inputs)
    rank = check_rank(rank, inputs, what="overlap: rank")
    return Overlap(rank * rank / inputs, math.comb(inputs - rank, rank) / math.comb(inputs, rank))


def choose_columns(seed: int, tag: int, mode: Mode, concept: int, rank: int, inputs: int) -> np.ndarray:
    """Returns the columns of a concept.

    Args:
      seed: of the shared basis.
      tag: tells the bases of one seed apart; 0 for that of all kernels.
      mode: how columns are chosen; "gaussian" has none, and gets those that count from zero.
      concept: number of the concept, from 0.
      rank: number of columns.
      inputs: columns of the basis.

    Raises:
      RankError: the basis has too few columns.
    """
    if rank > inputs:
        raise RankError(f"rank={rank} is above the {inputs} inputs of the weight, and so the columns of its basis.")
    if mode == "gaussian":
        return np.arange(rank)
    if mode == "random":
        return np.sort(_generator(_CONCEPT, seed, tag, inputs, concept).choice(inputs, rank, replace=False))
    first = concept * rank if mode == "slot" else 0
    if first + rank > inputs:
        raise RankError(
            f"concept={concept} of rank {rank} needs the columns {first} to {first + rank - 1}, and the basis of a "
            f"weight of {inputs} inputs has {inputs}: concepts 0 to {inputs // rank - 1} have slots. Choose a smaller "
            'rank, or mode="random", whose concepts overlap.'
        )
    return _generator(_ORDER, seed, tag, inputs).permutation(inputs)[first : first + rank]


def draw_columns(
    seed: int, tag: int, inputs: int, columns: np.ndarray, layers: int | None, basis: Basis, concept: int | None
) -> np.ndarray:
    """Returns columns of a basis in float64, made on the host, so that every machine has the same.

    Args:
      seed: of the basis.
      tag: tells the bases of one seed apart.
      inputs: length of a column.
      columns: which ones.
      layers: make a basis for each of so many layers; None for one basis.
      basis: "qr" or "cosine".
      concept: None, or the concept whose entries are drawn independently in place of a basis.

    Returns:
      `[layers, inputs, len(columns)]`, or without the first axis.
    """
    stack = () if layers is None else (layers,)
    if concept is not None:
        drawn = _generator(_GAUSSIAN, seed, tag, inputs, concept).standard_normal((*stack, inputs, len(columns)))
        return drawn / math.sqrt(inputs)
    if basis == "qr":
        found = _shared_basis(seed, inputs) if tag == 0 and layers is None else _orthonormal(seed, tag, inputs, stack)
        return found[..., columns]
    # Random signs before a cosine transform: orthonormal by construction, and only the needed columns are made.
    signs = _generator(_BASIS, seed, tag, inputs).integers(0, 2, (*stack, inputs)) * 2.0 - 1.0
    angles = np.pi * np.outer(2 * np.arange(inputs) + 1, columns) / (2 * inputs)
    waves = np.cos(angles) * np.where(columns == 0, math.sqrt(1 / inputs), math.sqrt(2 / inputs))
    return signs[..., None] * waves


# All concepts and kernels of one width have one basis; two of them are at most 67 MB.
@functools.lru_cache(maxsize=2)
def _shared_basis(seed: int, inputs: int) -> np.ndarray:
    return _orthonormal(seed, 0, inputs, ())


def _orthonormal(seed: int, tag: int, inputs: int, stack: tuple[int, ...]) -> np.ndarray:
    """A random orthonormal basis, uniformly distributed: signs are fixed so that no convention of LAPACK shows."""
    q, r = np.linalg.qr(_generator(_BASIS, seed, tag, inputs).standard_normal((*stack, inputs, inputs)))
    # A zero keeps its column.
    return q * np.where(np.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]


def _generator(use: int, *numbers: int) -> np.random.Generator:
    """Random numbers that follow from integers; the generator is named, whatever NumPy's default becomes."""
    return np.random.Generator(np.random.PCG64([use, *numbers]))
