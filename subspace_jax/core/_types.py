"""Names for what the functions of this library take and return.

optax's own `Params`, `Updates` and `OptState` are containers of arrays and no more. Here a stand-in weight may be a
leaf of each, and functions read the fields of a state, so a checker of types would refuse what is right. `Schedule` and
`ScalarOrSchedule` are optax's own.

Example:
  >>> import subspace_jax as sj
  >>> def size(params: sj.core.Params) -> int:
  ...     return sum(sj.core.is_weight(leaf) for _, leaf in sj.core.leaves_with_paths(params))
"""

from __future__ import annotations

from typing import Any, TypeAlias

from optax import ScalarOrSchedule as ScalarOrSchedule
from optax import Schedule as Schedule

PyTree: TypeAlias = Any
"""A tree of JAX: containers whose leaves are arrays, stand-in weights, or None where a part is left out."""

Params: TypeAlias = PyTree
"""A model's parameters, plain or adapted: a tree of arrays and stand-in weights, and None at what does not learn."""

Updates: TypeAlias = PyTree
"""Gradients, or what is added to parameters: a tree of their structure, with stand-in weights where they have them."""

OptState: TypeAlias = PyTree
"""What an optimizer keeps between steps: named tuples whose fields are arrays, trees like the parameters, or states."""

Batch: TypeAlias = PyTree
"""What one step of training looks at: a tree of arrays, examples along the first axis of each."""

Scalar: TypeAlias = Any
"""A number where a weight is made, and an array without axes in the weight: a scale, say."""
