"""A tower of equal layers: unrolled or scanned, rematerialized or not; both layouts of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from subspace_jax.core import is_weight
from subspace_jax.weights import Packed, stack_packed

LAYER_PREFIX = "layer_"
STACK_NAME = "layers"


def run_layers(
    block: type[nn.Module],
    fields: Mapping[str, Any],
    x: jax.Array,
    *shared: Any,
    num_layers: int,
    scan_layers: bool,
    remat: bool,
    per_layer: tuple[Any, ...] = (),
) -> tuple[jax.Array, Any]:
    """Sends `x` through `num_layers` copies of `block`; to be called inside a compact method.

    Args:
        block: module whose call is `(x, *shared, *per_layer_slices) -> (x, out)`.
        fields: constructor arguments of every copy.
        x: what travels from layer to layer.
        *shared: arguments that every layer receives whole (masks, rotary tables).
        num_layers: number of copies.
        scan_layers: one scanned module called `layers` with a leading layer axis on its parameters, in place
          of `layer_0`, `layer_1`, ...
        remat: recompute a layer's inside in the backward pass rather than store it.
        per_layer: trees whose leaves have a leading layer axis; each layer receives its slice.

    Returns:
        The last `x`, and the layers' `out` trees stacked on a leading layer axis.
    """
    if remat:
        # The loop of a scan already keeps the recomputation from being merged with the first computation.
        block = nn.remat(block, prevent_cse=not scan_layers)
    if scan_layers:
        in_axes: Any = (nn.broadcast,) * len(shared) + (0,) * len(per_layer)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=num_layers,
        )
        return scanned(**fields, name=STACK_NAME)(x, *shared, *per_layer)
    outs = []
    for layer in range(num_layers):
        slices = jax.tree.map(lambda leaf, layer=layer: leaf[layer], per_layer)
        x, out = block(**fields, name=f"{LAYER_PREFIX}{layer}")(x, *shared, *slices)
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def layer_names(node: Mapping[str, Any]) -> list[str]:
    """Returns the names of the unrolled layers of a group, in order."""
    names = [name for name in node if name.startswith(LAYER_PREFIX) and name[len(LAYER_PREFIX) :].isdecimal()]
    return sorted(names, key=lambda name: int(name[len(LAYER_PREFIX) :]))


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns every group `layer_0`, `layer_1`, ... of a parameter tree into one stacked `layers`.

    Args:
        params: nested dict of parameters as a module with `scan_layers=False` has them.

    Returns:
        The tree of the same module with `scan_layers=True`: each leaf of `layers` is `[layers, ...]`.

    Raises:
        ValueError: the numbering has a gap, or two layers differ in structure or shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> tree = {"encoder": {"layer_0": {"w": jnp.zeros(3)}, "layer_1": {"w": jnp.ones(3)}}}
        >>> stack_layers(tree)["encoder"]["layers"]["w"].shape
        (2, 3)
    """
    return _stack(params, "")


def _stack(node: Any, path: str) -> Any:
    if not isinstance(node, Mapping):
        return node
    names = layer_names(node)
    out = {name: _stack(child, f"{path}/{name}") for name, child in node.items() if name not in names}
    if not names:
        return out
    expected = [f"{LAYER_PREFIX}{i}" for i in range(len(names))]
    if names != expected:
        raise ValueError(f"{path or '/'}: cannot stack layers {names}; expected {expected} without a gap")
    layers = [_stack(node[name], f"{path}/{name}") for name in names]
    structures = [jax.tree.map(lambda leaf: tuple(leaf.shape), layer, is_leaf=is_weight) for layer in layers]
    for name, structure in zip(names, structures, strict=True):
        if structure != structures[0]:
            raise ValueError(
                f"{path}/{name}: parameters {structure} differ from {structures[0]} of {names[0]}; "
                "only layers of one structure and shape can be stacked"
            )
    out[STACK_NAME] = jax.tree.map(_stack_leaves, *layers, is_leaf=is_weight)
    return out


def _stack_leaves(*leaves: Any) -> Any:
    if not is_weight(leaves[0]):
        return jnp.stack(leaves)
    if not all(isinstance(leaf, Packed) for leaf in leaves):
        raise ValueError(f"cannot stack layers of {type(leaves[0]).__name__}; stack the layers before adapt().")
    return jax.tree.map(jnp.asarray, stack_packed(leaves))


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns every stacked `layers` of a parameter tree into `layer_0`, `layer_1`, ...; undoes `stack_layers`.

    Args:
        params: nested dict of parameters as a module with `scan_layers=True` has them.

    Returns:
        The tree of the same module with `scan_layers=False`.

    Raises:
        ValueError: the leaves of a stack differ in their leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> sorted(unstack_layers({"encoder": {"layers": {"w": jnp.zeros((2, 3))}}})["encoder"])
        ['layer_0', 'layer_1']
    """
    return _unstack(params, "")


def _unstack(node: Any, path: str) -> Any:
    if not isinstance(node, Mapping):
        return node
    out = {name: _unstack(child, f"{path}/{name}") for name, child in node.items() if name != STACK_NAME}
    if STACK_NAME not in node:
        return out
    stack = node[STACK_NAME]
    depths = {tuple(leaf.shape)[:1] for leaf in jax.tree.leaves(stack, is_leaf=is_weight)}
    if len(depths) != 1 or depths == {()}:
        raise ValueError(
            f"{path}/{STACK_NAME}: leading axes {sorted(depths)}; expected one layer axis of the same length "
            "on every leaf"
        )
    ((depth,),) = depths
    for layer in range(depth):
        out[f"{LAYER_PREFIX}{layer}"] = jax.tree.map(
            lambda leaf, layer=layer: _layer_of(leaf, layer), stack, is_leaf=is_weight
        )
    return out


def _layer_of(leaf: Any, layer: int) -> Any:
    if not is_weight(leaf):
        return leaf[layer]
    mapped, rebuild = leaf.split_stack(0)
    one = rebuild(jax.tree.map(lambda part: part[layer], mapped))
    return one.alone() if isinstance(one, Packed) else one
