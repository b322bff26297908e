"""Alternates between two groups of parameters: LoCA's coefficients and their locations.

LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning (Du et al., 2025).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.core import OptState, Params, PyTree, Updates, Weight, check_int, is_weight
from subspace_jax.methods.structured.loca._weight import CosineSpectrum
from subspace_jax.optim import is_hole, like_updates, rest_without_gradient

# Two roundings of single precision below the highest location, beyond which a location would get no gradient.
MARGIN = 2.0**-20


class AlternatingState(NamedTuple):
    """State of `alternating`.

    Attributes:
      count: steps so far, int32 scalar.
      coefficients: state of the optimizer of everything but locations.
      locations: state of the optimizer of locations.
    """

    count: jax.Array
    coefficients: Any
    locations: Any


def alternating(
    coefficients: optax.GradientTransformation,
    locations: optax.GradientTransformation,
    *,
    cutoff_step: int,
    coefficient_steps: int = 10,
    location_steps: int = 20,
    project: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Trains LoCA's coefficients and locations in turns, and after a cut-off the coefficients alone.

    Each turn advances one optimizer. The other group keeps its values, moments and step count bit for bit; it neither
    decays nor counts in a norm that the active one clips by. The first turn is the coefficients', since locations have
    no gradient while those are zero.

    Args:
      coefficients: optimizer of every array but the locations, those of other methods and of a head included.
      locations: optimizer of the locations, `optax.adam(1e-4)` as published.
      cutoff_step: locations rest from this step on; about a tenth of all steps.
      coefficient_steps: length of a turn of the coefficients.
      location_steps: length of a turn of the locations.
      project: move locations that left their range back to its border after each of their steps. Without it they
        get no gradient any more, as in the authors' code.

    Returns:
      A gradient transformation for the trainable tree of `partition`; its `update` needs `params`. Each optimizer sees
      the other's arrays as `optax.MaskedNode`. With `optax.inject_hyperparams` every argument is of `static_args`.

    Raises:
      RankError: a number of steps is not an integer, a turn has no step, or the cut-off is below zero.
      ValueError: `params` without LoCA's locations, or `update` without `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, subspace_jax as sj
      >>> adapted = sj.adapt({"w": jnp.ones((8, 6))}, {"w": sj.loca(5)}, key=jax.random.key(0))
      >>> trainable, frozen = sj.partition(adapted)
      >>> optimizer = sj.methods.loca.alternating(optax.adamw(1e-2), optax.adam(1e-4), cutoff_step=100)
      >>> updates, state = optimizer.update(trainable, optimizer.init(trainable), trainable)
      >>> bool(updates["w"].locations.any()), int(state.count)
      (False, 1)
    """
    check_int("alternating: coefficient_steps", coefficient_steps)
    check_int("alternating: location_steps", location_steps)
    check_int("alternating: cutoff_step", cutoff_step, least=0)
    first = rest_without_gradient(coefficients)
    second = rest_without_gradient(locations)

    def init(params: Params) -> AlternatingState:
        places = _select(params, True)
        # optax initializes with a tree without leaves to tell what of a state is like the parameters.
        if jax.tree.leaves(params) and not jax.tree.leaves(places):
            raise ValueError(
                "alternating: the parameters hold no locations of LoCA. Pass the trainable tree of sj.partition() "
                "of a model with sj.loca(); after fix_locations() the optimizer of the coefficients serves alone."
            )
        return AlternatingState(jnp.zeros([], jnp.int32), first.init(_select(params, False)), second.init(places))

    def update(updates: Updates, state: OptState, params: Params = None, **extra: Any) -> tuple[Updates, OptState]:
        if params is None:
            raise ValueError("alternating: call update(updates, state, params); it needs the parameters.")
        resting = like_updates(updates, params)
        ours, theirs = ((_select(updates, one), _select(resting, one), _select(params, one)) for one in (False, True))

        def move_coefficients() -> tuple[Any, Any, Any, Any]:
            change, inner = first.update(ours[0], state.coefficients, ours[2], **extra)
            return _like(change, ours[1]), _still(theirs[1]), inner, state.locations

        def move_locations() -> tuple[Any, Any, Any, Any]:
            change, inner = second.update(theirs[0], state.locations, theirs[2], **extra)
            change = _like(change, theirs[1])
            change = jax.tree.map(_projected, change, theirs[1], is_leaf=is_weight) if project else change
            return _still(ours[1]), change, state.coefficients, inner

        place = state.count % (coefficient_steps + location_steps)
        turn = (state.count > 0) & (state.count < cutoff_step) & (place >= coefficient_steps)
        one, other, *inner = jax.lax.cond(turn, move_locations, move_coefficients)
        joined = jax.tree.map(lambda a, b: b if _is_masked(a) else a, one, other, is_leaf=_is_masked)
        return joined, AlternatingState(jnp.asarray(optax.safe_increment(state.count)), *inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _select(tree: PyTree, locations: bool) -> PyTree:
    """The tree with what `optax.masked` leaves in place of everything but the locations, or of the locations."""

    def leaf(value: Any, owner: Any = None, name: str = "") -> Any:
        if isinstance(value, Weight):
            return value.map_fields(lambda field, inner: leaf(inner, value, field))
        is_location = isinstance(owner, CosineSpectrum) and name == "locations"
        return value if is_hole(value) or is_location == locations else optax.MaskedNode()

    return jax.tree.map(leaf, tree, is_leaf=is_weight)


def _is_masked(value: Any) -> bool:
    return isinstance(value, optax.MaskedNode)


def _like(change: Updates, params: Params) -> Updates:
    return jax.tree.map(lambda c, p: c.astype(p.dtype), change, params)


def _still(params: Params) -> Updates:
    # Not +0, which would turn a parameter of -0 into +0.
    return jax.tree.map(lambda p: jnp.full_like(p, -0.0), params)


def _projected(change: Updates, params: Params) -> Updates:
    """The change that ends within the range of locations."""
    if not isinstance(params, Weight):
        return change
    inner = {n: _projected(getattr(change, n), v) for n, v in params.data_items() if isinstance(v, Weight)}
    if isinstance(params, CosineSpectrum) and not is_hole(change.locations):
        old: Any = params.locations
        inner["locations"] = jnp.clip(old + change.locations, 0.0, params.highest - MARGIN) - old
    return change.map_fields(lambda name, value: inner.get(name, value))
