"""What all modules on activations have in common."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from subspace_jax.core import Operation, RoleError, Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module(Weight):
    """A frozen kernel with something on activations beside it or after it, so that no array stands for both.

    A subclass promises that a module adds exactly nothing where all that learns is zero, as in the empty slots of a
    bank. The class attribute `padded` names words of `axes` whose axes may be longer: zeros there change nothing.

    Attributes:
      base: the kernel.
    """

    base: jax.Array | Weight

    mergeable: ClassVar[bool] = False
    uses_context: ClassVar[bool] = True
    padded: ClassVar[tuple[str, ...]] = ()
    axes: ClassVar[Mapping[str, str]] = {"base": "array"}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return self.base.shape

    def contract_base(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the kernel alone."""
        return self.base.contract(x, operation) if isinstance(self.base, Weight) else operation.apply(x, self.base)

    @abc.abstractmethod
    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns what the kernel gives and the module adds."""

    def materialize(self, dtype: Any = None) -> jax.Array:
        """Refuses: what is added depends on the input.

        Raises:
          RoleError: always.
        """
        del dtype
        raise RoleError(
            f"A kernel of shape {self.shape} with a {type(self).__name__} is no array: the model uses it in another "
            "way than by a product with its inputs. Leave this leaf out of the rule."
        )
