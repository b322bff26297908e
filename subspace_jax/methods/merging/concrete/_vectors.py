"""Task vectors: what experts change of their base."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from subspace_jax.core import Params, map_with_paths
from subspace_jax.merging import Selector, sites


def task_vectors(experts: Sequence[Params], base: Params, *, select: Selector | None = None) -> list[Params]:
    r"""Returns \(\tau_i = \theta_i - \theta_0\) of every expert, in float32.

    All experts are in memory: their merged model is differentiated with respect to how they are mixed.

    Args:
      experts: trees of arrays or of stand-in weights.
      base: \(\theta_0\), the tree that they were trained from.
      select: which leaves; all that hold floating-point numbers if None. Heads of tasks are left out.

    Returns:
      Trees like `base`, with None for leaves that are left out.

    Raises:
      StructureError: an expert is of another tree.
      NonFiniteError: an expert holds NaN or infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> task_vectors([{"w": jnp.full(2, 3.0)}], {"w": jnp.ones(2)})[0]["w"].tolist()
      [2.0, 2.0]
    """
    found = {site.path: site.arrays() for site in sites(experts, base, select=select, least=1)}

    def vector(i: int) -> Params:
        return map_with_paths(lambda path, _: found[path][i].astype(jnp.float32) if path in found else None, base)

    return [vector(i) for i in range(len(experts))]
