"""The tensors of a PEFT file by module, each with the leaf of the tree that it belongs to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from subspace_jax.core import Weight, nearest
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._errors import ManifestError, listing
from subspace_jax.io.peft._names import TensorPlace

PREFIX = "base_model.model."
_BASE = ".base_layer"

# The names that end an adapter's tensors, and what is called here what they hold.
_ENDINGS: dict[str, dict[str, str]] = {
    "LORA": {
        "lora_A.weight": "a",
        "lora_B.weight": "b",
        "lora_embedding_A": "a",
        "lora_embedding_B": "b",
        "lora_magnitude_vector": "magnitude",
        "lora_B.bias": "bias",
        "token_adapter.trainable_tokens_delta": "rows",
    },
    "OFT": {"oft_R.weight": "entries"},
    "RANDLORA": {
        "randlora_A": "basis_a",
        "randlora_B": "basis_b",
        "randlora_lambda": "rank_scales",
        "randlora_gamma": "feature_scales",
    },
}

# What PEFT's model has once, not in every module.
SHARED = {"RANDLORA": {"base_model.randlora_A": "basis_a", "base_model.randlora_B": "basis_b"}}

ONE_SETTING = "PEFT has one setting for all of a folder. Save them apart, or make them equal with dataclasses.replace."

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Found:
    """The tensors of a file, each with its place.

    Attributes:
      adapters: parts of each module's adapter, by the module's name.
      shared: parts that all of them have in common.
      whole: arrays that stand in the file themselves, by module and tensor.
      base: arrays of the base model that the file holds too.
      rows: rows of embeddings that are replaced, by the module's name.
    """

    adapters: dict[str, dict[str, np.ndarray]]
    shared: dict[str, np.ndarray]
    whole: dict[tuple[str, str], np.ndarray]
    base: dict[tuple[str, str], np.ndarray]
    rows: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def tensor_name(module: str, ending: str) -> str:
    """Returns what a tensor of a module is called in the file."""
    return f"{PREFIX}{module}.{ending}"


def index_places(places: Iterable[TensorPlace]) -> dict[tuple[str, str], tuple[TensorPlace, int]]:
    """Returns the place of each tensor of the base model, and its position along the stacked axes."""
    return {(module, one.tensor): (one, i) for one in places for i, module in enumerate(one.modules)}


def sort_tensors(
    tensors: Mapping[str, np.ndarray], method: str, index: Mapping[tuple[str, str], tuple[TensorPlace, int]]
) -> Found:
    """Returns the tensors of a file by module.

    Args:
      tensors: by name, as the file has them.
      method: PEFT's name of the adapter's method.
      index: what the tree has, by module and tensor.

    Raises:
      ManifestError: names every tensor that has no place in the tree, or that holds no floating-point numbers.
    """
    found = Found({}, {}, {}, {})
    unknown = []
    known = sorted(f"{module}.{tensor}" for module, tensor in index)
    for name, tensor in tensors.items():
        if name in SHARED.get(method, {}):
            found.shared[SHARED[method][name]] = tensor
            continue
        if not name.startswith(PREFIX):
            unknown.append(f"{name!r}, which does not begin with {PREFIX!r}")
            continue
        target = _target(name.removeprefix(PREFIX), method, index)
        if target is None:
            unknown.append(f"{name!r}; nearest of the tree are {nearest(name.removeprefix(PREFIX), known)}")
            continue
        into: Any = getattr(found, target.group)
        if target.group == "adapters":
            into = into.setdefault(target.module, {})
        key: Any = (target.module, target.part)
        if target.group in ("adapters", "rows"):
            key = target.part if target.group == "adapters" else target.module
        if key in into:
            unknown.append(f"{name!r}, where another tensor has its place")
        into[key] = tensor
    if unknown:
        raise ManifestError(
            f"these tensors have no place in the tree by the NameMap:{listing(unknown)}\nCorrect the map, or the tree; "
            "nothing of an adapter is left out."
        )
    _check_floating(tensors)
    return found


class _Target(NamedTuple):
    """Where a tensor goes: the field of `Found`, the module, and the part of its adapter or the name of its array."""

    group: str
    module: str
    part: str


def _target(name: str, method: str, index: Mapping[tuple[str, str], tuple[TensorPlace, int]]) -> _Target | None:
    """Where a tensor goes by its name without PEFT's prefix; None if nowhere."""
    for ending, part in _ENDINGS[method].items():
        if not name.endswith(f".{ending}"):
            continue
        module = name.removesuffix(f".{ending}")
        if (module, "weight") not in index:
            return None
        kind = index[module, "weight"][0].rule.kind
        if part in ("a", "b") and (kind == "embedding") != ending.startswith("lora_embedding"):
            return None
        return _Target("rows" if part == "rows" else "adapters", module, part)
    module, _, last = name.rpartition(".")
    plain = module.removesuffix(_BASE)
    if (plain, last) not in index:
        return None
    return _Target("base" if module.endswith(_BASE) and last == "weight" else "whole", plain, last)


def _check_floating(tensors: Mapping[str, np.ndarray]) -> None:
    wrong = [
        f"{name!r} is {t.dtype}" for name, t in tensors.items() if t.dtype.kind not in "fV" or t.dtype.itemsize < 2
    ]
    if wrong:
        raise ManifestError(f"expected tensors of floating point with at least 16 bits, but{listing(wrong)}")


def per_leaf(
    parts: Mapping[str, T],
    index: Mapping[tuple[str, str], tuple[TensorPlace, int]],
    nothing: Callable[[T], T] | None = None,
) -> dict[TensorPlace, list[T]]:
    """Returns what each leaf's modules have, in the order of its stacked axes.

    Args:
      parts: by module, for the module's weight.
      index: as `index_places` gives it.
      nothing: makes of one layer's part that of a layer which the file leaves out, one that changes nothing and never
        will; None if there is no such part.

    Raises:
      ManifestError: some layers of a stack are there and others are not.
    """
    return _grouped({(module, "weight"): part for module, part in parts.items()}, index, nothing)


def whole_per_leaf(
    parts: Mapping[tuple[str, str], T], index: Mapping[tuple[str, str], tuple[TensorPlace, int]]
) -> dict[TensorPlace, list[T]]:
    """Returns the same as `per_leaf` for parts by module and tensor."""
    return _grouped(parts, index)


def _grouped(
    parts: Mapping[tuple[str, str], T],
    index: Mapping[tuple[str, str], tuple[TensorPlace, int]],
    nothing: Callable[[T], T] | None = None,
) -> dict[TensorPlace, list[T]]:
    grouped: dict[TensorPlace, dict[int, T]] = {}
    for key, part in parts.items():
        place, position = index[key]
        grouped.setdefault(place, {})[position] = part
    wrong = []
    for place, found in grouped.items():
        absent = [name for i, name in enumerate(place.modules) if i not in found]
        if absent and nothing is not None:
            found |= {i: nothing(next(iter(found.values()))) for i in range(len(place.modules)) if i not in found}
        elif absent:
            wrong.append(f"{place.path!r}: nothing for {', '.join(absent[:3])}{' and more' * (len(absent) > 3)}")
    if wrong:
        raise ManifestError(
            "layers_to_transform: these leaves are stacks of layers, of which the file adapts some, in a form that "
            f"would learn in the others too:{listing(wrong)}\nLoad it onto the unstacked parameters."
        )
    return {place: [found[i] for i in range(len(place.modules))] for place, found in grouped.items()}


def same_of_all(values: Mapping[str, T], what: str, mend: str) -> T:
    """Returns the one value that all have; raises ManifestError naming two that differ."""
    names = list(values)
    for name in names[1:]:
        if values[name] != values[names[0]]:
            raise ManifestError(f"{names[0]!r} has {what} {values[names[0]]} and {name!r} has {values[name]}; {mend}")
    return values[names[0]]


def whole_alpha(alpha: float) -> float:
    """Returns an alpha as an integer where it is one but for rounding, as configs have it."""
    whole = round(alpha)
    return whole if math.isclose(alpha, whole, rel_tol=1e-12) else alpha


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
