"""`ssf` and its fold into plain weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.core import (
    InitFn,
    Leaf,
    Method,
    Params,
    PatternError,
    PyTree,
    Role,
    RoleError,
    check_choice,
    check_dtype,
    check_number,
    leaves_with_paths,
    map_with_paths,
    merge,
    require_matrix,
)
from subspace_jax.methods.structured.ssf._weight import Scaled, ScaledShifted, ShiftedBias

# How norms of the form 1 + scale call their scale; a role cannot tell it from a bias, since both are added to.
OFFSET_NAMES = ("scale", "gamma", "weight")


def ssf(
    *, std: float = 0.02, create_bias: bool = False, unit_offset: bool | None = None, dtype: Any = jnp.float32
) -> Method:
    r"""Trains a scale and a shift for every channel after a layer, which fold into its kernel and bias.

    \(y = g\,(x K + b) + t\), so \(K' = K\,\mathrm{diag}(g)\) and \(b' = g\,b + t\); after a norm likewise with its
    scale in \(K\)'s place. The rule must match kernel (or scale) and bias of every layer; the bias reads its sibling's
    \(g\).

    Args:
      std: \(g \sim N(1, std^2)\) and \(t \sim N(0, std^2)\). Unless it is 0, the model is not the pretrained one at the
        start, as published.
      create_bias: serve kernels without a bias. Such a weight adds \(t\) itself; `merge` refuses it, and
        `ssf.fold` makes the bias. A norm's scale cannot add: for a norm without a bias (or without a scale)
        `ssf.complete_norms` makes the missing parameter, for the model with `use_bias=True` (`use_scale=True`).
      unit_offset: False for norms that multiply by their scale, True for those that multiply by 1 + scale, as
        Gemma's do. None takes it from `roles`, which then have to be given for norms, and refuses the second kind.
      dtype: dtype of \(g\) and \(t\).

    Returns:
      A method of \(2C\) values for a layer of \(C\) channels: `Scaled` for kernels and norm scales, `ShiftedBias` for
      biases, `ScaledShifted` for kernels without one.

    Raises:
      PatternError: from `adapt`: a bias or a scale is not matched (or there is none), or a layer has several kernels.
      RoleError: from `adapt`: whether a norm multiplies by its scale or by 1 + scale is not known, or not as said.
      ValueError: `std` is negative, or `dtype` is float16.

    Note:
      The published recipe: after every linear map, convolution and norm outside the head, AdamW without decay of
      scales, shifts and biases, and a rate above that of full fine-tuning, such as 1e-3 to 1e-2. Means over VTAB's
      tasks (73.1) and over its groups (75.7) differ: a comparison has to say which it takes.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}, "head": {"kernel": jnp.ones((4, 2))}}
      >>> adapted = sj.adapt(params, {"head/*": sj.full(), "**": sj.ssf()}, key=jax.random.key(0))
      >>> type(adapted["dense"]["kernel"]).__name__, type(adapted["dense"]["bias"]).__name__
      ('Scaled', 'ShiftedBias')
      >>> sj.summary(adapted).trainable
      16
    """
    check_number("ssf: std", std, least=0.0)
    check_choice("ssf: unit_offset", unit_offset, (None, False, True))
    dtype = check_dtype("ssf: dtype", dtype)

    def draw(key: jax.Array, array: jax.Array, role: Role, mean: float) -> jax.Array:
        shape = (*role.stack_shape(array.shape), role.sizes(array.shape)[1])
        return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    def scaled(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Scaled:
        del stats
        role = _with_outputs(array, role)
        scale = draw(key, array, role, 1.0)
        offset = 1.0 if unit_offset and not role.in_axes else 0.0
        return Scaled(base=array, scale=scale, offset=offset, role=role, dtype=array.dtype, trainable=("scale",))

    def alone(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> Scaled:
        require_matrix(array, role)
        keys = jax.random.split(key)
        base = scaled(keys[0], array, role, stats)
        return ScaledShifted(
            base=array,
            scale=base.scale,
            shift=draw(keys[1], array, role, 0.0),
            role=base.role,
            dtype=array.dtype,
            trainable=("scale", "shift"),
        )

    def shifted(owner: str, stack: int) -> InitFn:
        def init(key: jax.Array, array: jax.Array, role: Role, stats: Any) -> ShiftedBias:
            del stats
            role = _with_outputs(array, dataclasses.replace(role, stack_axes=tuple(range(stack))))
            return ShiftedBias(
                base=array,
                shift=draw(key, array, role, 0.0),
                links=(("scale", owner, "scale"),),
                role=role,
                dtype=array.dtype,
                trainable=("shift", "scale"),
            )

        return init

    def plan(key: jax.Array, leaves: Mapping[str, Leaf]) -> dict[str, InitFn]:
        del key
        inits: dict[str, InitFn] = {}
        for layer, names in _layers(leaves).items():
            biases = [n for n in names if _is_bias(n, leaves[n], unit_offset)]
            owners = [n for n in names if n not in biases]
            _check_layer(layer or "the tree", {n: leaves[n] for n in names}, owners, biases)
            (owner,) = owners
            _check_offset(owner, leaves[owner].role, unit_offset)
            if not biases and not (create_bias and leaves[owner].role.is_matrix):
                raise PatternError(f"{owner}: {_missing_bias(leaves[owner].role.is_matrix)}")
            if biases:
                inits |= {owner: scaled, biases[0]: shifted(owner, len(leaves[owner].role.stack_axes))}
            else:
                inits[owner] = alone
        return inits

    return Method("ssf", alone if create_bias else scaled, plan=plan)


def _layers(leaves: Mapping[str, Leaf]) -> dict[str, list[str]]:
    """Paths by the dict that holds them."""
    layers: dict[str, list[str]] = {}
    for path in leaves:
        layers.setdefault(path.rpartition("/")[0], []).append(path)
    return layers


def _is_bias(path: str, leaf: Leaf, unit_offset: bool | None) -> bool:
    name = path.rpartition("/")[2]
    if leaf.role.is_matrix or (unit_offset and name in OFFSET_NAMES):
        return False
    return leaf.role.kind == "bias" or name == "bias"


def _check_layer(layer: str, leaves: Mapping[str, Leaf], owners: list[str], biases: list[str]) -> None:
    """Refuses what is not one kernel or scale with at most one bias."""
    added = [n for n in biases if n.rpartition("/")[2] in OFFSET_NAMES]
    if added:
        raise RoleError(
            f"{added[0]}: the model adds to it, as a norm does that multiplies by 1 + scale, which folds in another "
            "way than a scale: if it is one, use ssf(unit_offset=True) in a rule of its own."
        )
    if not owners and len(biases) == 1:
        raise PatternError(
            f"{biases[0]}: ssf scales the layer's kernel or scale, which the rule does not match. Match it too; where "
            "a norm has none, run the model with use_scale=True on ssf.complete_norms(params, ...)."
        )
    if len(owners) != 1 or len(biases) > 1:
        raise PatternError(
            f"{layer}: ssf needs one kernel (or scale) and one bias of a layer, and the rule gives it {list(leaves)}. "
            "Match a layer's own kernel and bias, each layer in a dict of its own."
        )


def _check_offset(path: str, role: Role, unit_offset: bool | None) -> None:
    """Refuses a norm's scale of which it is not known, or known otherwise, what the model multiplies by."""
    if role.is_matrix:
        return
    if unit_offset is None and role.kind != "scale":
        raise RoleError(
            f"{path}: whether the model multiplies by it or by 1 + it is not known (role {role.kind!r}), and they fold "
            "in different ways. Pass roles=sj.roles(fn, params, *inputs) to adapt, or ssf(unit_offset=False) or True."
        )
    adds = role.kind == "scale" and role.primitive == "add"
    if adds and not unit_offset:
        raise RoleError(
            f"{path}: the model adds to it before it multiplies, as a norm does that multiplies by 1 + scale, which "
            "folds in another way than a scale: use ssf(unit_offset=True) in a rule of its own."
        )
    if unit_offset and role.kind == "scale" and not adds:
        raise RoleError(
            f"{path}: the model multiplies by it as it is, so there is no offset: leave it out of the rule with "
            "ssf(unit_offset=True)."
        )


def _missing_bias(is_matrix: bool) -> str:
    mend = (
        "where the layer has none, use ssf(create_bias=True)"
        if is_matrix
        else "where the norm has none, a scale cannot shift: run the model with use_bias=True on "
        "ssf.complete_norms(params, ...), or leave the norm out, or train its scale with full()"
    )
    return f"ssf shifts through the layer's bias, which the rule does not match. Match it too, or, {mend}."


def _with_outputs(array: jax.Array, role: Role) -> Role:
    """The role, with every axis of a vector that is not stacked as an output axis."""
    if role.is_matrix:
        role.check(array.shape)
        return role
    rest = tuple(i for i in range(array.ndim) if i not in role.stack_axes)
    return dataclasses.replace(role, in_axes=(), out_axes=rest)


def fold(adapted: Params) -> Params:
    """Folds every scale and shift into ordinary parameters, and creates the biases that layers lack.

    Args:
      adapted: a tree of dicts with weights of `ssf`; other stand-in weights are merged as well.

    Returns:
      A tree of arrays; run it with the model that has biases where some were created.

    Raises:
      PatternError: a layer that needs a bias is not in a dict.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"dense": {"kernel": jnp.ones((6, 4))}}
      >>> adapted = sj.adapt(params, {"**": sj.ssf(create_bias=True)}, key=jax.random.key(0))
      >>> {name: array.shape for name, array in sorted(sj.methods.ssf.fold(adapted)["dense"].items())}
      {'bias': (4,), 'kernel': (6, 4)}
    """
    created = {p: w for p, w in leaves_with_paths(adapted) if isinstance(w, ScaledShifted)}

    def without_shift(path: str, leaf: Any) -> Any:
        if path not in created:
            return leaf
        fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(Scaled)}
        return Scaled(**{**fields, "trainable": ("scale",)})

    folded = merge(map_with_paths(without_shift, adapted))
    for path, weight in created.items():
        *parents, _ = path.split("/")
        folded = _with_entry(folded, [*parents, "bias"], _bias_of(weight), path)
    return folded


def _bias_of(weight: ScaledShifted) -> jax.Array:
    """The shift in the shape that the layer's bias has: stacked axes, then output axes."""
    role, shape = weight.role, weight.shape
    return weight.shift.reshape(*role.stack_shape(shape), *role.out_shape(shape)).astype(weight.dtype)


def _with_entry(tree: PyTree, names: list[str], value: jax.Array, path: str) -> PyTree:
    if not isinstance(tree, Mapping):
        raise PatternError(f"{path}: a bias cannot be created in a {type(tree).__name__}; the tree must be of dicts.")
    first, *rest = names
    if rest:
        return {**tree, first: _with_entry(tree[first], rest, value, path)}
    if first in tree:
        raise PatternError(f"{path}: the layer has a {first!r} already, which the rule for ssf did not match.")
    return {**tree, first: value}
