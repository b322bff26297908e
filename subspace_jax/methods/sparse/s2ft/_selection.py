"""Which heads or channels learn: a share of all of them, drawn at random or by a score."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from subspace_jax.core import check_choice, check_number

PerLayer = Literal["global", "equal"]


def select_units(
    shapes: Mapping[str, tuple[int, ...]],
    ratio: float,
    *,
    seed: int = 0,
    per_layer: PerLayer = "global",
    scores: Mapping[str, Any] | None = None,
    largest: bool = True,
) -> dict[str, np.ndarray]:
    r"""Selects a share of the heads or channels of all layers together.

    Args:
      shapes: by path, `(*stack, units)`: the stacked layers of a weight and its heads or channels.
      ratio: share of all units, in \([0, 1]\).
      seed: of the draw; with the paths it decides what is drawn.
      per_layer: "global" takes \(\lfloor ratio \cdot n \rfloor\) of all \(n\) units together, so that layers get
        different numbers, as published; "equal" takes \(\mathrm{round}(ratio \cdot units)\) in every layer, which is a
        deviation.
      scores: by path, `(*stack, units)`; the units of largest score are taken, of equal ones the earlier. None draws
        at random.
      largest: False takes the smallest scores.

    Returns:
      By path, a mask `(*stack, units)`.

    Raises:
      ValueError: the ratio is outside \([0, 1]\), or scores are missing or of another shape.

    Example:
      >>> masks = select_units({"a": (8,), "b": (8,)}, 0.25)
      >>> int(sum(mask.sum() for mask in masks.values()))
      4
    """
    check_number("select_units: ratio", ratio, least=0.0, most=1.0)
    check_choice("select_units: per_layer", per_layer, get_args(PerLayer))
    order = _ranking(shapes, seed, scores, largest)
    if per_layer == "global":
        flat = np.concatenate([order[path].reshape(-1) for path in shapes])
        taken = np.zeros(flat.size, bool)
        taken[np.argsort(flat, kind="stable")[: int(flat.size * ratio)]] = True
        ends = np.cumsum([order[path].size for path in shapes])[:-1]
        return {p: part.reshape(shapes[p]) for p, part in zip(shapes, np.split(taken, ends), strict=True)}
    ranks = {path: np.argsort(np.argsort(o, axis=-1, kind="stable"), axis=-1) for path, o in order.items()}
    return {path: rank < round(ratio * rank.shape[-1]) for path, rank in ranks.items()}


def _ranking(
    shapes: Mapping[str, tuple[int, ...]], seed: int, scores: Mapping[str, Any] | None, largest: bool
) -> dict[str, np.ndarray]:
    """Numbers of which the smallest are taken first."""
    if scores is None:
        generator = np.random.default_rng([seed, zlib.crc32("\n".join(shapes).encode())])
        return {path: generator.random(shape) for path, shape in shapes.items()}
    found = {}
    for path, shape in shapes.items():
        score = np.asarray(scores[path], np.float64) if path in scores else None
        if score is None or score.shape != tuple(shape):
            raise ValueError(
                f"{path}: the scores have shape {None if score is None else score.shape}; expected {tuple(shape)}, one "
                "for each head or channel of each layer."
            )
        found[path] = -score if largest else score
    return found


def slots_of(mask: np.ndarray) -> tuple[np.ndarray | None, int, int]:
    """Returns how a mask of units is stored: positions, first position, number of slots.

    Args:
      mask: `(*stack, units)`.

    Returns:
      Positions `(*stack, slots)` int32, padded with the number of units; None where every layer has the same
      neighboring units, of which the first and the number follow.

    Example:
      >>> import numpy as np
      >>> slots_of(np.array([False, True, True, False]))
      (None, 1, 2)
      >>> slots_of(np.array([[True, False, True], [False, True, False]]))[0].tolist()
      [[0, 2], [1, 3]]
    """
    slots, units = int(mask.sum(-1).max(initial=0)), mask.shape[-1]
    positions = np.sort(np.where(mask, np.arange(units), units), axis=-1)[..., :slots].astype(np.int32)
    start = int(positions.min(initial=units)) if slots else 0
    if np.array_equal(positions, np.broadcast_to(np.arange(start, start + slots), positions.shape)):
        return None, start, slots
    return positions, 0, slots
