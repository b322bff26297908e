"""Modules on activations in a bank: those of one kind in one stack."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.banks._parts import pad
from subspace_jax.core import Full, StructureError, structure_names
from subspace_jax.modules import KeptInput, Module, ModuleBank, alone, with_slots
from subspace_jax.weights import AdapterBank

BANKS = (AdapterBank, ModuleBank)


def check_links(path: str, module: Module, adapter: Mapping[str, Any], what: str) -> None:
    """Refuses a module that reads what a bank does not hold: the bias of its layer, and fields of other modules.

    Args:
      path: of the kernel.
      module: the module.
      adapter: stand-ins of the adapter by path.
      what: which adapter this is, for errors.
    """
    for name, owner, _ in module.links:
        holder = adapter.get(owner)
        if not isinstance(holder, Module) and not (name == "bias" and isinstance(holder, Full)):
            raise StructureError(
                f"{path}: {what} reads {name!r} of the {type(holder).__name__} at {owner}, which no bank holds. "
                "A bank takes modules that read their layer's own bias, or other modules."
            )


def kept(path: str, base: Any, weights: list[Any]) -> Any:
    """Returns what stands below a leaf's banks: the array, or the array whose input is kept or whose values are read.

    Raises:
      StructureError: adapters keep the input under different names.
    """
    names = {w.writes for w in weights if isinstance(w, KeptInput)}
    if len(names) > 1:
        raise StructureError(
            f"{path}: adapters keep the input of this kernel under several names, {', '.join(sorted(names))}. Make "
            "all of them with rules on the same parameters."
        )
    sample = next(iter(weights), None)
    return base if sample is None else dataclasses.replace(sample, **{_kernel_of(sample): base}, trainable=())


def _kernel_of(weight: Any) -> str:
    return "value" if isinstance(weight, Full) else "base"


def layers_of(leaf: Any) -> Iterator[Any]:
    """Yields the banks of a leaf, outermost first, and what hands on its input or its values below them."""
    while isinstance(leaf, (*BANKS, KeptInput, Full)):
        yield leaf
        leaf = getattr(leaf, _kernel_of(leaf))


def original(leaf: Any) -> Any:
    """Returns the base of a bank's leaf: what all adapters were made on."""
    for layer in layers_of(leaf):
        leaf = getattr(layer, _kernel_of(layer))
    return leaf


def grouped(path: str, modules: Mapping[int, Module], trainable: bool) -> list[dict[int, Module]]:
    """Returns the modules of one kernel by kind, each by slot.

    Raises:
      StructureError: modules that share arrays with others are of several kinds.
    """
    groups: dict[Hashable, dict[int, Module]] = {}
    for slot, module in modules.items():
        groups.setdefault(kind_of(module, trainable), {})[slot] = module
    if len(groups) > 1 and any(_outside(m) for m in modules.values()):
        raise StructureError(
            f"{path}: adapters whose modules share arrays with one another ({modules[min(modules)].method}) must be "
            "made with the same options, but for what they hold in numbers. Make a bank of each kind."
        )
    return list(groups.values())


def kind_of(module: Module, trainable: bool) -> Hashable:
    """Returns what modules must have in common to lie in one stack: all but their numbers, dtypes and padded sizes."""
    left_out = {"links", "role", *(() if trainable else ("trainable",))}
    statics = tuple((n, getattr(module, n)) for n in structure_names(type(module))[0] if n not in left_out)
    shapes = tuple((n, _fixed_shape(module, n)) for n in fields_of(module))
    return type(module), statics, shapes, _outside(module), module.role.order, len(module.role.stack_axes)


def fields_of(module: Module) -> list[str]:
    """Names of the arrays that a bank holds of a module: neither the kernel, what is linked, nor keys of a step."""
    linked = {name for name, _, _ in module.links} | {"base", "bias"}
    arrays = ((n, v) for n, v in module.data_items() if n not in linked)
    return [n for n, v in arrays if not jnp.issubdtype(v.dtype, jax.dtypes.prng_key)]


def padded_axes(module: Module, name: str) -> list[int]:
    """Axes of a field that may be longer with zeros, counted from the end."""
    words = module.axes[name].split()
    return [i - len(words) for i, word in enumerate(words) if word in module.padded]


def _fixed_shape(module: Module, name: str) -> tuple[int, ...]:
    shape = getattr(module, name).shape
    longer = {i % len(shape) for i in padded_axes(module, name)} if shape else set()
    return tuple(-1 if i in longer else n for i, n in enumerate(shape))


def _outside(module: Module) -> tuple[Any, ...]:
    """Links to other modules, which lie in banks of their own."""
    return tuple(link for link in module.links if link[0] != "bias")


def stacked(
    path: str, base: Any, modules: Mapping[int, Module], slots: int, *, trainable: bool, size: int | None
) -> ModuleBank:
    """Returns the bank of modules of one kind on one kernel.

    Args:
      path: of the kernel.
      base: the kernel, or a weight that stands for it.
      modules: by slot.
      slots: number of slots.
      trainable: whether the modules go on learning.
      size: what their padded axes are padded to; the largest of theirs if None.
    """
    sample = next(iter(modules.values()))
    names, depth = fields_of(sample), len(sample.role.stack_axes)
    longest = {
        name: [max(getattr(m, name).shape[i] for m in modules.values()) for i in padded_axes(sample, name)]
        for name in names
    }
    fields = {}
    for name in names:
        sizes = longest[name] if size is None else [size] * len(longest[name])
        arrays = {i: _padded(path, m, name, sizes) for i, m in modules.items()}
        example = next(iter(arrays.values()))
        dtype = jnp.result_type(*(v.dtype for v in arrays.values()))
        missing = jnp.zeros_like(example) if name in sample.trainable else example
        rows = [jnp.asarray(arrays.get(i, missing), dtype) for i in range(slots)]
        fields[name] = jnp.stack(rows, axis=0 if name in alone(sample) else depth)
    empty = {name: None for name in sample.data_names() if name not in fields}
    module = dataclasses.replace(
        sample,
        **fields,
        **empty,
        role=with_slots(sample.role),
        trainable=sample.trainable if trainable else (),
        links=_outside(sample),
    )
    bias = tuple(link for link in sample.links if link[0] == "bias")
    present = jnp.asarray([i in modules for i in range(slots)])
    common: dict[str, Any] = {"role": sample.role, "dtype": sample.dtype, "trainable": (), "method": "bank"}
    common["learning"] = sample.trainable
    return ModuleBank(base=base, module=module, present=present, links=bias, **common)


def _padded(path: str, module: Module, name: str, sizes: list[int]) -> Any:
    """A field with zeros up to the given sizes of its padded axes."""
    array = getattr(module, name)
    for axis, size in zip(padded_axes(module, name), sizes, strict=True):
        if array.shape[axis] > size:
            raise StructureError(
                f"{path}: a module has {array.shape[axis]} hidden features, and the bank was made for {size}. Make "
                f"the bank with size={array.shape[axis]} or more."
            )
        array = pad(array, axis, size - array.shape[axis])
    return array


def fits(held: ModuleBank, module: Module) -> bool:
    """Tells whether a bank's modules are of a module's kind."""
    trainable, one = bool(held.module.trainable), jax.eval_shape(held.one, 0)
    one = dataclasses.replace(one, links=(*held.links, *held.module.links))
    return kind_of(one, trainable) == kind_of(module, trainable)


def fields_for(path: str, held: ModuleBank, module: Module | None) -> dict[str, Any]:
    """Returns what a slot of a bank holds of a module, by field; for none zeros in what learns.

    Raises:
      StructureError: it has more hidden features than the bank has room for.
    """
    depth, found = len(held.role.stack_axes), {}
    for name in fields_of(held.module):
        array = getattr(held.module, name)
        axis = 0 if name in alone(held.module) else depth
        if module is None and name in held.learning:
            found[name] = jnp.zeros_like(jnp.take(array, 0, axis=axis))
        if module is not None:
            found[name] = _padded(path, module, name, [array.shape[i] for i in padded_axes(module, name)])
    return found


def taken_module(held: ModuleBank, slot: int) -> Module:
    """Returns the module of one slot as an ordinary stand-in, which learns."""
    links = (*held.links, *held.module.links)
    unlinked = {name: None for name, _, _ in links}
    return dataclasses.replace(held.one(slot), base=original(held), trainable=held.learning, links=links, **unlinked)
