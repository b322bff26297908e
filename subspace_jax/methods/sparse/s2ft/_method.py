"""`s2ft`: selects units of coupled weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.core import (
    InitFn,
    Leaf,
    Method,
    PatternError,
    Role,
    RoleError,
    check_choice,
    check_int,
    check_number,
    nearest,
    require_matrix,
)
from subspace_jax.linalg import wide_dtype
from subspace_jax.methods.sparse.s2ft._selection import PerLayer, select_units, slots_of
from subspace_jax.methods.sparse.s2ft._weight import DenseSlice, Parameterization
from subspace_jax.weights import hidden_zeros

Side = Literal["in", "out"]

# What a side is called in a weight's fields: selected inputs are rows of its matrix, selected outputs columns.
FIELDS: dict[str, Literal["rows", "columns"]] = {"in": "rows", "out": "columns"}


def s2ft(
    ratio: float | None = None,
    *,
    side: Side = "in",
    heads: int | None = None,
    per_layer: PerLayer = "global",
    scores: Mapping[str, Any] | None = None,
    prefer: Literal["large", "small"] = "large",
    selected: Mapping[str, Any] | None = None,
    parameterization: Parameterization = "delta",
    seed: int = 0,
) -> Method:
    r"""Trains a few heads or channels of a weight densely: whole rows or whole columns of its matrix.

    Rows, which are inputs, for the weight that a head or channel leads into (the attention's output, the feed-forward's
    down): \(y = x W + x_{sel}\,\Delta\). Columns, which are outputs, for the one that it comes out of (values, up):
    \(y = x W\), and \(x \Delta\) is added to the selected outputs. \(\Delta = 0\) at the start, in float32.

    A rule of its own for each kind of weight, since each has its own share: published are 0.052 of the heads of the
    attention's output and 0.02 of the channels of down for LLaMA-2-7B, 0.03 of those of down alone for LLaMA-3-8B.
    Published training: Adam with betas 0.9 and 0.95, rate 1e-3 (mathematics) or 2e-4 (commonsense), no decay.

    Where weights stay in place ("gather", the default here) rows are picked by position. For contiguous slices as
    published, select with `select_units`, reorder with `coupled_order` and `co_permute`, and pass the reordered masks
    as `selected`; the results are identical.

    Args:
      ratio: share of all heads or channels of all selected weights together; \(\lfloor ratio \cdot n \rfloor\) learn.
      side: "in" trains inputs (rows), "out" outputs (columns).
      heads: number of heads that the side consists of, selected as a whole; None selects channels one by one.
      per_layer: "global" draws from all layers together, so that layers get different numbers and stacked ones are
        padded to the largest; "equal" takes the same number in every layer, a deviation.
      scores: by path, one number for each head or channel, `[*stack, units]`, which decide; None draws at random.
        See `channel_scores` and `activation_scores`.
      prefer: "large" or "small" scores.
      selected: by path, masks `[*stack, units]` that were decided before; in place of `ratio`.
      parameterization: "delta" trains the change; "in_place" the rows or columns themselves. The trajectories are
        equal, but for decoupled weight decay, which acts on what is trained.
      seed: of the draw. Shapes depend on the draw, so it is an int and not a traced key.

    Returns:
      A method whose weights are `DenseSlice` with `rows` `[*stack, slots, out]` or `columns` `[*stack, in, slots]`. A
      layer of which nothing is selected gets an array of no rows.

    Raises:
      ValueError: not one of `ratio` and `selected` is given, or an option is unknown.
      RoleError: the heads do not divide the side, or rows of a convolution are asked for, which the method does not
        define.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"down_0": jnp.ones((100, 8)), "down_1": jnp.ones((100, 8))}
      >>> adapted = sj.adapt(params, {"down_*": sj.s2ft(0.02)}, key=jax.random.key(0))
      >>> sj.summary(adapted).trainable
      32
    """
    if (ratio is None) == (selected is None):
        raise ValueError("s2ft: pass a ratio, or the selected heads or channels, and not both.")
    if ratio is not None:
        check_number("s2ft: ratio", ratio, least=0.0, most=1.0)
    check_side("s2ft", side)
    heads = None if heads is None else check_int("s2ft: heads", heads)
    check_choice("s2ft: per_layer", per_layer, get_args(PerLayer))
    check_choice("s2ft: parameterization", parameterization, get_args(Parameterization))
    check_choice("s2ft: prefer", prefer, ("large", "small"))
    seed = check_int("s2ft: seed", seed, least=0)

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        del key
        shapes = {path: _units(path, leaf, side, heads) for path, leaf in leaves.items()}
        if selected is not None:
            masks = {path: _given(path, selected, shape) for path, shape in shapes.items()}
        else:
            options: dict[str, Any] = {"seed": seed, "per_layer": per_layer, "scores": scores}
            masks = select_units(shapes, ratio or 0.0, **options, largest=prefer == "large")
        return {path: _slice_init(mask, side, parameterization) for path, mask in masks.items()}

    def alone(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> DenseSlice:
        weight = plan(key, {"weight": Leaf(array, role)})["weight"](key, array, role, stats)
        return cast(DenseSlice, weight)

    return Method("s2ft", alone, plan=plan)


def check_side(owner: str, side: Any) -> None:
    """Refuses a side that is neither "in" nor "out", with today's word for what it was called before."""
    now = {field: one for one, field in FIELDS.items()}.get(side) if isinstance(side, str) else None
    if now is not None:
        raise ValueError(f"{owner}: side={side!r} is called side={now!r} now.")
    check_choice(f"{owner}: side", side, get_args(Side))


def channel_scores(array: jax.Array, role: Role | None = None, *, side: Side = "in", heads: int | None = None) -> Any:
    r"""Returns the Euclidean norm of every head's or channel's rows (columns), `[*stack, units]` in float32.

    Of a weight these are the scores of the strategy "weight", of its gradient those of "gradient".

    Args:
      array: a weight, or its gradient as `capture(..., statistics="gradient")` gives it.
      role: its role; `(in, out)` if None.
      side: "in" for rows, "out" for columns.
      heads: number of heads of that side; None for channels.

    Example:
      >>> import jax.numpy as jnp
      >>> channel_scores(jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [5.0, 1.0]
    """
    check_side("channel_scores", side)
    role = role or Role.dense()
    matrix = role.matrix(array).astype(wide_dtype(array.dtype))
    squares = jnp.sum(matrix * matrix, axis=-1 if side == "in" else -2)
    units = heads or squares.shape[-1]
    return jnp.sqrt(jnp.sum(squares.reshape(*squares.shape[:-1], units, -1), axis=-1))


def activation_scores(activations: jax.Array, *, heads: int | None = None) -> jax.Array:
    r"""Returns the mean absolute activation of every head or channel over a calibration batch, `[units]`.

    The scores of the strategy "activation"; times `channel_scores` of the weight, those of "product". A head's or
    channel's activation is the input of the weight that it leads into (the attention's output, down).

    Args:
      activations: `[..., features]`.
      heads: number of heads that the features consist of; None for channels.

    Example:
      >>> import jax.numpy as jnp
      >>> activation_scores(jnp.array([[1.0, -2.0], [3.0, 0.0]])).tolist()
      [2.0, 1.0]
    """
    means = jnp.mean(
        jnp.abs(activations.astype(wide_dtype(activations.dtype))), axis=tuple(range(activations.ndim - 1))
    )
    return jnp.mean(means.reshape(heads or means.size, -1), axis=-1)


def _units(path: str, leaf: Leaf, side: Side, heads: int | None) -> tuple[int, ...]:
    """The stacked layers of a weight and its heads or channels; refuses what has none."""
    require_matrix(leaf.array, leaf.role)
    if side == "in" and leaf.role.kind == "conv":
        raise RoleError(
            f"{path}: s2ft: inputs of a convolution mix its window with its input channels, for which the method "
            'defines nothing; take side="out", its output channels.'
        )
    size = leaf.role.sizes(leaf.array.shape)[0 if side == "in" else 1]
    if heads is not None and (heads < 1 or size % heads):
        raise RoleError(f"{path}: s2ft: heads={heads} does not divide the {size} features of side={side!r}.")
    return (*leaf.role.stack_shape(leaf.array.shape), heads or size)


def _given(path: str, selected: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    if path not in selected:
        raise PatternError(f"{path}: s2ft: nothing is selected for it; given are {nearest(path, selected)}.")
    mask = np.asarray(selected[path])
    if mask.shape != shape or mask.dtype != bool:
        raise RoleError(f"{path}: s2ft: selected is {mask.dtype} {mask.shape}; expected a mask of booleans {shape}.")
    return mask


def _slice_init(mask: np.ndarray, side: Side, parameterization: Parameterization) -> InitFn:
    """Makes the weight of one leaf whose heads or channels are known."""

    def make(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> DenseSlice:
        del stats
        inputs, outputs = role.sizes(array.shape)
        size = inputs if side == "in" else outputs
        positions, start, slots = slots_of(np.repeat(mask, size // mask.shape[-1], axis=-1))
        stack, wide = role.stack_shape(array.shape), wide_dtype(array.dtype)
        shape = (*stack, slots, outputs) if side == "in" else (*stack, inputs, slots)
        trained = hidden_zeros(key, shape, wide)
        weight = DenseSlice(
            base=array,
            rows=trained if side == "in" else None,
            columns=trained if side == "out" else None,
            selected=None if positions is None else jnp.asarray(positions),
            start=start,
            parameterization=parameterization,
            role=role,
            dtype=array.dtype,
            trainable=(FIELDS[side],),
        )
        return weight.holding_itself() if parameterization == "in_place" else weight

    return make
