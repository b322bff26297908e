"""The tensors of a PEFT file by module, each with the leaf of the tree that it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from subspace_jax.core import nearest
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
