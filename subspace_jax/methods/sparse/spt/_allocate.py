"""Spends a budget of trained values where a task is sensitive: single entries, or a module where many are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from subspace_jax.core import (
    PatternError,
    Role,
    StatisticsError,
    check_choice,
    check_int,
    check_number,
    matches,
    nearest,
)
from subspace_jax.weights import largest_of_all

Module = Literal["lora", "adapter"]
Part = Literal["module", "entries", "whole", "nothing"]


class Leaf(NamedTuple):
    """What an allocation gives one array.

    Attributes:
      part: "module" in place of single entries, "entries", the "whole" of a vector, or "nothing".
      chosen: which entries learn where `part` is "entries", in the array's shape.
      sensitive: how many of its entries are among the most sensitive.
      trained: how many values learn.
    """

    part: Part
    chosen: np.ndarray | None
    sensitive: int
    trained: int


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation:
    """How a budget of trained values is spent: modules and entries by path.

    Attributes:
      leaves: by path of every scored array.
      rank: of every module.
      module: "lora" or "adapter".
      tau: entries that were ranked as sensitive.
      counted: values by which the sweep compares: `extra`, and marked entries of norms, included.
      trained: values that learn, `extra` included; less than `counted` where norms are marked but not trained.
    """

    leaves: Mapping[str, Leaf]
    rank: int
    module: Module
    tau: int
    counted: int
    trained: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The scored paths, as the selector of a rule."""
        return tuple(self.leaves)


def allocate(
    stats: Mapping[str, Any],
    budget: int,
    *,
    roles: Mapping[str, Role] | None = None,
    rank: int = 8,
    alpha: float = 10.0,
    beta: float = 5.0,
    module: Module = "lora",
    parallel: str | None = None,
    structured_only: bool = False,
    whole_vectors: bool = True,
    include_norm: bool = False,
    extra: int = 0,
    step: int = 20_000,
    most: int = 1_580_000,
) -> Allocation:
    r"""Spends a budget by squared gradients: modules where many entries are sensitive, single entries elsewhere.

    The \(\tau\) most sensitive entries of all arrays together are marked, \(c\) of each array. A matrix with
    \(c \ge m / \alpha\) gets a module of \(m\) values and none of its entries learns; else its marked entries learn. A
    vector of \(n\) entries with \(c \ge n / \beta\) learns as a whole, else its marked entries. Since modules cost more
    than they were marked for, \(\tau\) is swept, and the sweep whose total is closest to the budget counts, a later one
    of equal distance. Never call this under `jit`: another allocation is another program.

    Args:
      stats: what `sj.capture(loss, params, batches, statistics="squared_gradient", select=...)` found: the mean
        over a few batches of the square of a batch's gradient (published: 16 of 32 examples, in training mode, with the
        head as training will start it). Leave the head, the class token and the embeddings out of `select`. Batches of
        one example give the mean of squared gradients of examples, which ranks otherwise. Queries, keys and values that
        are one kernel are one matrix here; the method scores them apart.
      budget: values to train, the head left out. Published: 0.2 to 1 million, chosen by task.
      roles: what `sj.roles` found; arrays of two axes need none. A stack of layers is decided as one matrix.
      rank: \(\rho\), of every module.
      alpha: 10 as released; 1 where "as many sensitive entries as the module has values" is wanted, as the paper
        writes. Above 1 the total grows with \(\tau\).
      beta: 5 as released.
      module: "lora" costs \(\rho (d_{in} + d_{out})\), "adapter" \(2 \rho d_{out} + \rho + d_{out}\).
      parallel: a glob of kernels whose adapter reads their input, as the attention's projection does in the released
        form, at \(\rho (d_{in} + d_{out}) + \rho + d_{out}\). None for none.
      structured_only: nothing but modules and whole vectors.
      whole_vectors: whether vectors may learn as a whole; else their marked entries do.
      include_norm: marked entries of norms learn too. As released they do not, and only a whole norm learns. A norm is
        a vector that no matrix stands beside.
      extra: values that learn in any case and are counted, such as 768 for a class token.
      step: of the sweep, which goes through its multiples.
      most: the end of the sweep.

    Returns:
      An `Allocation`: what learns of every scored array, and how many values in all.

    Raises:
      StatisticsError: there are no statistics, or an array has no squared gradient.
      ValueError: an option is out of range, or no sweep reaches the budget; the message tells what is reachable.
      PatternError: `parallel` matches no scored array.
      RankError: `rank`, `budget`, `step` or `most` is not a positive integer.

    Example:
      >>> import jax.numpy as jnp, subspace_jax as sj
      >>> loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"]) ** 2)
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
      >>> stats = sj.capture(loss, params, [jnp.eye(4)], statistics="squared_gradient")
      >>> found = allocate(stats, 4, step=1, most=15, rank=1)
      >>> found.tau, found.leaves["b"].part, found.leaves["w"].part, found.trained
      (3, 'whole', 'nothing', 3)
    """
    rank = check_int("spt: rank", rank)
    check_choice("spt: module", module, ("lora", "adapter"))
    for name, value in (("alpha", alpha), ("beta", beta)):
        check_number(f"spt: {name}", value, above=0.0)
    for name, value in (("budget", budget), ("step", step), ("most", most)):
        check_int(f"spt: {name}", value)
    scores = _scores(stats)
    if parallel is not None and not any(matches(parallel, path) for path in scores):
        raise PatternError(f"spt: parallel={parallel!r} matches no scored array; nearest: {nearest(parallel, scores)}.")
    costs = _costs(scores, roles, rank, module, parallel)
    norms = _norms(scores, costs)
    rules = _Rules(costs, norms, alpha, beta, structured_only, whole_vectors, include_norm)
    order = _order(scores, most)
    ends = np.cumsum([v.size for v in scores.values()])
    owners = np.searchsorted(ends, order, side="right")
    counts = np.zeros(len(scores), np.int64)
    best: tuple[int, int, int] | None = None
    totals = []
    for tau in range(step, len(order) + 1, step):
        counts += np.bincount(owners[tau - step : tau], minlength=len(scores))
        counted = extra + sum(rules.decide(path, int(c))[2] for path, c in zip(scores, counts, strict=True))
        totals.append(counted)
        if best is None or abs(counted - budget) <= best[0]:
            best = abs(counted - budget), tau, counted
    if best is None or not min(totals) <= budget <= max(totals):
        reach = f"from {min(totals):,} to {max(totals):,}" if totals else f"nothing: step={step} is above {len(order)}"
        raise ValueError(f"spt: budget={budget:,}: the sweep reaches {reach}; choose a budget, step or most for it.")
    _, tau, counted = best
    chosen = np.zeros(ends[-1], bool)
    chosen[order[:tau]] = True
    parts = zip(scores.items(), np.split(chosen, ends[:-1]), strict=True)
    leaves = {path: rules.leaf(path, part.reshape(score.shape)) for (path, score), part in parts}
    return Allocation(leaves, rank, module, tau, counted, extra + sum(leaf.trained for leaf in leaves.values()))


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What becomes of an array with a number of sensitive entries."""

    costs: Mapping[str, tuple[int, int]]
    norms: frozenset[str]
    alpha: float
    beta: float
    structured_only: bool
    whole_vectors: bool
    include_norm: bool

    def decide(self, path: str, count: int) -> tuple[Part, int, int]:
        """The part, how many values learn, and how many are counted."""
        module, size = self.costs[path]
        if not count:
            return "nothing", 0, 0
        if module and count >= module / self.alpha:
            return "module", module, module
        if not module and self.whole_vectors and count >= size / self.beta:
            return "whole", size, size
        if self.structured_only:
            return "nothing", 0, 0
        if path in self.norms and not self.include_norm:
            return "nothing", 0, count
        return "entries", count, count

    def leaf(self, path: str, chosen: np.ndarray) -> Leaf:
        count = int(chosen.sum())
        part, trained, _ = self.decide(path, count)
        return Leaf(part, chosen if part == "entries" else None, count, trained)


def _scores(stats: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not stats:
        raise StatisticsError("spt: no statistics were given; pass what sj.capture found.")
    scores = {}
    for path, one in stats.items():
        found = one.get("squared_gradient")
        if found is None:
            raise StatisticsError(
                f"{path}: spt needs its squared gradient; pass sj.capture(loss, params, batches, "
                'statistics="squared_gradient").'
            )
        scores[path] = np.asarray(found)
    return scores


def _costs(
    scores: Mapping[str, np.ndarray],
    roles: Mapping[str, Role] | None,
    rank: int,
    module: Module,
    parallel: str | None,
) -> dict[str, tuple[int, int]]:
    """By path the values of a module, 0 for what is no matrix, and the array's size."""
    found = {}
    for path, score in scores.items():
        role = (roles or {}).get(path, Role.dense() if score.ndim == 2 else Role("other"))
        values = 0
        if role.is_matrix:
            inputs, outputs = role.sizes(score.shape)
            if module == "adapter":
                reads = inputs if parallel is not None and matches(parallel, path) else outputs
                values = rank * (reads + outputs) + rank + outputs
            else:
                values = rank * (inputs + outputs)
            values *= math.prod(role.stack_shape(score.shape))
        found[path] = (values, score.size)
    return found


def _norms(scores: Mapping[str, np.ndarray], costs: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """Vectors in whose module there is no matrix."""
    layers = {path.rpartition("/")[0] for path in scores if costs[path][0]}
    return frozenset(path for path in scores if not costs[path][0] and path.rpartition("/")[0] not in layers)


def _order(scores: Mapping[str, np.ndarray], most: int) -> np.ndarray:
    """Places of the `most` largest entries of all arrays together, by falling score; of equal ones the first."""
    flat = np.concatenate([np.ravel(v) for v in scores.values()])
    # Sorting what the sweep never reaches would take longer than all the rest.
    largest = largest_of_all(scores, min(most, flat.size))
    places = np.flatnonzero(np.concatenate([np.ravel(v) for v in largest.values()]))
    return places[np.argsort(-flat[places], kind="stable")]
