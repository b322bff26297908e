"""Converts RandLoRA, its random bases included, to PEFT's tensors and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Weight
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._errors import ManifestError
from subspace_jax.io.peft._checks import (
    ONE_SETTING,
    alpha_of,
    check_dense,
    check_packable,
    check_shapes,
    same_of_all,
)
from subspace_jax.io.peft._layout import host_array, sizes, stack, unstack
from subspace_jax.io.peft._names import TensorPlace
from subspace_jax.io.peft._reading import Reading
from subspace_jax.io.peft._tensors import SHARED, Found, per_leaf, tensor_name
from subspace_jax.methods.structured.randlora import RandomBases


def pack_randlora(
    weights: Mapping[str, RandomBases], places: Mapping[str, TensorPlace], base: BaseArrays
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors of these weights by name, and the settings that go with them.

    Raises:
      ManifestError: a weight has no equal in PEFT, or stands on another base than `base`.
    """
    for path, weight in weights.items():
        place = places[path]
        check_packable(path, weight, place, base, "rank_scales", "feature_scales", "basis_a", "basis_b")
        _check_form(path, weight, place)
    ranks = {path: weight.bases_shape[1] for path, weight in weights.items()}
    rank = same_of_all(ranks, "rank", ONE_SETTING)
    scale = same_of_all({path: float(weight.scale) for path, weight in weights.items()}, "scale", ONE_SETTING)
    tensors: dict[str, np.ndarray] = {}
    bases = _common_bases(weights, [sizes(places[path]) for path in weights])
    tensors |= {name: bases[name.rpartition(".")[2]] for name in SHARED["RANDLORA"]}
    for path, weight in weights.items():
        place = places[path]
        scales = (unstack(value, place, path) for value in (weight.rank_scales, weight.feature_scales))
        for module, ranks_of, features_of in zip(place.modules, *scales, strict=True):
            tensors[tensor_name(module, "randlora_lambda")] = ranks_of.T
            tensors[tensor_name(module, "randlora_gamma")] = features_of
            tensors |= {tensor_name(module, name): basis for name, basis in bases.items()}
    return tensors, {
        "peft_type": "RANDLORA",
        "r": rank,
        "randlora_alpha": alpha_of(scale, rank),
        "randlora_dropout": same_of_all({p: weight.dropout for p, weight in weights.items()}, "dropout", ONE_SETTING),
        "save_projection": True,
        "projection_prng_key": 0,
        "sparse": False,
        "very_sparse": False,
        "init_weights": True,
    }


def _check_form(path: str, weight: RandomBases, place: TensorPlace) -> None:
    bases, rank = weight.rank_scales.shape[-2:]
    if weight.pairing != "peft":
        raise ManifestError(
            f"{path}: pairs its bases as the paper does, and PEFT pairs them otherwise, so the sum would be another. "
            'Train with randlora(..., pairing="peft"), or merge() it.'
        )
    if bases != -(-min(sizes(place)) // rank):
        raise ManifestError(f"{path}: has {bases} bases of rank {rank}, and PEFT takes another number. merge() it.")


def _common_bases(weights: Mapping[str, RandomBases], shapes: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The bases that all weights read, in the sizes that PEFT makes them; what no weight reads is zero."""
    (first, weight), *others = weights.items()
    rank = weight.bases_shape[1]
    a, b = host_array(weight.basis_a, first), host_array(weight.basis_b, first)
    for path, other in others:
        if other.basis_a is not weight.basis_a or other.basis_b is not weight.basis_b:
            same = np.array_equal(host_array(other.basis_a, path), a) and np.array_equal(
                host_array(other.basis_b, path), b
            )
            if not same:
                raise ManifestError(
                    f"{path}: reads other bases than {first}, and PEFT has one pair for all. Give all layers the same "
                    "method object, or save them apart."
                )
    # Of each side the largest, then the smaller of the two: more than any weight reads, where shapes are mixed.
    inputs, outputs = (max(shape[side] for shape in shapes) for side in (0, 1))
    smaller, larger = sorted((inputs, outputs))
    whole_a, whole_b = np.zeros((rank, smaller), a.dtype), np.zeros((-(-smaller // rank), rank, larger), b.dtype)
    for target, source in ((whole_a, a), (whole_b, b)):
        common = tuple(slice(min(n, m)) for n, m in zip(target.shape, source.shape, strict=True))
        target[common] = source[common]
    return {"randlora_A": whole_a[:, None, :], "randlora_B": whole_b.transpose(2, 0, 1)}


def unpack_randlora(reading: Reading) -> dict[str, Weight]:
    """Returns the weights that the tensors of a RandLoRA file make, by path; the first stores the bases of all.

    Raises:
      ManifestError: tensors are missing or misshapen, or the file has no bases.
    """
    rank = reading.settings.integer("r")
    if rank < 1:
        raise ManifestError(f"the config has r={rank}, expected at least 1.")
    if not reading.found.adapters:
        return {}
    a, b = _read_bases(reading.found, rank)
    parts = {
        module: _scales(module, own, rank, reading.place(module)) for module, own in reading.found.adapters.items()
    }
    weights: dict[str, Weight] = {}
    # With both scales at zero a layer gets no gradient either.
    leaves = per_leaf(parts, reading.index, lambda part: (np.zeros_like(part[0]), np.zeros_like(part[1])))
    # In the order of the tree, as `adapt` has it.
    for path in (path for path in reading.base.leaves if path in {place.path for place in leaves}):
        place, layers = next((place, layers) for place, layers in leaves.items() if place.path == path)
        _check_fits(place, a, b)
        array, owner = reading.base.leaves[path], next(iter(weights), None)
        weights[path] = RandomBases(
            base=array,
            rank_scales=jnp.asarray(stack([ranks for ranks, _ in layers], place)),
            feature_scales=jnp.asarray(stack([features for _, features in layers], place)),
            basis_a=None if owner else jnp.asarray(a),
            basis_b=None if owner else jnp.asarray(b),
            bases_shape=(b.shape[0], b.shape[1], b.shape[2], a.shape[1]),
            basis_dtype=np.dtype(b.dtype),
            scale=reading.settings.number("randlora_alpha") / rank,
            pairing="peft",
            dropout=reading.settings.probability("randlora_dropout"),
            sides=place.role.sizes(array.shape),
            **reading.fields(place),
            trainable=("rank_scales", "feature_scales"),
            links=tuple((name, owner, name) for name in RandomBases.regenerated) if owner else (),
            method="randlora",
        )
    return weights


def _read_bases(found: Found, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair of bases that all modules have in common, `[rank, smaller]` and `[bases, rank, larger]`."""
    first = next(iter(found.adapters))
    one = {part: found.shared.get(part, found.adapters[first].get(part)) for part in ("basis_a", "basis_b")}
    a, b = one["basis_a"], one["basis_b"]
    if a is None or b is None:
        raise ManifestError(
            f"module {first!r}: the file has not both random bases, which only PyTorch's generator would give again. "
            "Write it in PEFT with save_projection=True."
        )
    for module, own in found.adapters.items():
        if any(
            part in own and not np.array_equal(own[part], basis) for part, basis in (("basis_a", a), ("basis_b", b))
        ):
            raise ManifestError(f"module {module!r} has other bases than the first, and RandLoRA has one pair for all.")
    if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != (rank, 1) or b.shape[2] != rank:
        raise ManifestError(
            f"module {first!r}: randlora_A is {list(a.shape)} and randlora_B {list(b.shape)}, expected [{rank}, 1, n] "
            f"and [m, bases, {rank}] by the config."
        )
    return a[:, 0], b.transpose(1, 2, 0)


def _scales(
    module: str, found: Mapping[str, np.ndarray], rank: int, place: TensorPlace
) -> tuple[np.ndarray, np.ndarray]:
    check_dense(place, RandomBases)
    smaller = min(sizes(place))
    bases = -(-smaller // rank)
    scales = {name: found[name] for name in ("rank_scales", "feature_scales") if name in found}
    if len(scales) < 2:
        raise ManifestError(f"module {module!r} has the parts {sorted(found)}, expected both of its scales.")
    check_shapes(module, scales, {"rank_scales": (rank, bases), "feature_scales": (bases, smaller)}, place)
    return scales["rank_scales"].T, scales["feature_scales"]


def _check_fits(place: TensorPlace, a: np.ndarray, b: np.ndarray) -> None:
    smaller, larger = sorted(sizes(place))
    if a.shape[1] < smaller or b.shape[2] < larger or b.shape[0] < -(-smaller // b.shape[1]):
        raise ManifestError(
            f"{place.path}: the bases of the file are for sides of {a.shape[1]} and {b.shape[2]}, too small for its "
            f"shape {list(place.shape)}. It is the adapter of another model."
        )
