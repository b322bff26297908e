"""Puts adapters into the slots of a bank, takes them out, and empties slots."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.banks._bank import adapter_parts
from subspace_jax.banks._modules import BANKS, fields_for, fits, layers_of, original, taken_module
from subspace_jax.banks._parts import Part, padded
from subspace_jax.core import (
    Params,
    StructureError,
    check_int,
    leaves_with_paths,
    map_with_paths,
    nearest,
)
from subspace_jax.methods.low_rank.dora import Magnitude
from subspace_jax.modules import KeptInput, Module, ModuleBank, alone
from subspace_jax.weights import AdapterBank


def put(bank: Params, slot: int, adapted: Params) -> Params:
    """Puts an adapter into a slot of a bank, in place of what was there, without compiling the model again.

    Args:
      bank: a tree that `bank` made.
      slot: from 1; slot 0 is the plain base.
      adapted: a tree that `adapt` made of the same parameters, of at most the bank's rank.

    Returns:
      The bank with the adapter in the slot; leaves that the adapter leaves out are the plain base there.

    Raises:
      StructureError: the adapter covers a leaf that the bank has no room for, or is on other numbers.
      RankError: its rank is above the bank's.
      ValueError: there is no such slot.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params, key = {"w": jnp.ones((4, 3))}, jax.random.key(0)
      >>> bank = sj.bank(params, [sj.adapt(params, {"w": sj.lora(rank=2)}, key=key)], slots=8)
      >>> bank = sj.banks.put(bank, 5, sj.adapt(params, {"w": sj.lora(rank=1, alpha=3.0)}, key=key))
      >>> bank["w"].scale
      Array([0., 1., 0., 0., 0., 3., 0., 0.], dtype=float32)
    """
    banks = _banks(bank, slot)
    leaves = dict(leaves_with_paths(bank))
    parts = adapter_parts(map_with_paths(lambda path, leaf: original(leaf), bank), adapted, "the adapter")
    for path, part in parts.items():
        _check_room(path, part, leaves[path], banks)
    return _write(bank, slot, parts)


def remove(bank: Params, slot: int) -> Params:
    """Empties a slot of a bank: rows that name it get the plain base.

    Args:
      bank: a tree that `bank` made.
      slot: from 1.

    Returns:
      The bank.

    Raises:
      ValueError: there is no such slot.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> bank = sj.bank(params, [sj.adapt(params, {"w": sj.lora(rank=2)}, key=jax.random.key(0))])
      >>> float(jnp.abs(sj.banks.remove(bank, 1)["w"].a).max())
      0.0
    """
    _banks(bank, slot)
    return _write(bank, slot, {})


def take(bank: Params, slot: int) -> Params:
    """Returns one adapter of a bank as an ordinary adapted tree, at the bank's rank and size; to save it, for instance.

    Args:
      bank: a tree that `bank` made.
      slot: from 1.

    Returns:
      A tree with `LowRank` weights, in a `Magnitude` where the adapter is of DoRA, and with its modules. Leaves that
      the adapter leaves out are additions of zero, or the base where only modules of other adapters are.

    Raises:
      ValueError: there is no such slot.
      StructureError: the bank holds only the gains of DoRA, not the magnitudes that they came of.

    Example:
      >>> import jax, jax.numpy as jnp, subspace_jax as sj
      >>> params = {"w": jnp.ones((4, 3))}
      >>> bank = sj.bank(params, [sj.adapt(params, {"w": sj.lora(rank=2)}, key=jax.random.key(0))])
      >>> sj.banks.take(bank, 1)["w"].b.shape
      (2, 3)
    """
    _banks(bank, slot)
    return map_with_paths(lambda path, leaf: _taken(path, leaf, slot), bank)


def _taken(path: str, leaf: Any, slot: int) -> Any:
    """One slot of one leaf."""
    if isinstance(leaf, ModuleBank):
        return taken_module(leaf, slot) if bool(leaf.present[slot]) else _taken(path, leaf.base, slot)
    if not isinstance(leaf, AdapterBank):
        return leaf
    if isinstance(leaf.base, (ModuleBank, KeptInput)) and float(leaf.scale[slot]) == 0.0:
        return _taken(path, leaf.base, slot)
    return _low_rank(path, dataclasses.replace(leaf, base=original(leaf)), slot)


def _low_rank(path: str, held: AdapterBank, slot: int) -> Any:
    weight, depth = dataclasses.replace(held.one(slot), trainable=("a", "b"), method="lora"), len(held.role.stack_axes)
    if held.gain is not None and bool(jnp.any(jnp.take(held.gain, slot, axis=depth) != 1.0)):
        raise StructureError(
            f"{path}: slot {slot} is of DoRA, of which this bank for serving holds the gains "
            "alone. Keep the adapter that was put in, or make the bank with trainable=True."
        )
    if held.magnitude is None or held.has_magnitude is None or not bool(held.has_magnitude[slot]):
        return weight
    return Magnitude(
        direction=weight,
        magnitude=jnp.take(held.magnitude, slot, axis=depth),
        detach_norm=held.detach_norm,
        role=held.role,
        dtype=held.dtype,
        trainable=("magnitude",),
        method="dora(lora)",
    )


def _banks(bank: Params, slot: int) -> dict[str, AdapterBank | ModuleBank]:
    """The bank's leaves by path; refuses a slot that is not there."""
    found = {path: leaf for path, leaf in leaves_with_paths(bank) if isinstance(leaf, BANKS)}
    if not found:
        raise StructureError("The tree holds no bank of adapters; make one by sj.bank(params, adapters).")
    slots = next(iter(found.values())).slots
    slot = check_int("slot", slot, least=1)
    if slot >= slots:
        raise ValueError(f"slot {slot}: the bank has slots 1 to {slots - 1}, and the plain base in 0.")
    return found


def _check_room(path: str, part: Any, leaf: Any, banks: Mapping[str, Any]) -> None:
    """Refuses an adapter's part that no bank of the leaf can hold."""
    layers = list(layers_of(leaf))
    if isinstance(part, Part):
        room = any(isinstance(one, AdapterBank) for one in layers)
    elif isinstance(part, Module):
        room = any(isinstance(one, ModuleBank) and fits(one, part) for one in layers)
    else:
        room = any(type(one) is type(part) for one in layers)
    if room:
        return
    if path not in banks:
        raise StructureError(
            f"{path}: the adapter covers this leaf and no adapter of the bank did, so there is no room for it; the "
            f"bank has {nearest(path, banks)}. Make the bank with this adapter among the first."
        )
    raise StructureError(
        f"{path}: the adapter has a {type(part).__name__} here, and no adapter of the bank has had one of this kind. "
        "Make the bank with this adapter among the first."
    )


def _fitting(path: str, part: Part | None, held: AdapterBank) -> Part:
    """The part at the bank's rank, with gains and magnitudes as far as the bank has them."""
    depth = len(held.role.stack_axes)
    if part is None:
        a, b = (jnp.zeros_like(jnp.take(v, 0, axis=depth)) for v in (held.a, held.b))
        part = Part(a, b, jnp.zeros((), jnp.float32))
    if part.gain is not None and held.gain is None and held.magnitude is None:
        raise StructureError(
            f"{path}: the adapter is of DoRA, and the bank has no room for gains here. Make the bank with one of DoRA "
            "among its first adapters."
        )
    if held.magnitude is not None and not part.learns:
        raise StructureError(
            f"{path}: the adapter is no plain LoRA (or DoRA of one), so it cannot go on learning in a bank. Convert it "
            "by sj.to_lora, or make the bank without trainable=True."
        )
    ones = next((jnp.ones_like(jnp.take(v, 0, axis=depth)) for v in (held.gain, held.magnitude) if v is not None), None)
    gain, magnitude = (ones if v is None else v for v in (part.gain, part.magnitude))
    whole = dataclasses.replace(part, gain=gain, magnitude=magnitude)
    return padded(path, whole, held.rank, "the adapter")


def _write(bank: Params, slot: int, parts: Mapping[str, Any]) -> Params:
    """The bank with an adapter's parts in a slot; whatever the adapter leaves out is emptied."""
    return map_with_paths(lambda path, leaf: _written(path, leaf, slot, parts.get(path)), bank)


def _written(path: str, leaf: Any, slot: int, part: Any) -> Any:
    if isinstance(leaf, ModuleBank):
        mine = part if isinstance(part, Module) and fits(leaf, part) else None
        depth, slotwise, changed = len(leaf.role.stack_axes), alone(leaf.module), {}
        for name, value in fields_for(path, leaf, mine).items():
            axis = 0 if name in slotwise else depth
            changed[name] = _set(getattr(leaf.module, name), slot, value, axis)
        module = dataclasses.replace(leaf.module, **changed)
        present = _set(leaf.present, slot, mine is not None, 0)
        return dataclasses.replace(leaf, base=_written(path, leaf.base, slot, part), module=module, present=present)
    if not isinstance(leaf, AdapterBank):
        return leaf
    whole, depth = part, len(leaf.role.stack_axes)
    part = _fitting(path, part if isinstance(part, Part) else None, leaf)
    changed = {name: _set(getattr(leaf, name), slot, getattr(part, name), depth) for name in ("a", "b")}
    changed["scale"] = _set(leaf.scale, slot, part.scale, 0)
    for name in ("gain", "magnitude"):
        if getattr(leaf, name) is not None:
            changed[name] = _set(getattr(leaf, name), slot, getattr(part, name), depth)
    if leaf.has_magnitude is not None:
        changed["has_magnitude"] = _set(leaf.has_magnitude, slot, part.has_magnitude, 0)
    return dataclasses.replace(leaf, base=_written(path, leaf.base, slot, whole), **changed)


def _set(array: jax.Array, slot: int, value: Any, axis: int) -> jax.Array:
    return _set_at(array, jnp.asarray(slot, jnp.int32), jnp.asarray(value, array.dtype), axis)


@functools.partial(jax.jit, static_argnums=3)
def _set_at(array: jax.Array, slot: jax.Array, value: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(array, value, slot, axis)
