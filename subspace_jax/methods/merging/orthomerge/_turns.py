"""The rotations of one leaf."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from subspace_jax.linalg import wide_matmul
from subspace_jax.merging import Change, Dense, Site, formed, wide_array
from subspace_jax.methods.merging.orthomerge._group import (
    TINY,
    Aggregate,
    procrustes,
    scaled_mean,
    to_algebra,
    to_group,
)

Direction = Literal["theta", "uniform"]
Side = Literal["in", "out", "auto"]

# Coordinates found by decompositions are no nearer to zero than this, in float32.
_DUST = 1e-5


def directed(coordinate: jax.Array, length: jax.Array, direction: Direction, dust: float = TINY) -> jax.Array:
    """Returns a coordinate as it is to be added: as it is, or at length 1; what is shorter than `dust` has none."""
    if direction == "theta":
        return coordinate
    # What rounding leaves of no rotation is not blown up to a direction.
    real = length > dust
    return coordinate * jnp.where(real, 1.0 / jnp.where(real, length, 1.0), 0.0)[..., None, None]


class Turns:
    """The rotations of one leaf: one expert's at a time, and what is kept of each for the merged one."""

    def __init__(
        self, site: Site, threshold: float | None, aggregate: Aggregate, direction: Direction, side: Side
    ) -> None:
        self.site = site
        self._threshold = threshold
        self._aggregate: Aggregate = aggregate
        self._direction: Direction = direction
        self._flipped = False
        if site.role is not None:
            inputs, outputs = site.role.sizes(site.base.shape)
            wanted = "out" if site.role.kind == "embedding" else side
            self._flipped = wanted == "out" or (wanted == "auto" and outputs < inputs)
        self._total: Any = 0.0
        self._lengths: dict[int, jax.Array] = {}
        self._mean: jax.Array | None = None

    def residual(self, expert: int) -> Change:
        """Returns what the expert's rotation does not explain of it."""
        change = self.site.change(expert)
        if self.site.role is None:
            return change
        delta = self._matrix(formed(change, self.site.base))
        start = self._start()
        coordinate, rest = _decouple(start, delta, self._mean_change(), self._threshold or 0.0)
        if expert not in self._lengths:  # a merger may ask several times
            self._lengths[expert] = jnp.sqrt(jnp.sum(coordinate * coordinate, axis=(-2, -1)))
            self._total = self._total + directed(coordinate, self._lengths[expert], self._direction, _DUST)
        return Dense(array=self._back(rest))

    def merged(self, residual: jax.Array) -> Change:
        """Returns the change of the merged rotation and the merged residual."""
        count = len(self.site.leaves)
        if self.site.role is None:
            return Dense(array=residual)
        for i in range(count):
            if i not in self._lengths:
                self.residual(i)
        lengths = jnp.stack([self._lengths[i] for i in range(count)])
        turned = _turn(self._start(), self._total, lengths, self._aggregate)
        return Dense(array=self._back(turned) + residual)

    def _mean_change(self) -> jax.Array | None:
        if self._threshold is None:
            return None
        if self._mean is None:
            count = len(self.site.leaves)
            total: Any = 0.0
            for i in range(count):
                total = total + self._matrix(self.site.array(i)) / count
            self._mean = total
        return self._mean

    def _start(self) -> jax.Array:
        return self._matrix(wide_array(self.site.base))

    def _matrix(self, array: jax.Array) -> jax.Array:
        matrix = self.site.matrix_of(array)
        return jnp.swapaxes(matrix, -1, -2) if self._flipped else matrix

    def _back(self, matrix: jax.Array) -> jax.Array:
        role: Any = self.site.role
        return role.unmatrix(jnp.swapaxes(matrix, -1, -2) if self._flipped else matrix, self.site.base.shape)


@jax.jit
def _decouple(
    start: jax.Array, delta: jax.Array, mean: jax.Array | None, threshold: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the coordinate of the rotation that explains the change best, and what it leaves."""
    explained = delta
    if mean is not None:
        norms = jnp.linalg.norm(delta, axis=-2) * jnp.linalg.norm(mean, axis=-2)
        cosine = jnp.clip(jnp.sum(delta * mean, axis=-2) / jnp.maximum(norms, 1e-6), -1.0, 1.0)
        explained = delta * (cosine < threshold)[..., None, :]
    coordinate = to_algebra(procrustes(start + explained, start))
    # The rotation is read again, so that it is the one that is merged.
    return coordinate, delta - (wide_matmul(to_group(coordinate), start) - start)


@functools.partial(jax.jit, static_argnums=3)
def _turn(start: jax.Array, total: jax.Array, lengths: jax.Array, aggregate: Aggregate) -> jax.Array:
    coordinate = scaled_mean(total, lengths, aggregate, (-2, -1))
    return wide_matmul(to_group((coordinate - jnp.swapaxes(coordinate, -1, -2)) / 2), start) - start
