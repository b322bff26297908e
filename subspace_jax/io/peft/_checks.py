"""What is checked of weights on their way to PEFT's tensors and back, in every form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from subspace_jax.core import Weight
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._errors import ManifestError, listing
from subspace_jax.io.peft._names import TensorPlace

ONE_SETTING = "PEFT has one setting for all of a folder. Save them apart, or make them equal with dataclasses.replace."

T = TypeVar("T")


def same_of_all(values: Mapping[str, T], what: str, mend: str) -> T:
    """Returns the one value that all have; raises ManifestError naming two that differ."""
    names = list(values)
    for name in names[1:]:
        if values[name] != values[names[0]]:
            raise ManifestError(f"{names[0]!r} has {what} {values[names[0]]} and {name!r} has {values[name]}; {mend}")
    return values[names[0]]


def alpha_of(scale: float, divisor: float) -> float:
    """Returns the shortest alpha that gives a float32 scale when divided, an integer where it is one."""
    candidates = (float(f"{scale * divisor:.{digits}g}") for digits in (6, 7, 8, 9, 17))
    alpha = next((a for a in candidates if np.float32(a / divisor) == np.float32(scale)), scale * divisor)
    return round(alpha) if alpha.is_integer() else alpha


def require_parts(path: str, weight: Weight, *names: str) -> None:
    """Raises ManifestError unless a weight holds these of its fields."""
    absent = [name for name in names if getattr(weight, name) is None]
    if absent:
        raise ManifestError(
            f"{path}: {', '.join(absent)} of the {type(weight).__name__} are missing. combine() the two trees of "
            "partition() first."
        )


def check_original(path: str, array: Any, base: BaseArrays) -> None:
    """Raises ManifestError unless the frozen part of a weight is the array that PEFT will have there."""
    original = base.leaves.get(path)
    if isinstance(array, Weight) and array.stored and isinstance(original, Weight):
        parts = [f"{path}/{name}" for name, value in array.data_items() if not base.holds(f"{path}/{name}", value)]
        if parts:
            raise ManifestError(f"{parts[0]}: differs from that of base_params. Pass the tree that adapt() was given.")
        return
    if isinstance(array, Weight):
        raise ManifestError(
            f"{path}: stands on a {type(array).__name__}, and PEFT puts adapters on the original array, so the numbers "
            "would be others. merge() it and save the whole model, or use save_adapter."
        )
    if not base.holds(path, array):
        raise ManifestError(
            f"{path}: stands on another array than base_params has there. Pass the parameters that adapt() was given; "
            "a residual whose start is not kept has no form in PEFT."
        )


def check_role(weight: Weight, place: TensorPlace) -> None:
    """Raises ManifestError unless a weight reads its array as the NameMap says that PyTorch does."""
    ours, theirs = weight.role, place.role
    if place.rule.shared or ours.uses > 1:
        raise ManifestError(
            f"{place.path}: the model reads this array in several places, and PEFT adapts only {place.modules[0]}. "
            "Leave it out, or merge() it."
        )
    if not theirs.is_matrix:
        raise ManifestError(
            f"{place.path}: is a {type(weight).__name__}, and the NameMap's rule for {place.rule.module!r} says "
            f"{place.rule.kind} {place.tensor}: PEFT adapts matrices only. Train it as it is with full()."
        )
    if (ours.stack_axes, ours.in_axes, ours.out_axes) != (theirs.stack_axes, theirs.in_axes, theirs.out_axes):
        raise ManifestError(
            f"{place.path}: was adapted with stack={ours.stack_axes} in={ours.in_axes} out={ours.out_axes}, and by the "
            f"NameMap it is stack={theirs.stack_axes} in={theirs.in_axes} out={theirs.out_axes} (kind "
            f"{place.rule.kind!r}, inputs={place.rule.inputs}). Correct the rule, or adapt with roles=sj.roles(...)."
        )
    if ours.groups > 1:
        raise ManifestError(f"{place.path}: PEFT's factors of a grouped convolution have another form. merge() it.")


def check_shapes(
    module: str, found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], place: TensorPlace
) -> None:
    """Raises ManifestError unless every part of a module's adapter has the shape expected of it."""
    wrong = [
        f"{n} is {list(t.shape)}, expected {list(expected[n])}" for n, t in found.items() if t.shape != expected[n]
    ]
    if wrong:
        raise ManifestError(
            f"module {module!r}: by the config, and by the shape {list(place.shape)} of {place.path}:{listing(wrong)}\n"
            "It is the adapter of another model, or the NameMap has the wrong kind or inputs."
        )


def check_packable(path: str, weight: Any, place: TensorPlace, base: BaseArrays, *parts: str) -> None:
    """Raises ManifestError unless a weight on a linear module has all of its parts and stands on the original array.

    Args:
      path: of the weight.
      weight: with its array in the field `base`.
      place: of the weight.
      base: the original arrays.
      parts: names of the other fields that it must hold.
    """
    require_parts(path, weight, "base", *parts)
    check_role(weight, place)
    check_dense(place, weight)
    check_original(path, weight.base, base)


def check_dense(place: TensorPlace, weight: Weight | type[Weight]) -> None:
    """Raises ManifestError for a form of adapter that PEFT has of linear modules only."""
    if place.rule.kind != "dense":
        name = weight.__name__ if isinstance(weight, type) else type(weight).__name__
        raise ManifestError(
            f"{place.path}: is a module of kind {place.rule.kind!r}, and PEFT does what a {name} does to linear "
            "modules only; its OFT of a convolution rotates other axes. merge() it, in the library that trained it."
        )
