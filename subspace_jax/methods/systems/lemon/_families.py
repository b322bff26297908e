"""What a family of equations is, on a periodic line of length 2, and trajectories drawn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from subspace_jax.core import check_int, check_number

from ._initial import riemann_states, sine_sums
from ._symbols import Expression, encode_equations

LENGTH = 2.0
Coefficients = Mapping[str, np.ndarray]
Initial = Literal["sines", "riemann"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of equation.

    Attributes:
      name: of it.
      centers: by coefficient, the value around which it is drawn.
      tree: `tree(values, t_final)`, the equation with numbers.
      solve: `solve(coefficients, u0, times)`, `[n, frames, points]`; coefficients are `[n, 1]`, times physical.
      t_final: physical time of 2 in stretched time.
      initial: kinds of initial states, drawn in turn.
      derived: what the tree and the solver need beside the coefficients, made of them.
      choices: coefficients that are drawn from a list instead, uniformly; of two numbers and `ranges`, between them.
      ranges: coefficients that are uniform between two numbers, whatever the spread.
    """

    name: str
    centers: Mapping[str, float]
    tree: Callable[[Mapping[str, float], float], Expression]
    solve: Callable[[Coefficients, np.ndarray, np.ndarray], np.ndarray]
    t_final: float = 2.0
    initial: tuple[Initial, ...] = ("sines",)
    derived: Callable[[Coefficients], Coefficients] = lambda c: {}
    choices: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)


class Trajectories(NamedTuple):
    """Solutions with their equations.

    Attributes:
      u: float32 `[n, frames, points, 1]`.
      times: float32 `[frames]`, stretched, from 0 to below 2.
      expressions: the equation of each, as a tree.
      operators: which operator each belongs to, `[n]`.
      coefficients: by name, `[n]`.
    """

    u: np.ndarray
    times: np.ndarray
    expressions: list[Expression]
    operators: np.ndarray
    coefficients: dict[str, np.ndarray]

    def tokens(self, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns token numbers and mask of the equations, `[n, length]`."""
        return encode_equations(self.expressions, length)


def grid(points: int) -> np.ndarray:
    """Returns the cell centers of the line."""
    return (np.arange(points) + 0.5) * LENGTH / points


def draw_trajectories(
    family: Family,
    seed: int,
    *,
    operators: int,
    states: int = 50,
    spread: float = 0.1,
    points: int = 128,
    frames: int = 64,
    largest_wave: int = 4,
    initial: Callable[[np.random.Generator, int], np.ndarray] | None = None,
) -> Trajectories:
    """Draws operators of a family and solves each from its own initial states, in float64.

    Support and query sets must share neither operators nor states: give them other seeds.

    Args:
      family: of `families()`, or your own.
      seed: of all draws.
      operators: draws of the coefficients, each uniform within `spread` of its center.
      states: initial states of each operator.
      spread: relative; 0.1 as in training, 0.3 out of distribution.
      points: cells of the line.
      frames: at equal stretched times from 0 to below 2.
      largest_wave: wave number of the initial sines, 2 or 4.
      initial: `initial(rng, count)`, states `[count, points]` in place of the family's.

    Returns:
      `operators * states` trajectories.

    Raises:
      RankError: a count is out of range.
      ValueError: the spread is not in [0, 1), or a solution is not finite.

    Example:
      >>> from subspace_jax.methods import lemon
      >>> found = draw_trajectories(lemon.families()["heat"], 0, operators=2, states=3, points=32, frames=4)
      >>> found.u.shape, found.operators.tolist()
      ((6, 4, 32, 1), [0, 0, 0, 1, 1, 1])
    """
    for name, value, least in (("operators", operators, 1), ("states", states, 1), ("points", points, 8)):
        check_int(f"draw_trajectories: {name}", value, least)
    check_int("draw_trajectories: frames", frames, 1)
    check_number("draw_trajectories: spread", spread, least=0.0, below=1.0)
    rng, owner = np.random.default_rng(seed), np.repeat(np.arange(operators), states)
    drawn = {k: center * rng.uniform(1 - spread, 1 + spread, operators) for k, center in family.centers.items()}
    drawn |= {k: rng.choice(values, operators).astype(float) for k, values in family.choices.items()}
    drawn |= {k: rng.uniform(low, high, operators) for k, (low, high) in family.ranges.items()}
    drawn |= dict(family.derived(drawn))
    trees_of = [family.tree({k: float(v[i]) for k, v in drawn.items()}, family.t_final) for i in range(operators)]
    times = np.arange(frames) * 2.0 / frames
    columns = {k: v[owner][:, None] for k, v in drawn.items()}
    u0 = _initial(family, rng, len(owner), points, largest_wave) if initial is None else initial(rng, len(owner))
    u = family.solve(columns, u0, times * family.t_final / 2)
    if not np.isfinite(u).all():
        raise ValueError(f"draw_trajectories: {family.name} has solutions that are not finite; use smaller states.")
    expressions = [trees_of[i] for i in owner]
    values = {k: v[:, 0] for k, v in columns.items()}
    return Trajectories(u[..., None].astype(np.float32), times.astype(np.float32), expressions, owner, values)


def _initial(family: Family, rng: np.random.Generator, count: int, points: int, largest: int) -> np.ndarray:
    x, found = grid(points), np.empty((count, points))
    for i, kind in enumerate(family.initial):
        part = np.arange(count) % len(family.initial) == i
        if kind == "sines":
            found[part] = sine_sums(rng, int(part.sum()), x, LENGTH, largest)
        else:
            found[part] = riemann_states(rng, int(part.sum()), x, LENGTH)
    return found


def add_noise(u: np.ndarray, seed: int, level: float = 0.02) -> np.ndarray:
    r"""Adds noise to whole trajectories: \(u + \sigma \|u\| z / \|z\|\), each by its own norm.

    Args:
      u: `[n, ...]`.
      seed: of the noise.
      level: \(\sigma\).

    Example:
      >>> import numpy as np
      >>> noisy = add_noise(np.ones((1, 4)), 0)
      >>> round(float(np.linalg.norm(noisy - 1)), 4)
      0.04
    """
    z = np.random.default_rng(seed).normal(size=u.shape)
    axes = tuple(range(1, u.ndim))
    size = np.sqrt((np.square(u).sum(axes, keepdims=True)) / np.square(z).sum(axes, keepdims=True))
    return (u + level * size * z).astype(u.dtype)
