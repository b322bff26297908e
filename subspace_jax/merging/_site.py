"""One leaf of the base and of all experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from subspace_jax.core import NonFiniteError, Role, Weight
from subspace_jax.merging._change import Change, Deferred, formed, read_change


@dataclasses.dataclass(frozen=True)
class Site:
    """One leaf of the base and what every expert has there.

    Attributes:
      path: of the leaf.
      base: the base's leaf.
      leaves: those of the experts, in their order.
      role: how the leaf is read as a matrix; None if it is not known to be one.
      first: number of the first expert, for messages.
    """

    path: str
    base: Any
    leaves: tuple[Any, ...]
    role: Role | None
    first: int = 0

    def only(self, expert: int) -> Site:
        """Returns the site with one expert alone."""
        return dataclasses.replace(self, leaves=(self.leaves[expert],), first=self.first + expert)

    def change(self, expert: int) -> Change:
        """Returns what one expert changes here.

        Raises:
          NonFiniteError: it holds NaN or infinity.
          StructureError: its adapter stands on other values than the base.
        """
        found = read_change(self.path, self.leaves[expert], self.base)
        self.check_finite(expert, found)
        return found

    def check_finite(self, expert: int, values: Any) -> None:
        """Refuses an expert whose values are not numbers; traced ones, which are not known, pass.

        Raises:
          NonFiniteError: they hold NaN or infinity.
        """
        arrays = jax.tree.leaves(values)
        finite = _finite(arrays) if arrays else True
        if not isinstance(finite, Tracer) and not bool(finite):
            raise NonFiniteError(
                f"{self.path}: expert {self.first + expert} differs from the base by NaN or infinity here. Its "
                "training diverged, or the file is damaged; leave this expert out."
            )

    def changes(self) -> list[Change]:
        """Returns what every expert changes here."""
        return [self.change(i) for i in range(len(self.leaves))]

    def arrays(self) -> list[jax.Array]:
        """Returns every change as an array of the leaf's shape, in at least float32."""
        return [self.array(i) for i in range(len(self.leaves))]

    def array(self, expert: int) -> jax.Array:
        """Returns one expert's change as an array of the leaf's shape, in at least float32."""
        return formed(self.change(expert), self.base)

    def weights(self) -> list[Weight]:
        """Returns the stand-in weights among the experts' leaves."""
        return weights_of(self.leaves)

    def matrices(self) -> list[jax.Array]:
        """Returns every change as `[*stack, in, out]`."""
        assert self.role is not None
        return [self.matrix_of(array) for array in self.arrays()]

    def matrix_of(self, array: jax.Array) -> jax.Array:
        """Returns an array of the leaf's shape as `[*stack, in, out]`."""
        return (Role.dense() if self.role is None else self.role).matrix(array)


def weights_of(leaves: Iterable[Any]) -> list[Weight]:
    """Returns the stand-in weights among leaves, or what deferred ones are made of."""
    found = (leaf.of if isinstance(leaf, Deferred) else leaf for leaf in leaves)
    return [leaf for leaf in found if isinstance(leaf, Weight)]


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(v).all() for v in arrays]))
