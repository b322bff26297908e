"""Converts LoRA, DoRA and whatever equals them to PEFT's tensors, and back."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
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
    check_original,
    check_role,
    check_shapes,
    require_parts,
    same_of_all,
)
from subspace_jax.io.peft._config import Settings, exact_pattern
from subspace_jax.io.peft._dora import direction_of, is_dora, lengths_of, with_lengths
from subspace_jax.io.peft._layout import (
    factor_names,
    factor_shapes,
    host_array,
    input_factor_from_torch,
    input_factor_to_torch,
    magnitude_shape,
    magnitude_to_torch,
    output_factor_from_torch,
    output_factor_to_torch,
    sizes,
    stack,
    unstack,
)
from subspace_jax.io.peft._names import TensorPlace
from subspace_jax.io.peft._reading import Reading
from subspace_jax.io.peft._starts import start_factors
from subspace_jax.io.peft._tensors import per_leaf, tensor_name
from subspace_jax.methods.low_rank.matryoshka import NestedLowRank
from subspace_jax.weights import AsLowRank, LowRank

# Parts that a module has only if the config says so.
_OPTIONAL = {"magnitude": "use_dora", "bias": "lora_bias"}


@dataclasses.dataclass(frozen=True)
class _Part:
    """The adapter of one module: factors `[in, rank]` and `[rank, out]`, scale, and lengths `[out]` or None."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None

    def nothing(self) -> _Part:
        """The adapter of a layer that has none: with both factors at zero it gets no gradient either."""
        return dataclasses.replace(self, a=np.zeros_like(self.a), b=np.zeros_like(self.b))


def pack_lora(
    weights: Mapping[str, Any], places: Mapping[str, TensorPlace], base: BaseArrays
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors of low-rank weights by name, and the settings that go with them.

    Raises:
      ManifestError: a weight has no equal in PEFT, or stands on another base than `base`.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for path, weight in weights.items():
        place = places[path]
        check_role(weight, place)
        inner = _plain(path, weight)
        _check_base(inner, path, base)
        a, b = _factors(inner, path)
        lengths = lengths_of(weight, place)
        parts = zip(place.modules, unstack(a, place, path), unstack(b, place, path), lengths, strict=True)
        for module, module_a, module_b, length in parts:
            ranks[module], scales[module] = module_a.shape[-1], float(inner.scale)
            first, second = factor_names(place)
            tensors[tensor_name(module, first)] = input_factor_to_torch(module_a, place)
            tensors[tensor_name(module, second)] = output_factor_to_torch(module_b, place)
            if length is not None:
                tensors[tensor_name(module, "lora_magnitude_vector")] = magnitude_to_torch(length, place)
    kinds = {path: "DoRA" if is_dora(weight) else "LoRA" for path, weight in weights.items()}
    dropouts = {path: _plain(path, weight).dropout for path, weight in weights.items()}
    stabilized = all(_plain(path, weight).rank_stabilized for path, weight in weights.items())
    return tensors, {
        "peft_type": "LORA",
        "use_dora": same_of_all(kinds, "the form", ONE_SETTING) == "DoRA",
        "lora_dropout": same_of_all(dropouts, "dropout", ONE_SETTING),
        "init_lora_weights": True,
        **_ranks_and_alphas(ranks, scales, stabilized),
    }


def _ranks_and_alphas(ranks: Mapping[str, int], scales: Mapping[str, float], stabilized: bool) -> dict[str, Any]:
    """The commonest rank and alpha, and patterns for modules that have others."""
    alphas = {}
    for module, scale in scales.items():
        alphas[module] = alpha_of(scale, math.sqrt(ranks[module]) if stabilized else ranks[module])
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilized,
        "rank_pattern": {exact_pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {exact_pattern(name): value for name, value in alphas.items() if value != alpha},
    }


def _plain(path: str, weight: Any) -> LowRank:
    """The low-rank part of a weight that `is_low_rank`, gains multiplied in."""
    inner: Any = direction_of(weight)
    if isinstance(inner, AsLowRank):
        require_parts(path, inner, "base", *inner.trainable)
        return inner.plain()
    require_parts(path, inner, "base", "a", "b")
    return inner.plain() if isinstance(inner, NestedLowRank) else inner


def _factors(weight: LowRank, path: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors on the original weight: those of a residual base take the start away again, at twice the rank."""
    a, b = weight.original_factors()
    return host_array(a, path), host_array(b, path)


def _check_base(weight: LowRank, path: str, base: BaseArrays) -> None:
    """Refuses a weight whose frozen part is not what PEFT will have under it."""
    if isinstance(weight.base, Weight) or weight.start_a is None or weight.start_b is None:
        check_original(path, weight.base, base)
        return
    arrays = {"original": base.leaves[path], "residual": weight.base}
    matrices = {name: np.asarray(weight.role.matrix(array), np.float64) for name, array in arrays.items()}
    a, b = (host_array(v, path).astype(np.float64) for v in (weight.start_a, weight.start_b))
    start = float(weight.scale) * (a @ b)
    largest = max(float(np.abs(v).max(initial=0.0)) for v in (matrices["original"], start))
    coarsest = max(float(jnp.finfo(v.dtype).eps) for v in (*arrays.values(), weight.a))
    difference = float(np.abs(matrices["residual"] + start - matrices["original"]).max(initial=0.0))
    if not difference <= 64 * coarsest * largest:
        raise ManifestError(
            f"{path}: its residual and its start make an array that differs from that of base_params by "
            f"{difference:.1e}. Pass the parameters that adapt() was given."
        )


def unpack_lora(reading: Reading) -> dict[str, Weight]:
    """Returns the weights that the tensors of a LoRA file make, by path.

    Raises:
      ManifestError: tensors of a module are missing or misshapen, or layers of one stack differ in form.
    """
    parts = {
        module: _part(reading.settings, module, own, reading.place(module))
        for module, own in reading.found.adapters.items()
    }
    stabilized, dropout = reading.settings.flag("use_rslora"), reading.settings.probability("lora_dropout")
    weights: dict[str, Weight] = {}
    nothing = None if reading.settings.flag("use_dora") else _Part.nothing
    for place, layers in per_leaf(parts, reading.index, nothing).items():
        names = dict(zip(place.modules, layers, strict=True))
        mend = f"{place.path} is one stack, which has one. Load the file onto the unstacked parameters."
        same_of_all({name: part.a.shape[-1] for name, part in names.items()}, "rank", mend)
        scale = same_of_all({name: part.scale for name, part in names.items()}, "scale", mend)
        same_of_all({name: (part.a.dtype, part.b.dtype) for name, part in names.items()}, "dtypes", mend)
        array = reading.base.leaves[place.path]
        under, starts = _residual(reading.settings, array, layers, place) if reading.settings.start else (array, {})
        low_rank = LowRank(
            base=under,
            a=jnp.asarray(stack([part.a for part in layers], place)),
            b=jnp.asarray(stack([part.b for part in layers], place)),
            scale=scale,
            rank_stabilized=stabilized,
            dropout=dropout,
            trainable=("a", "b"),
            method="rslora" if stabilized else "lora",
            **starts,
            **reading.fields(place),
        )
        lengths = [part.magnitude for part in layers if part.magnitude is not None]
        weights[place.path] = low_rank
        if lengths:
            weights[place.path] = with_lengths(low_rank, stack(lengths, place), place)
    return weights


def _part(settings: Settings, module: str, found: Mapping[str, np.ndarray], place: TensorPlace) -> _Part:
    """The adapter of one module, its tensors checked against the config and the module's shape."""
    expected = {"a", "b", *(part for part, flag in _OPTIONAL.items() if settings.flag(flag))}
    if set(found) != expected:
        raise ManifestError(
            f"module {module!r} has the parts {sorted(found)}, expected {sorted(expected)} (use_dora="
            f"{settings.flag('use_dora')}, lora_bias={settings.flag('lora_bias')}). The file is not whole."
        )
    if place.rule.shared:
        raise ManifestError(
            f"module {module!r}: the model reads {place.path} in other places too, which PEFT does not adapt and this "
            "library would. Untie the two in the parameters first."
        )
    rank = settings.pattern("rank_pattern", module, settings.integer("r"))
    if rank < 1 or rank != int(rank):
        raise ManifestError(f"module {module!r}: the config gives it rank {rank:g}, expected a whole number from 1.")
    check_shapes(module, found, _shapes(int(rank), place), place)
    magnitude = found.get("magnitude")
    return _Part(
        input_factor_from_torch(found["a"], place),
        output_factor_from_torch(found["b"], place),
        module_scale(settings, module, rank),
        None if magnitude is None else magnitude.reshape(-1),
    )


def _shapes(rank: int, place: TensorPlace) -> dict[str, tuple[int, ...]]:
    a, b = factor_shapes(rank, place)
    return {"a": a, "b": b, "magnitude": magnitude_shape(place), "bias": (sizes(place)[1],)}


def module_scale(settings: Settings, module: str, rank: float) -> float:
    """Returns the scale of a module's adapter of some rank."""
    alpha = settings.pattern("alpha_pattern", module, settings.number("lora_alpha"))
    return alpha / (math.sqrt(rank) if settings.flag("use_rslora") else rank)


def _residual(settings: Settings, array: Any, layers: list[_Part], place: TensorPlace) -> tuple[Any, dict[str, Any]]:
    """The array without the start that PEFT took out of it, and the factors of that start."""
    kind = str(settings.start)
    residuals, pairs = [], []
    for layer, part in zip(unstack(array, place, place.path), layers, strict=True):
        matrix = layer.reshape(sizes(place))
        a, b = start_factors(kind, matrix, part.a.shape[-1], part.scale, place)
        residuals.append((matrix.astype(np.float64) - part.scale * (a @ b)).reshape(layer.shape))
        pairs.append((a.astype(np.float32), b.astype(np.float32)))
    base = jnp.asarray(stack(residuals, place), array.dtype)
    first, second = (jnp.asarray(stack(list(factors), place)) for factors in zip(*pairs, strict=True))
    return base, {"start_a": first, "start_b": second}
