"""Puts parameters that were read from a file onto the device, unrolled or stacked, without holding them twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from subspace_jax.core import is_weight
from subspace_jax.weights import stack_packed

from ._aligned import aligned_empty, hand_over
from ._layers import STACK_NAME, layer_names


def finish_params(params: dict[str, Any], config: Any, read: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Casts to `config.param_dtype`, stacks the layers if `config.scan_layers`, puts them on the default device.

    Arrays leave `params` one by one, so that none is in memory twice for longer than it takes.

    Args:
        params: nested dict of NumPy arrays, which is emptied.
        config: of the module.
        read: called after every part of a file in memory that was copied.
    """
    return _handed_over(params, _Hands(config.param_dtype, read), stack=config.scan_layers)


def _handed_over(node: dict[str, Any], hands: _Hands, *, stack: bool) -> dict[str, Any]:
    layers = layer_names(node) if stack else []
    found = {STACK_NAME: _stacked([node.pop(name) for name in layers], hands)} if layers else {}
    for name in list(node):
        leaf = node.pop(name)
        found[name] = _handed_over(leaf, hands, stack=stack) if isinstance(leaf, dict) else hands.place(leaf)
    return found


def _stacked(layers: list[dict[str, Any]], hands: _Hands) -> dict[str, Any]:
    """The layers as one, whose own arrays are given up one by one."""
    found: dict[str, Any] = {}
    for name in list(layers[0]):
        parts = [layer.pop(name) for layer in layers]
        found[name] = _stacked(parts, hands) if isinstance(parts[0], dict) else hands.stack(parts)
        del parts
    return found


@dataclasses.dataclass(frozen=True)
class _Hands:
    """Puts leaves on the default device."""

    dtype: Any
    read: Callable[[], None]

    def place(self, leaf: Any) -> Any:
        if is_weight(leaf):
            return leaf.map_fields(lambda _, value: hand_over(value, None, self.read))
        return hand_over(leaf, self.dtype, self.read)

    def stack(self, leaves: list[Any]) -> Any:
        stored = [is_weight(leaf) for leaf in leaves]
        if any(stored) and not all(stored):  # a file may leave the matrices of some layers unquantized
            leaves = [np.asarray(leaf.materialize()) if is_weight(leaf) else leaf for leaf in leaves]
        elif stored[0]:
            whole = stack_packed(leaves)
            self.read()
            return self.place(whole)
        joined = aligned_empty((len(leaves), *leaves[0].shape), np.dtype(self.dtype))
        for place, leaf in zip(joined, leaves, strict=True):
            place[...] = leaf
        return hand_over(joined)
