"""What is common to weights that store an array in fewer bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax

from subspace_jax.core import Operation

if TYPE_CHECKING:
    from subspace_jax.core import Weight as _Base
else:
    _Base = object


class Stored(_Base):
    """Mixin, in front of `Weight`, of weights that hold an array compressed and form it where it is used."""

    stored: ClassVar[bool] = True

    def contract(self, x: jax.Array, operation: Operation) -> jax.Array:
        """Returns the operation on the formed array, which the backward pass forms again instead of keeping it."""

        def use(x: jax.Array, weight: Any) -> jax.Array:
            return operation.apply(x, weight.materialize(operation.dtype))

        return jax.checkpoint(use)(x, self.with_frozen_stopped())
