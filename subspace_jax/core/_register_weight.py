"""Registers a class of stand-in weights as a pytree, so that remarks on a weight do not split compiled programs."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

C = TypeVar("C", bound=type)
Structure = tuple[tuple[Any, ...], "_Remarks"]


class _Remarks(tuple[Any, ...]):
    """Values that belong to a weight and not to the program that runs it: any two are equal."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Remarks)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, _Remarks)

    def __hash__(self) -> int:
        return 0


def register_weight(cls: C) -> C:
    """Registers a frozen dataclass of a stand-in weight as a pytree; use it as a decorator.

    Data fields are the children and static ones the structure, as with `jax.tree_util.register_dataclass`. Fields
    declared by `static(remark=True)`, such as the method's name, are carried along and compare equal, so weights that
    differ in nothing else share one compiled program. What such a program returns has the remarks of its first call.

    Args:
      cls: the dataclass.

    Returns:
      The class.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> one, two = (sj.adapt({"w": jnp.ones((4, 3))}, {"w": m}, key=jax.random.key(0)) for m in
      ...             (sj.lora(rank=2), sj.lora(rank=2, alpha=7.0, rank_stabilized=True)))
      >>> one["w"].method, two["w"].method, jax.tree.structure(one) == jax.tree.structure(two)
      ('lora', 'rslora', True)
    """
    data = tuple(f.name for f in dataclasses.fields(cls) if not f.metadata.get("static"))
    statics, remarks = structure_names(cls)
    keys = tuple(map(jax.tree_util.GetAttrKey, data))

    def structure(weight: Any) -> tuple[Any, ...]:
        return tuple(getattr(weight, n) for n in statics), _Remarks(getattr(weight, n) for n in remarks)

    def flatten(weight: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(weight, n) for n in data), structure(weight)

    def flatten_with_keys(weight: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children = (getattr(weight, n) for n in data)
        return tuple(zip(keys, children, strict=True)), structure(weight)

    def unflatten(structure: tuple[Any, ...], children: Any) -> Any:
        # Without __init__: leaves may be anything while a tree is mapped.
        weight = object.__new__(cls)
        weight.__dict__.update(zip(data, children, strict=True))
        weight.__dict__.update(zip(statics, structure[0], strict=True))
        weight.__dict__.update(zip(remarks, structure[1], strict=True))
        return weight

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def structure_names(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of a weight's static fields: those that make programs differ, and remarks."""
    fields = [f for f in dataclasses.fields(cls) if f.metadata.get("static")]
    remarks = tuple(f.name for f in fields if f.metadata.get("remark"))
    return tuple(f.name for f in fields if f.name not in remarks), remarks


def structure_of(cls: type, fields: dict[str, Any]) -> Structure:
    """Returns what JAX keeps of a weight beside its arrays, from the static fields by name."""
    statics, remarks = structure_names(cls)
    return tuple(fields[n] for n in statics), _Remarks(fields[n] for n in remarks)
