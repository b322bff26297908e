"""How many singular directions OSF freezes: by schedule, or by the importance of each layer."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from subspace_jax.core import (
    Batch,
    Operation,
    Params,
    PatternError,
    RankError,
    Role,
    StatisticsError,
    Weight,
    leaves_with_paths,
    map_with_paths,
    matches,
    register_weight,
    select_paths,
    with_adapters,
)
from subspace_jax.core import roles as find_roles

EPSILON = 1e-8


@jax.custom_vjp
def _tap(rows: jax.Array, found: jax.Array, zeros: jax.Array) -> jax.Array:
    """Returns the rows; in the backward pass the zeros receive the statistics in place of a cotangent."""
    del found, zeros
    return rows


def _tap_backward(found: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return cotangent, jnp.zeros_like(found), found


_tap.defvjp(lambda rows, found, zeros: (rows, found), _tap_backward)


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared(Weight):
    """An array whose outputs are compared with its inputs.

    Attributes:
      value: the array.
      sums: zeros `[*stack, 2]`, whose gradient is the sum of the cosines and the number of rows.
    """

    value: jax.Array
    sums: jax.Array

    axes: ClassVar[Mapping[str, str]] = {"value": "array", "sums": "stack rank"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `value`."""
        return self.value.shape

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Returns `value`."""
        return self.value if dtype is None else self.value.astype(dtype)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on `value`, row by row where its inputs and outputs can be compared."""
        matrix = self.role.matrix(self.value)

        def compared(rows: jax.Array) -> jax.Array:
            outputs = rows @ matrix.astype(rows.dtype)
            return _tap(outputs, lax.stop_gradient(_cosines(rows, outputs)), self.sums)

        found = None
        if operation.contracts_inputs:
            found = operation.linear(x, compared, lambda rows: rows @ jnp.swapaxes(matrix, -1, -2).astype(rows.dtype))
        return operation.apply(x, self.value) if found is None else found


def _cosines(inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """The sum over rows of the cosine of inputs and outputs, cut to one length, and the number of rows."""
    size = min(inputs.shape[-1], outputs.shape[-1])
    x, y = (v[..., :size].astype(jnp.float32) for v in (inputs, outputs))
    norms = [jnp.maximum(jnp.linalg.norm(v, axis=-1), EPSILON) for v in (x, y)]
    cosines = jnp.sum(x * y, axis=-1) / (norms[0] * norms[1])
    return jnp.stack([jnp.sum(cosines, axis=-1), jnp.full(cosines.shape[:-1], cosines.shape[-1], jnp.float32)], -1)


def importance(
    fn: Callable[..., Any],
    params: Params,
    batches: Iterable[Batch],
    *,
    select: Any = None,
    roles: Mapping[str, Role] | None = None,
    programs: dict[Any, Any] | None = None,
) -> dict[str, np.ndarray]:
    r"""Returns the mean cosine similarity of a layer's inputs and outputs, OSF's measure of its importance.

    \(I = \frac{1}{N} \sum_n \cos(x_n, x_n K)\) over rows, where the longer of the two is cut to the shorter's length.
    Each batch is one compiled call, through scan, remat and jit as `sj.capture`; the backward pass is dead code.

    Args:
      fn: `fn(params, batch)`; any floating output that depends on the weights.
      params: a tree of arrays.
      batches: calibration inputs of the previous task; the authors take 128 of at most 512 tokens, 8 at a time.
      select: globs or a predicate of path and array; every dense kernel if None.
      roles: what `sj.roles` found; found from the first batch if None.
      programs: a dict of the caller's, in which the compiled step stays for further calls with the same function.

    Returns:
      Importance by path, `[*stack]`, for `osf.ranks`.

    Raises:
      StatisticsError: there are no batches, or no row reached a selected weight.
      PatternError: a glob matches nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"same": jnp.eye(3), "turned": -jnp.eye(3)}
      >>> found = importance(lambda p, x: x @ p["same"] + x @ p["turned"], params, [jnp.ones((4, 3))])
      >>> [round(v.item(), 4) for v in found.values()]
      [1.0, -1.0]
    """
    batches = iter(batches)
    batch = next(batches, None)
    if batch is None:
        raise StatisticsError("osf.importance: there are no batches to compare inputs and outputs on.")
    known = find_roles(fn, params, batch) if roles is None else roles
    wanted = [p for p, _ in leaves_with_paths(params)] if select is None else select_paths(params, select)
    shapes = {p: leaf.shape for p, leaf in leaves_with_paths(params)}
    chosen = {p: known[p] for p in wanted if p in known and known[p].kind == "dense"}

    step = jax.jit(functools.partial(_step, fn, chosen))
    if programs is not None:  # a step that is kept keeps its function, so this number stays its own
        step = programs.setdefault((id(fn), tuple(chosen.items())), step)
    zeros = {p: jnp.zeros((*role.stack_shape(shapes[p]), 2), jnp.float32) for p, role in chosen.items()}
    sums = {p: np.zeros(v.shape) for p, v in zeros.items()}
    while batch is not None:
        sums = {p: sums[p] + np.asarray(v, np.float64) for p, v in step(zeros, params, batch).items()}
        batch = next(batches, None)
    if not sums:
        raise StatisticsError("osf.importance: no selected leaf is the kernel of a dense layer. Widen select.")
    for path, found in sums.items():
        if not (found[..., 1] > 0).all():
            raise StatisticsError(
                f"{path}: osf.importance: no rows met this weight, or its output does not reach the function's result. "
                "Narrow select."
            )
    return {path: found[..., 0] / found[..., 1] for path, found in sums.items()}


def _step(
    fn: Callable[..., Any],
    chosen: Mapping[str, Role],
    zeros: dict[str, jax.Array],
    params: Params,
    batch: Batch,
) -> dict[str, jax.Array]:
    """The sums of one batch."""

    def total(sums: dict[str, jax.Array]) -> jax.Array:
        def place(path: str, leaf: Any) -> Any:
            if path not in chosen:
                return leaf
            return Compared(
                value=leaf, sums=sums[path], role=chosen[path], dtype=leaf.dtype, trainable=("value", "sums")
            )

        out = with_adapters(fn, custom_rules="inline")(map_with_paths(place, params), batch)
        floating = [v for v in jax.tree.leaves(out) if jnp.issubdtype(v.dtype, jnp.floating)]
        return sum((jnp.sum(v.astype(jnp.float32)) for v in floating), jnp.zeros(()))

    return jax.grad(total)(zeros)


def schedule(task: int, tasks: int) -> float:
    r"""Returns the share \((t - 1) / n\) of the singular values to preserve before task \(t = 1, \ldots, n\).

    Args:
      task: \(t\), counted from 1.
      tasks: \(n\).

    Raises:
      RankError: the task is not one of them.

    Example:
      >>> [schedule(task, 4) for task in (1, 2, 3, 4)]
      [0.0, 0.25, 0.5, 0.75]
    """
    if not 1 <= task <= tasks:
        raise RankError(f"osf.schedule: task={task} of {tasks}; expected 1 .. {tasks}, counted from 1.")
    return (task - 1) / tasks


def ranks(
    importance: Mapping[str, Any],
    params: Params,
    *,
    floor: float = 0.1,
    target: float = 0.8,
    roles: Mapping[str, Role] | None = None,
) -> dict[str, np.ndarray]:
    r"""Returns the ranks to preserve by the importance of each layer: the adaptive policy of the paper.

    \(\rho_l = \mathrm{floor} + I_l\,(\mathrm{target} - \mathrm{floor})\), where \(I_l\) is divided by its mean over all
    layers, and \(k_l = \mathrm{clip}(\mathrm{round}(\rho_l\,q), 1, q)\). Cosines can be negative; where their mean is
    not positive the division means nothing, and every layer counts as one of mean importance, with a warning.

    Args:
      importance: \(I_l\) by path, a number or `[*stack]`, from `osf.importance`.
      params: the tree of those arrays; shapes suffice.
      floor: the paper's minimum retention ratio; the defaults are recalled from the paper, a public variant has 0.5.
      target: the paper's target retention ratio, which a layer of mean importance has; the variant has 1.0.
      roles: how the model uses arrays with more than two axes.

    Returns:
      Ranks by path, `[*stack]` int, for `osf`.

    Raises:
      PatternError: a path is not in the tree.
      RankError: an importance is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> found = ranks({"v": 0.1, "w": 0.2}, {"v": jnp.ones((10, 10)), "w": jnp.ones((10, 20))})
      >>> found["v"].item(), found["w"].item()  # 0.1 + 2/3 * 0.7, and 0.1 + 4/3 * 0.7 cut off at the whole
      (6, 10)
    """
    values = {path: np.asarray(value, np.float64) for path, value in importance.items()}
    mean = np.mean(np.concatenate([v.ravel() for v in values.values()]))
    if not np.isfinite(mean):
        bad = next(path for path, value in values.items() if not np.isfinite(value).all())
        raise RankError(f"{bad}: osf.ranks: the importance is not finite; expected the cosines of osf.importance.")
    if mean <= 0.0:
        warnings.warn(
            f"osf.ranks: the mean importance is {mean:.3g}, which no importance can be measured by; every layer keeps "
            f"target={target} of its singular values. Cosines of inputs and outputs are negative in many networks.",
            stacklevel=2,
        )
        values, mean = {path: np.ones_like(value) for path, value in values.items()}, 1.0
    smaller = _smaller_sides(values, params, roles)
    ratio = {path: floor + value / mean * (target - floor) for path, value in values.items()}
    return {p: np.clip(np.round(r * smaller[p]), 1, smaller[p]).astype(np.int32) for p, r in ratio.items()}


def _smaller_sides(paths: Mapping[str, Any], params: Params, roles: Mapping[str, Role] | None) -> dict[str, int]:
    found = {}
    for path, leaf in leaves_with_paths(params):
        role = next((r for pattern, r in (roles or {}).items() if pattern == path or matches(pattern, path)), None)
        if path in paths:
            found[path] = min((role or Role.dense()).sizes(leaf.shape))
    missing = sorted(set(paths) - set(found))
    if missing:
        raise PatternError(f"{missing[0]}: osf.ranks: has an importance but is not a leaf of the tree.")
    return found
