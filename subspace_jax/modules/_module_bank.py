"""A frozen kernel with several modules on activations, of which each row of a batch uses its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from subspace_jax.core import MaterializeError, Operation, Role, Weight, register_weight, static
from subspace_jax.modules._module import Module


@register_weight
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleBank(Weight):
    r"""A frozen kernel and the modules of all slots, one of which acts: that of the row.

    Modules of one kind lie in one weight, that of an array with one more stacked axis behind its own; those of another
    kind on the same kernel have a bank of their own, which is `base` here. In an empty slot all that learns is zero.

    Attributes:
      base: the kernel, or a weight that stands for it.
      module: the modules of all slots, with no kernel and no bias. Fields `[*stack, slot, ...]`, and `[slot, ...]` of
        those that one layer's do not differ from another's.
      present: which slots have a module here, bool `[slot]`.
      bias: what the model adds to the kernel's output, `[*stack, out]`, linked, where modules read it.
      row: the slot that acts, an int32 scalar, set by `per_row`.
      learning: names of the fields that learn in a module by itself.
    """

    base: jax.Array | Weight
    module: Module
    present: jax.Array
    bias: jax.Array | None = None
    row: jax.Array | None = None
    learning: tuple[str, ...] = static(default=(), remark=True)

    axes: ClassVar[Mapping[str, str]] = {"base": "array", "bias": "stack out", "present": "slot", "row": ""}
    mergeable: ClassVar[bool] = False
    uses_context: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return self.base.shape

    @property
    def slots(self) -> int:
        """The number of slots, the plain base in slot 0 included."""
        return self.present.shape[0]

    def with_key(self, key: jax.Array) -> ModuleBank:
        """Returns the bank for one training pass, with keys of its own for every slot."""
        base = self.base.with_key(key) if isinstance(self.base, Weight) else self.base
        return dataclasses.replace(self, base=base, module=self.module.with_key(key))

    def one(self, row: Any) -> Module:
        """Returns the module of one slot, on the kernel."""
        mapped, rebuild = self.module.split_stack(len(self.role.order))
        present = jnp.take(self.present, row)

        def pick(array: jax.Array) -> jax.Array:
            found = lax.dynamic_index_in_dim(array, row, keepdims=False)
            if not self.module.trainable or not jnp.issubdtype(found.dtype, jnp.inexact):
                return found
            return jnp.where(present, found, lax.stop_gradient(found))  # an empty slot learns nothing

        module = rebuild(jax.tree.map(pick, mapped))
        fields = {name: pick(getattr(module, name)) for name in alone(self.module)}
        linked = {} if self.bias is None else {"bias": self.bias}
        return dataclasses.replace(module, base=self.base, **fields, **linked)

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the kernel and the row's module give."""
        if self.row is None:
            raise MaterializeError(
                f"A bank of {self.slots} modules on a kernel of shape {self.shape} is used without saying which: run "
                "the model through sj.per_row(fn)(bank, rows, ...), or take one out by sj.banks.take(bank, slot)."
            )
        return self.one(self.row).contract(x, operation)

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Refuses: no array stands for a kernel with modules."""
        return dataclasses.replace(self.module, base=self.base).materialize(dtype)

    def permuted(self, permutation: tuple[int, ...]) -> ModuleBank | None:
        """Returns the bank of the kernel with its axes in another order."""
        return self._with_role_of(Weight.permuted(self._rest(), permutation))

    def reshape(self, shape: tuple[int, ...]) -> ModuleBank | None:
        """Returns the bank of the reshaped kernel, None where it would have to be formed."""
        return self._with_role_of(Weight.reshape(self._rest(), shape))

    def partition_specs(self, spec: PartitionSpec, *, exact: bool = False) -> Any:
        """Returns the bank with the partition spec of each array in its place; every device has all slots."""
        entries = (*spec, *(None,) * (len(self.role.order) - len(spec)))
        rest = Weight.partition_specs(self._rest(), spec, exact=exact)
        modules = self.module.partition_specs(PartitionSpec(*entries, None), exact=exact)
        fixed = {n: jax.tree.map(_behind, getattr(modules, n), is_leaf=_is_spec) for n in alone(self.module)}
        return dataclasses.replace(rest, module=dataclasses.replace(modules, **fixed))

    def _rest(self) -> Weight:
        return dataclasses.replace(self, module=None)  # pyright: ignore[reportArgumentType]

    def _with_role_of(self, rest: Any) -> ModuleBank | None:
        """The bank around a changed kernel: of the modules that changes what they stand for, and no array."""
        if rest is None or len(rest.role.stack_axes) != len(self.role.stack_axes):
            return None
        return dataclasses.replace(rest, module=dataclasses.replace(self.module, role=with_slots(rest.role)))


def with_slots(role: Role) -> Role:
    """Returns the role of all slots' modules together: one more stacked axis behind all others.

    Args:
      role: of the kernel.
    """
    return dataclasses.replace(role, stack_axes=(*role.stack_axes, len(role.order)))


def alone(module: Weight) -> list[str]:
    """Returns the names of the fields that all layers share; in a bank their first axis runs over slots.

    Args:
      module: one module, or those of all slots.
    """
    return [name for name, _ in module.data_items() if not {"stack", "array"} & set(module.axes[name].split())]


def _behind(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(None, *spec)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
