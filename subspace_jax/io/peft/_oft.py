"""Converts OFT to PEFT's tensors and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.core import Weight
from subspace_jax.io._base import BaseArrays
from subspace_jax.io._errors import ManifestError
from subspace_jax.io.peft._checks import (
    ONE_SETTING,
    check_dense,
    check_packable,
    check_shapes,
    same_of_all,
)
from subspace_jax.io.peft._config import Settings
from subspace_jax.io.peft._layout import sizes, stack, unstack
from subspace_jax.io.peft._names import TensorPlace
from subspace_jax.io.peft._reading import Reading
from subspace_jax.io.peft._tensors import per_leaf, tensor_name
from subspace_jax.methods.structured.oft import Rotated

# PEFT's series has the terms of ours from four on; with fewer it is another one.
_FEWEST_TERMS = 4


def pack_oft(
    weights: Mapping[str, Rotated], places: Mapping[str, TensorPlace], base: BaseArrays
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors of rotated weights by name, and the settings that go with them.

    Raises:
      ManifestError: a weight has no equal in PEFT, or stands on another base than `base`.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, weight in weights.items():
        place = places[path]
        check_packable(path, weight, place, base, "skew_entries")
        if weight.output_scale is not None:
            raise ManifestError(f"{path}: has a factor for every output, which PEFT's OFT has not. merge() it.")
        if weight.terms is not None and weight.terms < _FEWEST_TERMS:
            raise ManifestError(
                f"{path}: has terms={weight.terms}; PEFT's series is another one below {_FEWEST_TERMS}. merge() it."
            )
        # The exact transform of PEFT is that of -Q, its series that of Q.
        sign = -1.0 if weight.terms is None else 1.0
        for module, entries in zip(place.modules, unstack(weight.skew_entries, place, path), strict=True):
            tensors[tensor_name(module, "oft_R.weight")] = (sign * entries).astype(entries.dtype)
    terms = same_of_all({path: weight.terms for path, weight in weights.items()}, "terms", ONE_SETTING)
    # One block that is all there is may count as shared or not.
    shared = {path: weight.skew_entries.shape[-2] == 1 for path, weight in weights.items() if weight.blocks > 1}
    return tensors, {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": _block_size({path: (sizes(places[path])[0], w.block_size) for path, w in weights.items()}),
        "block_share": same_of_all(shared, "shared blocks:", ONE_SETTING) if shared else False,
        "module_dropout": same_of_all(
            {path: weight.dropout for path, weight in weights.items()}, "dropout", ONE_SETTING
        ),
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": 5 if terms is None else terms,
        "coft": False,
        "eps": 6e-5,
        "init_weights": True,
    }


def _block_size(wanted: Mapping[str, tuple[int, int]]) -> int:
    """The setting of which PEFT makes every weight's own block size, moving it to a divisor of the input size."""
    for size in range(1, max(inputs for inputs, _ in wanted.values()) + 1):
        if all(_moved(size, inputs) == block for inputs, block in wanted.values()):
            return size
    same_of_all({path: block for path, (_, block) in wanted.items()}, "block size", ONE_SETTING)
    path, (inputs, block) = next(iter(wanted.items()))
    raise ManifestError(f"{path}: PEFT makes no blocks of {block} for {inputs} inputs. merge() it.")


def _moved(size: int, inputs: int) -> int:
    """The divisor of the input size that PEFT takes for a block size: the nearest, of two the smaller."""
    divisors = [d for d in range(1, inputs + 1) if inputs % d == 0]
    return min(divisors, key=lambda d: (abs(d - size), d))


def unpack_oft(reading: Reading) -> dict[str, Weight]:
    """Returns the weights that the tensors of an OFT file make, by path.

    Raises:
      ManifestError: a tensor is misshapen, or the file is of a PEFT whose OFT was another.
    """
    terms = _terms(reading.settings)
    shared = reading.settings.flag("block_share")
    parts = {module: own["entries"] for module, own in reading.found.adapters.items()}
    weights: dict[str, Weight] = {}
    for place, layers in per_leaf(parts, reading.index).items():
        check_dense(place, Rotated)
        inputs = sizes(place)[0]
        size = _size(reading.settings, inputs)
        shape = (1 if shared else inputs // size, math.comb(size, 2))
        for module, entries in zip(place.modules, layers, strict=True):
            check_shapes(module, {"oft_R": entries}, {"oft_R": shape}, place)
        same_of_all(dict(zip(place.modules, (e.dtype for e in layers), strict=True)), "dtype", "a stack has one.")
        entries = stack(layers, place)
        if reading.settings.flag("coft"):
            entries = _near_identity(entries, reading.settings.number("eps", 6e-5))
        array = reading.base.leaves[place.path]
        weights[place.path] = Rotated(
            base=array,
            skew_entries=jnp.asarray(-entries if terms is None else entries),
            block_size=size,
            terms=terms,
            dropout=reading.settings.probability("module_dropout"),
            **reading.fields(place),
            trainable=("skew_entries", "output_scale"),
            method="oft",
        )
    return weights


def _terms(settings: Settings) -> int | None:
    """The number of terms of the series, None for the exact transform."""
    if "oft_block_size" not in settings.values:
        raise ManifestError("the config has no oft_block_size: it is of PEFT before 0.14, whose OFT was another.")
    if "use_cayley_neumann" not in settings.values:
        raise ManifestError(
            "the config has no use_cayley_neumann, by which releases of PEFT read it in different ways."
        )
    if not settings.flag("use_cayley_neumann"):
        return None
    version = str(settings.values.get("peft_version", "0")).split(".")
    numbers = [int(part) if part.isdecimal() else 0 for part in (*version, "0")[:2]]
    if numbers < [0, 18]:
        raise ManifestError(
            "the config has use_cayley_neumann and is of PEFT before 0.18, whose series was another. Merge it there."
        )
    terms = settings.integer("num_cayley_neumann_terms", 5)
    if terms < _FEWEST_TERMS - 1:
        raise ManifestError(f"the config has num_cayley_neumann_terms={terms}; expected at least {_FEWEST_TERMS - 1}.")
    # Three and four are the same series there.
    return max(terms, _FEWEST_TERMS)


def _size(settings: Settings, inputs: int) -> int:
    """The block size of a module, given as such or as a number of blocks."""
    count, size = settings.integer("r", 0), settings.integer("oft_block_size")
    if (count == 0) == (size == 0):
        raise ManifestError(f"the config has r={count} and oft_block_size={size}; expected one of them to be 0.")
    return _moved(size, inputs) if size else inputs // _moved(count, inputs)


def _near_identity(entries: np.ndarray, radius: float) -> np.ndarray:
    """The entries as PEFT cuts them before every use under `coft`."""
    # A skew-symmetric matrix has every entry of its triangle twice.
    norm = math.sqrt(2.0) * np.linalg.norm(entries.astype(np.float32), axis=-1, keepdims=True)
    limit = radius / math.sqrt(entries.shape[-2])
    return (entries * (limit / np.maximum(norm, limit))).astype(entries.dtype)
